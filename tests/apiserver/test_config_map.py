"""Kubernetes' limit on the size of a ConfigMap is the one that plans are measured with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tuneyard.rendering.plan_file import MOST_BYTES

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver


@pytest.mark.parametrize(("size", "accepted"), [(MOST_BYTES, True), (MOST_BYTES + 1, False)])
def test_a_config_map_holds_exactly_the_bytes_that_a_plan_may_have(
    apiserver: Cluster, size: int, accepted: bool
) -> None:
    item = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"size-{size}"},
        "data": {"plan.json": "p" * size},
    }
    create = ("create", "--dry-run=server", "--filename=-")
    done = apiserver.kubectl(*create, input=json.dumps(item), check=False)
    assert (done.returncode == 0) is accepted, done.stderr[-500:]
