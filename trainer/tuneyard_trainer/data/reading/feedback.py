"""Feedback logs: events of an application, joined by id into answers and what users made of them.

Rows may come in any order, so a log is joined when all of it is read. Its texts wait in a temporary
file; memory holds about 700 bytes for each answer, and 300 for each other event.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO, Any, Final

from tuneyard_trainer.data.reading import readers
from tuneyard_trainer.data.reading.example import Fault, Message, RowError
from tuneyard_trainer.data.reading.readers import Names, Parsed
from tuneyard_trainer.data.reading.rows import BrokenRow, Row

EVENTS: Final = ("request", "answer", "rating", "edit", "retry", "session")
COLUMNS: Mapping[str, Sequence[str]] = {
    "event": ("event",),
    "id": ("id",),
    "of": ("of",),
    "by": ("by",),
    "session": ("session", "session_id"),
    "completion": ("completion", "answer", "response"),
    "label": ("thumbs", "thumb", "label"),
    "scores": ("score",),
    **readers.ASKED,
}
Tools = tuple[Mapping[str, Any], ...]
_ASKED = (Message("user", "?"),)
"""Stands for the prompt where an answer is read without it."""


@dataclass(frozen=True)
class Outcome:
    """An answer and what users made of it. A joined row holds it in the place of its event."""

    turns: tuple[Message, ...]
    answer: Message
    tools: Tools
    is_up: bool
    """Whether the answer has a thumb up."""
    label: float | None
    """1.0 good, 0.0 bad. None: nothing says so."""
    edits: tuple[Message, ...]
    """The answer as users rewrote it."""
    worse: tuple[Message, ...]
    """Answers to the same prompt that this one beats."""
    is_beaten: bool
    """Whether this answer is among the `worse` ones of another."""


def is_event(row: Mapping[str, Any], names: Names) -> bool:
    """Return whether a row is an event of a log, or the outcome of several."""
    kind = names.value("event", row)
    if isinstance(kind, Outcome):
        return True
    known = isinstance(kind, str) and kind in EVENTS
    return known and any(names.value(key, row) is not None for key in ("id", "of", "session"))


def is_beaten(row: Mapping[str, Any] | BrokenRow) -> bool:
    """Return whether a row is an answer that another answer of its log beats."""
    values = () if isinstance(row, BrokenRow) else row.values()
    return any(isinstance(value, Outcome) and value.is_beaten for value in values)


# ---- what an outcome states -------------------------------------------------------------------


def texts(row: Mapping[str, Any], names: Names) -> Iterator[Parsed]:
    """Read an answer and its edits, whatever users made of it."""
    found = _outcome(row, names)
    for answer in (found.answer, *found.edits):
        yield Parsed((*found.turns, answer), tools=found.tools)


def conversations(row: Mapping[str, Any], names: Names) -> Iterator[Parsed]:
    """Read the answers to train on: an answer's edits, else the answer if it has a thumb up."""
    found = _outcome(row, names)
    for answer in found.edits or ((found.answer,) if found.is_up else ()):
        turns = (*found.turns, answer)
        is_plain = len(found.turns) == 1 and not answer.calls and not found.tools
        plain = (found.turns[0].content, answer.content) if is_plain else None
        yield Parsed(turns, plain=plain, tools=found.tools)


def pairs(row: Mapping[str, Any], names: Names) -> Iterator[Parsed]:
    """Read the pairs of an answer with its edits, and with the answers that it beats."""
    found = _outcome(row, names)
    for edit in found.edits:
        yield Parsed(found.turns, (edit, found.answer), tools=found.tools)
    for worse in found.worse:
        yield Parsed(found.turns, (found.answer, worse), tools=found.tools)


def labels(row: Mapping[str, Any], names: Names) -> Iterator[Parsed]:
    """Read an answer and its edits as single completions, good or bad."""
    found = _outcome(row, names)
    if found.label is not None:
        yield Parsed(found.turns, (found.answer,), found.label, tools=found.tools)
    for edit in found.edits:
        yield Parsed(found.turns, (edit,), tools=found.tools)


