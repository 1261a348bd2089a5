"""The worker group as Ray Train runs it. The driver imports this module while its Ray starts.

Ray's own TorchTrainer imports torch in the driver and in its controller process, each time for 3 s
of processor time. Here both import torch only for a group that needs a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

NEVER_SECONDS = 1e9
"""The interval of resizing, so long that a running group never grows: Ray would restart it, and it
would repeat steps. The next attempt grows instead."""


def trainer(
    function: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int | tuple[int, int],
    each: Mapping[str, float],
    name: str,
    storage: str,
    max_failures: int,
) -> DataParallelTrainer:
    """Return the trainer whose `fit` calls `function(config)` in every worker.

    `workers`: their number, or the least and the most of an elastic group. `each`: the resources of
    a worker. `storage`: the folder or URI of Ray Train's own files. `max_failures`: how often Ray
    restarts the group after a failure of a worker.
    """
    failures: dict[str, Any] = {"max_failures": max_failures, "max_preemption_failures": 0}
    scaling: dict[str, Any] = {
        "num_workers": workers,
        "use_gpu": each.get("GPU", 0) > 0,
        "resources_per_worker": dict(each),
        "elastic_resize_monitor_interval_s": NEVER_SECONDS,
    }
    return DataParallelTrainer(
        function,
        train_loop_config=config,
        backend_config=ProcessGroupConfig(),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name, storage_path=storage, failure_config=FailureConfig(**failures)
        ),
    )


class ProcessGroupBackend(Backend):
    """Ray's backend for torch if the group has several workers; otherwise it does nothing."""

    share_cuda_visible_devices = True  # as in Ray's

    def on_start(
        self,
        worker_group: Any,
        backend_config: BackendConfig,  # noqa: ARG002 - Ray's signature
    ) -> None:
        """Initialize torch.distributed in the workers."""
        if len(worker_group) > 1:
            config = _torch_config()
            config.backend_cls().on_start(worker_group, config)

    def on_training_start(
        self,
        worker_group: Any,
        backend_config: BackendConfig,  # noqa: ARG002 - Ray's signature
    ) -> None:
        """Set torchrun's environment variables in the workers."""
        if len(worker_group) > 1:
            config = _torch_config()
            config.backend_cls().on_training_start(worker_group, config)

    def on_shutdown(
        self,
        worker_group: Any,
        backend_config: BackendConfig,  # noqa: ARG002 - Ray's signature
    ) -> None:
        """Destroy the process group."""
        if len(worker_group) > 1:
            config = _torch_config()
            config.backend_cls().on_shutdown(worker_group, config)


class ProcessGroupConfig(BackendConfig):
    """Selects ProcessGroupBackend."""

    @property
    def backend_cls(self) -> type[ProcessGroupBackend]:
        """The backend."""
        return ProcessGroupBackend


def _torch_config() -> TorchConfig:
    from ray.train.torch import TorchConfig

    return TorchConfig()
