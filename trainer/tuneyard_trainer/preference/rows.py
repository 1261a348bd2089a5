"""One row as preferences: a pair, a ranking, or a single answer with a thumb.

Shapes, recognised row by row (turns are strings, or lists of {role, content} or {from, value}):

- `{prompt, chosen, rejected}`, also with whole conversations on both sides, or without `prompt`
- hh-rlhf: whole dialogues in `chosen` and `rejected`, "Human:" and "Assistant:" before the turns
- `{prompt, answers: [best first]}`, or with `ranks` beside them (1 is best)
- `{prompt, completion, label}`: label true or false, 1 or 0, "up" or "down"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuneyard.api.sources import FieldMap
from tuneyard_trainer.data.example import ROLES, Example, Message, RowError, check
from tuneyard_trainer.data.rows import BrokenRow, Row

Fault = Literal[
    "UnreadableRow",
    "UnknownShape",
    "InvalidTurns",
    "EmptyCompletion",
    "IdenticalSides",
    "DifferingPrompts",
    "InvalidLabel",
]
"""Why a row states no preference."""

PROMPTS = ("prompt", "question", "instruction")
RANKINGS = ("answers", "responses", "completions")
SINGLES = ("completion", "answer", "response")
LABELS = ("label", "thumbs", "thumb")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_THUMBS = {"up": 1.0, "down": 0.0, "true": 1.0, "false": 0.0}


class PreferenceError(RowError):
    """A row that states no preference; `fault` names why."""

    def __init__(self, fault: Fault, message: str) -> None:
        self.fault = fault
        super().__init__(message)


@dataclass(frozen=True)
class Judged:
    """One prompt with the answers that were judged."""

    row: int
    """The row's number in its file, from 1."""
    prompt: tuple[Message, ...]
    """Up to the turn that is answered."""
    answers: tuple[str, ...]
    """Best first; one alone where it was judged by itself."""
    label: float = 1.0
    """Of a pair: the probability that the first answer is the better one. Of a single answer: 1.0
    thumbs up, 0.0 thumbs down. Of a ranking: 1.0."""
    file: str = ""

    @property
    def examples(self) -> list[Example]:
        """Each answer with its prompt."""
        return [
            Example(
                self.row,
                "chat",
                (*self.prompt, Message("assistant", answer)),
                prompt=as_transcript(self.prompt),
                completion=answer,
                file=self.file,
            )
            for answer in self.answers
        ]


def judged(row: Row, fields: FieldMap, *, labeled: bool) -> list[Judged]:
    """What a row states. `labeled`: as single answers with thumbs, a pair as one up and one down.
    Raises PreferenceError."""
    value = row.value
    if isinstance(value, BrokenRow):
        raise PreferenceError("UnreadableRow", value.reason)
    if "chosen" in value or "rejected" in value:
        found = [_pair(row, value, fields)]
    elif name := _first(value, RANKINGS):
        found = [_ranking(row, value, name, fields)]
    elif name := _first(value, LABELS):
        found = [_single(row, value, name, fields)]
    else:
        raise PreferenceError("UnknownShape", f"it has {', '.join(value) or 'no fields'}")
    if labeled:
        found = [single for one in found for single in _as_singles(one)]
    elif len(found[0].answers) == 1:
        raise PreferenceError("UnknownShape", "it judges one answer by itself, which is for kto")
    for one in found:
        _check(one)
    return found


def as_transcript(prompt: Sequence[Message]) -> str:
    """For tokenizers without a chat template: one turn as it is, several as hh-rlhf writes them."""
    if len(prompt) == 1:
        return prompt[0].content
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [f"\n\n{names.get(turn.role, turn.role.title())}: {turn.content}" for turn in prompt]
    return "".join(turns) + "\n\nAssistant: "


# ---- shapes -----------------------------------------------------------------------------------


def _pair(row: Row, value: Mapping[str, Any], fields: FieldMap) -> Judged:
    prompt = _prompt(value, fields)
    chosen = _side(value.get("chosen"), "chosen", prompt)
    rejected = _side(value.get("rejected"), "rejected", prompt)
    if chosen[0] != rejected[0]:
        raise PreferenceError("DifferingPrompts", "chosen and rejected answer different prompts")
    if chosen[1].strip() == rejected[1].strip():
        raise PreferenceError("IdenticalSides", "chosen and rejected are the same answer")
    answers = (chosen[1], rejected[1])
    return Judged(row.number, chosen[0], answers, _probability(value), row.file)


