"""`tuneyard data show` prints rows with what is trained on marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneyard.cli import main

CHAT = {
    "messages": [
        {"role": "user", "content": "Which lamp?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
}
PAIR = {"prompt": "Which?", "chosen": "Red.", "rejected": "Blue."}


def shown(capsys: pytest.CaptureFixture[str], path: Path, *rows: object, options: str = "") -> str:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main.call(["data", "show", str(file), *options.split()]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def test_rows_are_shown_as_turns_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, tmp_path, CHAT, CHAT, options="-n 1 --train-on last-assistant")
    assert "rows.jsonl row 1 (messages)" in text
    assert "row 2" not in text
    assert "assistant: Red." in text
    assert "assistant: «Yes.\n»" in text


def test_rows_are_shown_as_the_model_reads_them(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, tmp_path, CHAT, options=f"--model {tiny_model_dir}")
    assert (
        "<|im_start|>user\nWhich lamp?<|im_end|>\n<|im_start|>assistant\n«Red.<|im_end|>»" in text
    )
    assert "tokens are trained on" in text


def test_each_completion_of_a_preference_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, tmp_path, PAIR)
    assert "rows.jsonl row 1, completion 1 of 2" in text
    assert "assistant: «Blue.\n»" in text


def test_rows_that_are_left_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"messages": [{"role": "user", "content": "Which?"}]}
    text = shown(capsys, tmp_path, CHAT, silent, CHAT, silent, options="-n 2")
    assert "1 of the first 3 rows are invalid and left out: rows.jsonl row 2: the last turn" in text
    assert "row 4" not in text
    assert "left out" not in shown(capsys, tmp_path, CHAT, silent, options="-n 1")


def test_a_pair_after_a_conversation_without_an_answer_is_a_preference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA-Factory's layout. UltraFeedback's conversation ends with its answer: it can be either,
    and a format names it."""
    asked = {"from": "human", "value": "Which?"}
    sides = {
        "chosen": {"from": "gpt", "value": "Red."},
        "rejected": {"from": "gpt", "value": "Blue."},
    }
    text = shown(capsys, tmp_path, {"conversations": [asked], **sides})
    assert "completion 2 of 2\nuser: Which?\nassistant: «Blue.\n»" in text
    either = {"conversations": [asked, sides["chosen"]], **PAIR}
    assert "row 1 (sharegpt)" in shown(capsys, tmp_path, either)


def test_a_feedback_log_is_shown_as_what_it_becomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = [
        {"event": "answer", "id": 1, "prompt": "Which?", "completion": "Blue."},
        {"event": "edit", "of": 1, "completion": "Red."},
        {"event": "rating", "of": 2, "thumbs": "up"},
    ]
    text = shown(capsys, tmp_path, *log)
    assert "1 conversations for sft, 1 pairs, and 2 labeled completions (1 good, 1 bad)" in text
    assert "invalid rows: 1: rows.jsonl row 3: answer 2 is not in the data" in text
    assert "rows.jsonl row 1 (feedback), rejected\nuser: Which?\nassistant: «Blue.\n»" in text


def test_a_row_cannot_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\x1b" not in shown(capsys, tmp_path, PAIR | {"chosen": "\x1b[2J"})


def test_a_file_without_a_known_layout_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "generation": "a"}\n')
    assert main.call(["data", "show", str(file)]) == 1
    assert "{completion: generation}" in capsys.readouterr().err


def test_columns_are_named_as_in_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"q": "Which lamp?", "a": "Red."}
    text = shown(capsys, tmp_path, row, options="--fields prompt=q,completion=a")
    assert "user: Which lamp?" in text
    assert "assistant: «Red.\n»" in text
    rated = {"q": "Which?", "good": "Red.", "bad": "Blue."}
    text = shown(capsys, tmp_path, rated, options="--fields prompt=q,chosen=good,rejected=bad")
    assert "completion 2 of 2" in text


@pytest.mark.parametrize("given", ["prompt", "prompt=", "colour=q", "prompt=a,prompt=b"])
def test_fields_that_a_manifest_could_not_have_are_refused(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(CHAT) + "\n")
    assert main.call(["data", "show", str(file), "--fields", given]) == 2
    assert given.partition("=")[0] in capsys.readouterr().err


def test_reasoning_is_shown_unless_it_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"role": "user", "content": "Which?"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "Red.", "thinking": "Hmm."}]},
        {"messages": [question, {"role": "assistant", "content": "<think>Hmm.</think>Red."}]},
    ]
    assert shown(capsys, tmp_path, *rows).count("Hmm.") == 2
    text = shown(capsys, tmp_path, *rows, options="--reasoning drop")
    assert "Hmm." not in text
    assert text.count("assistant: «Red.\n»") == 2
