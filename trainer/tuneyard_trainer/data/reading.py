"""Reading of rows of a known format as examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tuneyard.api.sources import DataFormat
from tuneyard_trainer.data.example import ROLES, Example, Message, Role, RowError, check
from tuneyard_trainer.data.formats import Names, input_text, is_flat_message, with_input
from tuneyard_trainer.data.rows import BrokenRow, Row


def read(row: Row, chosen: DataFormat, names: Names) -> list[Example]:
    """Return the examples of a row: one, several for an instruction with `instances`, or none for a
    tree without a reviewed answer. Raises RowError."""
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason)
    examples = list(_READERS[chosen](row, row.value, names))
    for example in examples:
        check(example)
    return examples


def _turns(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    field = names["messages"]
    yield _chat(row, _messages(value.get(field), field))


def _ultrachat(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    field = names["messages"]
    turns = value.get(field, value.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        yield _chat(row, _messages(turns, field))  # ultrachat_200k: {"messages": [...]}
        return
    roles: tuple[Role, Role] = ("user", "assistant")
    yield _chat(row, [Message(roles[i % 2], turn) for i, turn in enumerate(turns)])


def _sharegpt(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    field = names["messages"]
    messages = _messages(value.get(field), field, role="from", content="value")
    yield _chat(row, [*_system(value, names), *messages])


def _alpaca(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    """Yield one example, or one for each of the `instances` that Self-instruct's seeds hold."""
    instruction = _string(value, names["prompt"])
    for instance in _instances(value, names["completion"]):
        question = with_input(instruction, input_text(instance, names["input"]))
        answer = _string(instance, names["completion"])
        turns = [Message("user", question), Message("assistant", answer)]
        yield _chat(row, [*_system(value, names), *turns])


def _instances(value: dict[str, Any], completion: str) -> Sequence[dict[str, Any]]:
    instances = value.get("instances")
    if completion in value or instances is None:
        return [value]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise RowError("instances must be a list of {input, output}")
    if not instances:
        raise RowError("instances is empty")
    return instances


