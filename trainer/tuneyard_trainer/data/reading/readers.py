"""The readers of the layouts: from a row's fields to what the row states.

`layouts` has the table that names each reader. All of them parse turns by `turns`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from tuneyard.api.sources import FieldMap
from tuneyard_trainer.data.reading import trees
from tuneyard_trainer.data.reading.example import Message, RowError
from tuneyard_trainer.data.reading.turns import (
    TurnKeys,
    conversation,
    dialogue,
    kind_of,
    side,
    tools,
)

Row = Mapping[str, Any]
Fields = Mapping[str, Sequence[str]]
"""The published columns of each field of a `FieldMap`."""
ASKED: Fields = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "question", "instruction"),
    "input": ("input",),
    "system": ("system",),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "role": (),
    "content": (),
}
"""The fields of the turns before rated answers."""
_NO_PROMPTS = frozenset({*ASKED["system"], *ASKED["tools"], *ASKED["history"]})
_LABEL_WORDS = {"up": 1.0, "down": 0.0, "true": 1.0, "false": 0.0}
RATED: Fields = {
    "answer": ("answer", "response", "text", "generation"),
    "rank": ("rank",),
    "score": ("overall_score", "score", "rating"),
}
"""The keys of each of several answers."""
INNER = frozenset({"role", "content", *RATED})
"""The fields whose names are keys of a turn or an answer, and no columns."""
PAIR_RATINGS: Fields = {
    "probability": ("probability",),
    "score_chosen": ("score_chosen",),
    "score_rejected": ("score_rejected",),
}
"""The columns that rate a pair. UltraFeedback's binarized form has the scores."""
_MAX_NUMBER = 1e30
"""The largest score. JSON can hold integers and infinities that no margin can be computed of."""


@dataclass(frozen=True)
class Parsed:
    """One conversation that a row states."""

    turns: tuple[Message, ...] = ()
    """The turns. Of rated answers: the turns before them."""
    answers: tuple[Message, ...] = ()
    """Answers that the row rates, best first; a single one is rated by `label`. (): none."""
    label: float = 1.0
    """Of two answers: the probability that the first one is better. Of one: 1.0 good, 0.0 bad."""
    plain: tuple[str, str] | None = None
    """A prompt and its completion, exactly as the row has them. None: the row holds turns."""
    text: str = ""
    """A document; `turns` is empty."""
    margin: float | None = None
    """The difference of score between the best and the worst answer. None: there are no scores."""
    tied: int = 0
    """Answers left out, since an earlier one has the same score."""
    tools: tuple[Mapping[str, Any], ...] = ()


class Names:
    """The columns of a layout: those of the field map, or else the published ones."""

    def __init__(self, published: Mapping[str, Sequence[str]], fields: FieldMap) -> None:
        given = {name: value for name, value in fields if value is not None}
        self._columns = {name: tuple(columns) for name, columns in published.items()}
        self._columns |= {name: (value,) for name, value in given.items()}
        self.given: Mapping[str, str] = given
        """The columns that the manifest names, by field."""
        self.keys = TurnKeys(fields.role or "", fields.content or "")

    def of(self, field: str, row: Row) -> str:
        """Return the column of a field: the first one with a value in the row, else the first one.
        "": the layout has no such field."""
        columns = self._columns.get(field, ())
        for name in columns:
            if row.get(name) is not None:
                return name
        return columns[0] if columns else ""

    def published(self, field: str) -> Sequence[str]:
        """Return the columns of a field, of which the first one with a value is read."""
        return self._columns.get(field, ())

    def maps(self, field: str) -> bool:
        """Return whether the manifest names the field's column."""
        return field in self.given

    def value(self, field: str, row: Row) -> Any:
        """Return the value of a field. None: the row has none."""
        return row.get(self.of(field, row))

    @property
    def columns(self) -> frozenset[str]:
        """All columns that may be read."""
        return frozenset(
            name for field, names in self._columns.items() if field not in INNER for name in names
        )


# ---- conversations ----------------------------------------------------------------------------


