"""Faults of valid manifests: settings that contradict each other or that cannot be run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import Dpo, GroupRelative, RewardModel, WeightedReward
from tuneyard.api.alignmentjob import AlignmentSpec
from tuneyard.api.answer_metrics import MEASURED_BY, OF_ALL_ANSWERS
from tuneyard.api.compute import MIN_SHARDS, Compute
from tuneyard.api.evaluation import (
    PAIRED_METRICS,
    AlignmentMetric,
    Evaluate,
    Gate,
    Metric,
)
from tuneyard.api.finetunejob import FineTuneSpec
from tuneyard.api.sources import DataFormat, FineTuneData
from tuneyard.api.training import FineTuning, Training
from tuneyard.errors import Fault
from tuneyard.planning import defaults
from tuneyard.planning.augmentation import augmentation_faults, runs_a_model
from tuneyard.planning.defenses import defense_faults, measured_faults
from tuneyard.planning.drafts import Sharding
from tuneyard.planning.suites import (
    is_counted,
    is_paired,
    pattern_faults,
    suite_faults,
    unknown_suite_metric,
    whole_metric_remedy,
)
from tuneyard.planning.trl_arguments import (
    DISTILL_CONFIG,
    DPO_CONFIG,
    KTO_CONFIG,
    ONLINE_CONFIGS,
    REWARD_CONFIG,
    SFT_CONFIG,
    VLLM,
    VLLM_VERSIONS,
    argument_faults,
    effect_faults,
)

IN_VLLM = ("lora", "ia3", None)
"""Adapters with which vLLM can sample, None for full fine-tuning: they can be written as plain
weights, unlike a 4-bit base model, virtual tokens and bottlenecks."""
EVALUATED_IN_VLLM = (*IN_VLLM, "qlora")
"""Adapters with which vLLM can answer in an evaluation, for which the base is not quantized."""

PREFERENCE_FORMATS: tuple[DataFormat, ...] = (
    "auto",
    "feedback",
    "preference",
    "ranking",
    "labeled",
    "openassistant",
)
"""Formats of data sets of preferences."""

BY_TRL = (
    "spec.sft.training",
    "spec.rewardModel.train.training",
    "spec.optimize.dpo.training",
    "spec.optimize.grpo.training",
    "spec.optimize.rloo.training",
    "spec.optimize.distill.training",
)
"""The training loops of an alignment that TRL's trainers can take."""

SHARDED = ("dpo", "grpo", "rloo")
"""The methods of an alignment whose policy the workers can share."""

NEEDS_WHOLE_MODEL = (
    "needs a whole model on each worker, and compute.sharding is fsdp: remove it, or remove "
    "sharding"
)

WIN_RATES = ("winRate", "lengthControlledWinRate")
"""The metrics that a judge of `evaluate.winRate` measures."""

WITHOUT_ITEMS = (
    *("lengthRatio", "distinctRatio", *sorted(OF_ALL_ANSWERS)),
    *("kl", "preferenceMargin", "rewardMargin", "sycophancyShift"),
)
"""Metrics of all completions together, and means whose evidence has no items."""

WITH_VIRTUAL_TOKENS = ("prompt", "prefix")
"""Adapters that put trained tokens before the input."""


def fine_tuning_faults(spec: FineTuneSpec) -> list[Fault]:
    """Return the faults of a fine-tuning."""
    faults = [
        *_engine_faults(spec),
        *_sharding_faults(spec),
        *_evaluation_engine_faults(spec.evaluate, spec.adapter, [("spec.training", spec.training)]),
        *_unused_evaluation_engine(
            spec.evaluate,
            asks=spec.method == "sft" and spec.data.validation is not None,
            remedy="hold out questions with data.validation",
        ),
        *suite_faults(spec.evaluate.suites),
        *_win_rate_faults(spec),
        *_answer_faults(spec),
        *_gap_faults(spec.data, "spec.data", spec.method),
        *_document_faults(spec.data, "spec.data"),
        *augmentation_faults(spec.data, "spec.data", shared=spec.compute.sharding == "fsdp"),
        *defense_faults("spec.training", spec.training, spec.adapter, spec.data, "spec.data"),
        *measured_faults(
            "spec.training",
            spec.training,
            "fineTuning",
            spec.evaluate,
            has_guard=spec.training.guard is not None,
        ),
    ]
    for path, gate in _gates(spec.evaluate):
        compared = spec.evaluate.compare_with_base
        problem = _unknown_metric(gate, get_args(Metric), spec.evaluate, compared)
        problem = problem or _unmeasured_fine_tuning(gate, spec)
        if problem:
            faults.append(Fault(f"{path}.metric", problem))
        else:
            with_base = spec.evaluate.compare_with_base
            faults += _evidence_faults(path, gate, get_args(Metric), with_base=with_base)
    return faults