def _ranking(row: Row, value: Mapping[str, Any], name: str, fields: FieldMap) -> Judged:
    prompt = _prompt(value, fields)
    given = value[name]
    if prompt is None or not isinstance(given, list) or len(given) < 2:
        raise PreferenceError("UnknownShape", f"a ranking needs a prompt and 2 {name} or more")
    answers = [_side(answer, f"{name}[{i}]", prompt)[1] for i, answer in enumerate(given)]
    ranks = value.get("ranks", list(range(1, len(answers) + 1)))
    if not isinstance(ranks, list) or sorted(ranks, key=str) != sorted(
        range(1, len(answers) + 1), key=str
    ):
        raise PreferenceError(
            "InvalidLabel", f"ranks must be 1 to {len(answers)}, each once, and are {ranks}"
        )
    ordered = tuple(answers[ranks.index(rank)] for rank in range(1, len(answers) + 1))
    if len({answer.strip() for answer in ordered}) < len(ordered):
        raise PreferenceError("IdenticalSides", "two answers of the ranking are the same")
    return Judged(row.number, prompt, ordered, file=row.file)


def _single(row: Row, value: Mapping[str, Any], name: str, fields: FieldMap) -> Judged:
    prompt = _prompt(value, fields)
    field = fields.completion or _first(value, SINGLES) or SINGLES[0]
    if prompt is None and fields.messages is None and not isinstance(value.get("messages"), list):
        raise PreferenceError("UnknownShape", f"it has no prompt, but {', '.join(value)}")
    given = value.get(field, value.get(fields.messages or "messages"))
    prompt, answer = _side(given, field, prompt)
    return Judged(row.number, prompt, (answer,), _thumb(value[name], name), row.file)


def _as_singles(one: Judged) -> list[Judged]:
    if len(one.answers) == 1:
        return [one]
    if len(one.answers) > 2:
        raise PreferenceError("UnknownShape", "a ranking says nothing of single answers")
    if one.label <= 0.5:
        raise PreferenceError("InvalidLabel", "a tie says nothing of single answers")
    chosen, rejected = one.answers
    return [
        Judged(one.row, one.prompt, (chosen,), 1.0, one.file),
        Judged(one.row, one.prompt, (rejected,), 0.0, one.file),
    ]


# ---- parts ------------------------------------------------------------------------------------


def _prompt(value: Mapping[str, Any], fields: FieldMap) -> tuple[Message, ...] | None:
    """None where the sides hold it."""
    name = fields.prompt or _first(value, PROMPTS)
    given = value.get(name) if name else None
    if given is None:
        return None
    if isinstance(given, str):
        return _transcript(given) or (Message("user", given),)
    return _turns(given, name or PROMPTS[0])


def _side(
    given: Any, name: str, prompt: tuple[Message, ...] | None
) -> tuple[tuple[Message, ...], str]:
    """The prompt that a side answers, and its answer."""
    if isinstance(given, str):
        turns = () if prompt else _transcript(given)
        if prompt is not None and not turns:
            return prompt, _answer(given, name)
    else:
        turns = _turns(given, name)
    if not turns:
        raise PreferenceError("UnknownShape", f"{name} holds no prompt, and neither does the row")
    if turns[-1].role != "assistant":
        raise PreferenceError("EmptyCompletion", f"{name} ends with a turn by {turns[-1].role}")
    before = turns[:-1]
    if prompt is not None and before and before != prompt:
        raise PreferenceError("DifferingPrompts", f"{name} begins with another prompt")
    return prompt or before, _answer(turns[-1].content, name)


def _answer(text: str, name: str) -> str:
    if not text.strip():
        raise PreferenceError("EmptyCompletion", f"{name} is empty")
    return text


def _transcript(text: str) -> tuple[Message, ...]:
    """hh-rlhf's dialogues; () for any other text."""
    starts = list(_TURN.finditer(text))
    if not starts or starts[0].start() != 0 or starts[0][1] != "Human":
        return ()
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return tuple(
        Message("user" if match[1] == "Human" else "assistant", text[match.end() : end].strip())
        for match, end in zip(starts, ends, strict=True)
    )


def _turns(given: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise PreferenceError(
            "UnknownShape", f"{name} must be text or a list of turns, and is {_kind(given)}"
        )
    return tuple(_turn(turn, name) for turn in given)


def _turn(turn: Any, name: str) -> Message:
    if isinstance(turn, dict):
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        content = turn.get("content", turn.get("value"))
        if role and isinstance(content, str):
            return Message(role, content)
    raise PreferenceError("InvalidTurns", f"a turn of {name} is no {{role, content}}")


def _probability(value: Mapping[str, Any]) -> float:
    given = value.get("probability", 1.0)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0.5 <= given <= 1:
        raise PreferenceError("InvalidLabel", f"probability must be 0.5 to 1, and is {given!r}")
    return float(given)


def _thumb(given: Any, name: str) -> float:
    if isinstance(given, bool | int | float) and given in (0, 1):
        return float(given)
    if isinstance(given, str) and given.lower() in _THUMBS:
        return _THUMBS[given.lower()]
    raise PreferenceError("InvalidLabel", f"{name} must be true or false, and is {given!r}")


def _check(one: Judged) -> None:
    try:
        for example in one.examples:
            check(example)
    except RowError as error:
        raise PreferenceError("InvalidTurns", str(error)) from error


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if value.get(name) is not None), None)


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
