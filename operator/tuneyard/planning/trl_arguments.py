"""The arguments of TRL's trainers that a job may set in `training.trl`, and why not the others."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tuneyard.api.compute import Compute
from tuneyard.api.training import Training
from tuneyard.errors import Fault
from tuneyard.planning.trl_fields import DISTILL, DPO, GRPO, KTO, REWARD, RLOO, SFT

OUTPUT = "Tuneyard writes checkpoints, curves, logs and the result: remove it"
DATA = "Tuneyard tokenizes, orders and batches the rows: remove it and see spec.data"
EVALUATION = "Tuneyard measures the held-out rows: remove it and set training.evaluationSteps"
LAYOUT = "Tuneyard lays models out over the workers: remove it and set spec.compute.sharding"
SAFETY = "no code and no file from elsewhere is loaded into a job: remove it"
MODEL = "Tuneyard loads the model: remove it and see spec.model and spec.adapter"
GRADIENTS = "Tuneyard decides how the workers share their gradients: remove it"
LIGER = "liger-kernel is in no image of Tuneyard, and TRL 2 drops this argument: remove it"
LOSS = "the held-out loss, which decides which checkpoint is kept, would be another one: remove it"
REFERENCE = "Tuneyard computes the reference before the first step: remove it"

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
    GRADIENTS: (
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        "ddp_static_graph",
    ),
    LIGER: ("use_liger_kernel", "liger_kernel_config"),
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


SFT_OWNED: Mapping[str, str] = {
    **OWNED,
    **dict.fromkeys(("loss_type", "label_smoothing_factor", "router_aux_loss_coef"), LOSS),
}

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
    **dict.fromkeys(("use_weighting", "discopop_tau", "router_aux_loss_coef"), LOSS),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), REFERENCE),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), REFERENCE),
}

KTO_OWNED: Mapping[str, str] = {
    **OWNED,
    "beta": "optimize.dpo.beta sets it: set that field, and remove it here",
    "loss_type": "optimize.dpo.loss sets it: set that field, and remove it here",
    "label_smoothing_factor": "KTO's loss does not use it: remove it",
    "disable_dropout": "training.dropout sets it: set that field, and remove it here",
    **dict.fromkeys(
        ("desirable_weight", "undesirable_weight"),
        "good and bad completions have equal total weight, and so in the held-out loss: remove it",
    ),
    "router_aux_loss_coef": LOSS,
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), REFERENCE),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), REFERENCE),
}

REWARD_OWNED: Mapping[str, str] = {
    **OWNED,
    "center_rewards_coefficient": "rewardModel.train.centering sets it: set that field, and remove "
    "it here",
    "label_smoothing_factor": "the loss of a reward model does not use it: remove it",
    "disable_dropout": "training.dropout sets it: set that field, and remove it here",
}


SAMPLING = (
    "the held-out reward is that of completions sampled as spec.optimize.{method}.sampling says: "
    "remove it and set sampling"
)
VLLM_VERSIONS = "TRL 1.16 takes vLLM 0.22 to 0.31, and Tuneyard pins 0.32"
VLLM = f"{VLLM_VERSIONS}: remove it, or set training.engine to native and sampling.engine to vllm"
ONLINE_REFERENCE = "the KL is measured from the model as the stage began: remove it"
ADAPTIVE = (
    "its coefficient would begin again with each attempt: remove it and set entropy_coef, which is "
    "constant"
)
TOOLS = "jobs have no tools: remove it"
NOISE = "it changes the completions, and not the held-out ones: remove it"


def _online_owned(method: str) -> Mapping[str, str]:
    """Return the reasons why a job may not set some arguments of GRPOConfig or RLOOConfig.
    `method`: grpo or rloo."""
    fields = {
        "beta": "klCoefficient",
        "epsilon": "clipRange",
        "num_generations": "groupSize",
        "temperature": "sampling.temperature",
        "top_p": "sampling.topP",
        "max_completion_length": "sampling.maxNewTokens",
        "generation_batch_size": "training.batchSize",
        "steps_per_generation": "training.batchSize",
        "cast_lm_head_to_fp32": "training.precision",
    }
    groups: Mapping[str, tuple[str, ...]] = {
        SAMPLING.format(method=method): (
            *("top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
            *("use_transformers_continuous_batching", "use_transformers_paged"),
            "transformers_continuous_batching_config",
        ),
        DATA: ("chat_template_kwargs", "pad_to_multiple_of"),
        EVALUATION: ("num_generations_eval",),
        OUTPUT: (
            *("log_completions", "log_multimodal", "log_unique_prompts"),
            *("num_completions_to_print", "log_completions_hub_repo"),
        ),
        LAYOUT: ("ds3_gather_for_generation",),
        ONLINE_REFERENCE: ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        ADAPTIVE: (
            *("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
            *("entropy_coef_delta", "entropy_target"),
        ),
        TOOLS: ("max_tool_calling_iterations",),
        "Tuneyard adds the rewards: remove it and set spec.rewardTerms": (
            *("reward_weights", "multi_objective_aggregation"),
        ),
        "dropout is off in this stage: remove it": ("disable_dropout",),
        f"{method}'s loss does not use it: remove it": ("label_smoothing_factor",),
        NOISE: ("neftune_noise_alpha",),
        VLLM: tuple(
            name for name in (*GRPO, *RLOO) if name == "use_vllm" or name.startswith("vllm_")
        ),
    }
    return {
        **OWNED,
        "router_aux_loss_coef": LOSS,
        **{
            name: f"optimize.{method}.{field} sets it: set that field, and remove it here"
            for name, field in fields.items()
        },
        **{name: reason for reason, names in groups.items() for name in names},
    }


SAMPLED = "optimize.distill.sampling sets it: set that field, and remove it here"
TEACHER = "Tuneyard loads the teacher: remove it and see optimize.distill.teacher"

DISTILL_OWNED: Mapping[str, str] = {
    **OWNED,
    "router_aux_loss_coef": LOSS,
    "beta": "optimize.distill.beta sets it: set that field, and remove it here",
    "label_smoothing_factor": "the loss of distillation does not use it: remove it",
    "disable_dropout": "training.dropout sets it: set that field, and remove it here",
    "use_cache": MODEL,
    "chat_template_kwargs": "prompts are rendered as in the other stages: remove it",
    "generation_kwargs": "its values would replace those of optimize.distill.sampling: set top_k, "
    "min_p or repetition_penalty in its place",
    "ds3_gather_for_generation": LAYOUT,
    "max_tool_calling_iterations": TOOLS,
    "neftune_noise_alpha": NOISE,
    **dict.fromkeys(("temperature", "top_p", "max_completion_length"), SAMPLED),
    **dict.fromkeys(
        ("teacher_model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision"),
        TEACHER,
    ),
    **dict.fromkeys(("log_completions", "log_unique_prompts", "num_completions_to_print"), OUTPUT),
    **{name: f"{VLLM_VERSIONS}: remove it" for name in DISTILL if "vllm" in name},
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


SFT_CONFIG = Config("SFTConfig", SFT, SFT_OWNED)
DPO_CONFIG = Config("DPOConfig", DPO, DPO_OWNED)
KTO_CONFIG = Config("KTOConfig", KTO, KTO_OWNED)
REWARD_CONFIG = Config("RewardConfig", REWARD, REWARD_OWNED)
ONLINE_CONFIGS: Mapping[str, Config] = {
    "grpo": Config("GRPOConfig", GRPO, _online_owned("grpo")),
    "rloo": Config("RLOOConfig", RLOO, _online_owned("rloo")),
}
"""The configs of the methods that sample completions."""
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
        elif problem := _value_problem(value):
            yield Fault(f"{path}.{name}", problem)
        elif not _is_of(config.fields[name].split(" | "), value):
            shown = reprlib.repr(value)
            yield Fault(f"{path}.{name}", f"{shown} is not of the type {config.fields[name]}")
        elif name in BOUNDS and not BOUNDS[name][0] <= value <= BOUNDS[name][1]:
            least, most = BOUNDS[name]
            yield Fault(f"{path}.{name}", f"{value} is not between {least} and {most}")


BOUNDS: Mapping[str, tuple[int, int]] = {"num_iterations": (1, 1000)}
"""The least and the greatest values of arguments that TRL does not check itself."""
USED_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("sapo",)),
    **dict.fromkeys(
        ("vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos"), ("vespo",)
    ),
    "delta": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"),
}
"""The losses of GRPOConfig that use an argument."""
ON_GPUS = ("tf32", "torch_empty_cache_steps", "activation_offloading")
"""Arguments that concern GPUs."""


def effect_faults(path: str, training: Training, compute: Compute) -> Iterator[Fault]:
    """Yield a fault for each argument that TRL would accept and not use, or use otherwise than the
    job's own fields say. `path`: the field `training`."""
    given = training.trl or {}
    if "activation_checkpointing_kwargs" in given and not training.gradient_checkpointing:
        yield Fault(
            f"{path}.trl.activation_checkpointing_kwargs",
            "has no effect without activation checkpointing: set training.gradientCheckpointing to "
            "true, or remove it",
        )
    loss = given.get("loss_type", "dapo")
    for name in sorted(given.keys() & USED_BY.keys()):
        if loss not in USED_BY[name]:
            yield Fault(
                f"{path}.trl.{name}",
                f"has no effect with loss_type {loss}: set loss_type to "
                f"{' or '.join(USED_BY[name])}, or remove it",
            )
    if loss == "cispo" and given.get("epsilon_high") is None:
        yield Fault(
            f"{path}.trl.loss_type",
            "cispo limits the ratio itself by epsilon_high, and not its distance from 1, so that "
            "clipRange would make every gradient smaller: set epsilon_high too, such as 5.0",
        )
    if compute.gpus_per_worker == 0:
        for name in sorted(given.keys() & set(ON_GPUS)):
            yield Fault(
                f"{path}.trl.{name}",
                "has no effect on a CPU, and compute.gpusPerWorker is 0: raise gpusPerWorker, or "
                "remove it",
            )


