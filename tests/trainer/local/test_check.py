"""`tuneyard data check` and `stats`: faults of a file are named, and clean files pass."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import CHATML
from tests.trainer.data.test_cleaning import PLANTED, STORY
from tests.trainer.data.test_leaks import noise
from tests.trainer.data.test_prepare import Row, chat
from tuneyard.cli import main
from tuneyard_trainer.data.texts import Texts


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


def test_a_full_disk_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Texts, "append", append)
    assert main.call(["data", "check", write(tmp_path / "rows.jsonl", noise(1))]) == 1
    assert "The disk is full" in (error := capsys.readouterr().err)
    assert "TMPDIR" in error


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


def test_fields_whose_columns_no_row_has_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"message_id": 1, "parent_id": None, "role": "prompter", "body": "Which lamp?"}
    replies = [
        {"message_id": at, "parent_id": 1, "role": "assistant", "body": text, "place": at}
        for at, text in ((2, "The blue one."), (3, "Ask somebody else."))
    ]
    trees = write(tmp_path / "trees.jsonl", [question, *replies])
    _, out = run(capsys, "check", trees, "--fields", "text=body,rank=place,deleted=removd")
    assert "No row has the columns of fields.deleted: removd." in out
    _, out = run(capsys, "check", trees, "--fields", "text=body,rank=place")
    assert "No row has" not in out
    rated = write(tmp_path / "pairs.jsonl", pairs(1))
    _, out = run(capsys, "check", rated, "--fields", "system=rules")
    assert "No row has the columns of fields.system: rules." in out


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


# ---- preferences --------------------------------------------------------------------------------


def pair(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def pairs(seed: int, count: int = 12) -> list[Row]:
    """Pairs of random words."""
    words = [row["messages"][1]["content"] for row in noise(seed, 2 * count)]
    return [pair(f"Story {i}?", *words[2 * i : 2 * i + 2]) for i in range(count)]


def test_preferences_without_faults_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "pairs.jsonl", pairs(1))
    code, out = run(capsys, "check", file, "--held-out", write(tmp_path / "h.jsonl", pairs(2)))
    assert code == 0
    assert out == f"{file}: 12 rows of the layout preference\nNo faults were found.\n"


@pytest.mark.parametrize(
    ("label", "layout"), [(True, "labeled"), (False, "labeled"), (1, "prompt-completion")]
)
def test_answers_with_a_true_or_false_label_are_preferences_and_with_a_class_they_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bool | int, layout: str
) -> None:
    row = {"prompt": "Which lamp is the best?", "completion": "A blue one.", "label": label}
    file = write(tmp_path / "rows.jsonl", [row])
    code, out = run(capsys, "check", file)
    assert code == 0
    assert f"of the layout {layout}" in out
    assert ("Nothing reads the columns label." in out) == (layout != "labeled")


def test_the_prompt_and_both_answers_of_a_preference_are_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(1)
    file = write(
        tmp_path / "pairs.jsonl",
        [
            *rows,
            pair(PLANTED["phone"], "Yes.", "No."),
            pair("Whom do I ask?", PLANTED["email"], "Nobody at all."),
            pair("Whom then?", "Somebody at last.", PLANTED["email"]),
            pair("Where?", "In the cafÃ©.", "In the cafÃ©, or not."),
            rows[3],
            {"prompt": "Which?", "chosen": "This."},
        ],
    )
    held_out = write(
        tmp_path / "held.jsonl", [*pairs(2), pair("Then?", "No.", rows[5]["rejected"])]
    )
    code, out = run(capsys, "check", file, "--held-out", held_out)
    assert code == 1
    lines = out.splitlines()
    for fault, row in (
        ("invalid rows: 1 of 18", "pairs.jsonl row 18"),
        ("duplicates.exact: 1 of 17", "pairs.jsonl row 17: 100% as in pairs.jsonl row 4"),
        ("encoding.mojibake: 1 of 17", "pairs.jsonl row 16"),
        ("personalData.email: 2 of 17", "pairs.jsonl row 14: write to [EMAIL] today"),
        ("personalData.phone: 1 of 17", "pairs.jsonl row 13: call [PHONE]"),
        (
            "held-out rows in the training data: 1 of 13",
            "held.jsonl row 13 is in pairs.jsonl row 6",
        ),
    ):
        place = next(i for i, line in enumerate(lines) if line.startswith(fault))
        assert lines[place + 1].startswith(f"  {row}"), out
    assert "ada.lovelace" not in out


def test_statistics_of_preferences_are_also_shown_for_each_file_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    for name, better, worse in (("a.jsonl", "Yes, it does.", "No."), ("b.jsonl", "Yes.", "No, no")):
        rows = [{"prompt": f"{n}?", "chosen": better, "rejected": worse} for n in range(3)]
        write(folder / name, rows)
    code, out = run(capsys, "stats", str(folder))
    assert code == 0
    assert "\nThe longer one wins: 50% of 6\n" in out
    assert "\na.jsonl: The longer one wins: 100% of 3\n" in out
    assert "\nb.jsonl: The longer one wins: 0% of 3\n" in out
    assert "a.jsonl: " not in run(capsys, "stats", str(folder / "a.jsonl"))[1]


def test_a_broken_first_row_does_not_hide_that_the_others_are_preferences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "pairs.jsonl", pairs(1))
    Path(file).write_text("{\n" + Path(file).read_text())
    code, out = run(capsys, "check", file)
    assert code == 1
    assert "13 rows of the layout preference" in out
    assert "invalid rows: 1 of 13" in out
    assert "Preferences: 12" in run(capsys, "stats", file)[1]


def test_a_file_without_a_valid_preference_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "pairs.jsonl", [pair("Which?", "Yes.", "Yes.")] * 3)
    assert main.call(["data", "check", file]) == 1
    assert "3 of 3 rows are invalid" in capsys.readouterr().err


# ---- as a model reads them ----------------------------------------------------------------------


def test_rows_that_a_model_reads_without_faults_pass_with_their_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    file = write(
        tmp_path / "rows.jsonl", [chat(f"Number {i}?", f"The lamp {i}.") for i in range(9)]
    )
    code, out = run(capsys, "check", file, "--model", str(tiny_model_dir))
    assert code == 0, out
    assert out.splitlines()[0] == f"{file}: 9 rows of the layout messages"
    assert out.splitlines()[1].startswith("Tokens of a row: half at most ")
    assert "No faults were found." in out


def test_rows_that_a_job_would_refuse_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    """The rows that are too long or have no target are so only as this model reads them."""
    silent = chat("Who?", "The harbour team.")
    silent["messages"][1]["train"] = False
    rows = [
        *[chat(f"Number {i}?", f"The lamp {i}.") for i in range(9)],
        chat("Ask.", "lamp and button " * 30),
        silent,
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--model", str(tiny_model_dir), "--max-length", "60")
    code, out = run(capsys, "check", file, *options)
    assert code == 1
    lines = out.splitlines()
    for fault, row in (
        ("rows longer than 60 tokens: 1 of 11 rows", "rows.jsonl row 10: "),
        ("rows without a trained token: 1 of 11 rows", "rows.jsonl row 11"),
    ):
        place = lines.index(fault)
        assert lines[place + 1].startswith(f"  {row}"), out
    assert len(lines) == 6, out
    assert run(capsys, "check", file)[0] == 0, "nothing else is wrong with them"


def with_template(tmp_path: Path, model: Path, template: str) -> str:
    """Return a copy of the model with another chat template."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_rows_that_the_chat_template_refuses_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    model = with_template(tmp_path, tiny_model_dir, template + CHATML)
    system = {"role": "system", "content": "Be brief."}
    rows = [chat(f"Number {i}?", f"The lamp {i}.") for i in range(9)]
    rows.append({"messages": [system, *chat("Who?", "The team.")["messages"]]})
    code, out = run(capsys, "check", write(tmp_path / "rows.jsonl", rows), "--model", model)
    assert code == 1
    assert "rows that the chat template refuses: 1 of 10 rows\n  rows.jsonl row 10: " in out
    assert "no system" in out