def _gap_faults(
    data: FineTuneData, path: str, method: Literal["sft", "pretrain"]
) -> Iterator[Fault]:
    """Yield the fault of gaps in data that has no documents."""
    if data.fill_in_the_middle and method != "pretrain":
        remedy = "set method: pretrain, or remove it"
        if path != "spec.data":
            remedy = "remove it, or run a FineTuneJob with method: pretrain before"
        yield Fault(
            f"{path}.fillInTheMiddle",
            f"is for documents, and this step trains on answers: {remedy}",
        )


def can_shard(adapter: Adapter | None) -> bool:
    """Return whether a model can be sharded while this is trained: None, all of its weights."""
    return adapter is None or (adapter.lora is not None and not adapter.lora.decomposed)


def alignment_faults(spec: AlignmentSpec) -> list[Fault]:
    """Return the faults of an alignment."""
    faults = [
        *_preference_faults(spec),
        *_unused_step_faults(spec),
        *_stopping_faults(spec),
        *_reinforcement_faults(spec),
        *_independence_faults(spec),
        *_distillation_faults(spec),
        *_evaluation_engine_faults(spec.evaluate, spec.adapter, _trainings(spec)),
        *_unused_evaluation_engine(
            spec.evaluate,
            asks=_may_ask(spec),
            remedy="hold out rows with sft.data.validation, or pairs with preferences.heldOut",
        ),
        *suite_faults(spec.evaluate.suites),
        *_suites_of_rewards(spec),
        *_unanswered(spec),
        *_alignment_engine_faults(spec),
        *(_gap_faults(spec.sft.data, "spec.sft.data", "sft") if spec.sft else ()),
        *(_document_faults(spec.sft.data, "spec.sft.data") if spec.sft else ()),
        *(augmentation_faults(spec.sft.data, "spec.sft.data", shared=False) if spec.sft else ()),
        *_checkpoint_faults(spec),
    ]
    aligned = spec.optimize or (spec.reward_model and spec.reward_model.train)
    known = get_args(AlignmentMetric if aligned else Metric)
    with_base = bool(aligned) or spec.evaluate.compare_with_base
    for path, gate in _gates(spec.evaluate):
        problem = _unknown_metric(gate, known, spec.evaluate, compared=with_base)
        if problem is None and aligned:
            problem = _unmeasured_alignment(gate, spec)
        elif problem is None:
            problem = _unmeasured_steps(gate, spec) or _unnamed_metric(gate.metric, spec.evaluate)
        if problem:
            faults.append(Fault(f"{path}.metric", problem))
        else:
            faults += _evidence_faults(path, gate, known, with_base=with_base)
    return faults


def _checkpoint_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the faults of defenses against forgetting, and of metrics that choose a checkpoint."""
    sft = spec.sft
    if sft:
        path = "spec.sft.training"
        yield from defense_faults(path, sft.training, spec.adapter, sft.data, "spec.sft.data")
    for path, training in _trainings(spec):
        method = path.split(".")[-2]
        if path == "spec.rewardModel.train.training":
            method = "reward"
        elif spec.optimize and spec.optimize.dpo and method == "dpo":
            method = "kto" if spec.optimize.dpo.loss == "kto" else "dpo"
        elif path in ("spec.sft.training", "spec.constitution.training"):
            method = "fineTuning"
        has_guard = isinstance(training, FineTuning) and training.guard is not None
        yield from measured_faults(path, training, method, spec.evaluate, has_guard=has_guard)


def _preference_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    for index, dataset in enumerate((spec.preferences and spec.preferences.data) or []):
        if dataset.format not in PREFERENCE_FORMATS:
            yield Fault(
                f"spec.preferences.data[{index}].format",
                f"{dataset.format} is a format of fine-tuning data: remove format, or set one of "
                f"{', '.join(PREFERENCE_FORMATS[1:])}",
            )
    dpo, reward = spec.optimize and spec.optimize.dpo, spec.reward_model
    if dpo and dpo.loss == "kto" and reward and reward.train:
        yield Fault(
            "spec.rewardModel.train",
            "needs pairs or rankings, but optimize.dpo.loss kto takes unpaired completions: remove "
            "rewardModel or choose another loss",
        )
    feedback = spec.preferences and spec.preferences.ai_feedback
    if dpo and dpo.loss == "kto" and feedback and feedback.disagreement == "tie":
        yield Fault(
            "spec.preferences.aiFeedback.disagreement",
            "tie keeps pairs of equally good completions, but optimize.dpo.loss kto needs "
            "completions labeled good or bad: set drop or average, or choose another loss",
        )


def _unused_step_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for each part of the spec that no step uses."""
    reward, trains = spec.reward_model, bool(spec.reward_model and spec.reward_model.train)
    if reward and not trains and not spec.optimize:
        yield Fault(
            "spec.rewardModel",
            "is not used without optimize: add optimize, train a reward model, or remove it",
        )
    if spec.evaluate.win_rate and not spec.optimize:
        yield Fault(
            "spec.evaluate.winRate",
            "compares completions of an aligned model, but optimize is not set: add optimize, or "
            "remove winRate",
        )
    elif spec.evaluate.win_rate and not _has_evaluation_prompts(spec):
        yield Fault(
            "spec.evaluate.winRate",
            "compares completions of held-out prompts, but none are held out: set "
            "preferences.heldOut above 0, or remove winRate",
        )
    if spec.preferences and not trains and not spec.optimize:
        yield Fault(
            "spec.preferences",
            "are not used by any step: add optimize or rewardModel.train, or remove them",
        )


