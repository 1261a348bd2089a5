"""The operator as a process on a real API server: its start and its end."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.controller.running import Operator

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

CRDS = Path(__file__).parents[2] / "crds"


def holder(cluster: Cluster, lease: str) -> str | None:
    """Return the holder of the Lease; None: no replica holds it."""
    found = cluster.kubectl("get", "lease", lease, "-o", "json")
    name: str | None = json.loads(found.stdout)["spec"].get("holderIdentity")
    return name or None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_signal_ends_the_operator_and_releases_the_lease(
    apiserver: Cluster, tmp_path: Path, number: signal.Signals
) -> None:
    """kopf replaces the signal handlers at its start; the operator must still get the signals."""
    apiserver.define(CRDS)
    lease = f"ends-{number.name.lower()}"
    with Operator(apiserver.kubeconfig, tmp_path, lease=lease) as operator:
        operator.wait_until_active()
        assert holder(apiserver, lease) == "one"
        time.sleep(3)  # kopf starts after the Lease is acquired
        assert operator.end(number) == 0
        assert "lost" not in operator.log
    assert holder(apiserver, lease) is None
