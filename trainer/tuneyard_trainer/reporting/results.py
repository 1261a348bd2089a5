"""A job's figures for people: what the console, the report and the model card show alike."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuneyard.api.plan import StageRecord
from tuneyard.api.stage_settings import SUPERVISED_KINDS, TRAINING_KINDS
from tuneyard_trainer.reporting.formatting import ABSENT, count, duration, number, signed, size

ROW_OUTCOMES = {
    "skippedRows": "skipped",
    "droppedRows": "dropped",
    "truncatedRows": "truncated",
    "splitRows": "split",
}
"""What may have become of rows on their way, by the prepare stage's metric."""

Verdict = Literal["better", "worse", ""]


@dataclass(frozen=True)
class Comparison:
    """One line of the table base against tuned, ready to print."""

    label: str
    base: str
    tuned: str
    change: str
    verdict: Verdict
    """Whether the change is for the better; "" where that cannot be said."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what was answered. `base` is None where the base was not asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str
    expected: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Sample:
        return cls(
            prompt=str(value.get("prompt", "")),
            reference=str(value.get("reference", "")),
            base=None if value.get("base") is None else str(value["base"]),
            tuned=str(value.get("tuned", "")),
            expected=tuple(value.get("expected", ())),
        )

    def is_right(self, answer: str | None) -> bool | None:
        """By the evaluation's own rule: any expected text in the answer, case aside. None: nothing
        is expected, or nothing was answered."""
        if answer is None or not self.expected:
            return None
        return any(text.casefold() in answer.casefold() for text in self.expected)


@dataclass(frozen=True)
class Figures:
    """What a job's records say of its result."""

    comparisons: tuple[Comparison, ...]
    """Empty where nothing was held out."""
    facts: tuple[tuple[str, str], ...]
    """Label and value: time, tokens, memory."""
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]
    """Sentences that put the figures in doubt."""
    held_out: bool = True
    """False: the answers that were measured are to prompts of training."""

    @property
    def heading(self) -> str:
        """Of the comparisons."""
        return "On held-out rows" if self.held_out else "On prompts of training"

    @property
    def samples_heading(self) -> str:
        """Of the samples."""
        return f"Answers to {'held-out prompts' if self.held_out else 'prompts of training'}"

    @classmethod
    def of(cls, records: Mapping[str, StageRecord]) -> Figures:
        """From the records of a job's stages, by stage name; any of them may be missing."""
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
    """The stage whose model came out; None: there was none."""
    kinds = {record.kind: record for record in records}
    return next((kinds[kind] for kind in reversed(TRAINING_KINDS) if kind in kinds), None)


