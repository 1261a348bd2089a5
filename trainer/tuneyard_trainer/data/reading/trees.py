"""OpenAssistant's trees of messages: their links, conversations and ranked answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuneyard_trainer.data.reading.example import Message, RowError
from tuneyard_trainer.data.reading.rows import BrokenRow, Row
from tuneyard_trainer.data.reading.turns import TurnKeys, turn

if TYPE_CHECKING:
    from tuneyard_trainer.data.reading.readers import Names

_KEYS = TurnKeys("role", "text")
MAX_DEPTH = 200
"""The most messages of one conversation. Real ones have less than 20."""
_TOO_DEEP = f"the tree is deeper than {MAX_DEPTH} messages; remove the row, or the replies below"
Node = Mapping[str, Any]
COLUMNS: Mapping[str, Sequence[str]] = {
    "id": ("message_id",),
    "parent": ("parent_id",),
    "role": ("role",),
    "text": ("text",),
    "rank": ("rank",),
    "replies": ("replies",),
    "deleted": ("deleted",),
    "reviewed": ("review_result",),
    "prompt": ("prompt",),
}
"""The columns of a message. `prompt` holds the first message of a tree."""


class _Published(dict[str, Any]):
    """A message under the published names, in the place of one under the manifest's."""


def published(row: Node, names: Names) -> Node:
    """Return a message, with its replies, under the published names."""
    given = {names.of(field, row): COLUMNS[field][0] for field in COLUMNS if names.maps(field)}
    if not given or isinstance(row, _Published):
        return row
    hidden = set(given.values()) - given.keys()  # another column has the name of a field
    top = _Published()
    waiting = [(row, top)]
    while waiting:
        message, renamed = waiting.pop()
        for column, value in message.items():
            name = given.get(column, column)
            if column in hidden:
                continue
            parts = value if name == "replies" and isinstance(value, list) else [value]
            if name in ("replies", "prompt"):
                copies = [_Published() if isinstance(part, Mapping) else part for part in parts]
                pairs = zip(parts, copies, strict=True)
                waiting += [pair for pair in pairs if isinstance(pair[1], _Published)]
                value = copies if parts is value else copies[0]
            renamed[name] = value
    return top


def is_tree(row: Node) -> bool:
    """Return whether the row is a whole tree, under the published names."""
    root = row.get("prompt", row)
    return isinstance(root, Mapping) and isinstance(root.get("replies"), list) and "text" in root


def is_flat_message(row: Node) -> bool:
    """Return whether the row is one message of a tree, under the published names."""
    return {"message_id", "parent_id", "role", "text"} <= row.keys() and "replies" not in row


def by_published_names(rows: Iterable[Row], names: Names) -> Iterator[Row]:
    """Yield trees and messages under the published names, and other rows unchanged."""
    for row in rows:
        if not isinstance(row.value, BrokenRow):
            message = published(row.value, names)
            if isinstance(message, _Published) and (is_tree(message) or is_flat_message(message)):
                row = Row(row.number, message, row.file)
        yield row


