"""Parsing one row into preferences: a pair, a ranking, or a single completion with a label.

Shapes, recognized row by row (turns are strings, or lists of {role, content} or {from, value}):

- `{prompt, chosen, rejected}`, also with whole conversations on both sides, or without `prompt`
- hh-rlhf: whole dialogues in `chosen` and `rejected`, whose turns begin "Human:" or "Assistant:"
- `{prompt, answers: [best first]}`, or in any order with `ranks` (1 is best)
- `{prompt, completion, label}`: `label` is true or false, 1 or 0, "up" or "down"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuneyard.api.sources import FieldMap
from tuneyard_trainer.data.example import ROLES, Example, Message, RowError, check
from tuneyard_trainer.data.formats import row_input, with_input
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
"""The reasons why a row states no preference."""

PROMPTS = ("prompt", "question", "instruction")
RANKINGS = ("answers", "responses", "completions")
SINGLES = ("completion", "answer", "response")
LABELS = ("label", "thumbs", "thumb")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_LABEL_WORDS = {"up": 1.0, "down": 0.0, "true": 1.0, "false": 0.0}


class PreferenceError(RowError):
    """A row that states no preference, for the reason `fault`."""

    def __init__(self, fault: Fault, message: str) -> None:
        self.fault = fault
        super().__init__(message)


@dataclass(frozen=True)
class Preference:
    """One prompt with its rated completions."""

    row: int
    """The row's number in its file, from 1."""
    prompt: tuple[Message, ...]
    """The turns before the completion."""
    completions: tuple[str, ...]
    """Best first. A single completion is rated by its label."""
    label: float = 1.0
    """Of a pair: the probability that the first completion is the better one. Of a single
    completion: 1.0 for good, 0.0 for bad. Of a ranking: 1.0."""
    file: str = ""

    @property
    def examples(self) -> list[Example]:
        """Each completion with its prompt."""
        return [
            Example(
                self.row,
                "chat",
                (*self.prompt, Message("assistant", completion)),
                completion=completion,
                file=self.file,
            )
            for completion in self.completions
        ]


def parse_preferences(row: Row, fields: FieldMap, *, labeled: bool) -> list[Preference]:
    """Return the preferences that a row states. Raises PreferenceError.

    `labeled`: as single completions with labels; a pair becomes a good one and a bad one.
    """
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
        raise PreferenceError("UnknownShape", f"the row has {', '.join(value) or 'no fields'}")
    if labeled:
        found = [single for preference in found for single in _as_singles(preference)]
    elif len(found[0].completions) == 1:
        raise PreferenceError(
            "UnknownShape", "the row rates a single completion, which only kto accepts"
        )
    for preference in found:
        _check(preference)
    return found


# ---- shapes -----------------------------------------------------------------------------------


def _pair(row: Row, value: Mapping[str, Any], fields: FieldMap) -> Preference:
    prompt = _prompt(value, fields)
    chosen = _side(value.get("chosen"), "chosen", prompt)
    rejected = _side(value.get("rejected"), "rejected", prompt)
    if chosen[0] != rejected[0]:
        raise PreferenceError("DifferingPrompts", "chosen and rejected have different prompts")
    if chosen[1].strip() == rejected[1].strip():
        raise PreferenceError("IdenticalSides", "chosen and rejected are the same completion")
    completions = (chosen[1], rejected[1])
    return Preference(row.number, chosen[0], completions, _probability(value), row.file)


def _ranking(row: Row, value: Mapping[str, Any], name: str, fields: FieldMap) -> Preference:
    prompt = _prompt(value, fields)
    given = value[name]
    if prompt is None or not isinstance(given, list) or len(given) < 2:
        raise PreferenceError("UnknownShape", f"a ranking needs a prompt and at least 2 {name}")
    completions = [_side(side, f"{name}[{i}]", prompt)[1] for i, side in enumerate(given)]
    ranks = value.get("ranks", list(range(1, len(completions) + 1)))
    if not isinstance(ranks, list) or sorted(ranks, key=str) != sorted(
        range(1, len(completions) + 1), key=str
    ):
        raise PreferenceError(
            "InvalidLabel",
            f"ranks must hold each of 1 to {len(completions)} once, and ranks is {ranks}",
        )
    ordered = tuple(completions[ranks.index(rank)] for rank in range(1, len(completions) + 1))
    if len({completion.strip() for completion in ordered}) < len(ordered):
        raise PreferenceError("IdenticalSides", "two completions of the ranking are the same")
    return Preference(row.number, prompt, ordered, file=row.file)


