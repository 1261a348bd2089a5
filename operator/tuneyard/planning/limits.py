"""Parts of valid manifests that this version cannot carry out, each named with a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args

from tuneyard.api.alignmentjob import AlignmentSpec
from tuneyard.api.evaluation import AlignmentMetric, Evaluate, Gate, Metric
from tuneyard.api.finetunejob import FineTuneSpec
from tuneyard.errors import Fault

IN_VLLM = ("lora", "ia3", None)
"""Adapters, and none at all, with which a policy is plain weights: what is added to a 4-bit base is
not, and virtual tokens and bottlenecks never are."""


def fine_tuning_faults(spec: FineTuneSpec) -> list[Fault]:
    """In the order of the fields."""
    faults = list(_suite_faults(spec.evaluate))
    for path, gate in _gates(spec.evaluate):
        problem = _unknown(gate, get_args(Metric)) or _undecidable(gate, spec)
        if problem:
            faults.append(Fault(path, problem))
    return faults


def alignment_faults(spec: AlignmentSpec) -> list[Fault]:
    """In the order of the fields."""
    faults = [
        *_preference_faults(spec),
        *_idle_faults(spec),
        *_stopping_faults(spec),
        *_sampling_faults(spec),
        *_suite_faults(spec.evaluate),
    ]
    aligned = spec.optimize or (spec.reward_model and spec.reward_model.train)
    known = get_args(AlignmentMetric) if aligned else get_args(Metric)
    for path, gate in _gates(spec.evaluate):
        problem = _unknown(gate, known) or (_unmeasured(gate, spec) if aligned else None)
        if problem:
            faults.append(Fault(path, problem))
    return faults


def _preference_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    for index, dataset in enumerate((spec.preferences and spec.preferences.data) or []):
        if dataset.format != "auto":
            yield Fault(
                f"spec.preferences.data[{index}].format",
                f"{dataset.format} is a format of fine-tuning data, and the shape of preferences "
                "is recognised from the rows: remove format",
            )
    dpo, reward = spec.optimize and spec.optimize.dpo, spec.reward_model
    if dpo and dpo.loss == "kto" and reward and reward.train:
        yield Fault(
            "spec.rewardModel.train",
            "needs pairs or rankings, and optimize.dpo.loss kto takes single answers: remove "
            "rewardModel or choose another loss",
        )
    feedback = spec.preferences and spec.preferences.ai_feedback
    if dpo and dpo.loss == "kto" and feedback and feedback.disagreement == "tie":
        yield Fault(
            "spec.preferences.aiFeedback.disagreement",
            "tie keeps pairs of which neither answer is the better one, and optimize.dpo.loss kto "
            "learns from answers that are good or bad: set drop or average, or choose another loss",
        )


def _idle_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """What no step would read."""
    reward, trains = spec.reward_model, bool(spec.reward_model and spec.reward_model.train)
    if reward and not trains and not spec.optimize:
        yield Fault(
            "spec.rewardModel",
            "scores nothing without optimize: add optimize, train a reward model, or remove it",
        )
    if spec.evaluate.win_rate and not spec.optimize:
        yield Fault(
            "spec.evaluate.winRate",
            "compares answers of an aligned model, and nothing aligns one: add optimize, or remove "
            "winRate",
        )
    elif spec.evaluate.win_rate and not _answers(spec):
        yield Fault(
            "spec.evaluate.winRate",
            "is about answers to held-out prompts: set preferences.heldOut above 0, or remove "
            "winRate",
        )
    if spec.preferences and not trains and not spec.optimize:
        yield Fault(
            "spec.preferences",
            "nothing learns from them: add optimize or rewardModel.train, or remove them",
        )


def _answers(spec: AlignmentSpec) -> bool:
    """Whether the evaluation has prompts to answer."""
    preferences = spec.preferences
    sampled = spec.optimize is not None and spec.optimize.dpo is None
    held_out = preferences is not None and (preferences.ai_feedback or preferences.held_out > 0)
    return sampled or bool(held_out)


def _stopping_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    """Early stopping on preferences of which none are held out."""
    if spec.preferences is None or spec.preferences.held_out:
        return
    train = spec.reward_model and spec.reward_model.train
    dpo = spec.optimize and spec.optimize.dpo
    for path, step in (("rewardModel.train", train), ("optimize.dpo", dpo)):
        if step and step.training.early_stopping:
            yield Fault(
                f"spec.{path}.training.earlyStopping",
                "needs held-out preferences: set preferences.heldOut above 0, or remove "
                "earlyStopping",
            )


def _sampling_faults(spec: AlignmentSpec) -> Iterator[Fault]:
    optimize = spec.optimize
    sampled = (optimize.ppo or optimize.grpo or optimize.rloo) if optimize else None
    if optimize is None or sampled is None:
        return
    path = f"spec.optimize.{optimize.kind}"
    kind = spec.adapter.kind if spec.adapter else None
    if sampled.sampling.engine == "vllm" and kind not in IN_VLLM:
        yield Fault(
            f"{path}.sampling.engine",
            f"vllm runs plain weights, and a policy with adapter.{kind} is more than that: use "
            "adapter.lora, adapter.ia3 or none, or remove engine",
        )
    if sampled.training.dropout:
        yield Fault(
            f"{path}.training.dropout",
            f"{sampled.training.dropout} would compare answers under two different networks: "
            "remove dropout",
        )
    if sampled.training.early_stopping:
        yield Fault(
            f"{path}.training.earlyStopping",
            "watches a held-out loss, and rewards have none: remove earlyStopping and set stopOn",
        )
    size = sampled.training.batch_size
    group = getattr(sampled, "group_size", 1)
    if size != "auto" and size % group:
        yield Fault(
            f"{path}.training.batchSize",
            f"{size} answers do not make whole groups of {group}: set a multiple of groupSize",
        )


def _suite_faults(evaluate: Evaluate) -> Iterator[Fault]:
    if evaluate.few_shot:
        message = (
            f"{evaluate.few_shot} worked examples belong to benchmark suites, which this version "
            "does not run yet: remove fewShot"
        )
        yield Fault("spec.evaluate.fewShot", message)
    if evaluate.suites:
        message = (
            f"this version does not run benchmark suites ({', '.join(evaluate.suites)}) yet: "
            "remove suites, and judge the model by the held-out rows"
        )
        yield Fault("spec.evaluate.suites", message)


def _gates(evaluate: Evaluate) -> Iterator[tuple[str, Gate]]:
    for index, gate in enumerate(evaluate.gates):
        yield f"spec.evaluate.gates[{index}].metric", gate


def _unknown(gate: Gate, known: Sequence[str]) -> str | None:
    """Why nothing is ever measured under a gate's name; None where something may be."""
    if "/" in gate.metric:
        return (
            f"{gate.metric} is a metric of a benchmark suite, and this version does not run suites "
            f"yet: use one of {', '.join(known)}"
        )
    if gate.metric not in known:
        close = difflib.get_close_matches(gate.metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        return f"there is no metric {gate.metric}: {hint}"
    return None


def _undecidable(gate: Gate, spec: FineTuneSpec) -> str | None:
    """Why a gate of fine-tuning cannot be decided; None where it can."""
    if (
        gate.metric in ("lossReduction", "answerAccuracyGain")
        and not spec.evaluate.compare_with_base
    ):
        return (
            f"{gate.metric} is measured against the base model: set evaluate.compareWithBase: true"
        )
    if gate.metric.startswith("answerAccuracy") and spec.method == "pretrain":
        return (
            f"{gate.metric} needs rows with a prompt and an expected answer, and method is "
            "pretrain: use validationLoss, validationPerplexity or lossReduction"
        )
    return None


def _unmeasured(gate: Gate, spec: AlignmentSpec) -> str | None:
    """Why a gate of an alignment cannot be decided; None where it can."""
    preferences, reward = spec.preferences, spec.reward_model
    if gate.metric.startswith("preference") and not (spec.optimize and preferences):
        return f"{gate.metric} is measured on held-out preferences: set preferences and optimize"
    if gate.metric in ("reward", "rewardGain") and not (reward and spec.optimize):
        return f"{gate.metric} is what the reward says of answers: set rewardModel and optimize"
    on_reward = gate.metric in ("rewardAccuracy", "rewardMargin")
    if on_reward and not (preferences and reward and not reward.rule):
        return (
            f"{gate.metric} is a reward model's on held-out preferences: set preferences, and "
            "rewardModel.train or rewardModel.model"
        )
    own = ("kl", "lengthRatio", "distinctRatio", "repetition", "complete", "sycophancyShift")
    if gate.metric in own and not spec.optimize:
        return f"{gate.metric} is an aligned model's: set optimize"
    if gate.metric == "winRate" and not spec.evaluate.win_rate:
        return "winRate is what a second judge says of answers: set evaluate.winRate"
    on_pairs = on_reward or gate.metric.startswith("preference")
    if on_pairs and preferences and not preferences.held_out:
        return f"{gate.metric} is measured on held-out preferences: set preferences.heldOut above 0"
    return None
