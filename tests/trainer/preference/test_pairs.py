"""Preferences of every shape are read, checked, split by prompt and written as tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PairsSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.example import Message, RowError
from tuneyard_trainer.data.reading.rows import Row
from tuneyard_trainer.preference import pairs
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.rows import Preference, parse_preferences
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

HH = Path(__file__).parents[4] / "shared" / "data" / "hh-rlhf-harmless-base.jsonl.gz"
SETTINGS: dict[str, Any] = {
    "preferences": [DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)],
    "labeled": False,
    "held_out": 0.25,
    "max_length": "auto",
    "on_overlength": "error",
    "on_invalid_row": "error",
    "chat": ChatSettings(system_prompt=None, chat_template=None),
    "seed": 0,
}
PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f"Good answer {i}.", "rejected": f"Bad answer {i}."}
    for i in range(8)
]


def run(
    folder: Path,
    model: Path,
    rows: list[Any] | Path,
    reports: list[str] | None = None,
    **settings: Any,
) -> tuple[Preferences, StageOutcome]:
    path = folder / "rows.jsonl"
    if isinstance(rows, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = PlannedStage(
        name="pairs",
        settings=PairsSettings(**(SETTINGS | settings)),
        inputs={
            "preferences.0": SourceInput(uri="file://rows.jsonl", path="spec.preferences.data[0]")
        },
        fingerprint="sha256:0",
    )
    inputs = {"model": model, "preferences.0": rows if isinstance(rows, Path) else path}
    workdir = folder / "out"
    workdir.mkdir(exist_ok=True)
    told = [] if reports is None else reports
    worker = Worker(
        0, 1, torch.device("cpu"), report=lambda **report: told.append(report["message"])
    )
    outcome = pairs.run(StageContext(stage, inputs, workdir, worker))
    return Preferences.open(workdir), outcome


def parsed(value: dict[str, Any], *, labeled: bool = False) -> Preference:
    (found,) = parse_preferences(Row(1, value), FieldMap(), labeled=labeled)
    return found


def texts(preference: Preference) -> list[str]:
    return [completion.content for completion in preference.completions]


USER = Message("user", "Hi?")
DIALOGUE = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Bye?\n\nAssistant: "


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"question": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [{"role": "user", "content": "Hi?"}], "chosen": "Yes.", "rejected": "No."},
        {
            "prompt": "Hi?",
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        {
            "chosen": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}],
            "rejected": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No."}],
        },
        {
            "prompt": "Hi?",
            "chosen": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "rejected": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "No."},
            ],
        },
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: No.",
        },
        {"prompt": "Hi?", "answers": ["Yes.", "No."]},
        {"prompt": "Hi?", "responses": ["No.", "Yes."], "ranks": [2, 1]},
    ],
)
def test_every_shape_of_a_pair_is_the_same_preference(value: dict[str, Any]) -> None:
    found = parsed(value)
    assert (found.prompt, texts(found), found.label) == ((USER,), ["Yes.", "No."], 1.0)


def test_a_dialogue_keeps_its_turns() -> None:
    found = parsed({"chosen": DIALOGUE + "Good bye.", "rejected": DIALOGUE + "What?"})
    assert [turn.role for turn in found.prompt] == ["user", "assistant", "user"]
    assert texts(found) == ["Good bye.", "What?"]


def test_a_ranking_is_sorted_by_its_ranks() -> None:
    value = {"prompt": "Hi?", "answers": ["c", "a", "b"], "ranks": [3, 1, 2]}
    assert texts(parsed(value)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "i", "input": "x"}, FieldMap()),
        ({"prompt": "i", "context": "x"}, FieldMap(input="context")),
        ({"task": "i", "context": "x"}, FieldMap(prompt="task", input="context")),
    ],
)
def test_the_input_of_a_row_follows_its_prompt(row: dict[str, Any], fields: FieldMap) -> None:
    value = row | {"chosen": "c", "rejected": "r"}
    (found,) = parse_preferences(Row(1, value), fields, labeled=False)
    assert found.prompt == (Message("user", "i\n\nx"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": [{"role": "user", "content": "i"}], "context": "x"}, "cannot follow a prompt"),
        ({"prompt": "i", "context": ["x"]}, "must be a string, not list"),
    ],
)
def test_an_input_that_cannot_follow_its_prompt_is_refused(
    row: dict[str, Any], problem: str
) -> None:
    value = row | {"chosen": "c", "rejected": "r"}
    with pytest.raises(RowError, match=problem):
        parse_preferences(Row(1, value), FieldMap(input="context"), labeled=False)


def test_the_probability_of_an_order_becomes_the_label() -> None:
    value = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "probability": 0.75}
    assert parsed(value).label == 0.75


@pytest.mark.parametrize("label", [True, 1, "up", "Up"])
def test_a_good_label_is_recognized_in_every_spelling(label: Any) -> None:
    assert parsed({"prompt": "Hi?", "completion": "Yes.", "label": label}, labeled=True).label == 1


def test_a_pair_becomes_a_good_and_a_bad_completion_for_kto() -> None:
    value = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    found = parse_preferences(Row(1, value), FieldMap(), labeled=True)
    assert [(texts(single), single.label) for single in found] == [(["Yes."], 1), (["No."], 0)]


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes. "}, "IdenticalSides"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": " "}, "EmptyCompletion"),
    ({"prompt": "Hi?", "chosen": "Yes."}, "UnknownShape"),
    ({"chosen": "Yes.", "rejected": "No."}, "UnknownShape"),
    ({"text": "Yes."}, "UnknownShape"),
    ({"prompt": "Hi?", "completion": "Yes.", "label": True}, "UnknownShape"),
    ({"prompt": "", "chosen": "Yes.", "rejected": "No."}, "InvalidTurns"),
    (
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Ho?\n\nAssistant: No.",
        },
        "DifferingPrompts",
    ),
    ({"chosen": DIALOGUE + "x", "rejected": DIALOGUE + "x\n\nHuman: y"}, "EmptyCompletion"),
    ({"prompt": "Hi?", "answers": ["a", "a", "b"]}, "IdenticalSides"),
    ({"prompt": "Hi?", "answers": ["a", "b"], "ranks": [1, 1]}, "InvalidLabel"),
    ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "probability": 0.2}, "InvalidLabel"),
    ({"prompt": [{"role": "king", "content": "x"}], "chosen": "a", "rejected": "b"},
     "InvalidTurns"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "fault"), INVALID)
def test_a_row_without_a_preference_raises_its_fault(value: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowError) as caught:
        parsed(value)
    assert caught.value.fault == fault


def test_an_unknown_label_is_an_error() -> None:
    with pytest.raises(RowError) as caught:
        parsed({"prompt": "Hi?", "completion": "Yes.", "label": 5}, labeled=True)
    assert caught.value.fault == "InvalidLabel"


# ---- on disk --------------------------------------------------------------------------------


def test_a_row_is_the_prompt_and_one_completion_up_to_its_stop_token(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    found, _ = run(tmp_path, tiny_model_dir, PAIRS, held_out=0.0)
    assert found.validation is None
    assert list(found.train.sizes) == [2] * 8
    ids, mask = found.train.rows.ids(0), found.train.rows.mask(0)
    assert tiny_tokenizer.decode(ids) == (
        "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\nGood answer 0.<|im_end|>"
    )
    assert tiny_tokenizer.decode(ids[mask == 1]) == "Good answer 0.<|im_end|>"
    assert "Bad" in tiny_tokenizer.decode(found.train.rows.ids(1))


def test_all_completions_of_a_prompt_are_in_the_same_split(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [row | {"rejected": f"Worse {n}."} for row in PAIRS for n in range(3)]
    found, outcome = run(tmp_path, tiny_model_dir, rows)
    assert found.validation is not None
    assert len(found.validation) == outcome.metrics["heldOutPreferences"] == 6
    held = [json.loads(line) for line in (tmp_path / "out" / "validation.jsonl").open()]
    assert len({line["prompt"][0]["content"] for line in held}) == 2


def test_rankings_and_pairs_can_be_mixed(tmp_path: Path, tiny_model_dir: Path) -> None:
    ranking = {"prompt": "Which?", "answers": ["first", "second", "third"]}
    found, _ = run(tmp_path, tiny_model_dir, [*PAIRS, ranking], held_out=0.0)
    assert list(found.train.sizes) == [2] * 8 + [3]
    assert list(found.train.members(np.array([8, 0]))) == [16, 17, 18, 0, 1]


def test_the_system_prompt_of_the_job_is_part_of_every_row(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    chat = ChatSettings(system_prompt="Be brief.", chat_template=None)
    found, _ = run(tmp_path, tiny_model_dir, PAIRS, chat=chat)
    assert "system\nBe brief." in tiny_tokenizer.decode(found.train.rows.ids(0))


def test_without_a_chat_template_a_row_holds_every_turn_and_the_jobs_system_prompt(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """In the format in which the policy continues prompts and the reward model scores them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / "chat_template.jinja").unlink()
    chat = ChatSettings(system_prompt="Be brief.", chat_template=None)
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    rows = [row | {"prompt": turns} for row in PAIRS]
    found, _ = run(tmp_path, base, rows, chat=chat, held_out=0.0)
    assert tiny_tokenizer.decode(found.train.rows.ids(0)) == (
        "\n\nSystem: Be brief.\n\nHuman: user\n\nAssistant: assistant\n\nHuman: user"
        "\n\nAssistant: Good answer 0.<|im_end|>"
    )


