"""The operator as a process, on a real API server: it starts, and it ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

OPERATOR = "from tuneyard.cli import main; main()"


def wait_until(condition: Callable[[], object], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def holder(cluster: Cluster, lease: str) -> str | None:
    """Who holds the Lease; None: nobody."""
    found = cluster.kubectl("get", "lease", lease, "-o", "json", check=False)
    if found.returncode:
        return None
    name: str | None = json.loads(found.stdout)["spec"].get("holderIdentity")
    return name or None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_signal_ends_the_operator_in_good_order_and_gives_the_lease_back(
    apiserver: Cluster, tmp_path: Path, number: signal.Signals
) -> None:
    """kopf takes the signals for itself when it starts: what runs beside it must hear them too."""
    apiserver.kubectl(
        "apply", "--server-side", "--filename", str(Path(__file__).parents[2] / "crds")
    )
    lease = f"ends-{number.name.lower()}"
    arguments = ["operator", "--lease", lease, "--identity", "one", "--metrics-port", "0"]
    with (tmp_path / "log").open("w+") as log:
        operator = subprocess.Popen(
            [sys.executable, "-c", OPERATOR, *arguments],
            env={**os.environ, "KUBECONFIG": str(apiserver.kubeconfig)},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: holder(apiserver, lease) == "one" or operator.poll() is not None)
            time.sleep(3)  # kopf starts after the Lease is won
            operator.send_signal(number)
            assert operator.wait(30) == 0
        finally:
            operator.kill()
            operator.wait()
        log.seek(0)
        assert "ERROR" not in log.read()
    assert holder(apiserver, lease) is None