MOST_LEVELS = 4
"""The deepest nesting of a value."""
MOST_SIZE = 4096
"""The most characters and elements of a value. The configs take a handful of options."""
MOST_INTEGER = 1 << 63


def _value_problem(value: Any) -> str | None:
    """Return why a plan cannot hold a value; None: it can. No recursion: a value may be nested
    deeper than Python's stack."""
    pending, size = [(value, 0)], 0
    while pending:
        each, level = pending.pop()
        size += 1 + (len(each) if isinstance(each, str | list | Mapping) else 0)
        if level > MOST_LEVELS:
            return f"is nested deeper than {MOST_LEVELS} levels: shorten it"
        if size > MOST_SIZE:
            return f"has more than {MOST_SIZE} characters and elements: shorten it"
        if isinstance(each, Mapping):
            pending += [(part, level + 1) for pair in each.items() for part in pair]
            if odd := [key for key in each if not isinstance(key, str)]:
                return f"has the key {reprlib.repr(odd[0])}, which is no string: quote it"
        elif isinstance(each, list):
            pending += [(part, level + 1) for part in each]
        elif problem := _scalar_problem(each):
            return problem
    return None


def _scalar_problem(value: Any) -> str | None:
    shown = reprlib.repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{shown} is not finite: use a number"
    if isinstance(value, int) and abs(value) >= MOST_INTEGER:
        return f"{shown} is no 64-bit integer: use a smaller number"
    if value is None or isinstance(value, bool | int | float | str):
        return None
    return f"{shown} is of the type {type(value).__name__}, which JSON does not have: quote it"


def _is_of(kinds: list[str], value: Any) -> bool:
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    return any(kind in kinds and isinstance(value, of) for kind, of in _KINDS.items())