def link_messages(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of trees from OpenAssistant's flat files, which hold one message a row.

    All flat messages are held in memory, as replies may come in any order. Trees and broken rows
    are yielded unchanged. A message whose parent is not in the data, which has no id or one that
    appears twice, or which is its own ancestor is a broken row, and so are all messages below it. A
    tree has the number of its first message, and one deeper than MAX_DEPTH is a broken row: trees
    of 350 levels do not pickle.
    """
    rows_by_key: dict[str, Row] = {}
    nodes: dict[str, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.value, BrokenRow) or not is_flat_message(row.value):
            yield row
            continue
        if row.value["message_id"] in (None, ""):
            yield _broken(row, "message_id is empty: give each message an id of its own")
            continue
        key = str(row.value["message_id"])
        if key in nodes:
            yield _broken(row, f"message_id {key} appears twice")
            continue
        rows_by_key[key], nodes[key] = row, _Published({**row.value, "replies": []})
    for node in nodes.values():
        if node["parent_id"] not in (None, "") and str(node["parent_id"]) in nodes:
            nodes[str(node["parent_id"])]["replies"].append(node)
    roots = [key for key, node in nodes.items() if node["parent_id"] in (None, "")]
    reached = set(_below(nodes, roots))
    circles = set(_own_ancestors(nodes, (key for key in nodes if key not in reached)))
    for key, node in nodes.items():
        row, parent = rows_by_key[key], node["parent_id"]
        if parent is None or parent == "":
            yield _broken(row, _TOO_DEEP) if _is_too_deep(node) else Row(row.number, node, row.file)
        elif str(parent) not in nodes:
            yield _broken(row, f"the parent message {parent} is not in the data")
        elif key in circles:
            yield _broken(row, f"message_id {key} is its own ancestor: the replies form a circle")
        elif key not in reached:
            yield _broken(row, f"the message {parent} before it, or one before that, is invalid")


def _broken(row: Row, reason: str) -> Row:
    return Row(row.number, BrokenRow(reason), row.file)


def _is_too_deep(root: Node) -> bool:
    level, depth = [root], 0
    while level and depth <= MAX_DEPTH:
        level, depth = [reply for message in level for reply in message["replies"]], depth + 1
    return depth > MAX_DEPTH


def _below(nodes: Mapping[str, Node], keys: Iterable[str]) -> Iterator[str]:
    """Yield the messages at and below the given ones."""
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        yield key
        waiting += [str(reply["message_id"]) for reply in nodes[key]["replies"]]


def _own_ancestors(nodes: Mapping[str, Node], keys: Iterable[str]) -> Iterator[str]:
    """Yield those of the messages, and of their ancestors, that are their own ancestors."""
    seen: set[str] = set()
    for key in keys:
        path: list[str] = []
        while key in nodes and key not in seen:
            seen.add(key)
            path.append(key)
            key = str(nodes[key]["parent_id"])
        if key in path:
            yield from path[path.index(key) :]


# ---- conversations ----------------------------------------------------------------------------


def best(row: Node) -> list[Message]:
    """Return a tree's best conversation, which ends with a turn of the assistant; []: it has no
    reviewed answer.

    It follows the reply with the lowest rank at each level (unranked ones last) and leaves out
    deleted and unreviewed messages. Raises RowError.
    """
    message = row.get("prompt", row)
    thread: list[Message] = []
    while message is not None and _reviewed(_object(message)):
        thread.append(_turn(message, len(thread) + 1))
        message = min(filter(_reviewed, _replies(message)), key=_rank, default=None)
    while thread and thread[-1].role != "assistant":
        thread.pop()
    return thread


def paths(row: Node) -> Iterator[list[Message]]:
    """Yield the conversation to each last answer of a tree: an answer below which there is no other
    one. Raises RowError."""
    for thread, replies in _walk(row):
        if thread[-1].role == "assistant" and not any(_is_answered(reply) for reply in replies):
            yield thread


def ranked(row: Node) -> Iterator[tuple[list[Message], list[Message]]]:
    """Yield each question's thread with its ranked answers, best first, if two of them differ. Of
    answers with the same rank, the first one is kept. Raises RowError."""
    for thread, replies in _walk(row):
        if thread[-1].role == "assistant":
            continue
        order = sorted((r for r in replies if _rank(r) != float("inf")), key=_rank)
        first: dict[float, Node] = {}
        for reply in order:
            first.setdefault(_rank(reply), reply)
        distinct: dict[str, Message] = {}
        for reply in first.values():
            answer = _turn(reply, len(thread) + 1)
            distinct.setdefault(answer.content.strip(), answer)
        if len(distinct) > 1:
            yield thread, list(distinct.values())


def _walk(row: Node) -> Iterator[tuple[list[Message], list[Node]]]:
    """Yield the thread to each reviewed message, with the message's reviewed replies."""
    root = _object(row.get("prompt", row))
    waiting: list[tuple[list[Message], Node]] = [([], root)] if _reviewed(root) else []
    while waiting:
        before, message = waiting.pop()
        thread = [*before, _turn(message, len(before) + 1)]
        replies = [reply for reply in map(_object, _replies(message)) if _reviewed(reply)]
        yield thread, replies
        waiting += [(thread, reply) for reply in reversed(replies)]


def _is_answered(message: Node) -> bool:
    """Return whether a reviewed answer follows a question."""
    return any(_reviewed(reply) for reply in _replies(message))


def _turn(message: Node, number: int) -> Message:
    if number > MAX_DEPTH:
        raise RowError(_TOO_DEEP)
    return turn(message, f"turn {number}", _KEYS)


def _replies(message: Node) -> list[Any]:
    replies = message.get("replies") or []
    if not isinstance(replies, list):
        raise RowError(f"replies must be a list, not {type(replies).__name__}")
    return replies


def _object(message: Any) -> Node:
    if not isinstance(message, Mapping):
        raise RowError(f"a message must be an object, not {type(message).__name__}")
    return message


def _reviewed(message: Any) -> bool:
    """Return whether a message is reviewed and not deleted. `review_result` None means unreviewed;
    exports without the field hold reviewed messages only."""
    if not isinstance(message, Mapping):
        return True  # `_object` reports the wrong type
    return not message.get("deleted") and bool(message.get("review_result", True))


def _rank(message: Any) -> float:
    rank = message.get("rank") if isinstance(message, Mapping) else None
    return rank if isinstance(rank, int | float) and rank == rank else float("inf")
