"""The results of a job as text, for the console, the report and the model card."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuneyard.api.plan import StageRecord
from tuneyard.api.stage_settings import SUPERVISED_KINDS, TRAINING_KINDS
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.reporting.formatting import (
    count,
    duration,
    number,
    percent,
    signed,
    size,
)

ROW_OUTCOMES = {
    "skippedRows": "skipped",
    "filteredRows": "filtered",
    "duplicateRows": "duplicates",
    "droppedRows": "dropped",
    "truncatedRows": "truncated",
    "splitRows": "split",
}
"""Labels of the prepare stage's counts of rows that are not used unchanged, by metric."""

Verdict = Literal["better", "worse", ""]


@dataclass(frozen=True)
class Comparison:
    """One row of the table that compares the base model with the tuned model, as text."""

    label: str
    base: str
    tuned: str
    change: str
    verdict: Verdict
    """Whether the tuned model is better or worse. "": equal, or no direction is better."""


@dataclass(frozen=True)
class Sample:
    """One prompt with the completions of both models."""

    prompt: str
    reference: str
    """The expected completion; "": unknown."""
    base: str | None
    """None: the base model was not measured."""
    tuned: str
    expected: tuple[str, ...] = ()
    """Any of these texts in a completion makes it right, by the rule of `answers`."""

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Sample:
        """Return the sample that an evaluation stage recorded."""
        return cls(
            prompt=str(value.get("prompt", "")),
            reference=str(value.get("reference", "")),
            base=None if value.get("base") is None else str(value["base"]),
            tuned=str(value.get("tuned", "")),
            expected=tuple(value.get("expected", ())),
        )

    def is_right(self, completion: str | None) -> bool | None:
        """Return whether a completion is right. None: there is no completion, or no expected
        text."""
        if completion is None or not self.expected:
            return None
        return is_right(completion, self.expected)


@dataclass(frozen=True)
class Results:
    """The results of a job, from the records of its stages."""

    comparisons: tuple[Comparison, ...]
    """Empty if no rows were held out."""
    facts: tuple[tuple[str, str], ...]
    """Labels and values: time, tokens, memory."""
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]
    """Sentences on why the metrics may mislead."""
    held_out: bool = True
    """Whether the evaluation used held-out prompts. False: it used training prompts."""

    @property
    def heading(self) -> str:
        """The heading of the comparisons."""
        return "On held-out rows" if self.held_out else "On training prompts"

    @property
    def samples_heading(self) -> str:
        """The heading of the samples."""
        return f"Completions of {'held-out' if self.held_out else 'training'} prompts"

    @classmethod
    def of(cls, records: Mapping[str, StageRecord]) -> Results:
        """Return the results from the records of a job's stages, by stage name; any may be
        missing."""
        kinds = {record.kind: record for record in records.values()}
        training = last_trained(records.values())
        evaluation = kinds.get("evaluate") or kinds.get("assess")
        samples = evaluation.details.get("samples", []) if evaluation else []
        return cls(
            comparisons=tuple(_comparisons(training, evaluation)),
            facts=tuple(_facts(training, records.values() if "export" in kinds else ())),
            samples=tuple(Sample.of(sample) for sample in samples),
            warnings=tuple(_warnings(kinds.get("prepare"))),
            held_out=evaluation is None or bool(evaluation.details.get("promptsHeldOut", True)),
        )


def last_trained(records: Iterable[StageRecord]) -> StageRecord | None:
    """Return the record of the stage that trained the resulting model. None: no stage did."""
    kinds = {record.kind: record for record in records}
    return next((kinds[kind] for kind in reversed(TRAINING_KINDS) if kind in kinds), None)


