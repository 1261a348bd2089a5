"""The results of a job as text, for the console, the report and the model card."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tuneyard.api.evaluation import prefixed
from tuneyard.api.gates import GateResult
from tuneyard.api.plan import StageRecord
from tuneyard.api.stage_settings import EVALUATION_KINDS, SUPERVISED_KINDS, TRAINING_KINDS
from tuneyard.api.suites import is_main
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.reporting.formatting import (
    count,
    duration,
    number,
    percent,
    signed,
    size,
)
from tuneyard_trainer.reporting.labels import (
    ALIGNMENT_METRICS,
    ANSWER_METRICS,
    POINTS,
    REWARD_HACKING_SIGNS,
    REWARDS,
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

MOST_CLASSES = 20
"""Classes of a table that is shown."""
Z = 1.959964
"""The normal quantile of a 95% interval."""

Verdict = Literal["better", "worse", "unclear", ""]
UNCLEAR = "no clear difference"
EXAMPLES = "Tuning or examples"
"""The label of the fact whether tuning was worth it."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table that compares the base model with the tuned model, as text."""

    label: str
    base: str
    tuned: str
    change: str
    verdict: Verdict
    """Whether the tuned model is better or worse. unclear: the 95% interval of the difference
    contains 0, which `change` says. "": equal, or no direction is better."""
    on_suite: bool = False
    """Whether this is a metric of a suite, not of held-out rows or prompts."""


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
    where: str = ""
    """The name of its item, such as `row 12`; "": unknown."""
    few_shot: str | None = None
    """The base model's completion with worked examples. None: not measured."""

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Sample:
        """Return the sample that an evaluation stage recorded."""
        return cls(
            prompt=str(value.get("prompt", "")),
            reference=str(value.get("reference", "")),
            base=None if value.get("base") is None else str(value["base"]),
            tuned=str(value.get("tuned", "")),
            expected=tuple(value.get("expected", ())),
            where=str(value.get("where", "")),
            few_shot=None if value.get("fewShot") is None else str(value["fewShot"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the sample as JSON, as `of` reads it."""
        found = {
            "where": self.where,
            "prompt": self.prompt,
            "reference": self.reference,
            "base": self.base,
            "tuned": self.tuned,
            "expected": list(self.expected),
        }
        return found | ({} if self.few_shot is None else {"fewShot": self.few_shot})

    def is_right(self, completion: str | None) -> bool | None:
        """Return whether a completion is right. None: there is no completion, or no expected
        text."""
        if completion is None or not self.expected:
            return None
        return is_right(completion, self.expected)


@dataclass(frozen=True)
class ClassTable:
    """How often the tuned model named each class, for each right class."""

    named: tuple[str, ...]
    """The columns: the classes, and that of answers which name none of them."""
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """The right classes with their counts."""

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> ClassTable | None:
        """Return the table of an evaluation's details. None: it has none, or more than
        MOST_CLASSES classes."""
        table = (details.get("classification") or {}).get("tuned") or {}
        named, counts = table.get("classes", ()), table.get("counts", ())
        if not counts or len(counts) > MOST_CLASSES:
            return None
        rows = ((str(name), tuple(row)) for name, row in zip(named, counts, strict=False))
        return cls(tuple(map(str, named)), tuple(rows))


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
    classes: ClassTable | None = None
    """None: the answers are not classified."""
    gates: tuple[GateResult, ...] = ()
    """The verdicts on the gates."""
    held_out: bool = True
    """Whether the evaluation used held-out prompts. False: it used training prompts."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """The metrics of the evaluation, by name."""

    @property
    def own_heading(self) -> str:
        """The heading of the comparisons on the job's own rows or prompts."""
        return "On held-out rows" if self.held_out else "On training prompts"

    @property
    def heading(self) -> str:
        """The heading of the comparisons."""
        rows = self.own_heading
        found = {each.on_suite for each in self.comparisons}
        if found == {True}:
            return "On suites"
        return f"{rows} and suites" if True in found else rows

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
        evaluation = next((kinds[kind] for kind in EVALUATION_KINDS if kind in kinds), None)
        details = evaluation.details if evaluation else {}
        samples = details.get("samples", [])
        gates = tuple(GateResult.model_validate(value) for value in details.get("gates", ()))
        return cls(
            comparisons=tuple(_comparisons(training, evaluation)),
            facts=(
                *_facts(training, records.values() if "export" in kinds else ()),
                *_against_examples(evaluation.metrics if evaluation else {}),
            ),
            samples=tuple(Sample.of(sample) for sample in samples),
            warnings=(
                *_warnings(kinds.get("prepare")),
                *_leaked_items(kinds.get("leaks")),
                *details.get("findings", ()),
                *_missed_gates(gates),
            ),
            gates=gates,
            classes=ClassTable.of(details) if evaluation else None,
            measured=evaluation.metrics if evaluation else {},
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
    if kind in EVALUATION_KINDS:
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


def seconds_of_attempts(record: StageRecord) -> float:
    """Return the duration of a stage. Of one that was resumed, it is at least the time that all
    attempts trained, because its record has the start of the last attempt."""
    return max(seconds_of(record), record.metrics.get("trainingSeconds", 0.0))


def _missed_gates(gates: Iterable[GateResult]) -> list[str]:
    """Return a warning for each advisory gate that is not met; a required one ends the job."""
    return [
        f"The advisory gate is not met: {gate.sentence}. {gate.remedy}"
        for gate in gates
        if not gate.passed
    ]


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


def _leaked_items(leaks: StageRecord | None) -> list[str]:
    """Return a warning if items of suites are in the training data."""
    found = leaks.details["leaks"] if leaks else {}
    if not found.get("items"):
        return []
    first = found["examples"][0]
    return [
        f"{count(found['items'])} of {count(found['checked'])} items of suites have text that is "
        f"also in the training data, such as {first['item']} in {first['training']}: "
        f"{first['span']}"
    ]


# ---- comparisons --------------------------------------------------------------------------------


def _comparisons(training: StageRecord | None, evaluation: StageRecord | None) -> list[Comparison]:
    evidence = _Evidence(evaluation.details.get("evidence", {}) if evaluation else {})
    if evaluation is not None:
        found = evaluation.metrics
        losses = _with_training_losses(training, evaluation)
        rows = _on_held_out_rows(losses, evidence) if "validationLoss" in found else []
        return [*rows, *_alignment_comparisons(found, evidence), *_on_suites(found, evidence)]
    metrics = _with_training_losses(training, None)
    if training and training.kind not in SUPERVISED_KINDS:
        tuned, base = metrics.get("validationLoss"), metrics.get("baseValidationLoss")
        return [_lower_is_better("Held-out loss", base, tuned)] if tuned is not None else []
    return _on_held_out_rows(metrics, evidence)


def _on_held_out_rows(metrics: Mapping[str, float], evidence: _Evidence) -> list[Comparison]:
    """Compare the models on the held-out rows of fine-tuning data."""
    tuned, base = metrics.get("validationLoss"), metrics.get("baseValidationLoss")
    rows = []
    if tuned is not None:
        losses = [
            _lower_is_better("Held-out loss (nats per token)", base, tuned),
            _lower_is_better("Held-out perplexity", _perplexity(base), _perplexity(tuned)),
        ]
        rows += [evidence.marked(loss, "validationLoss") for loss in losses]
    if "answerAccuracy" in metrics:
        rows.append(evidence.marked(_right_answers(metrics), "answerAccuracy"))
    answers = _answer_metrics(metrics, evidence)
    return [*rows, *answers, *_without_context(metrics, evidence)]


def _answer_metrics(metrics: Mapping[str, float], evidence: _Evidence) -> list[Comparison]:
    """Compare the answers of both models by the metrics that the manifest names."""
    rows = []
    for name, label in ANSWER_METRICS.items():
        if name in metrics:
            tuned, base = metrics[name], metrics.get(prefixed("base", name))
            shown = number if name in POINTS else percent
            row = Comparison(label, shown(base), shown(tuned), "", _verdict(tuned, base))
            rows.append(evidence.marked(row, name))
    return rows


def _on_suites(metrics: Mapping[str, float], evidence: _Evidence) -> list[Comparison]:
    """Compare the models on suites, whose metrics are SUITE/NAME, SUITE/baseNAME and
    SUITE/NAMEChange. There is a verdict where the direction of the metric is known."""
    rows = []
    for metric, tuned in metrics.items():
        suite, _, name = metric.rpartition("/")
        if not suite or name.startswith("base") or name.endswith("Change"):
            continue
        base = metrics.get(prefixed("base", metric))
        higher = evidence.higher_is_better(metric)
        verdict: Verdict = ""
        if higher is not None:
            verdict = _verdict(tuned, base) if higher else _verdict(base, tuned)
        row = Comparison(f"{suite}: {name}", number(base), number(tuned), "", verdict, True)
        rows.append(evidence.marked(row, metric))
    return rows


class _Evidence:
    """The evidence of an evaluation, by metric: what `evaluation.items` recorded."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def higher_is_better(self, metric: str) -> bool | None:
        """Return the direction of a metric. None: no items are recorded."""
        found: bool | None = self._found.get(metric, {}).get("higherIsBetter")
        return found

    def marked(
        self, comparison: Comparison, metric: str, chance: float | None = None
    ) -> Comparison:
        """Return a comparison that calls a difference one only if its 95% interval excludes 0.
        `chance`: the value that the metric is compared with, instead of a base model's."""
        found = self._found.get(metric, {})
        interval = found.get("differenceInterval" if chance is None else "interval")
        same = chance or 0.0
        if interval is None or not interval[0] <= same <= interval[1] or not comparison.verdict:
            return comparison
        change = f"{comparison.change}, {UNCLEAR}" if comparison.change else UNCLEAR
        return replace(comparison, change=change, verdict="unclear")


def _without_context(metrics: Mapping[str, float], evidence: _Evidence) -> list[Comparison]:
    """Compare the models on the questions alone; []: the rows have no retrieved context."""
    if "validationLossWithoutContext" not in metrics:
        return []
    suffix = "WithoutContext"
    alone = {
        name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)
    }
    label = "Held-out loss without context"
    loss = _lower_is_better(label, alone.get("baseValidationLoss"), alone["validationLoss"])
    rows = [evidence.marked(loss, f"validationLoss{suffix}")]
    if "answerAccuracy" in alone:
        answers = _right_answers(alone)
        answers = replace(answers, label=f"{answers.label} without context")
        rows.append(evidence.marked(answers, f"answerAccuracy{suffix}"))
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


def _alignment_comparisons(metrics: Mapping[str, float], evidence: _Evidence) -> list[Comparison]:
    """Compare the aligned model with the model that the alignment started from. The base of a share
    is 0.5, the value of a random choice."""
    rows = []
    for label, name in ALIGNMENT_METRICS.items():
        if name in metrics:
            is_share = name not in REWARDS
            base = 0.5 if is_share else metrics.get(prefixed("start", name))
            shown = percent if is_share else number
            verdict = _verdict(metrics[name], base)
            start = f"{shown(base)} by chance" if is_share else shown(base)
            row = Comparison(label, start, shown(metrics[name]), "", verdict)
            rows.append(evidence.marked(row, name, base if is_share else None))
    for label, name in REWARD_HACKING_SIGNS.items():
        if name in metrics:
            before = metrics.get(prefixed("start", name))
            rows.append(Comparison(label, number(before), number(metrics[name]), "", ""))
    return rows


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


def _against_examples(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return whether tuning did better than worked examples in the prompt; []: not measured."""
    labels = {"answerAccuracy": "answers right", **ANSWER_METRICS}
    name = next((name for name in labels if f"{name}FewShotGain" in metrics), None)
    if name is None:
        return []
    gain, error = metrics[f"{name}FewShotGain"], Z * metrics[f"{name}FewShotGainError"]
    verdict = UNCLEAR
    if abs(gain) > error:
        verdict = "tuning was worth it" if gain > 0 else "examples in the prompt do better"
    examples, tokens = metrics["fewShotExamples"], metrics["fewShotTokens"]
    tuned, prompted = metrics[name], metrics[prefixed("baseFewShot", name)]
    return [
        (
            EXAMPLES,
            f"{verdict}: {labels[name]} {percent(tuned)} after tuning and {percent(prompted)} of "
            f"the base model with {count(examples)} example{'' if examples == 1 else 's'}, which "
            f"cost {count(tokens)} tokens in each request",
        )
    ]


# ---- facts --------------------------------------------------------------------------------------


def _facts(
    training: StageRecord | None, all_stages: Iterable[StageRecord]
) -> list[tuple[str, str]]:
    """Return labels and values of the training.

    `all_stages`: the records of the whole job, for its total time; empty while the job runs.
    """
    metrics = training.metrics if training else {}
    total = sum(seconds_of_attempts(record) for record in all_stages)
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
    for name in filter(is_main, metrics):
        of_base = metrics.get(prefixed("base", name))
        parts.append(f"{name} {number(of_base)} → {number(metrics[name])}")
    if "tokensPerSecond" in metrics:
        parts.append(f"{count(metrics['tokensPerSecond'])} tokens/s")
    return parts + _run_notes(details)


def _evaluate_headline(metrics: Mapping[str, float]) -> list[str]:
    parts = [f"held-out loss {_loss_change(metrics)}"] if "validationLoss" in metrics else []
    if "answerAccuracy" in metrics:
        parts.append(f"{_right_answers(metrics).tuned} answers right")
    return parts + _labeled(metrics, _ALIGNED)


_ALIGNED = {
    "preferenceAccuracy": "preference accuracy",
    "rewardGain": "reward gain",
    "independentRewardGain": "independent reward gain",
    "rewardAccuracy": "reward model accuracy",
    "kl": "nats of KL per completion",
}
"""The metrics of an alignment in the headline of its evaluation, and their labels."""


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