def test_a_stop_token_that_no_row_trains_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    """A job with onOverlength: truncate would cut it off in each row."""
    rows = [chat(f"Number {i}?", "The lamp and the button. " * 9) for i in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--model", str(tiny_model_dir), "--max-length", "60")
    fault = "rows, none of which trains a stop token within the limit: 9 of 9 rows"
    code, out = run(capsys, "check", file, *options)
    assert (code, fault in out) == (1, True), out
    write(tmp_path / "rows.jsonl", [*rows, chat("Which?", "The lamp.")])
    assert "stop token" not in run(capsys, "check", file, *options)[1], "one row trains it"


def test_questions_that_are_trained_on_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m['role'] + '\\n' "
        "+ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    )
    model = with_template(tmp_path, tiny_model_dir, template)
    rows = [chat(f"Number {i}?", f"The lamp {i}.") for i in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    code, out = run(capsys, "check", file, "--model", model)
    assert (code, "rows whose questions are trained on: 9 of 9 rows" in out) == (1, True), out
    assert run(capsys, "check", file, "--model", model, "--train-on", "all")[0] == 0


def test_preferences_are_tokenized_with_each_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    rows = [pair(f"Number {i}?", f"The lamp {i}.", f"A button {i}.") for i in range(9)]
    rows.append(pair("Which?", "A lamp.", "lamp and button " * 30))
    file = write(tmp_path / "pairs.jsonl", rows)
    code, out = run(capsys, "check", file, "--model", str(tiny_model_dir), "--max-length", "60")
    assert code == 1
    assert "rows longer than 60 tokens: 1 of 10 rows\n  pairs.jsonl row 10: " in out
    assert "Tokens of an answer with its prompt: " in out


def test_a_length_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", noise(1))
    assert main.call(["data", "check", file, "--max-length", "60"]) == 2
    assert "add --model" in capsys.readouterr().err
