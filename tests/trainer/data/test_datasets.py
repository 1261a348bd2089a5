"""Rows of every file kind and format become examples, or errors that name the row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading import rows as rows_module
from tuneyard_trainer.data.reading.example import Example
from tuneyard_trainer.data.reading.layouts import detect
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_rows
from tuneyard_trainer.data.reading.stream import DETECTED_FROM, Examples, examples

SHARED = Path(__file__).parents[4] / "shared" / "data"
ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]


def lines(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def open_data(
    path: Path,
    *,
    format: DataFormat = "auto",
    fields: dict[str, str] | None = None,
    limit: int | None = None,
    on_invalid: Any = "error",
) -> Examples:
    settings = DatasetSettings(
        format=format, fields=FieldMap(**(fields or {})), weight=1.0, limit=limit
    )
    return examples(path, settings, on_invalid=on_invalid, name="spec.data.train[0]")


def load(tmp_path: Path, *rows: Any, **options: Any) -> list[Example]:
    return list(open_data(put(tmp_path / "rows.jsonl", lines(rows)), **options))


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def refusal(act: Callable[[], Any]) -> StageError:
    with pytest.raises(StageError) as caught:
        act()
    return caught.value


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def broken(row: Row) -> str:
    assert isinstance(row.value, BrokenRow)
    return row.value.reason


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


TABLES = {
    "rows.jsonl": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": b"prompt,completion\nq0,a0\nq1,a1\nq2,a2\n",
    "rows.tsv": b"prompt\tcompletion\r\nq0\ta0\r\nq1\ta1\r\nq2\ta2\r\n",
    "rows.parquet": as_parquet(ROWS),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


class TestFiles:
    @pytest.mark.parametrize("suffix", COMPRESS)
    @pytest.mark.parametrize("name", TABLES)
    def test_every_kind_gives_the_same_rows_compressed_or_not(
        self, tmp_path: Path, name: str, suffix: str
    ) -> None:
        path = put(tmp_path / (name + suffix), COMPRESS[suffix](TABLES[name]))
        assert [row.value for row in read_rows(path)] == ROWS

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
    def test_a_byte_order_mark_is_not_part_of_the_first_row(
        self, tmp_path: Path, name: str
    ) -> None:
        path = put(tmp_path / name, b"\xef\xbb\xbf" + TABLES[name])
        assert [row.value for row in read_rows(path)] == ROWS

    def test_a_row_has_the_number_of_its_line_and_blank_lines_are_skipped(
        self, tmp_path: Path
    ) -> None:
        path = put(tmp_path / "a.jsonl", b'{"a": 1}\n\n  \n{"a": 2}')
        assert [row.number for row in read_rows(path)] == [1, 4]

    def test_a_text_file_is_one_document(self, tmp_path: Path) -> None:
        path = put(tmp_path / "a.txt", "one\n\ntwö\n".encode())
        assert [row.value for row in read_rows(path)] == [{"text": "one\n\ntwö\n"}]

    def test_a_json_file_may_hold_its_rows_under_data(self, tmp_path: Path) -> None:
        path = put(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}).encode())
        assert [row.value for row in read_rows(path)] == ROWS

    def test_a_csv_cell_may_hold_newlines_and_exceed_the_csv_modules_limit(
        self, tmp_path: Path
    ) -> None:
        cell = "two\nlines, " * 20_000
        path = put(tmp_path / "a.csv", f'text,id\n"{cell}",1\n'.encode())
        assert [row.value for row in read_rows(path)] == [{"text": cell, "id": "1"}]

    def test_the_first_row_is_yielded_before_the_file_is_read(self, tmp_path: Path) -> None:
        path = put(tmp_path / "a.jsonl.gz", gzip.compress(lines(ROWS * 20_000))[:-1000])
        assert next(read_rows(path)).value == ROWS[0]
        assert refusal(lambda: list(read_rows(path))).reason == "InvalidData"

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"a": ', "not JSON: Expecting value at column 7"),
            (b'{"a": "\xff"}', "not UTF-8: byte 0xff at column 8"),
            (
                b"[1, 2]",
                "a row must be an object with fields, not list; rename a file that is one list of "
                "rows to .json",
            ),
            (b"[", "not JSON: Expecting value at column 2; rename a file that is one list"),
            (
                b'{"a": ' + b"9" * 5000 + b"}",
                "a number has more than 4300 digits: write it as text",
            ),
            (b"[" * 200_000, "nested deeper than 450 levels: flatten the row"),
            (b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}", "nested deeper than 450 levels"),
            (b'{"a": {"b": 1, "b": 2}}', "the key 'b' appears twice in one object: rename one"),
        ],
    )
    def test_a_broken_line_breaks_only_its_row(
        self, tmp_path: Path, line: bytes, reason: str
    ) -> None:
        path = put(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
        first, second, third = read_rows(path)
        assert (first.value, third.value) == ({"a": 1}, {"a": 2})
        assert second.number == 2
        assert broken(second).startswith(reason)

    def test_a_broken_csv_row_breaks_only_its_row(self, tmp_path: Path) -> None:
        content = b'a,b\n1,2\n1,2,3\n"1"x,2\n\xff,2\n1,2\n"open,2\n'
        rows = list(read_rows(put(tmp_path / "a.csv", content)))
        assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
        assert broken(rows[1]) == "the row has 3 cells, and the header names 2 columns"
        assert broken(rows[2]).startswith("not CSV")
        assert broken(rows[3]) == "column a is not UTF-8"
        assert rows[4].value == {"a": "1", "b": "2"}
        assert (
            broken(rows[5]) == "not CSV: a cell in line 7 begins with a quote that is never closed"
        )

    @pytest.mark.parametrize("header", [b"a,a\n1,2\n", b"a,\n1,2\n"])
    def test_a_header_must_name_each_column_once(self, tmp_path: Path, header: bytes) -> None:
        path = put(tmp_path / "a.csv", header)
        assert "header" in refusal(lambda: list(read_rows(path))).message

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.json", b'[{"a": 1},', "is not JSON: Illegal trailing comma|is not JSON: Expecting"),
            ("a.json", lines(ROWS), "rename a file with one object a line to .jsonl"),
            ("a.json", b'"text"', "neither a list of rows"),
            ("a.json", b'["\xff"]', "not UTF-8 at byte 3"),
            ("a.parquet", b"PAR1 no", "not Parquet"),
            ("a.jsonl.gz", b"no gzip", "cannot be decompressed"),
            ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], "cannot be decompressed"),
            ("a.jsonl.bz2", b"no bzip", "cannot be decompressed"),
            ("a.jsonl.xz", b"no xz", "cannot be decompressed"),
            ("a.jsonl.zst", b"no zst", "cannot be decompressed"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_named(
        self, tmp_path: Path, name: str, content: bytes, words: str
    ) -> None:
        path = put(tmp_path / name, content)
        error = refusal(lambda: list(read_rows(path)))
        assert error.reason == "InvalidData"
        assert name in error.message
        assert any(text in error.message for text in words.split("|"))

    def test_a_row_longer_than_a_row_may_be_breaks_only_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rows_module, "MAX_ROW", 1 << 20)
        long = b'{"a": "' + b"x" * (3 << 20) + b'"}\n'
        path = put(tmp_path / "a.jsonl", b'{"a": 1}\n' + long + b'{"a": 2}\n')
        first, second, third = read_rows(path)
        assert (first.value, third.value, third.number) == ({"a": 1}, {"a": 2}, 3)
        assert broken(second) == "longer than 1 MiB: split the row"

    @pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
    def test_a_zip_bomb_is_refused_before_it_is_unpacked(
        self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rows_module, "BOMB_BYTES", 1 << 20)
        path = put(tmp_path / f"a.json{suffix}", COMPRESS[suffix](b" " * (8 << 20)))
        error = refusal(lambda: list(read_rows(path)))
        assert error.reason == "InvalidData"
        assert "zip bomb" in error.message

    def test_a_parquet_file_whose_strings_are_none_breaks_only_their_rows(
        self, tmp_path: Path
    ) -> None:
        texts = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary())
        lying = pa.StringArray.from_buffers(3, *texts.buffers()[1:])
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table({"text": lying}), sink)
        path = put(tmp_path / "a.parquet", bytes(sink.getvalue().to_pybytes()))
        first, second, third = read_rows(path)
        assert (first.value, third.value) == ({"text": "a"}, {"text": "b"})
        assert "not UTF-8" in broken(second)

    def test_null_fields_of_parquets_structures_are_absent(self, tmp_path: Path) -> None:
        """Arrow gives the arguments of each call the names of all arguments."""
        rows = [{"call": [{"a": {"x": 1}}, {"a": {"y": 2}}]}]
        path = put(tmp_path / "a.parquet", as_parquet(rows))
        assert [row.value for row in read_rows(path)] == rows

    @pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz"])
    def test_the_error_for_an_unknown_suffix_lists_the_known_ones(
        self, tmp_path: Path, name: str
    ) -> None:
        error = refusal(lambda: open_data(put(tmp_path / name, b"x")))
        assert error.reason == "UnknownFileType"
        assert ".jsonl" in error.message
        assert ".zst" in error.message


class TestFolders:
    def test_files_are_read_in_the_order_of_their_names_and_each_row_names_its_file(
        self, tmp_path: Path
    ) -> None:
        put(tmp_path / "b.jsonl", lines(ROWS[1:2]))
        put(tmp_path / "sub/c.jsonl.gz", gzip.compress(lines(ROWS[2:])))
        put(tmp_path / "a.jsonl", lines(ROWS[:1]))
        put(tmp_path / "README.md", b"# About")
        put(tmp_path / "LICENSE", b"free")
        put(tmp_path / ".cache/x.jsonl", b"junk")
        found = [(example.file, example.row, example.prompt) for example in open_data(tmp_path)]
        assert found == [("a.jsonl", 1, "q0"), ("b.jsonl", 1, "q1"), ("sub/c.jsonl.gz", 1, "q2")]

    def test_a_glob_selects_one_kind_of_files_in_a_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "a.jsonl", lines(ROWS))
        put(tmp_path / "b.csv", b"prompt,completion\nq,a\n")
        assert len(list(open_data(tmp_path / "*.jsonl"))) == 3
        error = refusal(lambda: open_data(tmp_path))
        assert "csv (b.csv), jsonl (a.jsonl)" in error.message
        assert "glob" in error.advice

    def test_a_folder_without_files_is_empty_data(self, tmp_path: Path) -> None:
        assert refusal(lambda: open_data(tmp_path)).reason == "EmptyData"


FORMATS: list[tuple[DataFormat, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": chat("q", "a")}, [("user", "q"), ("assistant", "a")]),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("q", "r")]},
                {"role": "assistant", "content": "a", "tool_calls": None},
            ]
        },
        [("system", "s"), ("user", "qr"), ("assistant", "a")],
    ),
    (
        "alpaca",
        {"instruction": "Add", "input": "1+1", "output": "2", "text": "### Instruction: Add"},
        [("user", "Add\n\n1+1"), ("assistant", "2")],
    ),
    (
        "alpaca",
        {"instruction": "Sing", "input": "", "output": "La", "system": "Be short"},
        [("system", "Be short"), ("user", "Sing"), ("assistant", "La")],
    ),
    (
        "alpaca",
        {"instruction": "Sing", "input": None, "output": "La", "system": None},
        [("user", "Sing"), ("assistant", "La")],
    ),
    ("flan", {"inputs": "q", "targets": "a"}, [("user", "q"), ("assistant", "a")]),
    (
        "sharegpt",
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "tool", "value": "t"},
                {"from": "gpt", "value": "b"},
            ],
        },
        [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t"), ("assistant", "b")],
    ),
    ("ultrachat", {"id": "1", "data": ["q", "a"]}, [("user", "q"), ("assistant", "a")]),
    (
        "prompt-completion",
        {"prompt": "q", "completion": "a", "system": "s"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "prompt-completion",
        {"prompt": chat("q", "a", "r"), "completion": [{"role": "assistant", "content": "b"}]},
        [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
    ),
    (
        "prompt-completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
        [("user", "q"), ("assistant", "a")],
    ),
]


def post(key: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": key, "parent_id": parent, "role": role, "text": key, **more}


def nested(row: dict[str, Any], *replies: dict[str, Any]) -> dict[str, Any]:
    return row | {"replies": list(replies)}


class TestFormats:
    @pytest.mark.parametrize(("name", "row", "expected"), FORMATS)
    def test_each_format_is_detected_and_read(
        self, tmp_path: Path, name: DataFormat, row: dict[str, Any], expected: Any
    ) -> None:
        stream = open_data(put(tmp_path / "rows.jsonl", lines([row])))
        assert [turns(example) for example in stream] == [expected]
        assert stream.summary.format == name
        assert turns(load(tmp_path, row, format=name)[0]) == expected

    def test_prompt_and_completion_are_kept_exactly(self, tmp_path: Path) -> None:
        (example,) = load(tmp_path, {"prompt": "The capital is", "completion": " Paris\n"})
        assert (example.kind, example.prompt, example.completion) == (
            "completion",
            "The capital is",
            " Paris\n",
        )

    def test_text_is_kept_exactly(self, tmp_path: Path) -> None:
        (example,) = load(tmp_path, {"text": " one\n"})
        assert (example.kind, example.text, example.messages) == ("text", " one\n", ())

    def test_the_ultrachat_format_reads_messages_too(self, tmp_path: Path) -> None:
        row = {"prompt": "q", "prompt_id": "1", "messages": chat("q", "a")}
        assert turns(load(tmp_path, row, format="ultrachat")[0])[1] == ("assistant", "a")
        assert turns(load(tmp_path, row)[0])[1] == ("assistant", "a")

    def test_messages_are_read_from_parquet_with_nulls(self, tmp_path: Path) -> None:
        rows = [{"messages": chat("q", "a"), "expected": ["a"]}, {"messages": chat("q", "b")}]
        stream = open_data(put(tmp_path / "a.parquet", as_parquet(rows)))
        assert [example.expected for example in stream] == [("a",), ()]

    def test_fields_map_other_field_names(self, tmp_path: Path) -> None:
        fields = {"prompt": "question", "completion": "answer"}
        (example,) = load(tmp_path, {"question": "q", "answer": "a"}, fields=fields)
        assert (example.prompt, example.completion) == ("q", "a")
        row = {"instruction": "i", "input": "x", "response": "a"}
        (example,) = load(tmp_path, row, fields={"completion": "response"})
        assert turns(example) == [("user", "i\n\nx"), ("assistant", "a")]
        (example,) = load(tmp_path, {"chosen": "c", "rejected": "r"}, fields={"text": "chosen"})
        assert example.text == "c"
        turn = {"from": "human", "value": "q"}
        row = {"conversation": [turn, {"from": "gpt", "value": "a"}]}
        (example,) = load(tmp_path, row, fields={"messages": "conversation"})
        assert example.kind == "chat"

    @pytest.mark.parametrize("prompt", [{}, {"prompt": "instruction"}])
    def test_a_mapped_input_follows_the_prompt_as_in_alpaca(
        self, tmp_path: Path, prompt: dict[str, str]
    ) -> None:
        """In both formats that Dolly's fields can be mapped to; an empty input adds nothing."""
        fields = {"input": "context", "completion": "response", **prompt}
        row = {"instruction": "i", "context": "x", "response": "a", "category": "qa"}
        (example,) = load(tmp_path, row, fields=fields)
        assert turns(example) == [("user", "i\n\nx"), ("assistant", "a")]
        (example,) = load(tmp_path, row | {"context": " "}, fields=fields)
        assert turns(example) == [("user", "i"), ("assistant", "a")]
        error = refusal(lambda: load(tmp_path, row | {"context": 1}, fields=fields))
        assert "context must be a string, not int" in error.message

    def test_prompt_and_completion_have_no_input_unless_it_is_mapped(self, tmp_path: Path) -> None:
        row = ROWS[0] | {"input": "x"}
        assert load(tmp_path, row)[0].prompt == "q0"
        assert load(tmp_path, row, fields={"input": "input"})[0].prompt == "q0\n\nx"

    def test_a_column_without_a_name_is_no_input(self, tmp_path: Path) -> None:
        """A converted table may hold its index in one."""
        row = ROWS[0] | {"": "17"}
        assert load(tmp_path, row)[0].prompt == "q0"

    def test_an_input_beside_a_list_of_turns_is_refused(self, tmp_path: Path) -> None:
        """It has no place there, and must not vanish."""
        row = {"prompt": chat("q", "a", "r"), "completion": "b", "context": "x"}
        error = refusal(lambda: load(tmp_path, row, fields={"input": "context"}))
        assert "context cannot follow a prompt that is a list of turns" in error.message

    @pytest.mark.parametrize(
        ("row", "fields", "unread"),
        [
            (
                {"instruction": "i", "context": "x", "response": "a", "category": "qa"},
                {"prompt": "instruction", "completion": "response"},
                ("category", "context"),
            ),
            ({"instruction": "i", "input": "x", "output": "a", "text": "t"}, {}, ("text",)),
            ({"instruction": "i", "instances": [{"input": "x", "output": "a"}]}, {}, ()),
            (ROWS[0] | {"expected": "a0", "system": "s"}, {}, ()),
            (ROWS[0] | {"note": "", "source": None, "tags": []}, {}, ()),
            ({"messages": chat("q", "a"), "prompt_id": "1"}, {}, ("prompt_id",)),
            ({"inputs": "q", "targets": "a", "task": "t"}, {}, ("task",)),
            (ROWS[0] | {"half\ud800": "x"}, {}, ("half?",)),  # no log or record could hold it
            (post("q", None, "prompter", lang="en") | {"replies": []}, {}, ()),
        ],
    )
    def test_columns_that_nothing_reads_are_listed(
        self, tmp_path: Path, row: dict[str, Any], fields: dict[str, str], unread: tuple[str, ...]
    ) -> None:
        """A column without a value is not listed; neither are the many of an OpenAssistant tree."""
        answer = post("a", "q", "assistant")
        rows = [row] if "replies" not in row else [nested(row, answer)]
        stream = open_data(put(tmp_path / "rows.jsonl", lines(rows)), fields=fields)
        assert len(list(stream)) == 1
        assert stream.summary.unread == unread

    def test_the_list_of_unread_columns_is_bounded_and_the_same_in_every_run(
        self, tmp_path: Path
    ) -> None:
        rows = [ROWS[0] | {f"{n:05}{'x' * 5000}": 1} for n in range(1000)]
        stream = open_data(put(tmp_path / "rows.jsonl", lines(rows)))
        assert len(list(stream)) == 1000
        row = ROWS[0] | {f"{n:02}": 1 for n in range(40)}
        wide = open_data(put(tmp_path / "wide.jsonl", lines([row])))
        assert len(list(wide)) == 1
        assert stream.summary.unread == tuple(f"{n:05}{'x' * 55}" for n in range(20))
        assert wide.summary.unread == tuple(f"{n:02}" for n in range(20))

    def test_a_field_map_with_fields_of_another_format_is_refused(self, tmp_path: Path) -> None:
        error = refusal(
            lambda: load(tmp_path, {"text": "t"}, format="text", fields={"prompt": "q"})
        )
        assert "fields.prompt" in error.message
        assert "fields.prompt" in error.advice

    def test_examples_keep_the_expected_answers(self, tmp_path: Path) -> None:
        one, several = load(
            tmp_path, ROWS[0] | {"expected": "x"}, ROWS[1] | {"expected": ["x", "y"]}
        )
        assert (one.expected, several.expected) == (("x",), ("x", "y"))
        error = refusal(lambda: load(tmp_path, ROWS[0] | {"expected": [1]}))
        assert "expected must be" in error.message

    @pytest.mark.parametrize(
        "row",
        [
            {"query": "q", "reply": "a"},
            {"messages": "hello"},
            {"messages": chat("q", "a"), "prompt": "q", "completion": "a"},
            {"instruction": "i", "output": "o", "inputs": "i", "targets": "o"},
        ],
    )
    def test_unknown_and_ambiguous_formats_are_refused(
        self, tmp_path: Path, row: dict[str, Any]
    ) -> None:
        error = refusal(lambda: load(tmp_path, row))
        assert error.reason == "UnknownFormat"
        assert all(field in error.message for field in row)
        assert "conversations: [{from, value}]" in error.message
        assert "format" in error.advice
        assert "fields" in error.advice

    def test_the_first_rows_decide_the_format_and_later_rows_must_match(
        self, tmp_path: Path
    ) -> None:
        rows = [ROWS[0]] * DETECTED_FROM + [{"text": "t"}]
        error = refusal(lambda: load(tmp_path, *rows))
        assert "row 21: prompt is missing; the row has text" in error.message

    def test_broken_rows_do_not_decide_the_format(self) -> None:
        rows = [Row(1, BrokenRow("x")), Row(2, ROWS[0])]
        assert detect(rows, FieldMap()) == "prompt-completion"