def _single(row: Row, value: Mapping[str, Any], name: str, fields: FieldMap) -> Preference:
    prompt = _prompt(value, fields)
    field = fields.completion or _first(value, SINGLES) or SINGLES[0]
    if prompt is None and fields.messages is None and not isinstance(value.get("messages"), list):
        raise PreferenceError(
            "UnknownShape", f"the row has no prompt; its fields are {', '.join(value)}"
        )
    given = value.get(field, value.get(fields.messages or "messages"))
    prompt, completion = _side(given, field, prompt)
    return Preference(row.number, prompt, (completion,), _label(value[name], name), row.file)


def _as_singles(preference: Preference) -> list[Preference]:
    """Return a single completion as it is, and a pair as a good and a bad completion."""
    if len(preference.completions) == 1:
        return [preference]
    if len(preference.completions) > 2:
        raise PreferenceError("UnknownShape", "a ranking does not rate single completions")
    if preference.label <= 0.5:
        raise PreferenceError("InvalidLabel", "a tie does not rate single completions")
    chosen, rejected = preference.completions
    return [
        replace(preference, completions=(chosen,), label=1.0),
        replace(preference, completions=(rejected,), label=0.0),
    ]


# ---- parts ------------------------------------------------------------------------------------


def _prompt(value: Mapping[str, Any], fields: FieldMap) -> tuple[Message, ...] | None:
    """Return the row's prompt; None if its completions hold the prompt."""
    name = fields.prompt or _first(value, PROMPTS)
    given = value.get(name) if name else None
    if given is None:
        return None
    try:
        following = row_input(value, name or "", fields)
    except RowError as error:
        raise PreferenceError("UnknownShape", str(error)) from error
    if isinstance(given, str):
        text = with_input(given, following)
        return _transcript(text) or (Message("user", text),)
    return _turns(given, name or PROMPTS[0])


def _side(
    given: Any, name: str, prompt: tuple[Message, ...] | None
) -> tuple[tuple[Message, ...], str]:
    """Return the prompt and the completion of one side. `prompt`: the row's own."""
    if isinstance(given, str):
        turns = () if prompt else _transcript(given)
        if prompt is not None and not turns:
            return prompt, _completion(given, name)
    else:
        turns = _turns(given, name)
    if not turns:
        raise PreferenceError("UnknownShape", f"neither {name} nor the row holds a prompt")
    if turns[-1].role != "assistant":
        raise PreferenceError("EmptyCompletion", f"{name} ends with a turn by {turns[-1].role}")
    before = turns[:-1]
    if prompt is not None and before and before != prompt:
        raise PreferenceError("DifferingPrompts", f"{name} begins with another prompt")
    return prompt or before, _completion(turns[-1].content, name)


def _completion(text: str, name: str) -> str:
    if not text.strip():
        raise PreferenceError("EmptyCompletion", f"{name} is empty")
    return text


def _transcript(text: str) -> tuple[Message, ...]:
    """Return the turns of an hh-rlhf dialogue; () for any other text."""
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
            "UnknownShape", f"{name} must be text or a list of turns, and it is {_kind(given)}"
        )
    return tuple(_turn(turn, name) for turn in given)


def _turn(turn: Any, name: str) -> Message:
    if isinstance(turn, dict):
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        content = turn.get("content", turn.get("value"))
        if role and isinstance(content, str):
            return Message(role, content)
    raise PreferenceError("InvalidTurns", f"a turn of {name} is not {{role, content}}")


def _probability(value: Mapping[str, Any]) -> float:
    given = value.get("probability", 1.0)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0.5 <= given <= 1:
        raise PreferenceError(
            "InvalidLabel", f"probability must be from 0.5 to 1, and it is {given!r}"
        )
    return float(given)


def _label(given: Any, name: str) -> float:
    if isinstance(given, bool | int | float) and given in (0, 1):
        return float(given)
    if isinstance(given, str) and given.lower() in _LABEL_WORDS:
        return _LABEL_WORDS[given.lower()]
    raise PreferenceError("InvalidLabel", f"{name} must be true or false, and it is {given!r}")


def _check(preference: Preference) -> None:
    """Raise PreferenceError for empty turns, roles out of order and text that cannot be encoded."""
    try:
        for example in preference.examples:
            check(example)
    except RowError as error:
        raise PreferenceError("InvalidTurns", str(error)) from error


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if value.get(name) is not None), None)


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
