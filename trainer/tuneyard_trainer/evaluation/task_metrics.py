"""Metrics of answers against reference texts: each is a function of all answers of a model.

A mean of items is a `mean`, which both models share item by item; what a metric computes from all
answers together, such as BLEU, is a `whole`. Shapes: N answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.answer_metrics import AnswerMetric
from tuneyard_trainer.evaluation import numeric
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.reinforcement.patterns import Pattern
from tuneyard_trainer.reinforcement.rewards import JsonSchema, parsed_json
from tuneyard_trainer.reporting.answers import is_right

MAX_CLASSES = 200
"""The most classes of which the record has a table."""
OTHER = "(other)"
"""The class of an answer that names no class, or several."""

References = Sequence[Sequence[str]]
"""The accepted texts of each answer, at least one."""


@dataclass(frozen=True)
class Scores:
    """The scores of one model's answers by one metric."""

    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """(N,) values whose mean is a metric, by its name."""
    whole: Mapping[str, float] = field(default_factory=dict)
    """Metrics of all answers together."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts beside the metrics, such as the table of classes, by the name of the metric."""

    @property
    def metrics(self) -> dict[str, float]:
        """The value of each metric, by its name."""
        return {name: float(np.mean(values)) for name, values in self.means.items()} | dict(
            self.whole
        )


TaskMetric = Callable[[Sequence[str], References], Scores]


@dataclass(frozen=True)
class Compared:
    """A metric of the answers of both models."""

    tuned: Scores
    base: Scores | None
    """None: the model before was not measured."""

    @classmethod
    def of(
        cls,
        metric: TaskMetric,
        references: References,
        tuned: Sequence[str],
        before: Sequence[str] | None,
    ) -> Compared:
        """Measure the answers of both models. None: only the tuned model answered."""
        base = None if before is None else metric(before, references)
        return cls(metric(tuned, references), base)

    def items(self, ids: tuple[str, ...]) -> dict[str, Items]:
        """Return the values of each answer, by the metric that is their mean."""
        return {
            name: Items(ids, values, self.base.means[name] if self.base else None, True)
            for name, values in self.tuned.means.items()
        }

    @property
    def details(self) -> dict[str, Any]:
        """The facts of both models beside the metrics, by the name of the metric."""
        bases = self.base.details if self.base else {}
        return {
            name: {"tuned": facts} | ({"base": bases[name]} if name in bases else {})
            for name, facts in self.tuned.details.items()
        }