BEST = [("user", "q"), ("assistant", "best"), ("user", "again"), ("assistant", "last")]


class TestOpenAssistant:
    def flat(self) -> list[dict[str, Any]]:
        return [
            post("q", None, "prompter"),
            post("worse", "q", "assistant", rank=1),
            post("best", "q", "assistant", rank=0),
            post("again", "best", "prompter", rank=None),
            post("deleted", "again", "assistant", rank=0, deleted=True),
            post("unreviewed", "again", "assistant", rank=1, review_result=None),
            post("last", "again", "assistant", rank=2, review_result=True),
            post("thanks", "last", "prompter"),
        ]

    def test_flat_messages_in_any_order_become_the_best_conversation(self, tmp_path: Path) -> None:
        assert turns(load(tmp_path, *self.flat())[0]) == BEST
        assert turns(load(tmp_path, *reversed(self.flat()))[0]) == BEST

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_a_tree_and_its_flat_messages_give_the_same_conversation(
        self, tmp_path: Path, wrapped: bool
    ) -> None:
        q, worse, best, again, *last, thanks = self.flat()
        answers = [nested(m, *([thanks] if m["message_id"] == "last" else [])) for m in last]
        tree = nested(q, worse, nested(best, nested(again, *answers)))
        row = {"message_tree_id": "q", "prompt": tree} if wrapped else tree
        assert turns(load(tmp_path, row)[0]) == BEST

    def test_a_tree_without_a_reviewed_answer_is_counted_as_filtered(self, tmp_path: Path) -> None:
        bad = post("spam", "r", "assistant", review_result=False)
        rows = [*self.flat(), post("r", None, "prompter"), bad]
        stream = open_data(put(tmp_path / "a.jsonl", lines(rows)))
        assert len(list(stream)) == 1
        assert (stream.summary.rows, stream.summary.filtered, stream.summary.skipped) == (10, 1, 0)

    def test_a_file_without_reviewed_answers_is_empty_data(self, tmp_path: Path) -> None:
        error = refusal(lambda: load(tmp_path, post("q", None, "prompter", deleted=True)))
        assert error.reason == "EmptyData"
        assert "1 conversation trees" in error.message

    def test_a_missing_parent_and_a_repeated_message_are_invalid_rows(self, tmp_path: Path) -> None:
        rows = [*self.flat(), post("x", "missing", "assistant"), post("q", None, "prompter")]
        error = refusal(lambda: load(tmp_path, *rows))
        assert "row 9: the parent message missing is not in the data" in error.message
        assert "row 10: message_id q appears twice" in error.message

    def test_the_messages_below_an_invalid_one_are_invalid(self, tmp_path: Path) -> None:
        """They were in no tree, and in no count either."""
        rows = [
            *self.flat(),
            post("x", "missing", "prompter"),
            post("y", "x", "assistant"),
            post("c", "d", "prompter"),
            post("d", "c", "assistant"),
            post("e", "d", "prompter"),
        ]
        stream = open_data(put(tmp_path / "a.jsonl", lines(rows)), on_invalid="skip")
        assert len(list(stream)) == 1
        assert stream.summary.skipped == 5
        error = refusal(lambda: load(tmp_path, *rows[:10]))
        assert "row 10: the message x before it, or one before that, is invalid" in error.message


