"""The operator on a real API server, one namespace for each module."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chart.rendering import Chart
from tests.controller.scene import CRDS, OperatedScene, Scene, namespace, operated

if TYPE_CHECKING:
    from rig.plugin import Cluster


@pytest.fixture(scope="session")
def served(apiserver: Cluster) -> Cluster:
    """The API server with Tuneyard's CRDs."""
    apiserver.define(CRDS)
    return apiserver


@pytest.fixture(scope="module")
def new_scene(
    served: Cluster, helm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Scene]]:
    """Make namespaces without an operator, by a prefix of the name."""
    with ExitStack() as stack:

        def make(prefix: str) -> Scene:
            folder = tmp_path_factory.mktemp(prefix)
            return stack.enter_context(
                namespace(served, Chart(helm), f"{prefix}-{secrets.token_hex(2)}", folder)
            )

        yield make


@pytest.fixture(scope="module")
def module_scene(
    request: pytest.FixtureRequest,
    new_scene: Callable[[str], Scene],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatedScene]:
    """The module's namespace, its operator and the operator's proxy to the API server."""
    name = request.module.__name__.rpartition("test_")[2].replace("_", "-")
    folder = tmp_path_factory.mktemp(name)
    with operated(new_scene(name), folder) as running:
        yield running


@pytest.fixture
def scene(module_scene: OperatedScene) -> Iterator[OperatedScene]:
    """The module's scene, with a running operator and no faults."""
    if not module_scene.operator.is_alive:
        module_scene.operator.start()
        module_scene.operator.wait_until_active()
    yield module_scene
    module_scene.proxy.heal()
