"""The answers of the models side by side, for the report's document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuneyard.api.report import Answer, Comparison, Score
from tuneyard_trainer.reporting.comparisons import finite
from tuneyard_trainer.reporting.results import Sample

MAX_ANSWERS = 500
"""Answers in the document: a page of them is some megabytes."""
MAX_SUITE_ANSWERS = 500
"""Answers of all suites together in the document."""
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


def suite_answers(
    suites: Mapping[str, Mapping[str, Sequence[Any]]],
    items: Mapping[str, Mapping[str, Sequence[Any]]],
    comparisons: Sequence[Comparison],
) -> list[Answer]:
    """Return at most MAX_SUITE_ANSWERS answers to the prompts of suites, as many of each if there
    are enough, the flipped and worse ones before others, and in the order of the suites.

    `suites`: the columns of each suite's answers, as `evaluation.json` holds them. `items` and
    `comparisons`: as for `answers`.
    """
    found = {name: _of_suite(name, each, items, comparisons) for name, each in suites.items()}
    most = shares([len(each) for each in found.values()], MAX_SUITE_ANSWERS)
    kept = zip(found.values(), most, strict=True)
    return [answer for each, share in kept for answer in preferred(each, share)]


def shares(sizes: Sequence[int], most: int) -> list[int]:
    """Return how many of each group are shown if at most `most` of all are: as many of each, as far
    as it has them."""
    found = [0] * len(sizes)
    for left, place in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        found[place] = min(sizes[place], (most - sum(found)) // (len(sizes) - left))
    return found


def preferred(answers: Sequence[Answer], most: int) -> list[Answer]:
    """Return at most `most` answers in their order: flipped and worse ones go before others."""
    ranked = sorted(
        range(len(answers)),
        key=lambda i: (answers[i].flipped == "none" and not answers[i].worse, i),
    )
    return [answers[i] for i in sorted(ranked[:most])]


def _of_suite(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    items: Mapping[str, Mapping[str, Sequence[Any]]],
    comparisons: Sequence[Comparison],
) -> list[Answer]:
    own = {each.metric: each.higher_is_better for each in comparisons if each.suite == name}
    higher = {metric.removeprefix(f"{name}/"): better for metric, better in own.items()}
    scores = _scores(
        {metric.removeprefix(f"{name}/"): items[metric] for metric in own if metric in items}
    )
    ids, tuned = columns["id"], columns["tuned"]
    base = columns.get("base") or [None] * len(ids)
    prompts = columns.get("prompt") or [""] * len(ids)
    return [
        _answer(
            Sample(
                prompt=prompt,
                reference="\n".join(filter(None, targets)),
                base=before,
                tuned=after,
                where=where,
            ),
            scores.get(where, {}),
            higher,
        ).model_copy(update={"suite": name})
        for where, prompt, targets, before, after in zip(
            ids, prompts, columns["targets"], base, tuned, strict=True
        )
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


_CHECKS = (
    "exactMatch",
    "numericMatch",
    "classAccuracy",
    "schemaValid",
    "jsonValid",
    "patternMatch",
)
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