def as_row(turns: list[Any]) -> dict[str, Any]:
    return {"messages": turns}


class TestInvalidRows:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (as_row(chat("q", "a", "r")), "the last turn is by user; expected assistant"),
            (as_row(chat("q", "a")[1:]), "turn 1 is by assistant and begins the conversation"),
            (as_row(chat("q") + chat("q", "a")), "turn 2 is by user and follows user"),
            (as_row([chat("q")[0], {"role": "system", "content": "s"}]), "turn 2 is by system"),
            (as_row(chat("q", " \n")), "turn 2 (assistant) is empty"),
            (
                as_row([{"role": "wizard", "content": "q"}]),
                "turn 1 has role 'wizard'; known roles are",
            ),
            (
                as_row([{"role": "user", "content": 3}]),
                "turn 1: content must be a string, not int",
            ),
            (
                as_row([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
                "turn 1 holds a part that is not text",
            ),
            (as_row(["q"]), "turn 1 must be an object"),
            (as_row([]), "messages must be a list of turns"),
            ({"other": 1}, "messages must be a list of turns"),
            (as_row(chat("q", "\ud800")), "character 1 is half of a surrogate pair"),
        ],
    )
    def test_an_invalid_conversation_is_refused_with_its_reason(
        self, tmp_path: Path, row: dict[str, Any], reason: str
    ) -> None:
        error = refusal(lambda: load(tmp_path, as_row(chat("q", "a")), row))
        assert error.reason == "InvalidData"
        assert f"rows.jsonl row 2: {reason}" in error.message
        assert "onInvalidRow" in error.advice

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "q", "completion": " "}, "completion is empty"),
            ({"prompt": "q", "completion": None}, "completion is missing"),
            ({"prompt": 1, "completion": "a"}, "prompt must be a string, not int"),
            ({"prompt": "q", "completion": "a", "system": 1}, "system must be a string"),
        ],
    )
    def test_prompt_and_completion_must_both_be_text(
        self, tmp_path: Path, row: dict[str, Any], reason: str
    ) -> None:
        error = refusal(lambda: load(tmp_path, row, format="prompt-completion"))
        assert reason in error.message

    def rows(self, tmp_path: Path) -> Path:
        bad = [b"{", b"[]", lines([{"prompt": "q"}]).strip(), b"\xff"]
        return put(tmp_path / "rows.jsonl", lines(ROWS) + b"\n".join(bad) + b"\n" + lines(ROWS))

    def test_with_error_the_message_counts_all_invalid_rows_and_quotes_three(
        self, tmp_path: Path
    ) -> None:
        path = self.rows(tmp_path)
        read: list[Example] = []
        error = refusal(lambda: read.extend(open_data(path)))
        assert "spec.data.train[0]: 4 of 10 rows are invalid. The first 3: " in error.message
        assert all(f"rows.jsonl row {number}: " in error.message for number in (4, 5, 6))
        assert "row 7" not in error.message
        assert [example.row for example in read] == [1, 2, 3]  # the rest is only counted

    def test_with_skip_invalid_rows_are_skipped_and_counted(self, tmp_path: Path) -> None:
        stream = open_data(self.rows(tmp_path), on_invalid="skip")
        assert [example.row for example in stream] == [1, 2, 3, 8, 9, 10]
        summary = stream.summary
        assert (summary.rows, summary.examples, summary.skipped) == (10, 6, 4)
        assert [fault.row for fault in summary.faults] == [4, 5, 6]

    def test_with_skip_a_file_without_valid_rows_is_an_error(self, tmp_path: Path) -> None:
        error = refusal(lambda: load(tmp_path, {"prompt": 1, "completion": 2}, on_invalid="skip"))
        assert error.reason == "InvalidData"
        assert "1 of 1 rows" in error.message

    @pytest.mark.parametrize("on_invalid", ["error", "skip"])
    def test_a_file_of_broken_rows_alone_is_an_error_that_quotes_them(
        self, tmp_path: Path, on_invalid: str
    ) -> None:
        path = put(tmp_path / "a.jsonl", b"{\n{\n")
        fields = {"prompt": "question"}
        error = refusal(lambda: list(open_data(path, on_invalid=on_invalid, fields=fields)))
        assert error.reason == "InvalidData"
        assert "a.jsonl row 1: not JSON" in error.message

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.csv", b"prompt\n"),
         ("b.csv", b""), ("a.parquet", as_parquet(ROWS[:0]))],
    )  # fmt: skip
    def test_a_file_without_rows_is_empty_data(
        self, tmp_path: Path, name: str, content: bytes
    ) -> None:
        error = refusal(lambda: list(open_data(put(tmp_path / name, content))))
        assert error.reason == "EmptyData"
        assert "spec.data.train[0]" in error.message

    def test_the_limit_counts_rows_over_all_files(self, tmp_path: Path) -> None:
        put(tmp_path / "a.jsonl", lines(ROWS))
        put(tmp_path / "b.jsonl", lines(ROWS) + b"broken\n")
        stream = open_data(tmp_path, limit=4)
        assert [(example.file, example.row) for example in stream][-1] == ("b.jsonl", 1)
        assert stream.summary.rows == 4


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
class TestPublicData:
    def test_openassistant_trees(self) -> None:
        stream = open_data(SHARED / "oasst-en-100-messages.jsonl.gz")
        found = list(stream)
        assert stream.summary.format == "openassistant"
        assert len(found) + stream.summary.filtered == stream.summary.rows
        assert len(found) > 0.9 * stream.summary.rows
        assert turns(found[0])[0] == ("user", "How can I find the best 401k plan for my needs?")

    def test_each_instance_of_a_self_instruct_seed_is_an_example(self) -> None:
        stream = open_data(SHARED / "self-instruct-seed-tasks.jsonl")
        found = list(stream)
        assert (stream.summary.format, stream.summary.rows) == ("alpaca", 175)
        assert len(found) >= 175
        assert "\n\nNight : Day :: Right : Left" in found[1].messages[0].content

    def test_gsm8k_with_a_field_map(self) -> None:
        fields = {"prompt": "question", "completion": "answer"}
        found = list(open_data(SHARED / "gsm8k-test-500.jsonl", fields=fields, limit=100))
        assert len(found) == 100
        assert found[0].completion.endswith("#### 18")

    def test_preference_pairs_have_no_format_and_can_be_read_as_text(self) -> None:
        path = SHARED / "hh-rlhf-harmless-base.jsonl.gz"
        assert "chosen, rejected" in refusal(lambda: open_data(path)).message
        stream = open_data(path, fields={"text": "chosen"})
        assert len(list(stream)) == 1800

    def test_a_csv_of_questions_and_answers(self) -> None:
        fields = {"prompt": "Question", "completion": "Best Answer"}
        assert len(list(open_data(SHARED / "TruthfulQA.csv", fields=fields))) > 700

    def test_a_text_file(self) -> None:
        (example,) = open_data(SHARED / "tinyshakespeare-300k.txt")
        assert example.text.startswith("First Citizen:")
