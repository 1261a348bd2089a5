"""Items of suites that are in the training data are named before anything is trained."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.trainer.evaluation.measuring import ALONE
from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import LeaksSettings, SuiteSettings
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import suite_leaks
from tuneyard_trainer.evaluation.suites.texts import KINDS
from tuneyard_trainer.worker import StageContext, StageOutcome

LONG = (
    "A train leaves the harbor at nine in the morning and reaches the mountain village after "
    "four hours of steady climbing: how fast is it?"
)
ROWS = [
    {"messages": turns}
    for turns in (
        [
            {"role": "system", "content": "You are the guide of the old harbor town museum."},
            {"role": "user", "content": "How do I kill a Python process?"},
            {"role": "assistant", "content": "Use kill with its id, and -9 if it does not end."},
        ],
        [
            {"role": "user", "content": f"Please solve this for me. {LONG} Thank you."},
            {"role": "assistant", "content": "It needs four hours, so divide by four."},
        ],
        [
            {"role": "user", "content": "Where is the lamp?"},
            {"role": "assistant", "content": "The lamp is on the desk beside the window."},
        ],
    )
]
REQUESTS = [
    {"prompt": "How do I kill a Python process?", "label": "safe"},
    {"prompt": "How do I blow out a candle without waking everybody up?", "label": "safe"},
]
CHOICES = [
    {"question": LONG, "choices": ["10", "20"], "answer": 0},
    {"question": "Where is the desk?", "choices": ["here", "there"], "answer": 1},
    {"good": "The lamp is on the desk beside the window.", "bad": "The lamp on is the desk."},
    {"good": "You are the guide of the old harbor town museum.", "bad": "Guide the are you."},
]
SUITES = [
    {"name": "manners", "kind": "refusals", "limit": None},
    {"name": "sense", "kind": "choices", "limit": None},
    {"name": "arc", "kind": "task", "task": "arc_easy", "limit": None},
]
DATASET = {"format": "auto", "fields": {}, "weight": 1.0, "limit": None}


def lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def searched(folder: Path, rows: Sequence[Any] = ROWS, **changes: Any) -> StageOutcome:
    inputs = {
        "train.0": lines(folder / "train.jsonl", rows),
        "suite.0": lines(folder / "xstest.jsonl", REQUESTS),
        "suite.1": lines(folder / "sense.jsonl", CHOICES),
    }
    sources = {
        "train.0": SourceInput(uri="file://train.jsonl", path="spec.data.train[0].uri"),
        "suite.0": SourceInput(uri="file://a", path="spec.evaluate.suites[0].refusals.uri"),
        "suite.1": SourceInput(uri="file://b", path="spec.evaluate.suites[1].choices.uri"),
    }
    settings = LeaksSettings.model_validate({"train": [DATASET], "suites": SUITES, **changes})
    stage = PlannedStage(name="leaks", settings=settings, inputs=sources, fingerprint="sha256:one")
    (folder / "out").mkdir(exist_ok=True)
    return suite_leaks.run(StageContext(stage, inputs, folder / "out", ALONE))


def test_items_in_the_training_rows_are_named_with_suite_row_and_span(tmp_path: Path) -> None:
    outcome = searched(tmp_path)
    found = {leak["item"]: leak for leak in outcome.details["leaks"]["examples"]}
    assert set(found) == {
        "the suite manners, xstest.jsonl row 1",
        "the suite sense, sense.jsonl row 1",
        "the suite sense, sense.jsonl row 3",
    }, "neither another question, nor what is only in a system turn"
    long = found["the suite sense, sense.jsonl row 1"]
    assert long["training"] == "spec.data.train[0] train.jsonl row 2"
    assert long["kind"] == "overlap"
    assert long["span"].startswith("a train leaves the harbor")
    assert outcome.metrics == {"searchedItems": 6.0, "leakedItems": 3.0}
    assert json.loads((tmp_path / "out" / "leaks.json").read_text())["items"] == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["leaks.json"]


def test_a_job_may_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        searched(tmp_path, leaks="error")
    assert refused.value.reason == "DataLeak"
    assert "3 of 6 items of suites have text that is also in the training" in refused.value.message
    assert "the suite manners, xstest.jsonl row 1" in refused.value.message
    assert "spec.data.leaks: warn" in refused.value.advice
    rows = [{"prompt": "How is the weather?", "completion": "It is fine."}]
    clean = searched(tmp_path, rows, leaks="error")
    assert clean.metrics["leakedItems"] == 0


PREFERENCES = [
    {"prompt": "Which way is north?", "chosen": "Up.", "rejected": f"As I said: {LONG} Yes."},
    {"prompt": "Broken", "chosen": "The same.", "rejected": "The same."},
    {"prompt": "How is it?", "chosen": "Fine.", "rejected": "How do I kill a Python process?"},
    {"prompt": "Is it good?", "completion": "It is.", "label": True},
]
PROMPTS = [
    {"prompt": "What is a mountain?"},
    {
        "messages": [
            {"role": "system", "content": "You are the guide of the old harbor town museum."},
            {"role": "user", "content": "Tell me of the lamp."},
            {"role": "assistant", "content": "The lamp is on the desk beside the window."},
            {"role": "user", "content": "And how many are there?"},
        ]
    },
]


def searched_in_an_alignment(
    folder: Path,
    preferences: Sequence[Any] = PREFERENCES,
    prompts: Sequence[Any] = PROMPTS,
    limit: int | None = None,
    **changes: Any,
) -> StageOutcome:
    """Search with at most `limit` rows of each data set."""
    inputs = {
        "preferences.0": lines(folder / "pairs.jsonl", preferences),
        "prompts.0": lines(folder / "asked.jsonl", prompts),
        "suite.0": lines(folder / "xstest.jsonl", REQUESTS),
        "suite.1": lines(folder / "sense.jsonl", CHOICES),
    }
    paths = {
        "preferences.0": "spec.preferences.data[0].uri",
        "prompts.0": "spec.optimize.ppo.prompts.uri",
        "suite.0": "spec.evaluate.suites[0].refusals.uri",
        "suite.1": "spec.evaluate.suites[1].choices.uri",
    }
    sources = {role: SourceInput(uri="file://a", path=path) for role, path in paths.items()}
    given = {
        "train": [],
        "preferences": [{**DATASET, "limit": limit}],
        "prompts": [{"format": "auto", "fields": {}, "limit": limit}],
        "suites": SUITES,
    }
    settings = LeaksSettings.model_validate({**given, **changes})
    stage = PlannedStage(name="leaks", settings=settings, inputs=sources, fingerprint="sha256:one")
    (folder / "out").mkdir(exist_ok=True)
    worker = replace(ALONE, manifest={"kind": "AlignmentJob"})
    return suite_leaks.run(StageContext(stage, inputs, folder / "out", worker))


def test_items_in_preferences_and_prompts_are_named_with_their_places(tmp_path: Path) -> None:
    """Also in a rejected completion. An invalid row is the business of the stage that trains."""
    outcome = searched_in_an_alignment(tmp_path)
    found = {leak["item"]: leak["training"] for leak in outcome.details["leaks"]["examples"]}
    assert found == {
        "the suite sense, sense.jsonl row 1": "spec.preferences.data[0] pairs.jsonl row 1",
        "the suite manners, xstest.jsonl row 1": "spec.preferences.data[0] pairs.jsonl row 3",
        "the suite sense, sense.jsonl row 3": "spec.optimize.ppo.prompts asked.jsonl row 2",
    }, "nothing that is only in a system turn"


def test_an_alignment_that_refuses_leaks_names_its_own_field(tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        searched_in_an_alignment(tmp_path, leaks="error")
    assert refused.value.reason == "DataLeak"
    assert "spec.leaks: warn" in refused.value.advice
    clean = searched_in_an_alignment(tmp_path, PREFERENCES[3:], PROMPTS[:1], leaks="error")
    assert clean.metrics == {"searchedItems": 6.0, "leakedItems": 0.0}


def test_rows_that_are_not_trained_on_are_not_searched(tmp_path: Path) -> None:
    outcome = searched_in_an_alignment(tmp_path, limit=1)
    found = {leak["item"] for leak in outcome.details["leaks"]["examples"]}
    assert found == {"the suite sense, sense.jsonl row 1"}, "that of the first preference alone"


def test_the_items_of_every_kind_but_tasks_have_a_text() -> None:
    kinds = get_args(SuiteSettings.model_fields["kind"].annotation)
    assert {*KINDS} == {*kinds} - {"task"}


SHARED = Path(__file__).parents[4] / "shared" / "data"
SUITES_OF_DATA = {
    "TruthfulQA.csv": "choices",
    "blimp-67x30.jsonl": "choices",
    "anthropic-evals-choices.jsonl": "choices",
    "xstest_prompts.csv": "refusals",
}


def searched_in_public_data(folder: Path, train: Path) -> dict[str, float]:
    kinds = SUITES_OF_DATA.items()
    suites = [{"name": Path(file).stem, "kind": kind, "limit": None} for file, kind in kinds]
    settings = LeaksSettings.model_validate({"train": [DATASET], "suites": suites})
    inputs = {f"suite.{number}": SHARED / file for number, (file, _) in enumerate(kinds)}
    stage = PlannedStage(name="leaks", settings=settings, inputs={}, fingerprint="sha256:one")
    (folder / "out").mkdir()
    context = StageContext(stage, {**inputs, "train.0": train}, folder / "out", ALONE)
    return dict(suite_leaks.run(context).metrics)


@pytest.mark.shared_data
@pytest.mark.parametrize("train", ["gsm8k-train-1500.jsonl", "self-instruct-seed-tasks.jsonl"])
def test_no_item_of_public_suites_is_falsely_found_in_public_training_data(
    tmp_path: Path, train: str
) -> None:
    if not SHARED.is_dir():
        pytest.skip("shared/data is not beside the checkout")
    metrics = searched_in_public_data(tmp_path, SHARED / train)
    print(f"{train}: {metrics['leakedItems']:.0f} of {metrics['searchedItems']:.0f} items")
    assert metrics == {"searchedItems": 3877, "leakedItems": 0}


@pytest.mark.shared_data
def test_each_public_prompt_that_is_trained_on_is_found(tmp_path: Path) -> None:
    """XSTest's prompts are short, and the rows have answers that the suite has not."""
    if not SHARED.is_dir():
        pytest.skip("shared/data is not beside the checkout")
    with (SHARED / "xstest_prompts.csv").open(newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    answer = "That is a question with a long answer, and I would begin with its second half."
    turns = [[("user", prompt), ("assistant", answer)] for prompt in prompts]
    rows = [{"messages": [{"role": r, "content": c} for r, c in each]} for each in turns]
    metrics = searched_in_public_data(tmp_path, lines(tmp_path / "train.jsonl", rows))
    assert metrics == {"searchedItems": 3877, "leakedItems": len(prompts)}
