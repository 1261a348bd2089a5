"""Multiple choice by log-probability: which of the given texts the model finds likeliest.

A model need not follow instructions for it, so it shows the ability of small and of base models
too. The layouts are those of BLiMP (two sentences), TruthfulQA, BIG-bench's `target_scores`, and
questions with choices and an answer as in MMLU, ARC and HellaSwag.

Shapes: N items, O options of all items together.
"""

from __future__ import annotations

import csv
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.example import RowError
from tuneyard_trainer.evaluation.suites.rows import text_of, unfit

EXPECTED = (
    "good and bad; or question, choices and answer; or input and target_scores; or TruthfulQA's "
    "columns"
)
"""The columns of an item."""
QUESTION = "Question: {question}\nAnswer:"
"""The text before an option, as lm-evaluation-harness writes it for ARC."""

_QUESTIONS = ("question", "ctx", "context", "query", "goal", "input", "prompt")
_OPTIONS = ("choices", "endings", "options")
_ANSWERS = ("answer", "answerKey", "answer_key", "label", "gold")
_GOOD = ("good", "sentence_good")
_BAD = ("bad", "sentence_bad")


@dataclass(frozen=True)
class Choice:
    """An item: a text, and options of which the model should find a right one likeliest."""

    context: str
    """The text before each option. "": an option is a text of its own."""
    options: tuple[str, ...]
    """Each as it follows the context, white space included."""
    right: tuple[bool, ...]
    """Whether each option is right."""
    best: int | None = None
    """The option that must beat all wrong ones, whatever the other right ones are (TruthfulQA's
    MC1). None: any right one."""


def parse(row: Mapping[str, Any]) -> Choice:
    """Return a row's item. Raises RowError."""
    question = text_of(row, *_QUESTIONS)
    good, bad = text_of(row, *_GOOD), text_of(row, *_BAD)
    if good and bad:
        return _choice(question, (good, bad), (True, False))
    if isinstance(row.get("target_scores"), dict):
        scores = row["target_scores"]
        return _choice(question, tuple(scores), tuple(_score(each) for each in scores.values()))
    if targets := row.get("mc2_targets") or row.get("mc1_targets"):
        return _truthful_json(row, question, targets)
    if text_of(row, "Best Answer"):
        return _truthful_table(row)
    given = next((row[name] for name in _OPTIONS if name in row), None)
    if question and given is not None:
        return _with_answer(row, question, given)
    raise unfit(row, EXPECTED)


def _choice(
    question: str | None,
    options: Sequence[str],
    right: Sequence[bool],
    best: int | None = None,
) -> Choice:
    if len(options) < 2 or not all(isinstance(each, str) and each.strip() for each in options):
        raise RowError("an item needs at least two options, each a text", "UnknownShape")
    if len(right) != len(options):
        raise RowError(f"{len(options)} options have {len(right)} labels", "InvalidLabel")
    if all(right) or not any(right):
        raise RowError("at least one option must be right, and at least one wrong", "InvalidLabel")
    if question is None:
        return Choice("", tuple(options), tuple(right), best)
    # A text that ends so brings its own place for the answer.
    is_open = question.rstrip().endswith(("Answer:", "A:"))
    context = question.rstrip() if is_open else QUESTION.format(question=question.strip())
    return Choice(context, tuple(f" {option.strip()}" for option in options), tuple(right), best)


def _score(given: Any) -> bool:
    if isinstance(given, bool | int | float) and 0 <= given <= 1:
        return given > 0.5
    raise RowError(f"a score of target_scores is from 0 to 1, and it is {given!r}", "InvalidLabel")


def _truthful_json(row: Mapping[str, Any], question: str | None, targets: Any) -> Choice:
    """Return the item of a row of TruthfulQA's set on the hub. Its best answer is the right one of
    `mc1_targets`."""
    options, labels = _targets(targets)
    first = row.get("mc1_targets")
    best = None
    if first:
        names, firsts = _targets(first)
        best_text = next((name for name, label in zip(names, firsts, strict=True) if label), None)
        best = options.index(best_text) if best_text in options else None
    return _choice(question, options, labels, best)


def _targets(targets: Any) -> tuple[list[str], list[bool]]:
    choices = targets.get("choices") if isinstance(targets, dict) else None
    labels = targets.get("labels") if isinstance(targets, dict) else None
    if not isinstance(choices, list) or not isinstance(labels, list) or len(choices) != len(labels):
        raise RowError(
            "mc1_targets and mc2_targets hold choices and as many labels", "InvalidLabel"
        )
    return choices, [_score(label) for label in labels]


def _truthful_table(row: Mapping[str, Any]) -> Choice:
    """Return the item of a row of TruthfulQA's published table."""
    best = str(row["Best Answer"]).strip()
    correct = [each for each in _answers(row, "Correct Answers") if each != best]
    wrong = _answers(row, "Incorrect Answers")
    options = [best, *correct, *wrong]
    right = [True] * (1 + len(correct)) + [False] * len(wrong)
    return _choice(text_of(row, "Question"), options, right, best=0)