def _outcome(row: Mapping[str, Any], names: Names) -> Outcome:
    found = names.value("event", row)
    if not isinstance(found, Outcome):
        raise RowError(
            f"{names.of('event', row)} is {found!r}; an event is one of {', '.join(EVENTS)}, with "
            f"an {names.of('id', row)} or {names.of('of', row)}",
            "UnknownShape",
        )
    return found


# ---- joining ----------------------------------------------------------------------------------


def join_events(rows: Iterable[Row], names: Names) -> Iterator[Row]:
    """Yield a row for each answer of a log, with its outcome and the number of the answer's row.

    Other rows and broken ones are yielded unchanged. An event is a broken row if it misses a field,
    names an id that is not in the data, has an id that appears twice, contradicts another rating of
    the same answer, or edits nothing.
    """
    with tempfile.TemporaryFile() as file:
        log = _Log(names, _Texts(file))
        for row in rows:
            if isinstance(row.value, BrokenRow) or not is_event(row.value, names):
                yield row
                continue
            try:
                log.add(row, row.value)
            except RowError as error:
                yield _broken(row, str(error), error.fault)
            except RecursionError:
                yield _broken(row, "the row is nested too deeply", "UnreadableRow")
        yield from log.joined()


def prompts(rows: Iterable[Row], names: Names) -> Iterator[Row]:
    """Yield the events that hold a prompt: requests, and answers without a request. An answer to a
    request that is not in the data is a broken row."""
    requests: set[str] = set()
    answers: list[tuple[str, int, str]] = []
    for row in rows:
        if isinstance(row.value, BrokenRow):
            yield row
            continue
        kind, request = names.value("event", row.value), names.value("of", row.value)
        if kind not in EVENTS:
            yield _broken(row, f"{names.of('event', row.value)} is {kind!r}", "UnknownShape")
        elif kind == "answer" and request not in (None, ""):
            answers.append((str(request), row.number, row.file))
        elif kind in ("request", "answer"):
            requests.add(str(names.value("id", row.value)))
            yield row
    for request, number, file in answers:
        if request not in requests:
            reason = f"request {request} is not in the data"
            yield Row(number, BrokenRow(reason, "UnknownId"), file)


def _broken(row: Row | _Entry | _Event, reason: str, fault: Fault) -> Row:
    return Row(row.number, BrokenRow(reason, fault), row.file)


class _Texts:
    """The fields of events, in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, 0

    def add(self, row: Mapping[str, Any]) -> int:
        """Write the fields and return their place."""
        place = self._end
        self._end += self._file.write(json.dumps(row, default=str).encode() + b"\n")
        return place

    def read(self, place: int) -> dict[str, Any]:
        self._file.seek(place)
        row: dict[str, Any] = json.loads(self._file.readline())
        return row


@dataclass(slots=True)
class _Entry:
    """A request or an answer."""

    number: int
    file: str
    order: int
    """The number of events before it."""
    session: str
    """"": none."""
    prompt: bytes
    """A hash of the turns and tools. b"": those of the request."""
    place: int
    """The place of its fields."""
    request: str = ""
    """The id of the answer's request. "": the answer holds its prompt."""
    text: bytes = b""
    """A hash of the answer."""
    thumb: float | None = None
    score: float | None = None
    edits: dict[bytes, int] = field(default_factory=dict)
    """The places of the edits, by a hash of their text."""
    beaten: list[str] = field(default_factory=list)
    """The ids of answers that this one beats."""
    replaced: bool | None = None
    """True: the answer lost to one that replaced it. False: it won. None: neither."""


@dataclass(slots=True)
class _Event:
    """A rating, an edit or a retry of an answer."""

    number: int
    file: str
    order: int
    kind: str
    of: str
    thumb: float | None = None
    score: float | None = None
    place: int = 0
    """The place of an edit's fields."""
    text: bytes = b""
    """A hash of an edit's text."""
    by: str = ""
    """The id of the answer that replaced a retried one. "": the event does not name it."""