def _has_evaluation_prompts(spec: AlignmentSpec) -> bool:
    """Return whether the evaluation has prompts to sample completions for."""
    preferences = spec.preferences
    on_policy = spec.optimize and spec.optimize.on_policy
    held_out = preferences and (preferences.ai_feedback or preferences.held_out > 0)
    return bool(on_policy or held_out)


def _stopping_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for each early stopping without held-out preferences."""
    if spec.preferences is None or spec.preferences.held_out:
        return
    train = spec.reward_model and spec.reward_model.train
    dpo = spec.optimize and spec.optimize.dpo
    for path, step in (("rewardModel.train", train), ("optimize.dpo", dpo)):
        if step and step.training.early_stopping and "/" not in (step.training.best_by or ""):
            yield Fault(
                f"spec.{path}.training.earlyStopping",
                "needs held-out preferences: set preferences.heldOut above 0, or bestBy to a "
                "metric of a suite, or remove earlyStopping",
            )


def _independence_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the fault of an independent reward that is a part of the optimized one, or that has no
    completions to score."""
    independent = spec.independent_reward
    if independent is None:
        return
    parts: dict[str, RewardModel | WeightedReward | None] = {
        "rewardModel": spec.reward_model,
        **{f"rewardTerms[{index}]": term for index, term in enumerate(spec.reward_terms)},
    }
    for name, part in parts.items():
        same_rule = part and independent.rule and part.rule == independent.rule
        same_model = part and independent.model and part.model == independent.model
        if same_rule or same_model:
            yield Fault(
                f"spec.independentReward.{independent.kind}",
                f"is optimized as {name}, and shows nothing beside itself: name another reward, "
                "or remove independentReward",
            )
    if spec.optimize and not _has_evaluation_prompts(spec):
        yield Fault(
            "spec.independentReward",
            "scores completions of held-out prompts, but none are held out: set "
            "preferences.heldOut above 0, or remove independentReward",
        )


def _reinforcement_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the faults of PPO, GRPO or RLOO."""
    optimize = spec.optimize
    method = optimize.reinforcement if optimize else None
    if optimize is None or method is None:
        return
    path = f"spec.optimize.{optimize.kind}"
    kind = spec.adapter.kind if spec.adapter else None
    if method.sampling.engine == "vllm" and kind not in IN_VLLM:
        yield Fault(
            f"{path}.sampling.engine",
            f"vllm needs plain weights and cannot run a policy with adapter.{kind}: use "
            "adapter.lora, adapter.ia3 or no adapter, or remove engine",
        )
    if method.training.dropout:
        yield Fault(
            f"{path}.training.dropout",
            f"{method.training.dropout} would change the log-probabilities between sampling and "
            "training: remove dropout",
        )
    if method.training.early_stopping:
        yield Fault(
            f"{path}.training.earlyStopping",
            f"needs a held-out loss, which {optimize.kind} does not have: remove earlyStopping and "
            "set stopOn",
        )
    size = method.training.batch_size
    group = method.group_size if isinstance(method, GroupRelative) else 1
    if size != "auto" and size % group:
        yield Fault(
            f"{path}.training.batchSize",
            f"{size} completions cannot be divided into groups of {group}: set a multiple of "
            "groupSize",
        )


def _evaluation_engine_faults(
    evaluate: Evaluate, adapter: Adapter | None, trainings: Iterable[tuple[str, Training]]
) -> Iterator[Fault]:
    """Yield the reasons why vLLM cannot answer in an evaluation. `trainings`: the loops of the job,
    with their paths."""
    path = "spec.evaluate.engine"
    if evaluate.engine != "vllm":
        return
    kind = adapter.kind if adapter else None
    if kind not in EVALUATED_IN_VLLM:
        yield Fault(
            path,
            f"vllm needs plain weights and cannot run a model with adapter.{kind}: use "
            "adapter.lora, adapter.qlora, adapter.ia3 or no adapter, or remove engine",
        )
    by_trl = [where for where, training in trainings if training.engine == "trl"]
    if by_trl:
        yield Fault(
            path,
            f"vllm is in no trainer image with TRL, which {by_trl[0]}.engine names "
            f"({VLLM_VERSIONS}): remove evaluate.engine, or train with the native engine",
        )


def _unused_evaluation_engine(evaluate: Evaluate, *, asks: bool, remedy: str) -> Iterator[Fault]:
    """Yield a fault if vLLM would have nothing to answer. `asks`: whether the evaluation asks
    prompts beside those of suites. `remedy`: how it would."""
    suites = any(suite.answers or suite.refusals for suite in evaluate.suites)
    if evaluate.engine == "vllm" and not (asks or suites):
        yield Fault(
            "spec.evaluate.engine",
            f"vllm answers prompts, and this evaluation has none: {remedy}, add a suite with "
            "answers or refusals, or remove engine",
        )


def _may_ask(spec: AlignmentSpec) -> bool:
    """Return whether the evaluation of an alignment may have prompts beside those of suites."""
    if spec.optimize:
        return _has_evaluation_prompts(spec) or spec.optimize.distill is not None
    return bool(spec.constitution or (spec.sft and spec.sft.data.validation))


def _distillation_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the faults of a distillation."""
    distill = spec.optimize and spec.optimize.distill
    if not distill:
        return
    path = "spec.optimize.distill"
    yield from argument_faults(f"{path}.training.trl", DISTILL_CONFIG, distill.training.trl)
    yield from effect_faults(f"{path}.training", distill.training, spec.compute)
    if distill.training.engine == "native":
        yield Fault(
            f"{path}.training.engine",
            "native does not distill, as only TRL has a trainer for it: remove engine",
        )
    if distill.sampling.engine == "vllm":
        yield Fault(
            f"{path}.sampling.engine",
            "vllm does not sample for TRL's trainers, as TRL 1.16 takes vLLM 0.22 to 0.31 and the "
            "trainer image has a newer one: remove engine",
        )
    same = (distill.teacher.uri, distill.teacher.revision) == (spec.model.uri, spec.model.revision)
    if same and spec.sft is None and spec.constitution is None:
        yield Fault(
            f"{path}.teacher.uri",
            f"{distill.teacher.uri} is the model itself, which has nothing to learn from its own "
            "distribution: name another model",
        )
    yield from _head_faults(spec)
    adapter = spec.adapter.kind if spec.adapter else "full"
    yield from _division_faults("distill", distill.training, adapter, spec.compute, "prompts")