# ---- words --------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 12)  # classes and references come again for each answer
def normalized(text: str) -> str:
    """Return a text without case, punctuation, the articles a, an and the, and repeated white
    space, as SQuAD's metric does (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    kept = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", kept).split())


_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def exact_match(answers: Sequence[str], references: References) -> Scores:
    """Return whether each answer equals one of its references after `normalized`."""
    return _mean(
        "exactMatch",
        [
            float(normalized(answer) in {normalized(text) for text in accepted})
            for answer, accepted in zip(answers, references, strict=True)
        ],
    )


def token_f1(answers: Sequence[str], references: References) -> Scores:
    """Return each answer's best F1 of words with one of its references, as SQuAD's metric does. Two
    texts without words are equal."""
    return _mean(
        "tokenF1",
        [
            max(_f1(normalized(answer).split(), normalized(text).split()) for text in accepted)
            for answer, accepted in zip(answers, references, strict=True)
        ],
    )


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def rouge(answers: Sequence[str], references: References) -> Scores:
    """Return each answer's best F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming (Lin
    2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    found = [
        scorer.score_multi(list(accepted), answer)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return Scores({kind: np.array([each[kind].fmeasure for each in found]) for kind in kinds})


# ---- translations -------------------------------------------------------------------------------


def bleu(answers: Sequence[str], references: References) -> Scores:
    """Return BLEU of all answers (Papineni et al. 2002), by sacrebleu, and the mean BLEU of single
    answers: 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    single = BLEU(effective_order=True)
    found = [
        single.sentence_score(answer, list(accepted)).score
        for answer, accepted in zip(answers, references, strict=True)
    ]
    whole = BLEU().corpus_score(list(answers), _streams(references)).score
    return Scores({"sentenceBleu": np.array(found)}, {"bleu": whole})


def chrf(answers: Sequence[str], references: References) -> Scores:
    """Return chrF of all answers (Popović 2015), by sacrebleu, and the mean chrF of single answers:
    0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    found = [
        metric.sentence_score(answer, list(accepted)).score
        for answer, accepted in zip(answers, references, strict=True)
    ]
    whole = metric.corpus_score(list(answers), _streams(references)).score
    return Scores({"sentenceChrf": np.array(found)}, {"chrf": whole})


def _streams(references: References) -> list[list[Any]]:
    """Return the first reference of each answer, the second, and so on; None, which sacrebleu's
    types leave out: there is none."""
    most = max(map(len, references))
    return [
        [accepted[number] if number < len(accepted) else None for accepted in references]
        for number in range(most)
    ]


# ---- forms --------------------------------------------------------------------------------------


def json_valid(answers: Sequence[str], _references: References) -> Scores:
    """Return whether each whole answer is JSON."""
    return _mean("jsonValid", [float(_is_json(answer)) for answer in answers])


def _is_json(text: str) -> bool:
    try:
        parsed_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def schema_valid(schema: JsonSchema, answers: Sequence[str], _references: References) -> Scores:
    """Return whether each whole answer is JSON that a schema accepts."""
    return _mean("schemaValid", [float(schema.accepts(answer)) for answer in answers])


def pattern_match(pattern: Pattern, answers: Sequence[str], _references: References) -> Scores:
    """Return whether a pattern is found in each answer."""
    return _mean("patternMatch", [float(pattern.is_in(answer)) for answer in answers])


# ---- classes ------------------------------------------------------------------------------------


def classification(answers: Sequence[str], references: References) -> Scores:
    """Return whether each answer names its class, the mean F1 of the classes, and the table of
    classes (rows) and named classes (columns).

    The classes are the first references, of which those that differ by case alone are one. An
    answer names a class that it equals, or equals after `normalized`, or else the only one whose
    words it contains, apart from classes whose words are a part of that one's. The table is left
    out with more than MAX_CLASSES classes: its size is their number squared.
    """
    spelled: dict[str, str] = {}
    texts = [accepted[0].strip() for accepted in references]
    wanted = [spelled.setdefault(text.casefold(), text) for text in texts]
    classes = sorted({*wanted})
    named = [_class_of(answer, classes) for answer in answers]
    counts = Counter(zip(wanted, named, strict=True))
    rows, columns = Counter(wanted), Counter(named)
    scores = [2 * counts[each, each] / (rows[each] + columns[each]) for each in classes]
    return Scores(
        means={
            "classAccuracy": np.array(
                [float(name == of) for name, of in zip(named, wanted, strict=True)]
            )
        },
        whole={"macroF1": float(np.mean(scores))},
        details={"classification": _table(classes, counts)} if len(classes) <= MAX_CLASSES else {},
    )


def _table(classes: Sequence[str], counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return the table of classes (rows) and named classes (columns), as JSON."""
    columns = [*classes, OTHER]
    table = [[counts.get((row, column), 0) for column in columns] for row in classes]
    return {"classes": columns, "counts": table}


def _class_of(answer: str, classes: Sequence[str]) -> str:
    text = answer.strip().casefold()
    equal = [each for each in classes if each.casefold() == text]
    if not equal and (words := normalized(answer)):  # "A" and "+" have none
        equal = [each for each in classes if normalized(each) == words]
    found = equal or [each for each in classes if is_right(answer, [each])]
    # "not spam" contains the words of "spam" too.
    longest = [
        each
        for each in found
        if not any(is_right(other, [each]) for other in found if other != each)
    ]
    return longest[0] if len(longest) == 1 else OTHER


# ---- numbers ------------------------------------------------------------------------------------


def numeric_match(answers: Sequence[str], references: References) -> Scores:
    """Return whether each final answer is equal to one of its references, as a number or an
    expression, by math-verify, and how many could not be compared."""
    values, counts = numeric.compared(answers, references)
    return Scores({"numericMatch": np.array(values)}, details={"numeric": counts})


# ---- all of them --------------------------------------------------------------------------------

BY_NAME: Mapping[AnswerMetric, TaskMetric] = {
    "exactMatch": exact_match,
    "tokenF1": token_f1,
    "rouge": rouge,
    "bleu": bleu,
    "chrf": chrf,
    "json": json_valid,
    "classification": classification,
    "numeric": numeric_match,
}
"""The metrics by their names in `evaluate.metrics`."""


def task_metrics(
    names: Sequence[AnswerMetric],
    schema: str | None,
    pattern: str | None,
    field: str = "evaluate",
) -> list[TaskMetric]:
    """Return the metrics that a manifest names. `schema`: of the field `answerSchema`. `pattern`:
    of `answerPattern`. `field`: the field that holds both. Raises StageError BadSchema."""
    found = [BY_NAME[name] for name in names]
    if schema is not None:
        parsed = JsonSchema.parsed(schema, f"{field}.answerSchema")
        found.append(partial(schema_valid, parsed))
    if pattern is not None:
        found.append(partial(pattern_match, Pattern(pattern)))
    return found


def _mean(name: str, values: Sequence[float]) -> Scores:
    return Scores({name: np.array(values, dtype=np.float64)})
