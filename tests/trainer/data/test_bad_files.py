"""Files that are broken, hostile or of another kind: each is refused with its place and a remedy,
and in bounded memory."""

from __future__ import annotations

import datetime
import io
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.trainer.data.test_datasets import ROWS, broken, chat, lines, load, put, refusal
from tuneyard.api.sources import FieldMap
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.personal_data import without_personal_data
from tuneyard_trainer.data.reading import parquet_rows, rows
from tuneyard_trainer.data.reading.example import RowError, printable
from tuneyard_trainer.data.reading.layouts import detect
from tuneyard_trainer.data.reading.parquet_rows import _dictionary
from tuneyard_trainer.data.reading.rows import Row, read_rows
from tuneyard_trainer.data.reading.thrift import Compact
from tuneyard_trainer.preference.rows import parse_preferences


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, **options)
    return sink.getvalue()


def calling(arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "find", "arguments": arguments}}
    return {"messages": [*chat("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]}


# ---- tables -----------------------------------------------------------------------------------


def test_a_line_of_a_table_is_never_read_whole_if_it_is_longer_than_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1 << 20)
    path = put(tmp_path / "a.csv", b"a,b\n1,2\n" + b"1," * (3 << 20) + b"\n3,4\n")
    first, second, third = read_rows(path)
    assert (first.value, third.value) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert broken(second) == "not CSV: longer than 1 MiB: split the row in line 3"


def test_a_quote_that_is_not_closed_swallows_no_more_than_the_longest_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1000)
    path = put(tmp_path / "a.csv", b'a,b\n"1,2\n' + b"3,4\n" * 1000)
    first, *others = read_rows(path)
    assert broken(first).startswith("not CSV: longer than 0 MiB: split the row in lines 2 to 25")
    assert broken(first).endswith("is a quote not closed?")
    assert len(others) > 700
    assert all(row.value == {"a": "3", "b": "4"} for row in others)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\n1,2\n".encode("utf-16"), "a.csv is UTF-16: convert it with iconv"),
        ("a,b\n1,2\n".encode("utf-16-be"), "needs a header|UTF-16"),
        (b"caf\xe9,b\n1,2\n", "has a header that is not UTF-8"),
        (b"prompt;completion\nq;a\n", "separate the cells with ',', not with ';'"),
        (b"prompt\tcompletion\nq\ta\n", r"separate the cells with ',', not with '\t'"),
    ],
)
def test_a_table_of_another_encoding_or_separator_is_named(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    if reason.startswith("needs"):
        content = b"\xfe\xff" + content
    error = refusal(lambda: list(read_rows(put(tmp_path / "a.csv", content))))
    assert error.reason == "InvalidData"
    assert any(part in error.message for part in reason.split("|"))
    assert error.message.isprintable()


def test_utf_16_is_named_in_every_kind_of_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.tsv", "a.txt"):
        path = put(tmp_path / name, lines(ROWS).decode().encode("utf-16"))
        assert "iconv -f UTF-16 -t UTF-8" in refusal(lambda p=path: list(read_rows(p))).message


# ---- JSON -------------------------------------------------------------------------------------


def test_a_key_that_appears_twice_makes_a_json_file_invalid(tmp_path: Path) -> None:
    """Python would keep the last value, and lose the first one silently."""
    path = put(tmp_path / "a.json", b'[{"prompt": "q", "completion": "a", "completion": "b"}]')
    error = refusal(lambda: list(read_rows(path)))
    assert "the key 'completion' appears twice in one object" in error.message


def test_a_row_that_the_readers_could_not_walk_through_is_broken(tmp_path: Path) -> None:
    deep = b'{"event": "answer", "id": "a", "prompt": "q", "completion": '
    path = put(tmp_path / "a.jsonl", deep + b"[" * 900 + b"]" * 900 + b"}\n" + lines(ROWS))
    first, *others = read_rows(path)
    assert "nested deeper than 450 levels" in broken(first)
    assert len(others) == 3


# ---- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"x": float("nan")}, "the arguments of find: nan is not JSON; write null or a text"),
        ({"x": {"y": ["\ud800"]}}, "half of a surrogate pair"),
        ({"\ud800": 1}, "half of a surrogate pair"),
        (json.loads('{"x": ' + "[" * 120 + "]" * 120 + "}"), "more than 100 levels; flatten them"),
    ],
)
def test_arguments_that_no_template_could_render_are_refused_by_their_turn(
    tmp_path: Path, arguments: Any, reason: str
) -> None:
    error = refusal(lambda: load(tmp_path, calling(arguments)))
    assert "row 1: turn 2" in error.message
    assert reason in error.message
    tools = [{"name": "find", "parameters": arguments}]
    error = refusal(lambda: load(tmp_path, {"messages": chat("q", "a"), "tools": tools}))
    assert "row 1: tools[0]" in error.message