def _head_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for an adapter that TRL's distillation would not train: its loss takes the
    hidden states and the weights of the head."""
    adapter = spec.adapter
    if adapter is None:
        return
    if adapter.kind in ("prefix", "prompt"):
        yield Fault(
            f"spec.adapter.{adapter.kind}",
            "adds virtual tokens, which TRL's distillation does not see: use adapter.lora, or no "
            "adapter",
        )
    low_rank = adapter.lora or adapter.qlora
    if low_rank and "lm_head" in low_rank.targets:
        yield Fault(
            f"spec.adapter.{adapter.kind}.targets",
            "holds lm_head, and TRL's distillation does not train an adapter on the head: remove "
            "lm_head",
        )


def _division_faults(
    kind: Literal["grpo", "rloo", "distill"],
    training: Training,
    adapter: str,
    compute: Compute,
    rows: str,
) -> Iterator[Fault]:
    """Yield a fault for a batch that some number of workers cannot share equally. `adapter`: its
    kind, or full. `rows`: of the batch, in plural."""
    if compute.profile is not None and compute.workers is None:
        return  # the profile may set the number: checked once it is known
    size = training.batch_size
    if size == "auto":
        size = defaults.alignment_rule(kind, adapter).batch_size
    if uneven := compute.uneven_workers(size):
        yield Fault(
            f"spec.optimize.{kind}.training.batchSize",
            f"TRL needs equally many {rows} on each process, and {size} cannot be divided among "
            f"the {uneven * compute.processes_per_worker} of {uneven} workers: set a multiple, or "
            "change compute.workers or compute.minWorkers",
        )


def _engine_faults(spec: FineTuneSpec) -> Iterator[Fault]:
    """Yield a fault for what TRL's trainer does not do."""
    if spec.training.engine == "native":
        yield from _unused_trl("spec.training", spec.training)
        return
    yield from _trl_sft_faults("spec", spec.training, spec.data, spec.compute)


def _trl_sft_faults(
    path: str, training: Training, data: FineTuneData, compute: Compute
) -> Iterator[Fault]:
    """Yield a fault for what TRL's SFTTrainer does not do. `path`: of the step with `training` and
    `data`."""
    yield from argument_faults(f"{path}.training.trl", SFT_CONFIG, training.trl)
    yield from effect_faults(f"{path}.training", training, compute)
    if data.packing == "always":
        yield Fault(
            f"{path}.data.packing",
            "always needs the native engine, as the rows of a batch are padded under "
            "training.engine trl: set packing to auto or never, or engine to native",
        )


