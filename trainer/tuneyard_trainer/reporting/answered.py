"""The answers of the models side by side, for the report's document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuneyard.api.report import Answer, Comparison, Score
from tuneyard_trainer.reporting.comparisons import finite
from tuneyard_trainer.reporting.results import Sample

MAX_ANSWERS = 500
"""Answers in the document: a page of them is some megabytes."""
MAX_CHARACTERS = 8000
"""Characters of each text; a longer one is cut off."""


def answers(
    samples: Sequence[Sample],
    items: Mapping[str, Mapping[str, Sequence[Any]]],
    comparisons: Sequence[Comparison],
) -> list[Answer]:
    """Return the first MAX_ANSWERS answers.

    `items`: the values of each item by metric, as `evaluation.json` holds them. `comparisons`:
    those of the report, for the directions of the metrics.
    """
    own = {each.metric: each.higher_is_better for each in comparisons if each.scope != "suite"}
    scores = _scores({metric: items[metric] for metric in own if metric in items})
    return [
        _answer(sample, scores.get(sample.where, {}) if sample.where else {}, own)
        for sample in samples[:MAX_ANSWERS]
    ]


def _scores(items: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, dict[str, Score]]:
    """Return the values of each item by its name and the metric."""
    found: dict[str, dict[str, Score]] = {}
    for metric, columns in items.items():
        if metric.endswith("WithoutContext"):
            continue
        base = columns.get("base") or [None] * len(columns["ids"])
        for where, tuned, before in zip(columns["ids"], columns["tuned"], base, strict=False):
            score = Score(tuned=finite(tuned), base=finite(before))
            found.setdefault(where, {})[metric] = score
    return found


def _answer(sample: Sample, scores: dict[str, Score], higher: Mapping[str, bool | None]) -> Answer:
    tuned, base = sample.is_right(sample.tuned), sample.is_right(sample.base)
    if tuned is None and "answerAccuracy" not in scores:
        tuned, base = next(_right_or_wrong(scores), (None, None))
    texts = (sample.prompt, sample.reference, sample.base, sample.few_shot, sample.tuned)
    flipped = tuned is not None and base is not None and tuned != base
    return Answer(
        id=sample.where,
        prompt=_cut(sample.prompt),
        reference=_cut(sample.reference),
        expected=list(sample.expected),
        base=None if sample.base is None else _cut(sample.base),
        few_shot=None if sample.few_shot is None else _cut(sample.few_shot),
        tuned=_cut(sample.tuned),
        base_right=base,
        few_shot_right=sample.is_right(sample.few_shot),
        tuned_right=tuned,
        scores=scores,
        flipped="none" if not flipped else "gained" if tuned else "lost",
        worse=(flipped and not tuned) or (not flipped and _fell(scores, higher)),
        length=len(sample.tuned),
        base_length=None if sample.base is None else len(sample.base),
        clipped=any(text is not None and len(text) > MAX_CHARACTERS for text in texts),
    )


_CHECKS = ("exactMatch", "classAccuracy", "schemaValid", "jsonValid", "patternMatch")
"""Metrics by which an answer is right or wrong if no text is expected."""


def _right_or_wrong(scores: Mapping[str, Score]) -> Iterator[tuple[bool, bool | None]]:
    for name in _CHECKS:
        score = scores.get(name)
        if score is not None and score.tuned in (0.0, 1.0):
            yield bool(score.tuned), None if score.base is None else bool(score.base)


def _fell(scores: Mapping[str, Score], higher: Mapping[str, bool | None]) -> bool:
    """Return whether the first metric of the answer that differs is worse. The loss of the
    reference says little about the answer, and counts only if nothing else is known."""
    names = sorted(scores, key=lambda name: name == "validationLoss")
    for name in names:
        score, up = scores[name], higher.get(name)
        if up is None or score.tuned is None or score.base is None or score.tuned == score.base:
            continue
        return (score.tuned < score.base) == up
    return False


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