class _Log:
    """The events of a log, and the answers that they are joined into."""

    def __init__(self, names: Names, texts: _Texts) -> None:
        self._names, self._texts = names, texts
        self._order = 0
        self._entries: dict[str, dict[str, _Entry]] = {"request": {}, "answer": {}}
        self._refused: dict[str, set[str]] = {"request": set(), "answer": set()}
        """The ids of broken requests and answers."""
        self._events: list[_Event] = []
        self._continued: set[bytes] = set()
        """Hashes of the answers that a later turn of their session follows."""

    # ---- reading ------------------------------------------------------------------------------

    def add(self, row: Row, value: Mapping[str, Any]) -> None:
        """Add an event. Raises RowError."""
        self._order += 1
        kind = self._names.value("event", value)
        if kind in self._entries:
            self._add_entry(row, value, kind)
        elif kind != "session":
            self._events.append(self._event(row, value, kind))

    def _add_entry(self, row: Row, value: Mapping[str, Any], kind: str) -> None:
        key = self._id(value, "id", kind)
        known, refused = self._entries[kind], self._refused[kind]
        if key in known or key in refused:
            refused.add(key)
            raise RowError(f"{kind} {key} appears twice", "DuplicateId")
        try:
            found = self._entry(row, value, kind)
        except RowError:
            refused.add(key)
            raise
        known[key] = found

    def _entry(self, row: Row, value: Mapping[str, Any], kind: str) -> _Entry:
        session = _text(self._names.value("session", value))
        request = self._names.value("of", value) if kind == "answer" else None
        request = None if request == "" else request  # an empty cell of a table
        holds_prompt = any(
            self._names.value(key, value) not in (None, "") for key in ("prompt", "messages")
        )
        if request is not None:
            if holds_prompt:
                raise RowError("an answer has a request or a prompt of its own, not both")
            _, answer = self._completion(value)
            prompt, text = b"", _hash(answer.text.strip())
        elif kind == "answer":
            parsed = readers.answered(value, self._names)
            prompt, text = self._prompt(parsed.turns, parsed.tools, session), _answer_hash(parsed)
        else:
            turns, tools = readers.prompt(value, self._names, turns_first=False)
            if not turns:
                raise RowError("the request has no prompt", "UnknownShape")
            prompt, text = self._prompt(turns, tools, session), b""
        place = self._texts.add(self._read_columns(value))
        named = "" if request is None else str(request)
        return _Entry(row.number, row.file, self._order, session, prompt, place, named, text)

    def _prompt(self, turns: tuple[Message, ...], tools: Tools, session: str) -> bytes:
        """Return a prompt's hash. The answer in its last turn but one is thereby continued."""
        if session and len(turns) > 2 and turns[-2].role == "assistant":
            before, answer = _hash(turns[:-2], tools), _hash(turns[-2].text.strip())
            self._continued.add(_hash(session, before, answer))
        return _hash(turns, tools)

    def _event(self, row: Row, value: Mapping[str, Any], kind: str) -> _Event:
        names = self._names
        found = _Event(row.number, row.file, self._order, kind, self._id(value, "of", kind))
        if kind == "rating":
            thumb, score = names.value("label", value), names.value("scores", value)
            if thumb is None and score is None:
                fields = f"{names.of('label', value)} or {names.of('scores', value)}"
                raise RowError(f"a rating needs {fields}", "InvalidLabel")
            if thumb is not None:
                found.thumb = readers.label(thumb, names.of("label", value))
            if score is not None:
                if not readers.is_number(score):
                    field = names.of("scores", value)
                    raise RowError(f"{field} must be a number, not {score!r}", "InvalidLabel")
                found.score = float(score)
        elif kind == "edit":
            column, answer = self._completion(value)
            found.text = _hash(answer.text.strip())
            found.place = self._texts.add({column: value[column]})
        else:
            found.by = _text(names.value("by", value))
        return found

    def _id(self, value: Mapping[str, Any], field: str, kind: str) -> str:
        found = self._names.value(field, value)
        if found is None or found == "":
            raise RowError(f"{kind} without {self._names.of(field, value)}", "UnknownId")
        return str(found)

    def _completion(self, value: Mapping[str, Any]) -> tuple[str, Message]:
        """Return the column and the answer of an event that holds no prompt."""
        column = self._names.of("completion", value)
        if value.get(column) is None:
            raise RowError(f"{column} is missing", "EmptyCompletion")
        return column, readers.answer(value[column], column, _ASKED, self._names)[1]

    def _read_columns(self, value: Mapping[str, Any]) -> dict[str, Any]:
        columns = self._names.columns
        return {name: each for name, each in value.items() if name in columns}

    # ---- joining ------------------------------------------------------------------------------

    def joined(self) -> Iterator[Row]:
        """Yield the broken rows, and a row for each answer. Call it once, after the last event."""
        for kind, known in self._entries.items():
            for key in sorted(self._refused[kind] & known.keys()):
                yield _broken(known.pop(key), f"{kind} {key} appears twice", "DuplicateId")
        yield from self._join_requests()
        yield from self._join_events()
        self._compare_rated()
        column = self._names.of("event", {})
        known = self._entries["answer"]
        beaten = {key for each in known.values() for key in each.beaten}
        for key, answer in known.items():
            outcome = self._outcome(answer, is_beaten=key in beaten)
            value = {column: outcome, **self._document(answer)}
            yield Row(answer.number, value, answer.file)

    def _join_requests(self) -> Iterator[Row]:
        answers, requests = self._entries["answer"], self._entries["request"]
        for key, answer in list(answers.items()):
            if answer.request and answer.request not in requests:
                del answers[key]
                self._refused["answer"].add(key)
                yield self._unknown(answer, "request", answer.request)
            elif answer.request:
                request = requests[answer.request]
                answer.prompt = request.prompt
                answer.session = answer.session or request.session

    def _unknown(self, row: _Entry | _Event, kind: str, key: str) -> Row:
        is_refused = key in self._refused[kind]
        reason = "has no valid row" if is_refused else "is not in the data"
        return _broken(row, f"{kind} {key} {reason}", "UnknownId")

    def _join_events(self) -> Iterator[Row]:
        answers = self._entries["answer"]
        known: list[_Event] = []
        for event in self._events:
            if event.of in answers:
                known.append(event)
            else:
                yield self._unknown(event, "answer", event.of)
        yield from self._join_ratings([each for each in known if each.kind == "rating"])
        yield from self._join_edits([each for each in known if each.kind == "edit"])
        yield from self._join_retries([each for each in known if each.kind == "retry"])

    def _join_ratings(self, ratings: Sequence[_Event]) -> Iterator[Row]:
        answers = self._entries["answer"]
        torn: set[str] = set()
        for event in ratings:
            answer = answers[event.of]
            for said, known in ((event.thumb, answer.thumb), (event.score, answer.score)):
                if said is not None and known not in (None, said):
                    torn.add(event.of)
            answer.thumb = event.thumb if answer.thumb is None else answer.thumb
            answer.score = event.score if answer.score is None else answer.score
        for event in ratings:
            if event.of in torn:
                answers[event.of].thumb = answers[event.of].score = None
                yield _broken(event, f"the ratings of answer {event.of} differ", "Conflict")

    def _join_edits(self, edits: Sequence[_Event]) -> Iterator[Row]:
        for event in edits:
            answer = self._entries["answer"][event.of]
            if event.text == answer.text:
                reason = f"the edit of answer {event.of} changes nothing"
                yield _broken(event, reason, "IdenticalSides")
            else:
                answer.edits.setdefault(event.text, event.place)

    def _join_retries(self, retries: Sequence[_Event]) -> Iterator[Row]:
        answers = self._entries["answer"]
        following: dict[tuple[str, bytes], list[str]] = defaultdict(list)
        if any(not event.by for event in retries):
            for key, answer in answers.items():
                following[answer.session, answer.prompt].append(key)
        for event in retries:
            retried = answers[event.of]
            if not event.by:
                rest = following[retried.session, retried.prompt] if retried.session else []
                start = max(event.order, retried.order)
                later = (each for each in rest if answers[each].order > start)
                event.by = next(later, "")
            if not event.by:
                reason = f"no later answer of its session replaces answer {event.of}"
                yield _broken(event, reason, "UnknownId")
            elif event.by == event.of:
                yield _broken(event, f"answer {event.of} cannot replace itself", "Conflict")
            elif event.by not in answers:
                yield self._unknown(event, "answer", event.by)
            elif answers[event.by].prompt != retried.prompt:
                reason = f"answers {event.of} and {event.by} have different prompts"
                yield _broken(event, reason, "DifferingPrompts")
            else:
                self._replace(event.of, event.by)

    def _replace(self, old: str, new: str) -> None:
        """Let the new answer beat the one that it replaced, if users kept it and did not like the
        old one."""
        retried, answer = self._entries["answer"][old], self._entries["answer"][new]
        continued = _hash(answer.session, answer.prompt, answer.text) in self._continued
        kept = answer.thumb == 1.0 or (answer.thumb is None and continued)
        if kept and retried.thumb != 1.0 and retried.score is None and retried.text != answer.text:
            answer.beaten.append(old)
            answer.replaced, retried.replaced = answer.replaced or False, True

    def _compare_rated(self) -> None:
        """Pair the answers to each prompt with those of the next lower rating: those with a thumb
        by it, and the other ones by their scores."""
        prompts: dict[bytes, list[str]] = defaultdict(list)
        for key, answer in self._entries["answer"].items():
            if answer.thumb is not None or answer.score is not None:
                prompts[answer.prompt].append(key)
        for keys in prompts.values():
            answers = [(key, self._entries["answer"][key]) for key in sorted(keys)]
            self._pair_levels((each.thumb, each.text, key) for key, each in answers)
            unrated = [(key, each) for key, each in answers if each.thumb is None]
            self._pair_levels((each.score, each.text, key) for key, each in unrated)

    def _pair_levels(self, ratings: Iterable[tuple[float | None, bytes, str]]) -> None:
        """Pair the texts of each level with those of the level below, the shorter list again from
        its start: every text is in a pair, and their number is linear. Texts that both levels hold
        are disputed and left out."""
        levels: dict[float, dict[bytes, str]] = defaultdict(dict)
        for rating, text, key in ratings:
            if rating is not None:
                levels[rating].setdefault(text, key)
        order = sorted(levels, reverse=True)
        for high, low in pairwise(order):
            better = [levels[high][text] for text in sorted(levels[high].keys() - levels[low])]
            worse = [levels[low][text] for text in sorted(levels[low].keys() - levels[high])]
            if better and worse:
                for index in range(max(len(better), len(worse))):
                    winner = self._entries["answer"][better[index % len(better)]]
                    winner.beaten.append(worse[index % len(worse)])

    def _document(self, answer: _Entry) -> dict[str, Any]:
        """Return the column of the document that an answer, or else its request, names. {}: they
        name none, or the field is not mapped."""
        if not self._names.maps("document"):
            return {}
        entries = [answer, *filter(None, [self._entries["request"].get(answer.request)])]
        column = self._names.of("document", {})
        found = (self._texts.read(entry.place).get(column) for entry in entries)
        return next(({column: value} for value in found if value is not None), {})

    def _outcome(self, answer: _Entry, *, is_beaten: bool) -> Outcome:
        parsed = self._parsed(answer)
        answers = self._entries["answer"]
        beaten = {answers[key].text: answers[key] for key in answer.beaten}
        edits = [self._texts.read(place) for _, place in sorted(answer.edits.items())]
        label = answer.thumb
        if label is None and (answer.edits or answer.replaced):
            label = 0.0
        elif label is None and answer.replaced is False:
            label = 1.0
        return Outcome(
            parsed.turns,
            parsed.answers[0],
            parsed.tools,
            answer.thumb == 1.0,
            label,
            tuple(self._completion(edit)[1] for edit in edits),
            tuple(self._parsed(beaten[text]).answers[0] for text in sorted(beaten)),
            is_beaten,
        )

    def _parsed(self, answer: _Entry) -> Parsed:
        own = self._texts.read(answer.place)
        if not answer.request:
            return readers.answered(own, self._names)
        request = self._texts.read(self._entries["request"][answer.request].place)
        turns, tools = readers.prompt(request, self._names, turns_first=False)
        return Parsed(turns, (self._completion(own)[1],), tools=tools)


def _text(given: Any) -> str:
    """Return an id as text; "": there is none. 0 is one."""
    return "" if given is None else str(given)


def _answer_hash(parsed: Parsed) -> bytes:
    return _hash(parsed.answers[0].text.strip())


def _hash(*parts: Any) -> bytes:
    content = repr(parts).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(content, digest_size=16).digest()