def _flan(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    prompt, completion = _string(value, names["prompt"]), _string(value, names["completion"])
    yield _completion(row, [], prompt, completion)


def _prompt_completion(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    prompt, completion = value.get(names["prompt"]), value.get(names["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        if input_text(value, names["input"]):
            raise RowError(f"{names['input']} cannot follow a prompt that is a list of turns")
        before = _messages(prompt, names["prompt"], text_role="user")
        after = _messages(completion, names["completion"], text_role="assistant")
        yield _chat(row, [*_system(value, names), *before, *after])
        return
    prompt, completion = _string(value, names["prompt"]), _string(value, names["completion"])
    prompt = with_input(prompt, input_text(value, names["input"]))
    yield _completion(row, _system(value, names), prompt, completion)


def _text(row: Row, value: dict[str, Any], names: Names) -> Iterator[Example]:
    yield Example(
        row.number,
        "text",
        text=_string(value, names["text"]),
        expected=_expected(row),
        file=row.file,
    )


def _openassistant(row: Row, value: dict[str, Any], _names: Names) -> Iterator[Example]:
    """Yield a tree's best conversation, which ends with a turn of the assistant.

    It follows the reply with the lowest rank at each level (unranked ones last) and leaves out
    deleted and unreviewed messages.
    """
    message = value.get("prompt", value)
    thread: list[Any] = []
    while message is not None:
        if not isinstance(message, dict):
            raise RowError(f"a message must be an object, not {type(message).__name__}")
        if not _reviewed(message):
            break
        thread.append(message)
        replies = message.get("replies") or []
        if not isinstance(replies, list):
            raise RowError(f"replies must be a list, not {type(replies).__name__}")
        message = min(filter(_reviewed, replies), key=_rank, default=None)
    messages = _messages(thread, "replies", content="text") if thread else []
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if messages:
        yield _chat(row, messages)


def _reviewed(message: Any) -> bool:
    """Return whether a message is reviewed and not deleted. `review_result` None means unreviewed;
    exports without the field hold reviewed messages only."""
    if not isinstance(message, dict):
        return True  # the caller reports the wrong type
    return not message.get("deleted") and bool(message.get("review_result", True))


def _rank(message: Any) -> float:
    rank = message.get("rank") if isinstance(message, dict) else None
    return rank if isinstance(rank, int | float) else float("inf")


_READERS: dict[DataFormat, Callable[[Row, dict[str, Any], Names], Iterator[Example]]] = {
    "messages": _turns,
    "alpaca": _alpaca,
    "flan": _flan,
    "sharegpt": _sharegpt,
    "openassistant": _openassistant,
    "ultrachat": _ultrachat,
    "prompt-completion": _prompt_completion,
    "text": _text,
}


def link_messages(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of trees from OpenAssistant's flat files, which hold one message a row.

    All flat messages are held in memory, as replies may come in any order. Trees and broken rows
    are yielded unchanged. A message whose parent is not in the data is a broken row. A tree has the
    number of its first message.
    """
    rows_by_key: dict[str, Row] = {}
    trees: dict[str, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.value, BrokenRow) or not is_flat_message(row.value):
            yield row
            continue
        key = str(row.value["message_id"])
        if key in trees:
            yield Row(row.number, BrokenRow(f"message_id {key} appears twice"), row.file)
            continue
        rows_by_key[key], trees[key] = row, {**row.value, "replies": []}
    for tree in trees.values():
        if str(tree["parent_id"]) in trees:
            trees[str(tree["parent_id"])]["replies"].append(tree)
    for key, tree in trees.items():
        row, parent = rows_by_key[key], tree["parent_id"]
        if parent is None or parent == "":
            yield Row(row.number, tree, row.file)
        elif str(parent) not in trees:
            yield Row(
                row.number, BrokenRow(f"the parent message {parent} is not in the data"), row.file
            )


# ---- parts of a row ---------------------------------------------------------------------------


def _chat(row: Row, messages: Sequence[Message]) -> Example:
    expected = _expected(row)
    return Example(row.number, "chat", tuple(messages), expected=expected, file=row.file)


def _completion(row: Row, system: Sequence[Message], prompt: str, completion: str) -> Example:
    turns = (*system, Message("user", prompt), Message("assistant", completion))
    expected = _expected(row)
    return Example(row.number, "completion", turns, prompt, completion, "", expected, row.file)


def _string(value: Mapping[str, Any], field: str) -> str:
    text = value.get(field)
    if text is None:
        raise RowError(f"{field} is missing; the row has {', '.join(value) or 'no fields'}")
    if not isinstance(text, str):
        raise RowError(f"{field} must be a string, not {type(text).__name__}")
    if not text.strip():
        raise RowError(f"{field} is empty")
    return text


def _system(value: Mapping[str, Any], names: Names) -> list[Message]:
    """Return the row's system turn; []: the field is absent, null or ""."""
    field = names["system"]
    return [Message("system", _string(value, field))] if value.get(field) else []


def _expected(row: Row) -> tuple[str, ...]:
    expected = row.value.get("expected") if isinstance(row.value, dict) else None
    if expected is None or expected == "":
        return ()
    answers = [expected] if isinstance(expected, str) else expected
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        raise RowError("expected must be a string or a list of strings, none of them empty")
    return tuple(answers)


def _messages(
    turns: Any,
    field: str,
    *,
    role: str = "role",
    content: str = "content",
    text_role: Role | None = None,
) -> list[Message]:
    """Return the turns of a list. With `text_role`, a string is one turn of that role."""
    if text_role and isinstance(turns, str):
        return [Message(text_role, turns)]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{field} must be a list of turns {{{role}, {content}}}")
    return [_message(turn, f"turn {n}", role, content) for n, turn in enumerate(turns, start=1)]


def _message(turn: Any, where: str, role: str, content: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object {{{role}, {content}}}")
    known = ROLES.get(str(turn.get(role)).lower())
    if known is None:
        raise RowError(f"{where} has {role} {turn.get(role)!r}; known roles are {', '.join(ROLES)}")
    return Message(known, _content(turn.get(content), where, content))


def _content(value: Any, where: str, content: str) -> str:
    if isinstance(value, list):  # OpenAI's content parts
        value = "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise RowError(f"{where}: {content} must be a string, not {type(value).__name__}")
    return value


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError(f"{where} holds a part that is not text; training supports text only")
    return text