def test_dates_in_the_arguments_of_parquet_are_refused_by_their_row(tmp_path: Path) -> None:
    row = calling({"when": datetime.datetime(2026, 1, 1)})  # noqa: DTZ001 - Parquet has them
    path = put(tmp_path / "a.parquet", as_parquet(pa.Table.from_pylist([row])))
    (found,) = read_rows(path)
    assert isinstance(found.value, dict)
    rated = {"prompt": "q", "chosen": found.value["messages"][1:], "rejected": "b"}
    with pytest.raises(RowError, match="a datetime is not JSON; write it as text"):
        parse_preferences(Row(1, rated), FieldMap(), labeled=False)


def test_expected_answers_and_ids_of_calls_must_be_whole_characters(tmp_path: Path) -> None:
    half = {**ROWS[0], "expected": "\ud800"}
    assert "half of a surrogate pair" in refusal(lambda: load(tmp_path, half)).message
    half, fields = {**ROWS[0], "id": "\ud800"}, {"document": "id"}
    assert (
        "half of a surrogate pair" in refusal(lambda: load(tmp_path, half, fields=fields)).message
    )
    row = calling({})
    row["messages"][1]["tool_calls"][0]["id"] = "\ud800"
    assert "half of a surrogate pair" in refusal(lambda: load(tmp_path, row)).message


def test_a_message_without_an_id_is_no_parent_of_the_roots(tmp_path: Path) -> None:
    """It was its own parent, and the search for its replies never ended."""
    flat = [
        {"message_id": None, "parent_id": None, "role": "prompter", "text": "x"},
        {"message_id": "", "parent_id": "", "role": "prompter", "text": "x"},
        {"message_id": "None", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "a", "parent_id": "None", "role": "assistant", "text": "a"},
    ]
    error = refusal(lambda: load(tmp_path, *flat))
    assert "2 of 4 rows are invalid" in error.message
    assert "rows.jsonl row 1: message_id is empty" in error.message


# ---- messages ---------------------------------------------------------------------------------


def test_a_message_quotes_rows_briefly_and_without_what_controls_a_terminal(
    tmp_path: Path,
) -> None:
    names = {f"\x1b[2J\ud800{'x' * 50}{n}": 1 for n in range(1000)}
    error = refusal(lambda: load(tmp_path, names))
    assert error.message.isprintable()
    assert len(error.message) < 2000
    error = refusal(
        lambda: load(tmp_path, {"messages": [*chat("q", "a"), {"role": "\x1b" * 9000}]})
    )
    assert str(error).isprintable()
    assert len(error.message) < 1000


def test_a_printable_text_stays_as_it_is() -> None:
    assert printable("naïve 你好") == "naïve 你好"
    assert printable("a\n\tb\x00\u202e") == "a  b??"
    assert printable("x" * 600) == "x" * 499 + "…"


def test_columns_in_another_case_are_named_with_the_fields_that_read_them() -> None:
    row = Row(1, {"Question": "q", " Answer": "a", "Id": 1}, "a.csv")
    error = refusal(lambda: detect([row], FieldMap()))
    assert "The nearest is question-answer" in error.message
    assert error.advice == "Name the fields: fields: {prompt: Question, completion: ' Answer'}."


