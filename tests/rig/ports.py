"""Free ports on 127.0.0.1 that no two rigs choose at the same moment."""

from __future__ import annotations

import random
import socket
from typing import Self

# Below the kernel's range for outgoing connections, whose ports come and go at any time.
CANDIDATES = range(20_000, 32_000)


class Reservation:
    """Ports that belong to this process, and to those that inherit the claims.

    A free port stays free only until somebody binds it, and the servers bind theirs seconds later.
    So each number is also claimed as an abstract socket name: other rigs on this machine look
    there, and the kernel gives the name back when its last holder dies.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go here; a process that inherited the claims goes on holding them."""
        for claim in self._claims:
            claim.close()

    @property
    def descriptors(self) -> list[int]:
        """To be inherited by the process that the ports are for."""
        return [claim.fileno() for claim in self._claims]

    def take(self) -> int:
        for port in random.sample(CANDIDATES, len(CANDIDATES)):
            claim = _claim(port)
            if claim is not None:
                self._claims.append(claim)
                return port
        raise OSError("every port that a rig may use is taken")


def _claim(port: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0tuneyard-rig/port/{port}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        claim.close()
        return None
    return claim