def headline(kind: str, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a finished stage that fit on one line after its name."""
    if kind == "prepare":
        return _prepare_headline(metrics)
    if kind in TRAINING_KINDS:
        return _training_headline(metrics, details)
    if kind == "evaluate":
        return _evaluate_headline(metrics)
    if kind in _HEADLINE_METRICS:
        return _labeled(metrics, _HEADLINE_METRICS[kind])
    return [size(metrics["bytes"])] if "bytes" in metrics else []


def seconds_of(record: StageRecord) -> float:
    """Return the duration of a stage in whole seconds."""
    start, end = (
        datetime.datetime.fromisoformat(moment)
        for moment in (record.started_at, record.finished_at)
    )
    return max(0.0, (end - start).total_seconds())


def _seconds_of_attempts(record: StageRecord) -> float:
    """Return the duration of a stage. Of one that was resumed, it is at least the time that all
    attempts trained, because its record has the start of the last attempt."""
    return max(seconds_of(record), record.metrics.get("trainingSeconds", 0.0))


def _warnings(prepare: StageRecord | None) -> list[str]:
    details = prepare.details if prepare else {}
    warnings = []
    if contaminated := details.get("contaminated"):
        warnings.append(
            f"{count(contaminated)} of the held-out rows are also in the training data, so the "
            "held-out metrics look better than they are. Remove these rows from one of the two."
        )
    leaks = details.get("leaks") or {}
    if leaks.get("rows"):
        first = leaks["examples"][0]
        warnings.append(
            f"{count(leaks['rows'])} of {count(leaks['checked'])} held-out rows have text that is "
            f"also in the training data, such as {first['heldOut']} in {first['training']}: "
            f"{first['span']}"
        )
    return warnings


# ---- comparisons --------------------------------------------------------------------------------


def _comparisons(training: StageRecord | None, evaluation: StageRecord | None) -> list[Comparison]:
    if evaluation and evaluation.kind == "assess":
        return _alignment_comparisons(evaluation.metrics)
    metrics = _with_training_losses(training, evaluation)
    tuned, base = metrics.get("validationLoss"), metrics.get("baseValidationLoss")
    if training and training.kind not in SUPERVISED_KINDS:
        return [_lower_is_better("Held-out loss", base, tuned)] if tuned is not None else []
    rows = []
    if tuned is not None:
        rows += [
            _lower_is_better("Held-out loss (nats per token)", base, tuned),
            _lower_is_better("Held-out perplexity", _perplexity(base), _perplexity(tuned)),
        ]
    if "answerAccuracy" in metrics:
        rows.append(_right_answers(metrics))
    return [*rows, *_without_context(metrics)]


def _without_context(metrics: Mapping[str, float]) -> list[Comparison]:
    """Compare the models on the questions alone; []: the rows have no retrieved context."""
    if "validationLossWithoutContext" not in metrics:
        return []
    suffix = "WithoutContext"
    alone = {
        name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)
    }
    label = "Held-out loss without context"
    rows = [_lower_is_better(label, alone.get("baseValidationLoss"), alone["validationLoss"])]
    if "answerAccuracy" in alone:
        answers = _right_answers(alone)
        rows.append(replace(answers, label=f"{answers.label} without context"))
    return rows


def _with_training_losses(
    training: StageRecord | None, evaluation: StageRecord | None
) -> dict[str, float]:
    """Return the evaluation's metrics. Losses that it does not have come from the training."""
    losses: dict[str, float] = {
        name: training.metrics[name]
        for name in ("validationLoss", "baseValidationLoss")
        if training and name in training.metrics
    }
    return {**losses, **(evaluation.metrics if evaluation else {})}


def _alignment_comparisons(metrics: Mapping[str, float]) -> list[Comparison]:
    """Compare the aligned model with the model that the alignment started from. The base of a share
    is 0.5, the value of a random choice."""
    rows = []
    for label, name in _ALIGNMENT_METRICS.items():
        if name in metrics:
            is_share = name != "reward"
            base = 0.5 if is_share else metrics.get("startReward")
            shown = percent if is_share else number
            verdict = _verdict(metrics[name], base)
            rows.append(Comparison(label, shown(base), shown(metrics[name]), "", verdict))
    for label, name in _REWARD_HACKING_SIGNS.items():
        if name in metrics:
            before = metrics.get(f"start{name[:1].upper()}{name[1:]}")
            rows.append(Comparison(label, number(before), number(metrics[name]), "", ""))
    return rows


_ALIGNMENT_METRICS = {
    "Preference accuracy": "preferenceAccuracy",
    "Reward": "reward",
    "Reward model accuracy": "rewardAccuracy",
    "Win rate by the second judge": "winRate",
}
"""Metrics of which higher is better, by label."""
_REWARD_HACKING_SIGNS = {
    "KL divergence (nats per completion)": "kl",
    "Length relative to the start model": "lengthRatio",
    "Distinct word pairs": "distinct",
    "Repeated word sequences": "repetition",
    "Completions that ended": "complete",
    "Sycophancy shift": "sycophancyShift",
}
"""Metrics that show reward hacking, by label. Neither direction is better in itself."""


def _lower_is_better(label: str, base: float | None, tuned: float | None) -> Comparison:
    change, verdict = "", _verdict(base, tuned)
    if base and tuned is not None and math.isfinite(base) and math.isfinite(tuned):
        change = f"{signed(100 * (tuned / base - 1))} %"
    return Comparison(label, number(base), number(tuned), change, verdict)


def _verdict(higher: float | None, lower: float | None) -> Verdict:
    """Return "better" if `higher` is the higher value. "": equal, or one is missing."""
    if higher is None or lower is None or higher == lower:
        return ""
    return "better" if higher > lower else "worse"


def _right_answers(metrics: Mapping[str, float]) -> Comparison:
    """Return right answers as counts, or as shares if the number of questions is unknown."""
    tuned, base = metrics["answerAccuracy"], metrics.get("baseAnswerAccuracy")
    questions = metrics.get("questions")

    def shown(share: float | None) -> str:
        if share is None or not questions:
            return percent(share)
        return f"{round(share * questions)}/{round(questions)}"

    change = ""
    if base is not None:
        gain = round((tuned - base) * questions) if questions else round(100 * (tuned - base))
        change = f"{signed(gain)}{'' if questions else ' points'}"
    return Comparison("Answers right", shown(base), shown(tuned), change, _verdict(tuned, base))


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


# ---- facts --------------------------------------------------------------------------------------


def _facts(
    training: StageRecord | None, all_stages: Iterable[StageRecord]
) -> list[tuple[str, str]]:
    """Return labels and values of the training.

    `all_stages`: the records of the whole job, for its total time; empty while the job runs.
    """
    metrics = training.metrics if training else {}
    total = sum(_seconds_of_attempts(record) for record in all_stages)
    facts = []
    if "trainingSeconds" in metrics:
        in_total = f", {duration(total)} in total" if total else ""
        facts.append(("Time", f"{duration(metrics['trainingSeconds'])} training{in_total}"))
    elif total:
        facts.append(("Time", duration(total)))
    if "steps" in metrics:
        facts.append(("Steps", _steps(metrics, training.details if training else {})))
    if "tokens" in metrics:
        facts.append(("Tokens trained on", count(metrics["tokens"])))
    if "tokensPerSecond" in metrics:
        facts.append(("Tokens per second", count(metrics["tokensPerSecond"])))
    if "peakMemoryBytes" in metrics:
        facts.append(("Peak memory", size(metrics["peakMemoryBytes"])))
    if "trainedParameters" in metrics:
        facts.append(("Trained parameters", _trained_parameters(metrics)))
    return facts


def _steps(metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
    parts = [count(metrics["steps"])]
    if "epochs" in metrics:
        parts[0] += f" ({metrics['epochs']:.3g} epoch{'' if metrics['epochs'] == 1 else 's'})"
    best = details.get("bestStep")
    if best is not None and best != metrics["steps"]:
        parts.append(f"best at step {count(best)}")
    return ", ".join([*parts, *_run_notes(details)])


def _run_notes(details: Mapping[str, Any]) -> list[str]:
    notes = ["stopped early"] if details.get("stoppedEarly") else []
    if details.get("stoppedByGuard"):
        notes = [details["stoppedByGuard"]]
    if details.get("resumedAtStep") is not None:
        notes.append(f"resumed after step {count(details['resumedAtStep'])}")
    return notes


def _trained_parameters(metrics: Mapping[str, float]) -> str:
    trained, every = metrics["trainedParameters"], metrics.get("parameters")
    if not every:
        return count(trained)
    return f"{count(trained)} of {count(every)} ({100 * trained / every:.3g} %)"


# ---- headlines ----------------------------------------------------------------------------------


def _prepare_headline(metrics: Mapping[str, float]) -> list[str]:
    always = {"rows": "rows", "tokens": "tokens", "heldOutRows": "held out"}
    parts = [f"{count(metrics[key])} {name}" for key, name in always.items() if key in metrics]
    return parts + _labeled(metrics, {"augmentedRows": "augmented", **ROW_OUTCOMES})


def _training_headline(metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
    parts = [f"{count(metrics['steps'])} steps"] if "steps" in metrics else []
    if "validationLoss" in metrics:
        parts.append(f"held-out loss {_loss_change(metrics)}")
    elif "baseReward" in metrics:
        parts.append(
            f"held-out reward {number(metrics['baseReward'])} → {number(metrics['reward'])}"
        )
    elif "finalLoss" in metrics:
        parts.append(f"loss {number(metrics['finalLoss'])}")
    if "generalLoss" in metrics:
        before, after = metrics["baseGeneralLoss"], metrics["generalLoss"]
        parts.append(f"general loss {number(before)} → {number(after)}")
    if "tokensPerSecond" in metrics:
        parts.append(f"{count(metrics['tokensPerSecond'])} tokens/s")
    return parts + _run_notes(details)


def _evaluate_headline(metrics: Mapping[str, float]) -> list[str]:
    parts = [f"held-out loss {_loss_change(metrics)}"] if "validationLoss" in metrics else []
    if "answerAccuracy" in metrics:
        parts.append(f"{_right_answers(metrics).tuned} answers right")
    return parts


_AUGMENTED = {
    "augmentedRows": "new rows",
    "paraphrases": "paraphrases",
    "inversions": "inversions",
    "templatedRows": "in templates",
    "leftOutRows": "left out",
}
_HEADLINE_METRICS: Mapping[str, Mapping[str, str]] = {
    "augment": _AUGMENTED,
    "rewrite": _AUGMENTED,
    "pairs": {
        "preferences": "preferences",
        "heldOutPreferences": "held out",
        "skippedRows": "skipped",
        "droppedRows": "dropped",
    },
    "assess": {
        "preferenceAccuracy": "preference accuracy",
        "rewardGain": "reward gain",
        "rewardAccuracy": "reward model accuracy",
        "kl": "nats of KL per completion",
    },
}
"""The metrics in the headline of a stage, by kind, and their labels."""


def _labeled(metrics: Mapping[str, float], labels: Mapping[str, str]) -> list[str]:
    """Return the metrics that exist and are not 0 with their labels: accuracies in percent, whole
    numbers as counts."""
    parts = []
    for name, label in labels.items():
        value = metrics.get(name)
        if value:
            is_share = name.endswith("Accuracy")
            shown = percent if is_share else count if float(value).is_integer() else number
            parts.append(f"{shown(value)} {label}")
    return parts


def _loss_change(metrics: Mapping[str, float]) -> str:
    tuned = number(metrics["validationLoss"])
    base = metrics.get("baseValidationLoss")
    return tuned if base is None else f"{number(base)} → {tuned}"