def _sharding_faults(spec: FineTuneSpec) -> Iterator[Fault]:
    """Yield a fault for each reason why the job cannot be sharded as it asks."""
    if spec.compute.sharding != "fsdp":
        return
    if spec.training.engine == "native":
        yield Fault(
            "spec.compute.sharding",
            "fsdp needs TRL's trainer, as each worker of the native engine holds the whole model: "
            "set training.engine to trl, or remove sharding",
        )
    elif not can_shard(spec.adapter):
        yield _unshardable(spec.adapter)
    yield from _too_few_shards(spec.compute)


def alignment_sharding(spec: AlignmentSpec) -> Sharding:
    """Return the sharding of the stages of an alignment that run the policy."""
    return spec.compute.sharding if next(_whole_models(spec), None) is None else "none"


def _alignment_sharding_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for each reason why the job cannot be sharded as it asks."""
    if spec.compute.sharding == "fsdp":
        yield from _whole_models(spec)
        yield from _too_few_shards(spec.compute)


def _whole_models(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for each part of an alignment that needs whole models on each worker."""
    path = "spec.compute.sharding"
    if spec.optimize is None or spec.optimize.kind not in SHARDED:
        yield Fault(
            path,
            f"fsdp in an alignment is for optimize.{', '.join(SHARDED)}, KTO included, in this "
            "version: remove sharding",
        )
    for where, training in _trainings(spec):
        if (
            where in ("spec.sft.training", *(f"spec.optimize.{kind}.training" for kind in SHARDED))
            and training.engine == "native"
        ):
            yield Fault(
                f"{where}.engine",
                "native holds the whole model on each worker, and compute.sharding is fsdp: set "
                "engine to trl, or remove sharding",
            )
    if not can_shard(spec.adapter):
        yield _unshardable(spec.adapter)
    judge = spec.evaluate.win_rate and spec.evaluate.win_rate.judge
    reward, preferences = spec.reward_model, spec.preferences
    augment = spec.sft and spec.sft.data.augment
    whole = {
        "spec.sft.data.augment.by": bool(augment and runs_a_model(augment)),
        "spec.constitution": spec.constitution is not None,
        "spec.preferences.aiFeedback": bool(preferences and preferences.ai_feedback),
        "spec.rewardModel": reward is not None and reward.rule is None,
        "spec.evaluate.winRate.judge.model": bool(judge and judge.model),
        **{
            f"spec.rewardTerms[{index}].model": term.model is not None
            for index, term in enumerate(spec.reward_terms)
        },
        "spec.independentReward.model": bool(
            spec.independent_reward and spec.independent_reward.model
        ),
    }
    for where, is_set in whole.items():
        if is_set:
            yield Fault(
                where,
                NEEDS_WHOLE_MODEL,
            )


def _unshardable(adapter: Adapter | None) -> Fault:
    return Fault(
        "spec.compute.sharding",
        f"fsdp shards a model under adapter.lora (not decomposed) or without an adapter, and "
        f"adapter.{adapter.kind if adapter else ''} is set: use one of these, or remove sharding",
    )


def _too_few_shards(compute: Compute) -> Iterator[Fault]:
    """Yield a fault for a number of workers that cannot share a model."""
    path = "spec.compute.sharding"
    if compute.profile is not None:  # which may set the numbers: checked once it is known
        return
    each = compute.processes_per_worker
    if (compute.workers or 1) * each < MIN_SHARDS:
        yield Fault(path, f"fsdp needs at least {MIN_SHARDS} workers or GPUs: set compute.workers")
    if compute.min_workers is not None and compute.min_workers * each < MIN_SHARDS:
        yield Fault(
            "spec.compute.minWorkers",
            f"fsdp needs at least {MIN_SHARDS} workers or GPUs, and the job may continue with "
            f"{compute.min_workers}: raise minWorkers, or remove sharding",
        )


def _alignment_engine_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for what an alignment asks of TRL's trainers, and for sharding."""
    yield from _alignment_sharding_faults(spec)
    for path, training in _trainings(spec):
        yield from _unused_trl(path, training)
        if training.engine == "trl" and path not in BY_TRL:
            reason = (
                "PPO stays native, as TRL has no PPO any more"
                if ".ppo." in path
                else "trl does not train this step in this version"
            )
            yield Fault(f"{path}.engine", f"{reason}: remove engine")
    if spec.sft and spec.sft.training.engine == "trl":
        yield from _trl_sft_faults("spec.sft", spec.sft.training, spec.sft.data, spec.compute)
    grpo, rloo = spec.optimize and spec.optimize.grpo, spec.optimize and spec.optimize.rloo
    if grpo and grpo.training.engine == "trl":
        yield from _trl_online_faults(spec, "grpo", grpo)
    if rloo and rloo.training.engine == "trl":
        yield from _trl_online_faults(spec, "rloo", rloo)
    dpo = spec.optimize and spec.optimize.dpo
    if dpo and dpo.training.engine == "trl":
        yield from _trl_dpo_faults("spec.optimize.dpo", dpo, spec.compute)
        if dpo.loss != "kto":
            yield from _uncertain_label_faults("spec.optimize.dpo.training", "DPOTrainer", spec)
    train = spec.reward_model and spec.reward_model.train
    if train and train.training.engine == "trl":
        path = "spec.rewardModel.train.training"
        yield from argument_faults(f"{path}.trl", REWARD_CONFIG, train.training.trl)
        yield from effect_faults(path, train.training, spec.compute)
        yield from _uncertain_label_faults(path, "RewardTrainer", spec)