def headline(kind: str, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
    """The few figures of a finished stage that fit behind its name."""
    if kind == "prepare":
        return _prepared(metrics)
    if kind in TRAINING_KINDS:
        return _trained(metrics, details)
    if kind == "evaluate":
        return _evaluated(metrics)
    if kind in _SHOWN:
        return _shown(metrics, _SHOWN[kind])
    return [size(metrics["bytes"])] if "bytes" in metrics else []


def seconds_of(record: StageRecord) -> float:
    """How long the stage took, to the second."""
    start, end = (
        datetime.datetime.fromisoformat(moment)
        for moment in (record.started_at, record.finished_at)
    )
    return max(0.0, (end - start).total_seconds())


def _warnings(prepare: StageRecord | None) -> list[str]:
    contaminated = prepare.details.get("contaminated") if prepare else None
    if not contaminated:
        return []
    return [
        f"{count(contaminated)} of the held-out rows are also in the training data: the held-out "
        "figures look better than they are."
    ]


# ---- the table ----------------------------------------------------------------------------------


def _measured(training: StageRecord | None, evaluation: StageRecord | None) -> dict[str, float]:
    """The evaluation's metrics; losses that it did not measure as training measured them."""
    losses: dict[str, float] = {
        name: training.metrics[name]
        for name in ("validationLoss", "baseValidationLoss")
        if training and name in training.metrics
    }
    return {**losses, **(evaluation.metrics if evaluation else {})}


def _comparisons(training: StageRecord | None, evaluation: StageRecord | None) -> list[Comparison]:
    metrics = _measured(training, evaluation)
    if evaluation and evaluation.kind == "assess":
        return _aligned(evaluation.metrics)
    tuned, base = metrics.get("validationLoss"), metrics.get("baseValidationLoss")
    if training and training.kind not in SUPERVISED_KINDS:
        return [_falling("Held-out loss", base, tuned)] if tuned is not None else []
    lines = []
    if tuned is not None:
        lines += [
            _falling("Held-out loss (nats per token)", base, tuned),
            _falling("Held-out perplexity", _perplexity(base), _perplexity(tuned)),
        ]
    if "answerAccuracy" in metrics:
        lines.append(_answers(metrics))
    return lines


def _aligned(metrics: Mapping[str, float]) -> list[Comparison]:
    """Of an alignment: the model that it started from, and the aligned one."""
    lines = []
    if "preferenceAccuracy" in metrics:
        right = metrics["preferenceAccuracy"]
        lines.append(_rising("Preferences followed", 0.5, right, share=True))
    if "reward" in metrics:
        lines.append(_rising("Reward", metrics.get("startReward"), metrics["reward"]))
    if "rewardAccuracy" in metrics:
        right = metrics["rewardAccuracy"]
        lines.append(_rising("Pairs that the reward model orders", 0.5, right, share=True))
    if "winRate" in metrics:
        won = metrics["winRate"]
        lines.append(_rising("Answers that a second judge prefers", 0.5, won, share=True))
    for label, name in _WATCHED.items():
        if name in metrics:
            before = metrics.get(f"start{name[:1].upper()}{name[1:]}")
            lines.append(Comparison(label, number(before), number(metrics[name]), "", ""))
    return lines


_WATCHED = {
    "KL (nats per answer)": "kl",
    "Length over the start's": "lengthRatio",
    "Variety of all answers": "distinct",
    "Repeated words in an answer": "repetition",
    "Answers that end by themselves": "complete",
    "Yielding to opinions": "sycophancyShift",
}
"""Signs of a reward being gamed; none is better or worse by itself."""


def _rising(label: str, base: float | None, tuned: float, *, share: bool = False) -> Comparison:
    """A figure that shall rise; `share`: shown in percent."""
    shown = _percent if share else number
    verdict = _verdict(-base if base is not None else None, -tuned)
    return Comparison(label, shown(base), shown(tuned), "", verdict)


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"


def _falling(label: str, base: float | None, tuned: float | None) -> Comparison:
    """A figure that shall fall."""
    change, verdict = "", _verdict(base, tuned)
    if base and tuned is not None and math.isfinite(base) and math.isfinite(tuned):
        change = f"{signed(100 * (tuned / base - 1))} %"
    return Comparison(label, number(base), number(tuned), change, verdict)


def _verdict(base: float | None, tuned: float | None) -> Verdict:
    if base is None or tuned is None or base == tuned:
        return ""
    return "better" if tuned < base else "worse"


def _answers(metrics: Mapping[str, float]) -> Comparison:
    """As counts where the number of questions is known, else as shares."""
    tuned, base = metrics["answerAccuracy"], metrics.get("baseAnswerAccuracy")
    questions = metrics.get("questions")

    def shown(share: float | None) -> str:
        if share is None:
            return ABSENT
        if questions:
            return f"{round(share * questions)}/{round(questions)}"
        return f"{100 * share:.0f} %"

    change = ""
    if base is not None:
        gain = round((tuned - base) * questions) if questions else round(100 * (tuned - base))
        change = f"{signed(gain)}{'' if questions else ' points'}"
    verdict = _verdict(-base if base is not None else None, -tuned)
    return Comparison("Answers right", shown(base), shown(tuned), change, verdict)


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _facts(
    training: StageRecord | None, all_stages: Iterable[StageRecord]
) -> list[tuple[str, str]]:
    """`all_stages`: the whole job's records; none while it runs, so that no total is told."""
    metrics = training.metrics if training else {}
    total = sum(seconds_of(record) for record in all_stages)
    facts = []
    if "trainingSeconds" in metrics:
        in_all = f", {duration(total)} in all" if total else ""
        facts.append(("Time", f"{duration(metrics['trainingSeconds'])} training{in_all}"))
    elif total:
        facts.append(("Time", duration(total)))
    if "steps" in metrics:
        facts.append(("Steps", _steps(metrics, training.details if training else {})))
    if "tokens" in metrics:
        facts.append(("Tokens trained on", count(metrics["tokens"])))
    if "tokensPerSecond" in metrics:
        facts.append(("Tokens per second", count(metrics["tokensPerSecond"])))
    if "peakMemoryBytes" in metrics:
        facts.append(("Memory at its peak", size(metrics["peakMemoryBytes"])))
    if "trainedParameters" in metrics:
        facts.append(("Trained parameters", _trained_parameters(metrics)))
    return facts


def _steps(metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
    parts = [count(metrics["steps"])]
    if "epochs" in metrics:
        parts[0] += f" ({metrics['epochs']:.3g} epoch{'' if metrics['epochs'] == 1 else 's'})"
    if details.get("stoppedEarly"):
        parts.append("stopped early")
    best = details.get("bestStep")
    if best is not None and best != metrics["steps"]:
        parts.append(f"best at step {count(best)}")
    if details.get("resumedAtStep") is not None:
        parts.append(f"resumed after step {count(details['resumedAtStep'])}")
    return ", ".join(parts)


def _trained_parameters(metrics: Mapping[str, float]) -> str:
    trained, every = metrics["trainedParameters"], metrics.get("parameters")
    if not every:
        return count(trained)
    return f"{count(trained)} of {count(every)} ({100 * trained / every:.3g} %)"


# ---- one stage ----------------------------------------------------------------------------------


def _prepared(metrics: Mapping[str, float]) -> list[str]:
    always = {"rows": "rows", "tokens": "tokens", "heldOutRows": "held out"}
    parts = [f"{count(metrics[key])} {name}" for key, name in always.items() if key in metrics]
    lost = {key: name for key, name in ROW_OUTCOMES.items() if metrics.get(key)}
    return parts + [f"{count(metrics[key])} {name}" for key, name in lost.items()]


def _trained(metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
    parts = [f"{count(metrics['steps'])} steps"] if "steps" in metrics else []
    if "validationLoss" in metrics:
        parts.append(f"held-out loss {_from_to(metrics)}")
    elif "baseReward" in metrics:
        parts.append(
            f"held-out reward {number(metrics['baseReward'])} → {number(metrics['reward'])}"
        )
    elif "finalLoss" in metrics:
        parts.append(f"loss {number(metrics['finalLoss'])}")
    if "tokensPerSecond" in metrics:
        parts.append(f"{count(metrics['tokensPerSecond'])} tokens/s")
    if details.get("stoppedEarly"):
        parts.append("stopped early")
    if details.get("resumedAtStep") is not None:
        parts.append(f"resumed after step {count(details['resumedAtStep'])}")
    return parts


def _evaluated(metrics: Mapping[str, float]) -> list[str]:
    parts = [f"held-out loss {_from_to(metrics)}"] if "validationLoss" in metrics else []
    if "answerAccuracy" in metrics:
        parts.append(f"{_answers(metrics).tuned} answers right")
    return parts


_SHOWN: Mapping[str, Mapping[str, str]] = {
    "pairs": {
        "preferences": "preferences",
        "heldOutPreferences": "held out",
        "skippedRows": "skipped",
        "droppedRows": "dropped",
    },
    "assess": {
        "preferenceAccuracy": "of preferences followed",
        "rewardGain": "reward gained",
        "rewardAccuracy": "of pairs ordered by the reward model",
        "kl": "nats per answer from the start",
    },
}
"""What is told of a stage, by metric."""


def _shown(metrics: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    """The figures that there are and that are not 0; accuracies in percent."""
    return [
        f"{_percent(metrics[key]) if key.endswith('Accuracy') else number(metrics[key])} {name}"
        if not float(metrics[key]).is_integer() or key.endswith("Accuracy")
        else f"{count(metrics[key])} {name}"
        for key, name in names.items()
        if metrics.get(key)
    ]


def _from_to(metrics: Mapping[str, float]) -> str:
    tuned = number(metrics["validationLoss"])
    base = metrics.get("baseValidationLoss")
    return tuned if base is None else f"{number(base)} → {tuned}"


# ---- numbers and text ---------------------------------------------------------------------------
