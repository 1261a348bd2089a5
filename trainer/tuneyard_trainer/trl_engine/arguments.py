"""The platform's part of a trainer's config: what no job may set another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from datasets import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from tuneyard.api.stage_settings import LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer.machine import same_environment
from tuneyard_trainer.models.base import precision_of, quiet
from tuneyard_trainer.models.environment import described
from tuneyard_trainer.models.files import first_line
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.trl_engine.batches import Layout
from tuneyard_trainer.trl_engine.following import Following
from tuneyard_trainer.worker import Interrupted, StageContext, is_host_memory, is_lost_peer


def platform_arguments(
    context: StageContext, settings: LoopSettings, layout: Layout, *, steps: int
) -> dict[str, Any]:
    """Return the arguments of transformers' TrainingArguments that the platform decides.

    `steps`: the steps of this attempt. The trainer writes nothing: checkpoints, curves and reports
    are ours. Its filter of NaN losses is off, since it would hide what ends a run here.
    """
    worker, optimizer = context.worker, settings.optimizer
    precision = precision_of(settings, worker)
    limit = optimizer.max_gradient_norm
    return {
        "output_dir": str(context.workdir / "unused"),
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "max_steps": steps,
        "per_device_train_batch_size": layout.rows,
        "gradient_accumulation_steps": layout.accumulated,
        # 0, the trainer's way to say none, would also leave the norm out of its logs.
        "max_grad_norm": math.inf if limit is None else limit,
        "learning_rate": settings.learning_rate,
        "activation_checkpointing": context.stage.runtime.gradient_checkpointing,
        "bf16": precision is torch.bfloat16,
        "fp16": False,
        "use_cpu": worker.device.type == "cpu",
        "seed": settings.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
    }


def another(model: Any) -> Any:
    """Return another object that is the same model, to be given as the reference: without one, TRL
    would load a second model or add an adapter. `copy` does not make one of a sharded model."""
    made = object.__new__(type(model))
    vars(made).update(vars(model))
    return made


CONFIGS = ("config", "generation_config")


@contextmanager
def training(following: Following, device: torch.device) -> Iterator[None]:
    """While active, TRL's trainer is made and trains the model of `following`, without progress
    bars. Its errors about arguments of the job become StageErrors. Afterwards the model has the
    configs that it had before: TRL and transformers write the tokenizer's special tokens and
    their own settings into them."""
    course, first = following.course, following.state.step
    model = base_of(course.model)
    kept = {name: deepcopy(getattr(model, name)) for name in CONFIGS if hasattr(model, name)}
    refusals = explained(course.settings.trl, has_begun=lambda: following.state.step > first)
    try:
        with described(device), quiet(), _no_bars_of_datasets(), same_process(), refusals:
            yield
    finally:
        for name, config in kept.items():
            setattr(model, name, config)


DETERMINISM = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"),
    *("ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
)
"""The variables that transformers sets for `full_determinism`."""


@contextmanager
def same_process() -> Iterator[None]:
    """Restore afterwards what arguments of TRL set for the whole process, in which later stages
    run: deterministic algorithms (`full_determinism`) and TF32 (`tf32`, `torch_compile`)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        fp32: str = torch.backends.fp32_precision  # type: ignore[attr-defined]  # set by a class
        with same_environment(DETERMINISM), torch.backends.flags(fp32_precision=fp32):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


@contextmanager
def explained(
    given: Mapping[str, Any] | None, has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Convert TRL's errors about arguments of the job to StageErrors. `given`: None: there are
    none. `has_begun`: whether a step was taken; later errors have other causes."""
    try:
        yield
    except Exception as error:  # torch's compiler, for example, has classes of its own
        if not given or has_begun() or not _is_refusal(error):
            raise
        raise StageError(
            "TrlRefused",
            f"TRL's trainer did not take a step with the job's arguments "
            f"({', '.join(sorted(given))}): {first_line(error)}.",
            advice="Change or remove the argument in training.trl.",
        ) from error


def _is_refusal(error: Exception) -> bool:
    """Return whether an error may come from an argument: it has no other cause that is known."""
    known = (StageError, Interrupted, OSError, torch.OutOfMemoryError, dist.DistError)
    return not (isinstance(error, known) or is_lost_peer(error) or is_host_memory(error))


@contextmanager
def _no_bars_of_datasets() -> Iterator[None]:
    """While active, `datasets` shows no progress bars."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