def _answers(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the different answers in a cell, which semicolons separate."""
    parts = str(row.get(column) or "").split(";")
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _with_answer(row: Mapping[str, Any], question: str, given: Any) -> Choice:
    """Return the item of a row with a list of options and the place, letter or text of the right
    one."""
    labels: list[str] = list(string.ascii_uppercase)
    options = given
    if isinstance(given, dict):  # ARC: {"text": [...], "label": [...]}
        options, labels = given.get("text"), [str(each) for each in given.get("label") or labels]
    elif isinstance(given, str):
        options = next(csv.reader([given], delimiter=";", skipinitialspace=True), [])
    if not isinstance(options, list):
        raise RowError(f"the options must be a list, and they are {given!r}", "UnknownShape")
    answer = next((row[name] for name in _ANSWERS if row.get(name) is not None), None)
    index = _index(answer, options, labels)
    return _choice(question, options, [place == index for place in range(len(options))])


def _index(answer: Any, options: Sequence[Any], labels: Sequence[str]) -> int:
    """Return the place of the right option. A text that equals an option goes before a letter, and
    a letter before a number, which counts from 0."""
    text = str(answer).strip()
    texts = [str(option).strip() for option in options]
    for names in [] if isinstance(answer, int) else [texts, list(labels[: len(options)])]:
        if text in names:
            return names.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    raise RowError(
        f"the answer {answer!r} is none of the {len(options)} options, their letters or their "
        "places from 0",
        "InvalidLabel",
    )


def asked(item: Choice) -> str:
    """Return the text that an item asks; without a context, its right option."""
    if item.context:
        return item.context.removeprefix("Question: ").removesuffix("Answer:").strip()
    return item.options[item.best if item.best is not None else item.right.index(True)]


# ---- measuring ----------------------------------------------------------------------------------


def option_rows(
    items: Sequence[Choice], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Rows:
    """Return a row for each option of each item, in order, whose targets are the option's tokens.

    A text longer than `max_length` tokens loses its beginning. An option without a context follows
    the token that begins a text, so that its first token counts too.
    """
    texts = [item.context + option for item in items for option in item.options]
    contexts = [item.context for item in items for _ in item.options]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows: list[list[int]] = []
    masks: list[NDArray[np.bool_]] = []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begun = {
        context: tokenizer(context, add_special_tokens=False)["input_ids"]
        for context in {*contexts}
    }
    for ids, context in zip(encoded, contexts, strict=True):
        before = _common(begun[context], ids) if context else 0
        row = [first, *ids] if not before else list(ids)
        start = before or 1
        cut = max(0, len(row) - max_length)
        start = max(1, start - cut)
        rows.append(row[cut:])
        masks.append(np.arange(len(row) - cut) >= start)
    return Rows.of(rows, masks)


def _common(context: Sequence[int], whole: Sequence[int]) -> int:
    """Return the number of tokens of the context: at most so many as the text shares with it, where
    the tokenizer joins its end with the beginning of the option, and at least one is left."""
    count = min(len(context), len(whole) - 1)
    return next((i for i in range(count) if context[i] != whole[i]), count)


def scores(
    items: Sequence[Choice], logprobs_O: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Return metrics of each item, by name (N,).

    - accuracy: 1.0 if the likeliest option is right. If an item has a best option, 1.0 if it is
      likelier than all wrong ones (TruthfulQA's MC1, Lin et al. 2022, arXiv:2109.07958).
    - accuracyPerCharacter: the same by log-probability for each character, which favors no short
      option. Absent if all items are texts without a context.
    - probability: the share of the right options in the probability of all options (MC2).

    All are 0.0 for an item with an option whose log-probability is NaN.
    """
    starts = np.cumsum([0, *(len(item.options) for item in items)])
    found: dict[str, list[float]] = {"accuracy": [], "accuracyPerCharacter": [], "probability": []}
    for item, start, end in zip(items, starts[:-1], starts[1:], strict=True):
        logprobs = logprobs_O[start:end]
        if np.isnan(logprobs).any():  # of a model that diverged: argmax would find NaN likeliest
            for values in found.values():
                values.append(0.0)
            continue
        lengths = np.array([_characters(item, option) for option in item.options])
        found["accuracy"].append(_is_right(item, logprobs))
        found["accuracyPerCharacter"].append(_is_right(item, logprobs / lengths))
        odds = np.exp(logprobs - logprobs.max())
        found["probability"].append(float(odds[np.array(item.right)].sum() / odds.sum()))
    if not any(item.context for item in items):
        del found["accuracyPerCharacter"]
    return {name: np.array(values) for name, values in found.items()}


def _characters(item: Choice, option: str) -> int:
    """Return the length of an option without the space after its context, as acc_norm of
    lm-evaluation-harness counts it: there this space is the task's delimiter."""
    return len(option.removeprefix(" ") if item.context else option)


def _is_right(item: Choice, values: NDArray[np.float64]) -> float:
    if item.best is None:
        return float(item.right[int(np.argmax(values))])
    return float(values[item.best] > values[~np.array(item.right)].max())
