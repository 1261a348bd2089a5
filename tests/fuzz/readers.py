"""Random files, rows and texts for the readers of data: examples, or errors of our own.

An input is two letters and the content: a target of `TARGETS`, a variant of it, then bytes. Any two
bytes name a target and a variant, so that every input runs.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pyarrow import parquet

from tests.fuzz.mutations import mutated_value
from tests.trainer.conftest import tokenizer_of_bytes
from tests.trainer.data.chat_templates import FAMILIES
from tests.trainer.data.test_layouts import LABELED, PAIRS, TOOL_ROWS, TRAINING, TREE
from tuneyard.api.cleaning import Clean, PersonalData
from tuneyard.api.sources import DataFormat, DocumentFields, FieldMap
from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.excerpts import excerpt
from tuneyard_trainer.data.cleaning.text import as_written, conversation
from tuneyard_trainer.data.cleaning.words import words
from tuneyard_trainer.data.documents import Documents
from tuneyard_trainer.data.encoding.tokenization import Encoder
from tuneyard_trainer.data.prompts import read_prompts
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import Example, Message, RowError, ToolCall, check
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import Examples, examples
from tuneyard_trainer.local import check as data_check
from tuneyard_trainer.local.feedback_log import FeedbackLog
from tuneyard_trainer.preference.rows import parse_preferences

LONGEST = 1 << 16
"""The most bytes of an input."""
SECONDS = 2.0
"""The most processor seconds of an input; it is read up to four times."""
MEGABYTES = 512
"""The most by which an input may raise the peak of memory."""
MESSAGE = 6000
"""The most characters of a message to a user."""

FORMATS: Sequence[DataFormat] = get_args(DataFormat)
MAPS: Sequence[dict[str, str]] = (
    {},
    {"prompt": "q", "completion": "a"},
    {"messages": "c", "role": "r", "content": "t"},
    {"text": "t"},
    {"prompt": "prompt", "chosen": "better", "rejected": "worse", "tools": "t"},
    {"document": "d", "expected": "e", "system": "s", "input": "i", "history": "h"},
)
PACKERS: Sequence[tuple[str, Callable[[bytes], bytes]]] = (
    ("", bytes),
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
    (".zst", lambda content: bytes(pa.compress(content, codec="zstd", asbytes=True))),
)
SUFFIXES: Sequence[str] = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
CLEANER = Cleaner.of(
    Clean(
        repair_encoding=True,
        languages=["en"],
        min_words=1,
        quality=["repetition", "gopher", "fineweb"],
        personal_data=PersonalData(
            email="redact", phone="redact", card="redact", iban="redact", key="redact"
        ),
    )
)


# Loading the identifier's model takes longer than a hundred inputs.
data_check.identifier = cache(data_check.identifier)  # type: ignore[attr-defined]


class ProblemError(AssertionError):
    """Something that must not happen."""


# ---- targets ----------------------------------------------------------------------------------


def read_file(variant: int, content: bytes, folder: Path) -> None:
    """Read bytes as a file of each kind: packed by us, or, from 128 on, said to be packed."""
    packer, is_raw = variant % len(PACKERS), variant >= 128
    suffix = SUFFIXES[variant % 128 // len(PACKERS) % len(SUFFIXES)]
    name, pack = PACKERS[packer]
    path = folder / f"rows{suffix}{name}"
    path.write_bytes(content if is_raw else pack(content))
    found = list(_rows_of(path))
    _same(found, list(_rows_of(path)), "rows")
    for row in found:
        if isinstance(row.value, BrokenRow):
            _check_message(row.value.reason)
    use(path, "auto", {}, variant)


def read_rows(variant: int, content: bytes, folder: Path) -> None:
    """Read lines of JSON as rows of every layout and field map."""
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    use(path, FORMATS[variant % len(FORMATS)], MAPS[variant // len(FORMATS) % len(MAPS)], variant)


def clean_text(variant: int, content: bytes, _folder: Path) -> None:
    """Apply the rules of cleaning to a text."""
    text = content.decode("utf-8", "replace")
    if variant % 2:
        example = Example(1, "text", text=text)
    else:
        asked, _, answered = text.partition("\x00")
        call = ToolCall("f", {asked[:20]: [answered, 1.5]})
        turns = (Message("user", asked), Message("assistant", answered, (call,), asked[::-1]))
        example = Example(1, "chat", turns, expected=(asked,))
    for rule in CLEANER.rules:
        for finding in rule(example).findings:
            finding.excerpt.encode()
    for kind in (CLEANER(example).example,):
        json.dumps(as_written(kind), ensure_ascii=False).encode()
    excerpt(text, len(text) // 2, len(text) // 2 + 1)
    words(conversation(example))


def find_spans(variant: int, content: bytes, _folder: Path) -> None:
    """Search the answers of a conversation in renderings of the families' chat templates."""
    parts = content.decode("utf-8", "replace").split("\x00")
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], part) for i, part in enumerate(parts[: len(parts) // 2 * 2])]
    if turns and variant & 1:
        call = ToolCall("find", {parts[0][:9]: parts[-1]}, parts[-1][:9])
        turns[-1] = Message("assistant", turns[-1].content, (call,), reasoning=parts[0])
    example = Example(1, "chat", tuple(turns[:8]))
    try:
        check(example)
    except RowError:
        return
    if not example.messages:
        return
    encoder = _encoder(list(FAMILIES)[variant // 2 % len(FAMILIES)])
    (found,), (again,) = encoder.encode([example]), encoder.encode([example])
    if repr(found) != repr(again):
        raise ProblemError("the mask differs between two encodings")


TARGETS: dict[bytes, Callable[[int, bytes, Path], None]] = {
    b"f": read_file,
    b"r": read_rows,
    b"t": clean_text,
    b"s": find_spans,
}


@cache
def _encoder(family: str) -> Encoder:
    tokenizer: Any = tokenizer_of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": [*FAMILIES[family].specials]})
    tokenizer.chat_template = FAMILIES[family].template
    return Encoder(tokenizer, "assistant")


# ---- what reads rows --------------------------------------------------------------------------


def use(path: Path, format: DataFormat, fields: dict[str, str], variant: int) -> None:
    """Read a file as everything that reads rows does, and check what must hold."""
    settings = DatasetSettings(
        format=format,
        fields=FieldMap(**fields),
        weight=1.0,
        limit=None,
        paths="all" if variant & 1 else None,
    )
    _same(*([*_examples_of(path, settings)] for _ in range(2)), "examples")  # type: ignore[misc]
    _allowed(lambda: _preferences(path, settings))
    prompts = PromptSettings(format=format, fields=settings.fields, limit=None)
    chat = ChatSettings(system_prompt="s", chat_template=None)
    _allowed(lambda: read_prompts(path, prompts, chat, name="prompts"))
    _allowed(lambda: Documents.read(path, DocumentFields(id="id", text="text"), 5, "documents"))
    _allowed(lambda: data_check.row_statistics(path, format, settings.fields))
    _allowed(lambda: [*FeedbackLog(path, settings.fields).uses()])
    if variant % 4 == 0:
        _allowed(lambda: data_check.check_rows(path, format, settings.fields, None))


def _examples_of(path: Path, settings: DatasetSettings) -> Iterator[str]:
    """Yield each example as text, then the counts or the error."""
    places, stream = set(), None
    try:
        stream = examples(path, settings, on_invalid="skip", name="data")
        for example in stream:
            places.add((example.file, example.row))
            json.dumps(as_written(example), ensure_ascii=False, allow_nan=False).encode()
            "".join(example.expected).encode()
            example.document.encode()
            yield repr(example)
    except StageError as error:
        _check_message(str(error))
        yield str(error)
    if stream is not None:
        _check_counts(stream, len(places))
        yield repr(stream.summary)


def _check_counts(stream: Examples, places: int) -> None:
    summary = stream.summary
    for fault in summary.faults:
        _check_message(fault.reason)
    if summary.format in ("openassistant", "feedback"):
        return  # several rows make one example
    if summary.rows != summary.skipped + summary.filtered + places:
        raise ProblemError(f"{places} rows have examples, and the counts are {summary}")


def _preferences(path: Path, settings: DatasetSettings) -> None:
    joined = layouts.joined(_rows_of(path), settings.format, settings.fields)
    for row in joined:
        for labeled in (False, True):
            try:
                found = parse_preferences(
                    row, settings.fields, labeled=labeled, chosen=settings.format
                )
            except RowError as error:
                _check_message(str(error))
                continue
            for example in (each for preference in found for each in preference.examples):
                json.dumps(as_written(example), ensure_ascii=False, allow_nan=False).encode()


def _rows_of(path: Path) -> Iterator[Row]:
    try:
        yield from read_data(path)
    except StageError as error:
        _check_message(str(error))


def _allowed(act: Callable[[], object]) -> None:
    try:
        act()
    except StageError as error:
        _check_message(str(error))


def _check_message(message: str) -> None:
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise ProblemError("a message holds half of a character") from error
    if not message.strip() or len(message) > MESSAGE:
        raise ProblemError(f"a message of {len(message)} characters: {message[:300]}")


def _same(one: Sequence[Any], other: Sequence[Any], what: str) -> None:
    if repr(one) != repr(other):
        raise ProblemError(f"two readings of a file give different {what}")


# ---- one input --------------------------------------------------------------------------------


def problem(data: bytes) -> str | None:
    """Return what an input broke; None: nothing."""
    if len(data) < 2:
        return None
    target = TARGETS.get(data[:1]) or [*TARGETS.values()][data[0] % len(TARGETS)]
    started, before = time.process_time(), _peak()
    try:
        with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
            target(data[1], data[2:], Path(folder))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    if time.process_time() - started > SECONDS:
        return f"{target.__name__} takes {time.process_time() - started:.1f} processor seconds"
    if _peak() - before > MEGABYTES:
        return f"{target.__name__} takes {_peak() - before:.0f} MiB"
    return None


_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- seeds and changes ------------------------------------------------------------------------


@cache
def seed_rows() -> list[Any]:
    """Return rows of every layout, and a list of events of a log."""
    published = [row for *_, row, _ in TRAINING]
    published += [row for _, row in (*TOOL_ROWS, *PAIRS, *LABELED)]
    asked: dict[str, Any] = {"event": "answer", "session": "s", "prompt": "q"}
    events: list[Any] = [
        {**asked, "id": "a", "completion": "x"},
        {**asked, "id": "b", "completion": "y"},
        {"event": "request", "id": "r", "messages": [{"role": "user", "content": "q"}]},
        {"event": "answer", "id": "c", "of": "r", "completion": "z"},
        {"event": "rating", "of": "a", "thumbs": "up"},
        {"event": "rating", "of": "b", "score": 2},
        {"event": "edit", "of": "a", "completion": "w"},
        {"event": "retry", "of": "a", "by": "b"},
        {"event": "session", "session": "s"},
    ]
    flat: list[Any] = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "a", "rank": 0},
        {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "b", "rank": 1},
    ]
    return [[row] for row in (*published, TREE, {"text": "A document."})] + [events, flat]


def seeds() -> Iterator[bytes]:
    """Yield inputs of every target."""
    for number, found in enumerate(seed_rows()):
        content = _lines(found)
        yield b"r" + bytes([0]) + content
        yield b"r" + bytes([number % 250]) + content
        yield b"f" + bytes([SUFFIXES.index(".parquet") * len(PACKERS)]) + _parquet(found)
    table = b'prompt,completion\r\n"q, ""x""\n",a\n'
    for number, suffix in enumerate(SUFFIXES):
        content = {".json": b'{"data": [{"text": "x"}]}', ".txt": b"One.\n\nTwo."}.get(
            suffix, table.replace(b",", b"\t") if suffix == ".tsv" else table
        )
        for packer, (_, pack) in enumerate(PACKERS):
            variant = number * len(PACKERS) + packer
            yield b"f" + bytes([variant]) + content
            yield b"f" + bytes([(variant + 128) // 30 * 30 + variant % 30 & 255]) + pack(content)
    texts = (
        "mail a.b@mail.org or +49 170 1234567, 4111 1111 1111 1111, DE89370400440532013000",
        "hf_" + "a1" * 12 + " sk-" + "b2" * 12 + " the caf\u00c3\u00a9 \u0939\u093f \u4f60\u597d",
        "- the dog and the cat have to be with that\n" * 12,
    )
    for number, text in enumerate(texts):
        yield b"t" + bytes([number]) + text.encode()
    for number in range(2 * len(FAMILIES)):
        yield b"s" + bytes([number]) + b"a question\x00an answer\x00another\x00 last <think> "


def _lines(values: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in values)


def _parquet(values: Any) -> bytes:
    """Return rows as Parquet; b"": they have no common schema."""
    sink = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist(values), sink)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
        return b""
    return sink.getvalue()


def mutated(data: bytes, seed: int, change_bytes: Callable[[bytes], bytes]) -> bytes:
    """Return a changed input. `change_bytes`: libFuzzer's own changes."""
    random_ = random.Random(seed)
    choice = random_.random()
    if len(data) < 2 or choice < 0.4:
        return change_bytes(data)
    head, content = data[:2], data[2:]
    if choice < 0.45:
        return bytes([head[0], random_.randrange(256)]) + content
    if choice < 0.7 and head[:1] in b"rf":
        return head + change_bytes(content)
    if head[:1] not in b"rf":
        text = content.decode("utf-8", "replace")
        return head + _changed_text(random_, text).encode(errors="replace")
    values = _values(content) or random_.choice(seed_rows())
    known = [each for group in seed_rows() for each in group]
    values = [mutated_value(random_, each, known) if isinstance(each, dict | list) else each
              for each in values[:20]]  # fmt: skip
    if random_.random() < 0.3:
        values.append(mutated_value(random_, random_.choice(known), known))
    try:
        content = _lines(values)
    except (TypeError, ValueError, RecursionError):
        return change_bytes(data)
    if head[:1] == b"f" and random_.random() < 0.7:
        packed = _parquet(values)
        if packed:
            return b"f" + bytes([SUFFIXES.index(".parquet") * len(PACKERS)]) + packed
    return (b"r" + head[1:] if head[:1] == b"f" else head) + content


_PIECES = (
    *("\x00", "\u200d", "\u0301", "\ud83d", "@", "a@b.c", "+1 ", "1-", "1 ", "4111", "DE12", " "),
    *("\n\n", "- ", "...", "```", "<think>", "</think>", "{{", "}}", "{%", "<|im_end|>", "sk-"),
    *("-----BEGIN PRIVATE KEY-----", "eyJ", "password=", "bearer ", "\\\"", "://a:b@"),
)  # fmt: skip


def _changed_text(random_: random.Random, text: str) -> str:
    for _ in range(random_.randint(1, 4)):
        begin = random_.randint(0, len(text))
        end = min(len(text), begin + random_.choice((0, 1, 5, 40)))
        piece = random_.choice((*_PIECES, text[begin:end]))
        text = text[:begin] + piece * random_.choice((1, 1, 2, 9, 500, 5000)) + text[end:]
    return text[: LONGEST // 2]


def _values(content: bytes) -> list[Any]:
    found = []
    for line in islice(content.splitlines(), 20):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found
