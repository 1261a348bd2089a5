"""Reserve free ports on 127.0.0.1, so that no two rigs choose the same one."""

from __future__ import annotations

import random
import socket
from typing import Self

# Below the kernel's range for outgoing connections, which take ports at any time.
CANDIDATES = range(20_000, 32_000)


class Reservation:
    """Ports that are reserved for this process and the processes that inherit the claims.

    The servers bind their ports seconds after a free port is found. Each port is therefore also
    claimed as an abstract socket name, which other rigs on this machine check. The kernel releases
    the name when the last process that holds it ends.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the claims in this process; processes that inherited the claims keep them."""
        for claim in self._claims:
            claim.close()

    @property
    def descriptors(self) -> list[int]:
        """The claims, for a process that inherits them."""
        return [claim.fileno() for claim in self._claims]

    def take(self) -> int:
        """Reserve a port and return it; raise OSError if none is free."""
        for port in random.sample(CANDIDATES, len(CANDIDATES)):
            claim = _claim(port)
            if claim is not None:
                self._claims.append(claim)
                return port
        raise OSError(f"no port from {CANDIDATES.start} to {CANDIDATES.stop - 1} is free")


def _claim(port: int) -> socket.socket | None:
    """Return the socket that claims the port; None if the port is claimed or in use."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0tuneyard-rig/port/{port}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        claim.close()
        return None
    return claim