# ---- Parquet ----------------------------------------------------------------------------------


def refused_parquet(path: Path, content: bytes) -> str:
    error = refusal(lambda: list(read_rows(put(path / "a.parquet", content))))
    assert error.reason == "InvalidData"
    return error.message


def test_a_parquet_page_that_unpacks_like_a_zip_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BOMB_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * (8 << 20)]})
    content = as_parquet(table, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read"))
    assert "as those of a zip bomb do" in refused_parquet(tmp_path, content)


def test_a_list_that_unpacks_to_far_too_many_values_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of equal values have no size: neither the file nor its claims show how many they are."""
    monkeypatch.setattr(parquet_rows, "BOMB_VALUES", 1 << 18)
    listed = pa.ListArray.from_arrays(pa.array([0, 1 << 20], pa.int32()), pa.nulls(1 << 20, "i1"))
    message = refused_parquet(tmp_path, as_parquet(pa.table({"x": listed})))
    assert "hold lists of 1048576 values" in message


def test_rows_that_repeat_one_long_text_are_unpacked_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary holds the text once, and a file of a kilobyte any number of such rows."""
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 8 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), ["x" * (2 << 20)])
    content = as_parquet(pa.table({"text": text.dictionary_decode()}), compression="zstd")
    path = put(tmp_path / "a.parquet", content)
    assert path.stat().st_size < 10_000
    sizes: list[int] = []
    values = parquet_rows._values
    monkeypatch.setattr(
        parquet_rows, "_values", lambda batch: (sizes.append(batch.num_rows), values(batch))[1]
    )
    assert sum(1 for _ in read_rows(path)) == 40
    assert max(sizes) <= 4
    monkeypatch.setattr(rows, "BOMB_BYTES", 32 << 20)
    assert "as those of a zip bomb do" in refused_parquet(tmp_path, content)


def test_a_row_of_one_list_that_repeats_a_long_text_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BOMB_BYTES", 16 << 20)
    table = pa.table({"x": [["x" * (1 << 20)] * 30]})
    content = as_parquet(table, compression="zstd")
    assert "a row unpacks to 30 MiB" in refused_parquet(tmp_path, content)


def test_a_row_of_parquet_that_is_longer_than_a_row_may_be_breaks_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1 << 20)
    table = pa.table({"text": ["a", "x" * (2 << 20), "b"]})
    first, second, third = read_rows(put(tmp_path / "a.parquet", as_parquet(table)))
    assert (first.value, third.value) == ({"text": "a"}, {"text": "b"})
    assert broken(second) == "longer than 1 MiB: split the row"


def test_a_value_that_python_has_no_type_for_breaks_its_row_with_its_column(
    tmp_path: Path,
) -> None:
    at = pa.array([None, 1], pa.timestamp("us", "Mars/Base"))
    table = pa.table({"text": ["a", "b"], "at": at})
    first, second = read_rows(put(tmp_path / "a.parquet", as_parquet(table)))
    assert first.value == {"text": "a", "at": None}
    assert broken(second).startswith("column at holds a value of the type timestamp[us, tz=Mars")
    assert broken(second).endswith("remove the column, or write it as text")


PLAIN = pa.table({"text": ["one", "two"] * 1000})


def test_a_footer_that_lies_about_the_number_of_rows_is_named(tmp_path: Path) -> None:
    content = as_parquet(PLAIN)
    of_file, of_column, *_, of_group = _places(content, b"\xa0\x1f")
    for place in (of_file, of_column, of_group):
        lying = content[:place] + b"\xa2\x1f" + content[place + 2 :]
        assert "the footer says that" in refused_parquet(tmp_path, lying)


def _places(content: bytes, part: bytes) -> list[int]:
    """Return the places of a part in the footer."""
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    return [i for i in range(start, len(content)) if content.startswith(part, i)]