def _trl_online_faults(
    spec: AlignmentSpec, kind: Literal["grpo", "rloo"], method: GroupRelative
) -> Iterator[Fault]:
    """Yield a fault for what TRL's GRPOTrainer and RLOOTrainer do not do."""
    path, training, compute = f"spec.optimize.{kind}", method.training, spec.compute
    yield from argument_faults(f"{path}.training.trl", ONLINE_CONFIGS[kind], training.trl)
    yield from effect_faults(f"{path}.training", training, compute)
    if method.sampling.engine == "vllm":
        yield Fault(f"{path}.sampling.engine", f"vllm is not for training.engine trl: {VLLM}")
    adapter = spec.adapter.kind if spec.adapter else "full"
    if adapter in WITH_VIRTUAL_TOKENS:
        yield Fault(
            f"spec.adapter.{adapter}",
            "its virtual tokens come before the padding, and TRL pads prompts on the left: use "
            f"another adapter, or set optimize.{kind}.training.engine to native",
        )
    yield from _division_faults(kind, training, adapter, compute, "completions")


def _uncertain_label_faults(path: str, trainer: str, spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield a fault for pairs with the probabilities of a judge, which a trainer of TRL does not
    take. An endpoint may give none: the stage then looks at its labels."""
    feedback = spec.preferences and spec.preferences.ai_feedback
    if feedback and (feedback.judge.model or feedback.disagreement == "tie"):
        yield Fault(
            f"{path}.engine",
            f"TRL's {trainer} takes pairs whose order is certain, and preferences.aiFeedback gives "
            "probabilities: set engine to native, or give pairs in preferences.data",
        )


def _trl_dpo_faults(path: str, dpo: Dpo, compute: Compute) -> Iterator[Fault]:
    config = KTO_CONFIG if dpo.loss == "kto" else DPO_CONFIG
    yield from argument_faults(f"{path}.training.trl", config, dpo.training.trl)
    yield from effect_faults(f"{path}.training", dpo.training, compute)
    if dpo.loss == "sigmoid" and dpo.label_smoothing:
        yield Fault(
            f"{path}.labelSmoothing",
            "TRL smooths labels in the loss robust alone: set loss to robust or training.engine to "
            "native, or remove labelSmoothing",
        )


def _unused_trl(path: str, training: Training) -> Iterator[Fault]:
    if training.trl and training.engine == "native":
        yield Fault(
            f"{path}.trl",
            f"holds arguments of TRL ({', '.join(sorted(training.trl)[:3])}), and engine is "
            "native: set engine to trl, or remove trl",
        )


def _trainings(spec: AlignmentSpec) -> Iterator[tuple[str, Training]]:
    """Yield the training loops of an alignment with their paths."""
    if spec.sft:
        yield "spec.sft.training", spec.sft.training
    if spec.constitution:
        yield "spec.constitution.training", spec.constitution.training
    if spec.reward_model and spec.reward_model.train:
        yield "spec.rewardModel.train.training", spec.reward_model.train.training
    if spec.optimize:
        method = spec.optimize.dpo or spec.optimize.on_policy
        if method:
            yield f"spec.optimize.{spec.optimize.kind}.training", method.training


def _document_faults(data: FineTuneData, path: str) -> Iterator[Fault]:
    """Yield a fault for each data set that names documents without retrieval."""
    if data.retrieval is not None:
        return
    held_out = (data.validation and data.validation.data) or []
    sets = {f"{path}.train[{index}]": dataset for index, dataset in enumerate(data.train)}
    sets |= {f"{path}.validation.data[{i}]": dataset for i, dataset in enumerate(held_out)}
    for where, dataset in sets.items():
        if dataset.fields.document is not None:
            yield Fault(
                f"{where}.fields.document",
                f"{dataset.fields.document} names the document that answers a row, which only "
                f"retrieval reads: set {path}.retrieval, or remove document",
            )


def _suites_of_rewards(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the fault of suites in a job that trains a reward model alone."""
    trains_reward = spec.reward_model is not None and spec.reward_model.train is not None
    if spec.evaluate.suites and trains_reward and not spec.optimize:
        yield Fault(
            "spec.evaluate.suites",
            "suites measure a model that writes, and this job trains a reward model alone: remove "
            "suites, or set optimize",
        )


def _win_rate_faults(spec: FineTuneSpec) -> Iterator[Fault]:
    """Yield the faults of a win rate that a fine-tuning cannot measure."""
    win_rate, path = spec.evaluate.win_rate, "spec.evaluate.winRate"
    if win_rate is None:
        return
    if spec.data.validation is None:
        yield Fault(
            path,
            "compares answers to held-out questions, but no rows are held out: set "
            "data.validation, or remove winRate",
        )
    if spec.method == "pretrain":
        yield Fault(
            path,
            "compares answers to questions, which method pretrain does not have: remove winRate",
        )
    if not spec.evaluate.compare_with_base:
        yield Fault(
            path,
            "compares the tuned model with the base model: set evaluate.compareWithBase: true, or "
            "remove winRate",
        )
    if win_rate.judge.model and spec.compute.sharding == "fsdp":
        yield Fault(f"{path}.judge.model", NEEDS_WHOLE_MODEL)


def _gates(evaluate: Evaluate) -> Iterator[tuple[str, Gate]]:
    for index, gate in enumerate(evaluate.gates):
        yield f"spec.evaluate.gates[{index}]", gate


def _unknown_metric(
    gate: Gate, known: Sequence[str], evaluate: Evaluate, compared: bool
) -> str | None:
    """Return the message for a gate on an unknown metric. None: the metric is known. `compared`:
    whether the model before is measured too."""
    if "/" in gate.metric:
        return unknown_suite_metric(gate.metric, evaluate.suites, compared)
    if gate.metric not in known:
        close = difflib.get_close_matches(gate.metric, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(known)}"
        return f"'{gate.metric}' is not a metric: {hint}"
    return None


def _evidence_faults(
    path: str, gate: Gate, known: Sequence[str], *, with_base: bool
) -> Iterator[Fault]:
    """Yield the faults of a gate whose evidence is never measured. `known`: the metrics of the job;
    `with_base`: whether the base model is measured too."""
    if gate.min_items is not None and not _has_items(gate.metric):
        yield Fault(
            f"{path}.minItems",
            f"{gate.metric} has no value for single items that could be counted: remove minItems",
        )
    if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
        yield Fault(
            f"{path}.atLeast",
            f"no value is at least {gate.at_least:g} and at most {gate.at_most:g}, so that the "
            "gate could never be met: lower atLeast, or raise atMost",
        )
    if gate.not_worse_than_base_by is None:
        return
    if gate.metric not in PAIRED_METRICS and not is_paired(gate.metric):
        paired = ", ".join(name for name in PAIRED_METRICS if name in known)
        remedy = f"use one of {paired}, or bound {gate.metric} with atLeast or atMost"
        if "/" in gate.metric:
            remedy = whole_metric_remedy(gate.metric)
        yield Fault(
            f"{path}.notWorseThanBaseBy",
            f"{gate.metric} is not a mean of values that both models have on each item: {remedy}",
        )
    elif not with_base:
        yield Fault(
            f"{path}.notWorseThanBaseBy",
            "needs a measurement of the base model: set evaluate.compareWithBase: true, or use "
            "atLeast or atMost",
        )


def _has_items(metric: str) -> bool:
    """Return whether the items of a metric can be counted, as far as its name says."""
    return is_counted(metric) if "/" in metric else metric not in WITHOUT_ITEMS


def _without_base(gate: Gate, evaluate: Evaluate) -> str | None:
    """Return the message for a metric that needs a base model that is not measured. None: it does
    not need it, or it is measured."""
    compared = gate.metric in ("lossReduction", "answerAccuracyGain")
    if not compared or evaluate.compare_with_base:
        return None
    return (
        f"{gate.metric} needs a measurement of the base model: set evaluate.compareWithBase: true"
    )


def _unmeasured_fine_tuning(gate: Gate, spec: FineTuneSpec) -> str | None:
    """Return the message for a metric that a fine-tuning does not measure. None: it does."""
    if spec.data.validation is None and "/" not in gate.metric:
        return f"{gate.metric} is measured on held-out rows: set data.validation"
    if problem := _without_base(gate, spec.evaluate):
        return problem
    if gate.metric == "validationLossOfGaps" and not spec.data.fill_in_the_middle:
        return (
            "validationLossOfGaps is measured on the gaps of held-out documents: set "
            "data.fillInTheMiddle"
        )
    if problem := _unnamed_metric(gate.metric, spec.evaluate):
        return problem
    if gate.metric.startswith("answerAccuracy") and spec.method == "pretrain":
        return (
            f"{gate.metric} needs rows with a prompt and an expected answer, but method is "
            "pretrain: use validationLoss, validationPerplexity or lossReduction"
        )
    return None


def _unnamed_metric(metric: str, evaluate: Evaluate) -> str | None:
    """Return the message for a metric of answers that the manifest does not ask for. None: it does,
    or it is none."""
    if metric in WIN_RATES and not evaluate.win_rate:
        return f"{metric} is measured by a judge: set evaluate.winRate"
    named = MEASURED_BY.get(metric)
    if named is not None and named not in evaluate.metrics:
        return f"{metric} is measured if it is asked for: add {named} to evaluate.metrics"
    if metric == "schemaValid" and evaluate.answer_schema is None:
        return "schemaValid is measured against a schema: set evaluate.answerSchema"
    if metric == "patternMatch" and evaluate.answer_pattern is None:
        return "patternMatch is measured with a pattern: set evaluate.answerPattern"
    return None


def _answer_faults(spec: FineTuneSpec) -> Iterator[Fault]:
    """Yield the faults of metrics of answers that a fine-tuning cannot measure."""
    for name in _answer_fields(spec.evaluate):
        path = f"spec.evaluate.{name}"
        if spec.data.validation is None:
            yield Fault(
                path,
                "measures answers to held-out questions, but no rows are held out: set "
                f"data.validation, or remove {name}",
            )
        if spec.method == "pretrain":
            yield Fault(
                path,
                "measures answers to questions, which method pretrain does not have: remove "
                f"{name}",
            )
    if spec.evaluate.few_shot and not spec.evaluate.compare_with_base:
        yield Fault(
            "spec.evaluate.fewShot",
            "asks the base model with examples: set evaluate.compareWithBase: true, or remove "
            "fewShot",
        )
    yield from pattern_faults(spec.evaluate.answer_pattern, "spec.evaluate.answerPattern")


def _answer_fields(evaluate: Evaluate) -> list[str]:
    """Return the fields that ask for metrics of answers."""
    fields = {
        "fewShot": evaluate.few_shot > 0,
        "metrics": bool(evaluate.metrics),
        "answerSchema": evaluate.answer_schema is not None,
        "answerPattern": evaluate.answer_pattern is not None,
    }
    return [name for name, is_set in fields.items() if is_set]


def _unanswered(spec: AlignmentSpec) -> Iterator[Fault]:
    """Yield the faults of metrics of answers in an alignment."""
    for name in _answer_fields(spec.evaluate):
        yield Fault(
            f"spec.evaluate.{name}",
            "measures answers to held-out questions, which a FineTuneJob has: remove it",
        )


def _unmeasured_steps(gate: Gate, spec: AlignmentSpec) -> str | None:
    """Return the message for a metric that an alignment of supervised steps alone does not measure.
    None: it does."""
    if "/" in gate.metric:
        return None
    if not spec.constitution and not (spec.sft and spec.sft.data.validation):
        return f"{gate.metric} is measured on held-out rows: set sft.data.validation"
    if gate.metric == "validationLossOfGaps":
        return "validationLossOfGaps is measured by a FineTuneJob with method: pretrain: remove it"
    return _without_base(gate, spec.evaluate)


def _unmeasured_alignment(gate: Gate, spec: AlignmentSpec) -> str | None:
    """Return the message for a metric that an alignment does not measure. None: it does."""
    preferences, reward = spec.preferences, spec.reward_model
    if gate.metric.startswith("preference") and not (spec.optimize and preferences):
        return f"{gate.metric} is measured on held-out preferences: set preferences and optimize"
    if gate.metric in ("reward", "rewardGain") and not (reward and spec.optimize):
        return f"{gate.metric} needs a reward and an aligned model: set rewardModel and optimize"
    if gate.metric == "rewardLengthCorrelation" and not (reward and spec.optimize):
        return f"{gate.metric} needs a reward and an aligned model: set rewardModel and optimize"
    if gate.metric.startswith("independentReward") and not spec.independent_reward:
        return f"{gate.metric} needs a reward that nothing is trained on: set independentReward"
    on_reward = gate.metric in ("rewardAccuracy", "rewardMargin")
    if on_reward and not (preferences and reward and not reward.rule):
        return (
            f"{gate.metric} is measured with a reward model on held-out preferences: set "
            "preferences, and rewardModel.train or rewardModel.model"
        )
    dpo = spec.optimize and spec.optimize.dpo
    if on_reward and dpo and dpo.loss == "kto":
        return (
            f"{gate.metric} is measured on pairs or rankings, and optimize.dpo.loss kto takes "
            "unpaired completions: use another metric, or choose another loss"
        )
    of_completions = ("kl", "lengthRatio", "distinctRatio", "repetition", "complete")
    if gate.metric in (*of_completions, "sycophancyShift") and not spec.optimize:
        return f"{gate.metric} is measured on an aligned model: set optimize"
    of_reward = ("reward", "rewardGain", "rewardLengthCorrelation")
    if gate.metric in (*of_completions, *of_reward) and not _has_evaluation_prompts(spec):
        return (
            f"{gate.metric} is measured on completions of held-out prompts, but none are held out: "
            "set preferences.heldOut above 0"
        )
    if gate.metric in WIN_RATES and not spec.evaluate.win_rate:
        return f"{gate.metric} is measured by a second judge: set evaluate.winRate"
    on_pairs = on_reward or gate.metric.startswith("preference")
    if on_pairs and preferences and not preferences.held_out:
        return f"{gate.metric} is measured on held-out preferences: set preferences.heldOut above 0"
    return None
