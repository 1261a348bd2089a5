"""`tuneyard data check` and `stats`: faults of a file are named, and clean files pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.test_cleaning import PLANTED, STORY
from tests.trainer.data.test_leaks import noise
from tests.trainer.data.test_prepare import Row, chat
from tuneyard.cli import main


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys: Any, *arguments: str) -> tuple[int, str]:
    code = main.call(["data", *arguments])
    return code, capsys.readouterr().out


def test_a_clean_file_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", noise(1))
    code, out = run(capsys, "check", file, "--held-out", write(tmp_path / "held.jsonl", noise(2)))
    assert code == 0
    assert out == f"{file}: 40 rows of the layout messages\nNo faults were found.\n"


def test_each_planted_fault_is_named_with_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = noise(1)
    copy = rows[2]["messages"][1]["content"].replace(".", ";") + " indeed"
    file = write(
        tmp_path / "rows.jsonl",
        [
            *rows,
            {"messages": []},
            rows[4],
            chat(rows[2]["messages"][0]["content"], copy),
            chat("Whom do I ask?", PLANTED["email"]),
            chat("Where?", "In the cafÃ©."),
        ],
    )
    held_out = write(
        tmp_path / "held.jsonl", [*noise(2), chat("Then?", rows[9]["messages"][1]["content"])]
    )
    before = Path(file).read_bytes()
    code, out = run(capsys, "check", file, "--held-out", held_out)
    assert code == 1
    assert Path(file).read_bytes() == before
    lines = out.splitlines()
    for fault, row in (
        ("invalid rows: 1 of 45", "rows.jsonl row 41"),
        ("duplicates.exact: 1 of 44", "rows.jsonl row 42: 100% as in rows.jsonl row 5"),
        ("duplicates.near: 1 of 44", "rows.jsonl row 43"),
        ("encoding.mojibake: 1 of 44", "rows.jsonl row 45"),
        ("personalData.email: 1 of 44", "rows.jsonl row 44: write to [EMAIL] today"),
        (
            "held-out rows in the training data: 1 of 41",
            "held.jsonl row 41 is in rows.jsonl row 10",
        ),
    ):
        place = next(i for i, line in enumerate(lines) if line.startswith(fault))
        assert lines[place + 1].startswith(f"  {row}"), out
    assert "ada.lovelace" not in out


def test_a_file_without_a_valid_row_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": ""}]}] * 3)
    assert main.call(["data", "check", file]) == 1
    assert "3 of 3 rows are invalid" in capsys.readouterr().err


def test_statistics_count_rows_turns_words_and_languages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("Tell me a story.", STORY)] * 3 + [chat("What is this?", "A red lamp.")]
    code, out = run(capsys, "stats", write(tmp_path / "rows.jsonl", rows))
    assert code == 0
    lines = out.splitlines()
    for line in (
        "Rows: 4",
        "Layout: messages",
        "Different prompts: 2",
        "Turns by user: 4",
        "Languages: en 100.0%",
    ):
        assert line in lines


def test_calls_of_tools_are_searched_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"name": "send", "arguments": {"to": "ada@engines.org"}}
    turns = [
        {"role": "user", "content": "Mail it."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "Sent."},
        {"role": "assistant", "content": "Done."},
    ]
    file = write(tmp_path / "rows.jsonl", [{"talk": turns}])
    code, out = run(capsys, "check", file, "--fields", "messages=talk")
    assert code == 1
    assert "personalData.email: 1 of 1 rows" in out
    assert "ada@" not in out
    code, out = run(capsys, "stats", file, "--fields", "messages=talk")
    assert code == 0
    assert "Turns by tool: 1" in out


def test_columns_that_nothing_reads_are_named_and_are_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [row | {"source": "web"} for row in noise(1)])
    code, out = run(capsys, "check", file)
    assert code == 0
    assert "Nothing reads the columns source." in out


LOG: list[Row] = [
    {"event": "answer", "id": 1, "prompt": "Which lamp?", "completion": STORY},
    {"event": "answer", "id": 2, "prompt": "Which lamp?", "completion": "A blue one."},
    {"event": "edit", "of": 1, "completion": STORY + " Indeed."},
    {"event": "rating", "of": 2, "thumbs": "down"},
    {"event": "answer", "id": 3, "prompt": "Whom do I ask?", "completion": PLANTED["email"]},
    {"event": "rating", "of": 9, "thumbs": "up"},
]


def test_every_answer_and_edit_of_a_log_is_searched_and_an_edit_is_no_duplicate_of_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "log.jsonl", LOG)
    code, out = run(capsys, "check", file)
    assert code == 1
    assert out.splitlines() == [
        f"{file}: 6 rows of the layout feedback",
        "invalid rows: 1 of 6 rows",
        "  log.jsonl row 6: answer 9 is not in the data",
        "personalData.email: 1 of 4 rows",
        "  log.jsonl row 5: write to [EMAIL] today",
        "The answers and edits were searched, also those that nobody rated.",
    ]
    copies = [event | {"id": 4} for event in LOG if event.get("id") == 1]
    code, out = run(capsys, "check", write(tmp_path / "log.jsonl", LOG + copies))
    assert "duplicates.exact: 1 of 5 rows" in out


def test_a_log_that_nobody_rated_has_no_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "check", write(tmp_path / "log.jsonl", LOG[1:2]))
    assert (code, "No faults were found." in out) == (0, True)


def test_the_statistics_of_a_log_are_those_of_what_it_becomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "log.jsonl", LOG)
    code, out = run(capsys, "stats", file)
    assert code == 0
    for line in (
        "Rows: 6",
        "Layout: feedback",
        "Invalid rows: 1 UnknownId",
        "Answers: 3",
        "They become: 1 conversations for sft, 1 pairs, and 3 labeled completions (1 good, 2 bad)",
        "By number of completions: 2: 1",
        "The longer one wins: 100% of 1",
    ):
        assert line in out.splitlines(), out


def test_the_columns_of_a_log_can_be_named_and_labels_are_counted_where_there_are_no_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = [{"kind": "answer", "id": 1, "prompt": "Which?", "completion": "Blue."}]
    log += [{"kind": "rating", "of": 1, "thumbs": "down"}]
    file = write(tmp_path / "log.jsonl", log)
    for command in ("stats", "check", "show"):
        code, out = run(capsys, command, file, "--fields", "event=kind")
        assert code == 0, out
        if command == "stats":
            assert "By number of completions: 1: 1" in out
            assert "Labeled bad: 1" in out
        if command == "show":
            assert "0 pairs, and 1 labeled completions (0 good, 1 bad)" in out