def turns(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a list of turns, after the row's system prompt if the layout has one."""
    field = names.of("messages", row)
    found = conversation(row.get(field), field, names.keys)
    yield _parsed(row, names, [*_system(row, names), *found])


def ultrachat(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a list of texts, or of turns: ultrachat_200k has `messages`."""
    field = names.of("messages", row)
    yield _parsed(row, names, conversation(row.get(field), field, names.keys, texts=True))


def instruction(row: Row, names: Names) -> Iterator[Parsed]:
    """Read an instruction and its answer, after a `history` of pairs of them; one conversation for
    each of the `instances` that Self-instruct's seeds hold."""
    question = _string(row, names.of("prompt", row))
    for instance in _instances(row, names):
        asked = with_input(question, input_text(instance, names.of("input", instance)))
        answer = _string(instance, names.of("completion", instance))
        thought = _reasoning(row, names)
        turns = [Message("user", asked), Message("assistant", answer, reasoning=thought)]
        yield _parsed(row, names, [*_system(row, names), *_history(row, names), *turns])


def prompt_completion(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a prompt and its completion: two texts, or lists of turns."""
    prompt_field, field = names.of("prompt", row), names.of("completion", row)
    prompt, completion = row.get(prompt_field), row.get(field)
    given = input_text(row, names.of("input", row))
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        if given:
            raise _misplaced_input(names.of("input", row))
        before = side(prompt, prompt_field, "user", names.keys)
        after = side(completion, field, "assistant", names.keys)
        yield _parsed(row, names, [*_system(row, names), *before, *after])
        return
    question = with_input(_string(row, prompt_field), given)
    answer = _string(row, field)
    system, thought = _system(row, names), _reasoning(row, names)
    turns = [*system, Message("user", question), Message("assistant", answer, reasoning=thought)]
    yield replace(_parsed(row, names, turns), plain=(question, answer))


def text(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a document."""
    yield Parsed(text=_string(row, names.of("text", row)))


def openassistant(row: Row, names: Names) -> Iterator[Parsed]:
    """Read the best conversation of a tree."""
    if thread := trees.best(trees.published(row, names)):
        yield Parsed(tuple(thread))


def openassistant_all(row: Row, names: Names) -> Iterator[Parsed]:
    """Read every conversation of a tree, from its root to a last answer."""
    for thread in trees.paths(trees.published(row, names)):
        yield Parsed(tuple(thread))


# ---- rated answers ----------------------------------------------------------------------------


def pair(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a chosen and a rejected answer."""
    before, used = prompt(row, names, turns_first=False)
    fields = names.of("chosen", row), names.of("rejected", row)
    sides = row.get(fields[0]), row.get(fields[1])
    if not before and all(isinstance(each, str) and not dialogue(each) for each in sides):
        before, sides = _without_beginning(row, names)
    found = [answer(each, field, before, names) for each, field in zip(sides, fields, strict=True)]
    (asked, chosen), (other, rejected) = found
    if asked != other:
        raise RowError(f"{fields[0]} and {fields[1]} have different prompts", "DifferingPrompts")
    if _said(chosen) == _said(rejected):
        raise RowError(f"{fields[0]} and {fields[1]} are the same completion", "IdenticalSides")
    label = _probability(row.get(names.of("probability", row), 1.0), names.of("probability", row))
    best, worst = names.value("score_chosen", row), names.value("score_rejected", row)
    margin = float(best - worst) if is_number(best) and is_number(worst) else None
    yield Parsed(asked, (chosen, rejected), label, tools=used, margin=margin)


def ranking(row: Row, names: Names) -> Iterator[Parsed]:
    """Read several answers: best first, or with ranks (1 is best) or scores (higher is better).

    Of answers with the same score, the first one is kept: no order between them is stated.
    """
    before, used = prompt(row, names, turns_first=False)
    field = names.of("answers", row)
    given = row.get(field)
    if not before or not isinstance(given, list) or len(given) < 2:
        raise RowError(f"a ranking needs a prompt and at least 2 {field}", "UnknownShape")
    answers = []
    for index, each in enumerate(given):
        where = f"{field}[{index}]"
        keys = names.published("answer") if isinstance(each, dict) else ()
        key = next((key for key in keys if key in each), None)
        answers.append(answer(each[key] if key else each, where, before, names)[1])
    ranks, are_scores = _ranks(row, names, given)
    ordered = _ordered(answers, ranks)
    if len(set(map(_said, ordered))) < len(ordered):
        raise RowError("two completions of the ranking are the same", "IdenticalSides")
    tied = len(answers) - len(ordered)
    margin = max(ranks) - min(ranks) if are_scores else None
    yield Parsed(before, tuple(ordered), tools=used, margin=margin, tied=tied)


def labeled(row: Row, names: Names) -> Iterator[Parsed]:
    """Read a single answer with a label: good or bad."""
    name = names.of("label", row)
    yield replace(answered(row, names), label=label(row.get(name), name))


def answered(row: Row, names: Names) -> Parsed:
    """Return a prompt and its single answer, not rated. Without a field for it, the answer is the
    last one of the row's turns."""
    field = names.of("completion", row)
    used = _tools(row, names)
    if row.get(field) is None and isinstance(row.get(names.of("messages", row)), list):
        field = names.of("messages", row)
        before = tuple(_prompt_field(row, names))
    else:
        before, used = prompt(row, names, turns_first=False)
    if not before and isinstance(row.get(field), str | None):
        raise RowError(f"the row has no prompt; its fields are {_present(row)}", "UnknownShape")
    before, found = answer(row.get(field), field, before, names)
    return Parsed(tuple(_with_system(row, names, list(before))), (found,), tools=used)


def openassistant_ranks(row: Row, names: Names) -> Iterator[Parsed]:
    """Read the ranked answers to each question of a tree."""
    for thread, answers in trees.ranked(trees.published(row, names)):
        yield Parsed(tuple(thread), tuple(answers))


def answer(
    given: Any, field: str, before: tuple[Message, ...], names: Names
) -> tuple[tuple[Message, ...], Message]:
    """Return the prompt and the answer of one side. `before`: the row's own prompt; () if its sides
    hold it. Raises RowError."""
    if isinstance(given, str):
        found = () if before else tuple(dialogue(given))
        if before:
            return before, _filled(Message("assistant", given), field)
        if not found:
            raise RowError(f"neither {field} nor the row holds a prompt", "UnknownShape")
    else:
        found = tuple(side(given, field, "assistant", names.keys))
    *rest, last = found
    if last.role != "assistant":
        raise RowError(f"{field} ends with a turn by {last.role}", "EmptyCompletion")
    asked = tuple(rest)
    if not before and not asked:
        raise RowError(f"neither {field} nor the row holds a prompt", "UnknownShape")
    if before and asked and asked[0].role == "assistant":
        raise RowError(
            f"{field} has {len(found)} turns after the prompt, and a completion is one turn of the "
            "assistant: put the turns that both sides share into the prompt",
        )
    if before and asked and asked not in (before, _without_system(before)):
        raise RowError(f"{field} begins with another prompt", "DifferingPrompts")
    return before or asked, _filled(last, field)


def _without_beginning(row: Row, names: Names) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """Return the prompt with which two texts begin, and the rest of both. Raises RowError."""
    asked, fields = beginning(row, names), (names.of("chosen", row), names.of("rejected", row))
    if not asked:
        others = [name for name in _columns_beside(row, names) if name not in _NO_PROMPTS]
        problem = (
            f"name its column, for example fields: {{prompt: {others[0]}}}"
            if others
            else f"it is no column, and {fields[0]} and {fields[1]} do not begin with it"
        )
        raise RowError(f"the row has no prompt: {problem}", "UnknownShape")
    chosen, rejected = (str(row[field])[len(asked) :].lstrip() for field in fields)
    return (Message("user", asked.strip()),), (chosen, rejected)


def beginning(row: Row, names: Names) -> str:
    """Return the words with which both texts of a pair begin, which TRL calls an implicit prompt.
    "": there are none, or the row has other columns, one of which may be its prompt."""
    first, second = names.value("chosen", row), names.value("rejected", row)
    if not (isinstance(first, str) and isinstance(second, str)) or _columns_beside(row, names):
        return ""
    pairs = enumerate(zip(first, second, strict=False))
    differ = next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
    found = re.search(r"\s\S*$", first[:differ])  # the texts may differ within a word
    words = first[: found.start()] if found else ""
    return words if words.strip() else ""


def _columns_beside(row: Row, names: Names) -> list[str]:
    """Return the filled columns that are neither a side of a pair nor a rating of it."""
    known = {names.of(field, row) for field in ("chosen", "rejected", *PAIR_RATINGS)}
    return [name for name, value in row.items() if name not in known and value is not None]


def _without_system(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return turns[1:] if turns and turns[0].role == "system" else turns


def _said(answer: Message) -> tuple[str, str]:
    """Return what makes an answer another one: answers may differ in their reasoning alone."""
    return answer.text.strip(), answer.reasoning.strip()


def _filled(answer: Message, field: str) -> Message:
    if not answer.text.strip():
        raise RowError(f"{field} is empty", "EmptyCompletion")
    return answer


def _ranks(row: Row, names: Names, given: list[Any]) -> tuple[list[float], bool]:
    """Return a number for each answer, lower is better, and whether it is a score. Raises RowError
    for ranks that are no order, and for scores that do not cover every answer."""
    count = len(given)
    ranks, field = names.value("ranks", row), names.of("ranks", row)
    rank_keys, score_keys = names.published("rank"), names.published("score")
    if ranks is None and any(_number(each, rank_keys) is not None for each in given):
        ranks, field = [_number(each, rank_keys) for each in given], rank_keys[0]
    scores = names.value("scores", row)
    if scores is None and any(_number(each, score_keys) is not None for each in given):
        scores = [_number(each, score_keys) for each in given]
    named = {"rank", "ranks", "score", "scores"} & names.given.keys()
    if scores is not None and named and named <= {"score", "scores"}:
        ranks = None  # the manifest names the scores, and the ranks are another column
    if ranks is not None:
        if not _are_numbers(ranks) or sorted(ranks) != list(range(1, count + 1)):
            problem = f"{field} must hold each of 1 to {count} once, and {field} is {ranks}"
            raise RowError(problem, "InvalidLabel")
        return [float(rank) for rank in ranks], False
    if scores is None:
        return [float(index) for index in range(count)], False
    if not _are_numbers(scores) or len(scores) != count:
        raise RowError(f"every answer needs a score, and the scores are {scores}", "InvalidLabel")
    return [-float(score) for score in scores], True


def _are_numbers(given: Any) -> bool:
    return isinstance(given, list) and all(map(is_number, given))


def _ordered(answers: Sequence[Message], ranks: Sequence[float]) -> list[Message]:
    best: dict[float, Message] = {}
    for answer, rank in zip(answers, ranks, strict=True):
        best.setdefault(rank, answer)
    if len(best) < 2:
        raise RowError("all answers have the same score", "InvalidLabel")
    return [best[rank] for rank in sorted(best)]


def _number(given: Any, keys: Sequence[str]) -> float | None:
    values = (given.get(key) for key in keys) if isinstance(given, dict) else ()
    return next((float(value) for value in values if is_number(value)), None)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number within _MAX_NUMBER, and neither true nor false."""
    is_given = isinstance(value, int | float) and not isinstance(value, bool)
    return is_given and abs(value) <= _MAX_NUMBER


def _probability(given: Any, field: str) -> float:
    if not is_number(given) or not 0.5 <= given <= 1:
        raise RowError(f"{field} must be from 0.5 to 1, and it is {given!r}", "InvalidLabel")
    return float(given)


def label(given: Any, name: str) -> float:
    """Return 1.0 for good and 0.0 for bad. Raises RowError for anything else."""
    if isinstance(given, bool | int | float) and given in (0, 1):
        return float(given)
    if isinstance(given, str) and given.lower() in _LABEL_WORDS:
        return _LABEL_WORDS[given.lower()]
    raise RowError(f"{name} must be true or false, and it is {given!r}", "InvalidLabel")


# ---- the prompt of a row ----------------------------------------------------------------------


def prompt(
    row: Row, names: Names, *, turns_first: bool
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """Return the turns before a row's answers, and its tools; no turns if the row has no prompt.

    `turns_first`: a list of turns goes before a field `prompt`, whose text is then no dialogue.
    """
    asked = names.value("input", row)
    if isinstance(asked, dict) and names.of("messages", asked) in asked:  # OpenAI's preferences
        found, used = prompt(asked, names, turns_first=True)
        return found, used or _tools(row, names)
    if turns_first:
        turns = _prompt_turns(row, names) or _prompt_field(row, names, dialogues=False)
    else:
        turns = _prompt_field(row, names) or _prompt_turns(row, names)
        while turns and turns[-1].role == "assistant" and not turns[-1].text.strip():
            turns.pop()  # "\n\nAssistant:" at the end of a dialogue asks for the answer
    return tuple(_with_system(row, names, turns)), _tools(row, names)


def _with_system(row: Row, names: Names, turns: list[Message]) -> list[Message]:
    """Return the turns after the row's system turn, if they have none."""
    return [*_system(row, names), *turns] if turns and turns[0].role != "system" else turns


def _prompt_turns(row: Row, names: Names) -> list[Message]:
    field = names.of("messages", row)
    if not isinstance(row.get(field), list) or not row[field]:
        return []
    return conversation(row[field], field, names.keys, texts=True)


def _prompt_field(row: Row, names: Names, *, dialogues: bool = True) -> list[Message]:
    field = names.of("prompt", row)
    given = row.get(field)
    if given is None:
        return []
    # `input` is Alpaca's beside an `instruction`, and something else beside any other prompt.
    is_input = names.maps("input") or field == "instruction"
    following = input_text(row, names.of("input", row)) if is_input else ""
    if isinstance(given, str):
        asked = with_input(given, following)
        turns = (dialogue(asked) if dialogues else []) or [Message("user", asked)]
        return [*_history(row, names), *turns]
    if following:
        raise _misplaced_input(names.of("input", row))
    return side(given, field, "user", names.keys)


# ---- parts of a row ---------------------------------------------------------------------------


def with_input(prompt: str, given: str) -> str:
    """Return the prompt followed by a row's input, as Alpaca renders them; "": there is none."""
    return f"{prompt}\n\n{given}" if given.strip() else prompt


def input_text(value: Row, field: str) -> str:
    """Return the text of an input field; "": the field is absent, null or empty, or there is none
    (`field` is ""). Raises RowError for another type."""
    given = (value.get(field) if field else None) or ""
    if not isinstance(given, str):
        raise RowError(f"{field} must be a string, not {type(given).__name__}", "UnknownShape")
    return given


def _misplaced_input(field: str) -> RowError:
    return RowError(f"{field} cannot follow a prompt that is a list of turns", "UnknownShape")


def _parsed(row: Row, names: Names, turns: Sequence[Message]) -> Parsed:
    return Parsed(tuple(turns), tools=_tools(row, names))


def _tools(row: Row, names: Names) -> tuple[Mapping[str, Any], ...]:
    return tools(names.value("tools", row), names.of("tools", row))


def _instances(row: Row, names: Names) -> Sequence[Row]:
    instances, field = names.value("instances", row), names.of("instances", row)
    if names.of("completion", row) in row or instances is None:
        return [row]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise RowError(f"{field} must be a list of {{input, output}}")
    if not instances:
        raise RowError(f"{field} is empty")
    return instances


def _history(row: Row, names: Names) -> list[Message]:
    """Return the turns of the question-answer pairs before this one; [] if there are none."""
    field = names.of("history", row)
    given = (row.get(field) if field else None) or []
    if not isinstance(given, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in given
    ):
        raise RowError(f"{field} must be a list of pairs [question, answer]", "UnknownShape")
    turns = [(Message("user", asked), Message("assistant", answer)) for asked, answer in given]
    return [turn for pair in turns for turn in pair]


def _string(value: Row, field: str) -> str:
    found = value.get(field)
    if found is None:
        raise RowError(f"{field} is missing; the row has {_present(value)}", "UnknownShape")
    if not isinstance(found, str):
        raise RowError(f"{field} must be a string, not {kind_of(found)}")
    if not found.strip():
        raise RowError(f"{field} is empty")
    return found


def _present(row: Row) -> str:
    return ", ".join(row) or "no fields"


def _system(row: Row, names: Names) -> list[Message]:
    """Return the row's system turn; []: the field is absent, null or ""."""
    field = names.of("system", row)
    return [Message("system", _string(row, field))] if field and row.get(field) else []


def _reasoning(row: Row, names: Names) -> str:
    return input_text(row, names.of("reasoning", row))


def expected(row: Row, names: Names) -> tuple[str, ...]:
    """Return the answers of which a right completion holds one; (): the row has none."""
    field = names.of("expected", row)
    given = row.get(field)
    if given is None or given == "":
        return ()
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        raise RowError(f"{field} must be a string or a list of strings, none of them empty")
    return tuple(answers)


def document(row: Row, names: Names) -> str:
    """Return the id of the document that answers the row; "": the row names none, or the field is
    not mapped."""
    given = names.value("document", row)
    if given is None or given == "":
        return ""
    if not isinstance(given, str | int) or isinstance(given, bool):
        field = names.of("document", row)
        raise RowError(f"{field} must be a document's id, not {kind_of(given)}", "UnknownShape")
    return str(given).strip()