def _last(content: bytes, old: bytes, new: bytes) -> bytes:
    head, _, tail = content.rpartition(old)
    return head + new + tail


def test_a_page_whose_checksum_is_wrong_is_not_read(tmp_path: Path) -> None:
    texts = pa.table({"text": ["one", "two"]})
    content = as_parquet(texts, compression="none", write_page_checksum=True, use_dictionary=False)
    assert "checksum" in refused_parquet(tmp_path, _last(content, b"\0two", b"\0owt"))


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    content = as_parquet(PLAIN)
    assert "not Parquet" in refused_parquet(tmp_path, content[:-20])
    assert "a.parquet" in refused_parquet(tmp_path, content[:8] + content[-400:])


def test_a_footer_with_another_type_than_the_pages_does_not_end_the_process(
    tmp_path: Path,
) -> None:
    """pyarrow's access to the metadata of such a column calls abort()."""
    content = _last(
        as_parquet(PLAIN), b"\x15\x0c\x25\x02\x18\x04text", b"\x15\x04\x25\x02\x18\x04text"
    )
    path = put(tmp_path / "a.parquet", content)
    code = (
        "import sys; from pathlib import Path; from tuneyard.errors import StageError\n"
        "from tuneyard_trainer.data.reading.rows import read_rows\n"
        "try: list(read_rows(Path(sys.argv[1])))\n"
        "except StageError as error: print(error.reason, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("InvalidData a.parquet ")


@pytest.mark.parametrize("value", [b"\x28\x01a", b"\x27" + bytes(8), b"\x29\x13\x01"])
def test_a_place_in_the_footer_that_is_no_number_is_none(tmp_path: Path, value: bytes) -> None:
    """pyarrow skips a field of another type: here the place of a column's dictionary."""
    content = as_parquet(PLAIN, compression="none")
    size = int.from_bytes(content[-8:-4], "little")
    footer = _last(content[-8 - size : -8], b"\x26\x08", value)
    lying = content[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    path = put(tmp_path / "a.parquet", lying)
    with suppress(StageError):  # without its place, pyarrow may miss the dictionary
        assert len(list(read_rows(path))) == len(PLAIN)


def test_a_dictionary_page_without_numbers_is_none(tmp_path: Path) -> None:
    header = bytes([0x15, 0x04, 0x18, 0x01, 0x61])  # type: dictionary; bytes unpacked: "a"
    with put(tmp_path / "a", b"1234" + header + bytes(60)).open("rb") as file:
        assert _dictionary(file, 4) == (0, 1)


def test_the_dictionary_of_a_column_is_found_in_its_first_page(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", as_parquet(PLAIN, compression="zstd"))
    with path.open("rb") as file:
        assert _dictionary(file, 4) == (14, 2)
        assert _dictionary(file, 5) == (0, 1)
        assert _dictionary(file, 1 << 40) == (0, 1)


def test_thrift_lists_and_long_numbers_are_read() -> None:
    data = bytes([0x16, 0x03, 0x19, 0x25, 0x02, 0x03, 0x18, 0x01, 0x61, 0x11, 0x00])
    assert Compact(data).struct() == {1: -2, 2: [1, -2], 3: b"a", 4: True}
    with pytest.raises(ValueError, match="unknown type"):
        Compact(bytes([0x1D])).struct()
    with pytest.raises(IndexError):
        Compact(bytes([0x18, 0x7F])).struct()


# ---- cleaning ---------------------------------------------------------------------------------


def test_the_search_for_keys_takes_time_in_proportion_to_the_text() -> None:
    """A long run without a digit and without white space took half a minute."""
    text = "sk-/" * (1 << 15)
    started = time.process_time()
    assert without_personal_data(text) == text
    assert time.process_time() - started < 2


def test_a_key_has_a_digit() -> None:
    assert without_personal_data("sk-" + "a" * 30) == "sk-" + "a" * 30
    assert without_personal_data("sk-" + "a1" * 15) == "[KEY]"
