"""One example to train on, and the checks that each example must pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The role that chat templates know for each role name in files."""


Fault = Literal[
    "UnreadableRow",
    "UnknownShape",
    "InvalidTurns",
    "EmptyCompletion",
    "IdenticalSides",
    "DifferingPrompts",
    "InvalidLabel",
    "UnknownId",
    "DuplicateId",
    "Conflict",
]
"""The kinds of faults by which the rows of a set are counted."""


LONGEST_REASON = 500
"""Characters of a reason: it may quote the row, which can hold any text."""


def printable(text: str, most: int = LONGEST_REASON) -> str:
    """Return a text for a message: on one line, at most `most` characters, and without characters
    that control a terminal or that no log can hold, such as half of a surrogate pair."""
    if not text.isprintable():
        text = "".join(
            character if character.isprintable() else " " if character.isspace() else "?"
            for character in text[: most + 1]
        )
    return text if len(text) <= most else text[: most - 1] + "…"


class RowError(ValueError):
    """A row that cannot become an example. The message states the reason."""

    def __init__(self, message: str, fault: Fault = "InvalidTurns") -> None:
        self.fault = fault
        super().__init__(printable(message))


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool by the assistant."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """The id that the tool's result names. "": the row has none."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str
    """The text; of a tool, its result. "" only of an assistant that calls tools, and of a tool."""
    calls: tuple[ToolCall, ...] = ()
    """The tools that the assistant calls in this turn."""
    reasoning: str = ""
    """The assistant's text before its answer. "": there is none."""
    name: str = ""
    """The name of the tool whose result this is. "": the row names none."""
    call_id: str = ""
    """The id of the call that this is the result of. "": the row has none."""
    train: bool | None = None
    """Whether an assistant's turn is trained on. None: the job's `trainOn` decides."""

    @property
    def text(self) -> str:
        """The content, followed by the calls as JSON objects, one a line; for metrics and views."""
        return "\n".join(filter(None, (self.content, *map(call_text, self.calls))))


def call_text(call: ToolCall) -> str:
    """Return a call as a JSON object."""
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


@dataclass(frozen=True)
class Origin:
    """The row that an augmented row was made from, and what made it."""

    by: str
    """paraphrase, inversion or template."""
    dataset: int
    """The index of the original's data set among those that are trained on."""
    file: str
    """The original's file, relative to the data set's folder."""
    row: int
    """The original's number in its file, from 1."""
    example: int
    """`Example.number` of the original: a row may have several examples."""
    model: str = ""
    """The model that wrote the question. "": none did."""


@dataclass(frozen=True)
class Example:
    """One training example.

    Fields by kind. chat: `messages`. completion: `prompt` and `completion`, and the same as
    `messages` (with the row's system prompt, if any) for models with a chat template. text: `text`.
    """

    row: int
    """The row's number in its file, from 1."""
    kind: Literal["chat", "completion", "text"]
    messages: tuple[Message, ...] = ()
    """An optional system turn, then alternating turns of user and assistant. The last turn is the
    assistant's. Tool turns may stand between two assistant turns."""
    prompt: str = ""
    completion: str = ""
    text: str = ""
    expected: tuple[str, ...] = ()
    """A right answer contains one of these: the row's field `expected`. (): the row has none."""
    file: str = ""
    """The file's name relative to the data set's folder."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    """The tools that the assistant may call, as JSON schemas of OpenAI's shape."""
    document: str = ""
    """The id of the document that answers the question. "": the row names none."""
    without_context: Example | None = field(default=None, compare=False)
    """The row before `retrieval` put a context before its question. None: it has no context."""
    number: int = field(default=0, compare=False)
    """The example's number in its data set, from 0."""
    origin: Origin | None = field(default=None, compare=False)
    """What the row was made from, if the job augments its data. None: it is not an augmented
    row."""


_MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check(example: Example) -> None:
    """Raise RowError for empty turns, roles out of order and text that no tokenizer can encode."""
    check_encodable(example.prompt, example.completion, example.text)
    check_encodable(example.document, *example.expected)
    check_turns(example.messages)
    if example.messages and example.messages[-1].role != "assistant":
        raise RowError(
            f"the last turn is by {example.messages[-1].role}; expected assistant, whose turn is "
            "the target"
        )


def check_turns(messages: Sequence[Message]) -> None:
    """Raise RowError as `check` does, for a conversation that may end with any turn."""
    previous: Role | None = None
    for number, message in enumerate(messages, start=1):
        if not (message.content.strip() or message.calls or message.role == "tool"):
            raise RowError(f"turn {number} ({message.role}) is empty")
        check_encodable(message.content, message.reasoning, *map(call_text, message.calls))
        check_encodable(message.name, message.call_id, *(call.id for call in message.calls))
        if message.role not in _MAY_FOLLOW[previous]:
            after = f"follows {previous}" if previous else "begins the conversation"
            wanted = " or ".join(_MAY_FOLLOW[previous])
            raise RowError(f"turn {number} is by {message.role} and {after}; expected {wanted}")
        previous = message.role


def check_encodable(*texts: str) -> None:
    """Raise RowError for half of a surrogate pair, which no tokenizer and no file can hold."""
    for text in texts:
        if text.isascii():  # which Python knows of each text
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"character {error.start + 1} is half of a surrogate pair") from error
