"""The arguments of TRL's trainers that a job may set in `training.trl`, and why not the others."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tuneyard.errors import Fault
from tuneyard.planning.trl_fields import DISTILL, DPO, SFT

OUTPUT = "Tuneyard writes checkpoints, curves, logs and the result: remove it"
DATA = "Tuneyard tokenizes, orders and batches the rows: remove it and see spec.data"
EVALUATION = "Tuneyard measures the held-out rows: remove it and set training.evaluationSteps"
LAYOUT = "Tuneyard lays models out over the workers: remove it and set spec.compute.sharding"
SAFETY = "no code and no file from elsewhere is loaded into a job: remove it"
MODEL = "Tuneyard loads the model: remove it and see spec.model and spec.adapter"

FIELDS: Mapping[str, str] = {
    "per_device_train_batch_size": "training.microBatchTokens",
    "gradient_accumulation_steps": "training.batchSize",
    "auto_find_batch_size": "training.microBatchTokens",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.maxSteps",
    "learning_rate": "training.learningRate",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler_kwargs": "training.schedule",
    "warmup_steps": "training.schedule.warmup",
    "optim": "training.optimizer",
    "optim_args": "training.optimizer",
    "optim_target_modules": "training.optimizer",
    "weight_decay": "training.optimizer.weightDecay",
    "adam_beta1": "training.optimizer.beta1",
    "adam_beta2": "training.optimizer.beta2",
    "adam_epsilon": "training.optimizer.epsilon",
    "max_grad_norm": "training.optimizer.maxGradientNorm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "activation_checkpointing": "training.gradientCheckpointing",
    "gradient_checkpointing": "training.gradientCheckpointing",
    "gradient_checkpointing_kwargs": "training.trl.activation_checkpointing_kwargs",
    "metric_for_best_model": "training.keepBest",
    "greater_is_better": "training.keepBest",
    "load_best_model_at_end": "training.keepBest",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "use_cpu": "compute.gpusPerWorker",
    "max_length": "data.maxLength",
    "truncation_mode": "data.onOverlength",
    "packing": "data.packing",
    "chat_template_path": "data.chatTemplate",
    "assistant_only_loss": "data.trainOn",
    "completion_only_loss": "data.trainOn",
}
"""Arguments that a field of the manifest sets."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    OUTPUT: (
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"),
        *("logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "save_only_model", "save_strategy", "save_steps"),
        *("save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub"),
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "skip_memory_metrics"),
    ),
    DATA: (
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
        *("dataloader_multiprocessing_context", "remove_unused_columns", "label_names"),
        *("train_sampling_strategy", "length_column_name", "dataset_text_field"),
        *("dataset_kwargs", "dataset_num_proc", "eos_token", "pad_token", "shuffle_dataset"),
        *("packing_strategy", "padding_free", "pad_to_multiple_of", "ignore_data_skip"),
        "average_tokens_across_devices",
    ),
    EVALUATION: (
        *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay"),
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_on_start"),
        *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "eval_packing"),
        *("bf16_full_eval", "fp16_full_eval"),
    ),
    LAYOUT: (
        *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config"),
        *("local_rank", "ddp_backend", "ddp_timeout"),
    ),
    SAFETY: (
        *("trust_remote_code", "resume_from_checkpoint"),
        "restore_callback_states_from_checkpoint",
    ),
    MODEL: ("model_init_kwargs", "use_cache"),
}
"""Arguments that a job may not set, by the reason."""

OWNED: Mapping[str, str] = {
    **{
        name: f"{field} sets it: set that field, and remove it here"
        for name, field in FIELDS.items()
    },
    **{name: reason for reason, names in GROUPS.items() for name in names},
}

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "list": list,
    "dict": dict,
}


LOSS = "the held-out loss, which decides which checkpoint is kept, would be another one: remove it"
REFERENCE = "Tuneyard computes the reference before the first step: remove it"

DPO_OWNED: Mapping[str, str] = {
    **OWNED,
    "beta": "optimize.dpo.beta sets it: set that field, and remove it here",
    "loss_type": "optimize.dpo.loss sets it: set that field, and remove it here",
    "label_smoothing": "optimize.dpo.labelSmoothing sets it: set that field, and remove it here",
    "label_smoothing_factor": "DPO's loss does not use it: remove it",
    "disable_dropout": "training.dropout sets it: set that field, and remove it here",
    **dict.fromkeys(
        ("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"), LOSS
    ),
    **dict.fromkeys(("use_weighting", "discopop_tau"), LOSS),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), REFERENCE),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), REFERENCE),
}


SAMPLED = "optimize.distill.sampling sets it: set that field, and remove it here"
TEACHER = "Tuneyard loads the teacher: remove it and see optimize.distill.teacher"
OLD_VLLM = "TRL 1.16 takes vLLM 0.22 to 0.31, and the trainer image has a newer one: remove it"
NO_TOOLS = "no code of a job is run: remove it"

DISTILL_OWNED: Mapping[str, str] = {
    **OWNED,
    "beta": "optimize.distill.beta sets it: set that field, and remove it here",
    "label_smoothing_factor": "the loss of distillation does not use it: remove it",
    "disable_dropout": "training.dropout sets it: set that field, and remove it here",
    "use_cache": MODEL,
    "chat_template_kwargs": "prompts are rendered as in the other stages: remove it",
    "generation_kwargs": "its values would replace those of optimize.distill.sampling: set top_k, "
    "min_p or repetition_penalty in its place",
    "ds3_gather_for_generation": LAYOUT,
    "max_tool_calling_iterations": NO_TOOLS,
    **dict.fromkeys(("temperature", "top_p", "max_completion_length"), SAMPLED),
    **dict.fromkeys(
        ("teacher_model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision"),
        TEACHER,
    ),
    **dict.fromkeys(("log_completions", "log_unique_prompts", "num_completions_to_print"), OUTPUT),
    **{name: OLD_VLLM for name in DISTILL if "vllm" in name},
}


class Config(NamedTuple):
    """The config of one of TRL's trainers."""

    name: str
    fields: Mapping[str, str]
    """The types of its arguments, by name."""
    owned: Mapping[str, str]
    """The reasons why a job may not set some arguments, by name."""

    @property
    def free(self) -> list[str]:
        """The arguments that a job may set, sorted."""
        return sorted(self.fields.keys() - self.owned.keys())


SFT_CONFIG = Config("SFTConfig", SFT, OWNED)
DPO_CONFIG = Config("DPOConfig", DPO, DPO_OWNED)
DISTILL_CONFIG = Config("DistillationConfig", DISTILL, DISTILL_OWNED)


def argument_faults(
    path: str, config: Config, arguments: Mapping[str, Any] | None
) -> Iterator[Fault]:
    """Yield a fault for each argument that is unknown, that Tuneyard sets, or whose value has the
    wrong type. `path`: the field that holds the arguments. `arguments`: None: there are none."""
    for name, value in sorted((arguments or {}).items()):
        if name not in config.fields:
            close = difflib.get_close_matches(name, config.free, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see TRL's documentation"
            yield Fault(f"{path}.{name}", f"is no argument of TRL's {config.name}: {hint}")
        elif name in config.owned:
            yield Fault(f"{path}.{name}", config.owned[name])
        elif not _is_of(config.fields[name].split(" | "), value):
            yield Fault(f"{path}.{name}", f"{value!r} is not of the type {config.fields[name]}")


def _is_of(kinds: list[str], value: Any) -> bool:
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return any(kind in kinds and isinstance(value, of) for kind, of in _KINDS.items())