def test_reasoning_is_rendered_or_dropped_as_the_job_says(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "(m['reasoning_content'] or '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = ChatSettings(system_prompt=None, chat_template=template)
    sides = {
        side: {"role": "assistant", "content": answer, "thinking": "Hm. "}
        for side, answer in (("chosen", "Yes."), ("rejected", "<think>So.</think>No."))
    }
    rows = [{"prompt": f"{number}?", **sides} for number in range(4)]

    def decoded(**policy: Any) -> tuple[str, list[Any]]:
        found, _ = run(tmp_path, tiny_model_dir, rows, chat=chat, held_out=0.5, **policy)
        lines = (tmp_path / "out" / "validation.jsonl").read_text().splitlines()
        texts = [tiny_tokenizer.decode(found.train.rows.ids(row)) for row in (0, 1)]
        return "".join(texts), [json.loads(line) for line in lines]

    kept, held = decoded()
    assert kept.count("Hm. ") == 2
    assert held[0]["turns"][0]["reasoning_content"] == "Hm. "
    dropped, held = decoded(reasoning="drop")
    assert "Hm." not in dropped
    assert "So." not in dropped
    assert held[0]["answers"] == ["Yes.", "No."]
    assert "turns" not in held[0]


def test_one_invalid_row_fails_the_stage_and_is_shown(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [*PAIRS, PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}]
    with pytest.raises(StageError) as caught:
        run(tmp_path, tiny_model_dir, rows)
    assert caught.value.reason == "InvalidPreferences"
    assert "1 of 9 rows state no preference: 1 IdenticalSides" in caught.value.message
    assert "row 9" in caught.value.message
    assert not list((tmp_path / "out").iterdir())


def test_invalid_rows_can_be_skipped_and_are_counted_by_fault(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [*PAIRS, *(row for row, _ in INVALID[:3])]
    _, outcome = run(tmp_path, tiny_model_dir, rows, on_invalid_row="skip")
    assert outcome.metrics["skippedRows"] == 3
    assert outcome.details["skippedBy"] == {
        "IdenticalSides": 1,
        "EmptyCompletion": 1,
        "UnknownShape": 1,
    }


def test_at_most_half_of_the_rows_are_skipped(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [PAIRS[0], {"text": "a"}, {"text": "b"}]
    with pytest.raises(StageError) as caught:
        run(tmp_path, tiny_model_dir, rows, on_invalid_row="skip")
    assert caught.value.reason == "InvalidPreferences"
    assert "prompt, chosen and rejected" in (caught.value.advice or "")


def test_a_long_row_is_rejected_or_dropped_but_never_truncated(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [*PAIRS, PAIRS[0] | {"chosen": "very " * 60}]
    with pytest.raises(StageError) as caught:
        run(tmp_path, tiny_model_dir, rows, max_length=64)
    assert caught.value.reason == "RowTooLong"
    found, outcome = run(tmp_path, tiny_model_dir, rows, max_length=64, on_overlength="drop")
    assert outcome.metrics["droppedRows"] == 1
    assert found.train.rows.lengths.max() <= 64


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([], {}, "EmptyData"),
        (PAIRS[:1] * 3, {}, "TooFewRows"),
        ([{"prompt": f"{i}?", "completion": "x", "label": 1} for i in range(4)],
         {"labeled": True}, "OneSided"),
        (PAIRS, {"max_length": 10_000}, "MaxLength"),
    ],
)  # fmt: skip
def test_unusable_preferences_raise_a_reason(
    tmp_path: Path, tiny_model_dir: Path, rows: list[Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(StageError) as caught:
        run(tmp_path, tiny_model_dir, rows, **settings)
    assert caught.value.reason == reason


def test_a_split_that_leaves_one_label_to_train_on_is_refused_before_training(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """KTO divides by the share of each label: it would fail after the model was loaded."""
    rows = [{"prompt": "Bad?", "completion": "no", "label": 0}]
    rows += [{"prompt": "Good?", "completion": f"yes {i}", "label": 1} for i in range(4)]
    reasons = set()
    for held_out in (0.5, 0.0):
        folder = tmp_path / str(held_out)
        folder.mkdir()
        try:
            run(folder, tiny_model_dir, rows, labeled=True, held_out=held_out)
        except StageError as error:
            reasons.add((held_out, error.reason))
    assert reasons == {(0.5, "OneSided")}


@pytest.mark.parametrize("held_out", [0.5, 0.0])
def test_labeled_rows_that_leave_one_prompt_to_train_on_are_refused_before_training(
    tmp_path: Path, tiny_model_dir: Path, held_out: float
) -> None:
    """KTO would fail when the model is loaded, after every stage before it has trained."""
    rows = [
        {"prompt": f"{i if held_out else 0}?", "completion": f"{word} {j}", "label": word == "yes"}
        for i in range(2)
        for j in range(2)
        for word in ("yes", "no")
    ]
    if not held_out:
        rows = rows[:4]
    with pytest.raises(StageError, match="training completions have the same prompt") as caught:
        run(tmp_path, tiny_model_dir, rows, labeled=True, held_out=held_out)
    assert caught.value.reason == "TooFewRows"
    assert ("heldOut: 0" in caught.value.advice) == bool(held_out)


@pytest.mark.shared_data
@pytest.mark.skipif(not HH.exists(), reason="needs hh-rlhf beside the checkout")
def test_hh_rlhf_is_read_without_conversion(tmp_path: Path, tiny_model_dir: Path) -> None:
    _, outcome = run(
        tmp_path, tiny_model_dir, HH, on_invalid_row="skip", on_overlength="drop", max_length=256
    )
    assert outcome.metrics["rows"] == 1800
    assert outcome.metrics["skippedRows"] < 36  # identical sides, empty completions


def test_every_row_and_token_has_one_outcome_in_the_ledger(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Of pairs too: rejected, dropped, trained on and held out add up to what came in."""
    rows: list[Any] = [
        *PAIRS,
        {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "Long?", "chosen": "lamp " * 300, "rejected": "No."},
    ]
    preferences, outcome = run(
        tmp_path, tiny_model_dir, rows, on_invalid_row="skip", on_overlength="drop"
    )
    (ledger,) = outcome.details["ledger"]["sources"]
    assert ledger["rows"] == {
        "in": 10,
        "invalid": {"IdenticalSides": 1},
        "filtered": {},
        "duplicate": {},
        "dropped": 1,
        "trained": 6,
        "heldOut": 2,
    }
    tokens = ledger["tokens"]
    assert tokens["in"] == tokens["dropped"] + tokens["trained"] + tokens["heldOut"]
    assert tokens["trained"] == outcome.metrics["tokens"]
    assert preferences.summary["ledger"] == outcome.details["ledger"]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"annotator": 8.5, "empty": "", "none": None}, ["annotator"]),
        ({"input": "a context that no prompt contains"}, ["input"]),
        ({"probability": 0.9, "system": "Be brief."}, []),
    ],
)
def test_columns_that_nothing_reads_are_named_once(
    tmp_path: Path, tiny_model_dir: Path, row: dict[str, Any], unread: list[str]
) -> None:
    reports: list[str] = []
    _, outcome = run(tmp_path, tiny_model_dir, [pair | row for pair in PAIRS], reports)
    assert outcome.details["unreadColumns"] == {"spec.preferences.data[0]": unread}
    named = [each for each in reports if "nothing reads" in each]
    wanted = f"spec.preferences.data[0]: nothing reads the column {unread[0]}" if unread else ""
    assert named == [wanted] * len(unread)


def test_an_input_beside_an_instruction_is_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [
        {"instruction": pair["prompt"], "input": f"Text {i}.", **pair}
        for i, pair in enumerate(PAIRS)
    ]
    for row in rows:
        del row["prompt"]
    _, outcome = run(tmp_path, tiny_model_dir, rows)
    assert outcome.details["unreadColumns"] == {"spec.preferences.data[0]": []}


def test_each_data_set_has_its_own_statistics(tmp_path: Path, tiny_model_dir: Path) -> None:
    """One figure for all would hide that one source prefers length and another contradicts it."""
    longer = [pair | {"chosen": f"{pair['chosen']} And more."} for pair in PAIRS]
    scored = [pair | {"score_chosen": 7, "score_rejected": 4} for pair in PAIRS[:3]]
    again = [PAIRS[0] | {"chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}]
    inputs: dict[str, Path] = {"model": tiny_model_dir}
    sources: dict[str, Any] = {}
    for index, rows in enumerate((longer, [*scored, *again, again[0]])):
        name = f"preferences.{index}"
        inputs[name] = tmp_path / f"{index}.jsonl"
        inputs[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        uri, path = f"file://{index}.jsonl", f"spec.preferences.data[{index}].uri"
        sources[name] = SourceInput(uri=uri, path=path)
    settings = PairsSettings(**(SETTINGS | {"preferences": SETTINGS["preferences"] * 2}))
    stage = PlannedStage(name="pairs", settings=settings, inputs=sources, fingerprint="sha256:0")
    worker = Worker(0, 1, torch.device("cpu"))
    found = pairs.run(StageContext(stage, inputs, tmp_path, worker)).details["statistics"]
    first, second = (found[f"spec.preferences.data[{index}]"] for index in (0, 1))
    assert first["longerWins"] == 1.0
    assert first.keys().isdisjoint({"agreement", "margins"})
    assert second["agreement"] == pytest.approx(1 / 3)
    assert second["repeated"] == 1
    assert second["margins"] == [3.0, 3.0, 3.0]


# ---- feedback logs ----------------------------------------------------------------------------


def log_of(number: int, **more: Any) -> list[Any]:
    """An answer with a thumb up, one with a thumb down, and one that nobody rated."""
    prompt = f"Question {number}?"
    return [
        {"event": "answer", "id": f"{key}{number}", "prompt": prompt, "completion": text, **more}
        for key, text in (("a", "Good."), ("b", "Bad."), ("c", "Whatever."))
    ] + [
        {"event": "rating", "of": f"a{number}", "thumbs": "up"},
        {"event": "rating", "of": f"b{number}", "thumbs": "down"},
    ]


LOG = [event for number in range(8) for event in log_of(number, latency=0.5)]


@pytest.mark.parametrize(("labeled", "count"), [(False, 8), (True, 16)])
def test_unrated_answers_of_a_log_are_in_the_ledger_and_those_in_a_pair_are_not_lost(
    tmp_path: Path, tiny_model_dir: Path, labeled: bool, count: int
) -> None:
    reports: list[str] = []
    _, outcome = run(tmp_path, tiny_model_dir, LOG, reports, labeled=labeled)
    (ledger,) = outcome.details["ledger"]["sources"]
    assert ledger["read"] == len(LOG)
    rows = ledger["rows"]
    assert rows["filtered"] == {"noPreference": 8}
    assert (rows["in"], rows["trained"] + rows["heldOut"]) == (count + 8, count)
    assert outcome.details["withoutPreference"] == outcome.metrics["filteredRows"] == 8
    assert outcome.details["unreadColumns"] == {"spec.preferences.data[0]": ["latency"]}
    assert "8 rows state no preference" in reports
    statistics = outcome.details["statistics"]["spec.preferences.data[0]"]
    assert statistics["completions"] == {"1" if labeled else "2": count}


def test_half_of_the_events_of_a_log_may_be_invalid(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Also if they are more than its answers: ratings of answers before the log begins."""
    lost = [{"event": "rating", "of": f"x{i}", "thumbs": "up"} for i in range(len(LOG))]
    _, outcome = run(tmp_path, tiny_model_dir, LOG + lost, on_invalid_row="skip")
    assert outcome.details["skippedBy"] == {"UnknownId": len(lost)}
    with pytest.raises(StageError, match=f"{len(LOG) + 1} of {2 * len(LOG) + 1} rows"):
        run(tmp_path, tiny_model_dir, [*LOG, *lost, lost[0]], on_invalid_row="skip")
