"""Two workers sample, criticize and judge what one does, and go on where the other number ended."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.multiprocessing as mp

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.judge_server import JudgeServer
from tests.trainer.judging.test_feedback import (
    WORKER,
    critic,
    critique_stage,
    feedback_stage,
    rows_of,
    unbiased,
)
from tests.trainer.several_workers import Notes, end_of, spawn
from tuneyard.api.sources import JudgeEndpoint
from tuneyard_trainer.generation import completions
from tuneyard_trainer.judging import critique, feedback, local_model
from tuneyard_trainer.worker import StageContext, Worker, never_stop

LAMPS = 7
JUDGED = {"disagreement": "average", "question": "{first}\nor\n{second}? A or B?"}
STAGES = {
    "by a model": (feedback, "preferences.jsonl", "judgments.jsonl"),
    "at an endpoint": (feedback, "preferences.jsonl", "judgments.jsonl"),
    "by itself": (critique, "revisions.jsonl", "critiques.jsonl"),
    "by a critic": (critique, "revisions.jsonl", "critiques.jsonl"),
}


def run(
    name: str,
    workdir: Path,
    inputs: dict[str, Path],
    endpoint: JudgeEndpoint | None = None,
    worker: Worker = WORKER,
) -> dict[str, float]:
    """Run a stage in small batches and return its metrics; {} on ranks other than 0."""
    completions.CPU_BATCH = local_model.CPU_BATCH = 2
    workdir.mkdir(exist_ok=True)
    module: Any = STAGES[name][0]
    if module is feedback:
        stage = feedback_stage(endpoint, **({} if endpoint else JUDGED))
    else:
        stage = critique_stage(endpoint, revisions=2)
    given = inputs | ({"judge": inputs["model"]} if name == "by a model" else {})
    worker = replace(worker, stage=stage.name)
    return dict(module.run(StageContext(stage, given, workdir, worker)).metrics)


class Recorder:
    """A worker that notes the prompts that it samples and judges, and the progress it reports."""

    def __init__(self, rank: int, notes: Notes, name: str) -> None:
        self.sampled: list[int] = []
        self.judged: list[str] = []
        self.steps: list[tuple[str | None, int, int]] = []
        self.rank, self.notes, self.name = rank, notes, name

    def worker(self, **changes: Any) -> Worker:
        worker = Worker(self.rank, 2, torch.device("cpu"), report=self.report)
        identity = WORKER.identity if self.rank == 0 else ""
        return replace(worker, identity=identity, **changes)

    def report(
        self, *, step: int = 0, total_steps: int = 0, message: str | None = None, **_: Any
    ) -> None:
        self.steps.append((message, step, total_steps))

    def __enter__(self) -> Self:
        self._sample, self._replies = completions._sample, local_model.ModelJudge.replies

        def sample(policy: Any, prompts: Any, indices: Any, *rest: Any) -> Any:
            self.sampled += indices
            return self._sample(policy, prompts, indices, *rest)

        def replies(judge: Any, prompts: Any) -> Any:
            self.judged += [prompt.key for prompt in prompts]
            return self._replies(judge, prompts)

        completions._sample = sample
        local_model.ModelJudge.replies = replies  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        completions._sample = self._sample
        local_model.ModelJudge.replies = self._replies  # type: ignore[method-assign]
        self.notes[self.name, self.rank] = (self.sampled, self.judged, self.steps)


class Moment:
    """True from a numbered check on after a worker has begun to sample, or to judge."""

    def __init__(self, recorder: Recorder, phase: str, check: int = 2) -> None:
        self.recorder, self.phase, self.check, self.checks = recorder, phase, check, 0

    def __call__(self) -> bool:
        recorder = self.recorder
        self.checks += bool(recorder.sampled if self.phase == "sampling" else recorder.judged)
        return self.checks >= self.check


PHASES = ("sampling", "judging")


def exhausted(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _worker(
    rank: int,
    notes: Notes,
    folder: Path,
    inputs: dict[str, Path],
    endpoints: dict[str, JudgeEndpoint],
) -> None:
    for name in STAGES:
        with Recorder(rank, notes, name) as recorder:
            found = run(name, folder / name, inputs, endpoints.get(name), recorder.worker())
        notes["metrics", name, rank] = found
    plain = Recorder(rank, notes, "").worker()
    for name in ("key", "budget"):
        notes[name, rank] = end_of(
            lambda name=name: run("at an endpoint", folder / name, inputs, endpoints[name], plain)  # type: ignore[misc]
        )
    for phase in PHASES:
        with Recorder(rank, notes, phase) as recorder:
            stop = Moment(recorder, phase) if rank == 1 else never_stop
            notes["end", phase, rank] = end_of(
                lambda phase=phase, recorder=recorder, stop=stop: run(  # type: ignore[misc]
                    "by a model", folder / phase, inputs, None, recorder.worker(stop=stop)
                )
            )
    with Recorder(rank, notes, "grown") as recorder:
        run("by a model", folder / "grown", inputs, None, recorder.worker())
    sample = completions._sample
    if rank == 1:
        completions._sample = exhausted
    notes["memory", rank] = end_of(
        lambda: run("by a model", folder / "memory", inputs, None, plain)
    )
    completions._sample = sample


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """Prompts of several lengths, and a model whose greedy completions are not white space."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": "Which port has lamp? " * (1 + i % 3) + str(i)} for i in range(LAMPS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_llama(VOCABULARY, tie_word_embeddings=False).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    return {"model": folder / "model", "prompts": folder / "prompts.jsonl"}


@pytest.fixture(scope="module")
def server() -> Any:
    with JudgeServer(unbiased) as judge:
        yield judge


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]
) -> dict[str, tuple[Path, dict[str, float]]]:
    """The folder and the metrics of each stage that one worker ran."""
    folder = tmp_path_factory.mktemp("one")
    found = {}
    with JudgeServer(unbiased) as judge, JudgeServer(critic) as reviser:
        endpoints = {"at an endpoint": judge.settings(), "by a critic": reviser.settings()}
        for name in STAGES:
            found[name] = folder / name, run(name, folder / name, inputs, endpoints.get(name))
    return found


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]
) -> tuple[Path, dict[Any, Any]]:
    """The folder of the stages that two workers ran, and what the workers noted."""
    folder = tmp_path_factory.mktemp("two")
    with Recorder(0, {}, "") as recorder:  # one worker, which is stopped
        asked = replace(WORKER, stop=Moment(recorder, "sampling"))
        ended = end_of(lambda: run("by a model", folder / "grown", inputs, None, asked))
    assert ended == "interrupted"
    begun = rows_of(folder / "grown" / "checkpoints" / "journal.jsonl")

    def slowly(body: dict[str, Any], number: int) -> Any:
        return replace(unbiased(body, number), delay=0.05)

    with (
        JudgeServer(slowly) as judge,
        JudgeServer(critic) as reviser,
        JudgeServer(lambda _body, _number: replace(unbiased(_body, 0), status=401)) as closed,
    ):
        endpoints = {
            "at an endpoint": judge.settings(concurrency=3),
            "by a critic": reviser.settings(),
            "key": closed.settings(),
            "budget": judge.settings(max_requests=1),
        }
        notes = spawn(2, _worker, folder, inputs, endpoints)
        notes["begun"] = [entry["prompt"] for entry in begun if "prompt" in entry]
        notes["most at once"] = judge.most_at_once
        notes["requests"] = Counter(body["messages"][0]["content"] for body in judge.bodies)
    return folder, notes


def same(one: Any, other: Any) -> None:
    """Compare JSON values: numbers up to rounding, everything else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each in zip(one, other, strict=True):
            same(*each)
    else:
        assert other == (pytest.approx(one, rel=1e-5) if isinstance(one, float) else one)


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_write_the_lines_of_one_in_their_order(
    name: str,
    two: tuple[Path, dict[Any, Any]],
    alone: dict[str, tuple[Path, dict[str, float]]],
) -> None:
    folder, notes = two
    _, *files = STAGES[name]
    for file in files:
        lines = rows_of(alone[name][0] / file)
        assert len(lines) == LAMPS
        same(lines, rows_of(folder / name / file))
    same(alone[name][1], notes["metrics", name, 0])
    assert notes["metrics", name, 1] == {}


@pytest.mark.parametrize("name", STAGES)
def test_each_prompt_is_sampled_by_one_worker_and_each_worker_samples_about_half(
    name: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    sampled = [two[1][name, rank][0] for rank in (0, 1)]
    assert sorted(sampled[0] + sampled[1]) == list(range(LAMPS))
    assert [len(each) for each in sampled] == [4, 3]


@pytest.mark.parametrize(("name", "requests"), [("by a model", 2), ("by itself", 4)])
def test_both_workers_judge_with_a_model_of_the_job(
    name: str, requests: int, two: tuple[Path, dict[Any, Any]]
) -> None:
    judged = [two[1][name, rank][1] for rank in (0, 1)]
    assert {*Counter(judged[0] + judged[1]).values()} == {1}
    assert len(judged[0]) + len(judged[1]) == requests * LAMPS
    assert abs(len(judged[0]) - len(judged[1])) <= requests


def test_one_worker_asks_an_endpoint_so_its_limits_hold_for_both(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    assert two[1]["most at once"] <= 3
    repeated = [text for text, count in two[1]["requests"].items() if count > 1]
    assert len(repeated) <= 1  # the one request of the case with a budget
    assert len(two[1]["requests"]) == 2 * LAMPS


@pytest.mark.parametrize("name", STAGES)
def test_progress_counts_the_work_of_both_workers_and_comes_from_rank_0(
    name: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    steps = [step for step in two[1][name, 0][2] if step[2]]
    for message in {message for message, _, _ in steps}:
        counted = [step for found, step, _ in steps if found == message]
        total = {total for found, _, total in steps if found == message}
        assert counted == sorted(counted)
        assert {counted[-1]} == total
    sampled = [step for message, step, _ in steps if message == "sampling completions"]
    # In each round two workers complete a batch of two: both completions of a prompt, or one each.
    assert sampled == ([2, 4, 6, 7] if STAGES[name][0] is feedback else [4, 7])


def test_the_failure_of_an_endpoint_ends_both_workers_with_its_reason(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    """Only rank 0 asks the endpoint, and knows its budget."""
    assert [two[1]["key", rank] for rank in (0, 1)] == ["JudgeForbidden"] * 2
    assert [two[1]["budget", rank] for rank in (0, 1)] == ["BudgetSpent"] * 2


def test_memory_that_runs_out_on_rank_1_ends_both_workers(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    told = "OutOfMemoryError: CUDA out of memory"
    assert [two[1]["memory", rank] for rank in (0, 1)] == [told, told]


# ---- with another number of workers -------------------------------------------------------------


def finish(
    workdir: Path, inputs: dict[str, Path], whole: tuple[Path, dict[str, float]]
) -> tuple[int, int]:
    """Go on with one worker; check that nothing was done twice and that the labels are those of an
    undisturbed run. Return how many completions and replies were known before."""
    before = rows_of(workdir / "checkpoints" / "journal.jsonl")
    known = {entry["prompt"] for entry in before if "prompt" in entry}
    replies = {entry["reply"]["key"] for entry in before if "reply" in entry}
    notes: dict[Any, Any] = {}
    with Recorder(0, notes, "again"):
        metrics = run("by a model", workdir, inputs)
    sampled, judged, _ = notes["again", 0]
    assert sorted([*known, *sampled]) == list(range(LAMPS))
    assert not replies & {*judged}
    assert len(replies) + len(judged) == 2 * LAMPS
    for file in ("preferences.jsonl", "judgments.jsonl"):
        same(rows_of(whole[0] / file), rows_of(workdir / file))
    same(whole[1], metrics)
    return len(known), len(replies)


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_to_stop_one_worker_stops_both_and_one_worker_goes_on(
    phase: str,
    two: tuple[Path, dict[Any, Any]],
    alone: dict[str, tuple[Path, dict[str, float]]],
    inputs: dict[str, Path],
) -> None:
    folder, notes = two
    assert [notes["end", phase, rank] for rank in (0, 1)] == ["interrupted"] * 2
    sampled, judged = finish(folder / phase, inputs, alone["by a model"])
    assert 0 < sampled < LAMPS if phase == "sampling" else sampled == LAMPS
    assert judged == 0 if phase == "sampling" else 0 < judged < 2 * LAMPS


def test_two_workers_go_on_where_one_was_stopped(
    two: tuple[Path, dict[Any, Any]], alone: dict[str, tuple[Path, dict[str, float]]]
) -> None:
    folder, notes = two
    sampled = [index for rank in (0, 1) for index in notes["grown", rank][0]]
    assert notes["begun"]
    assert sorted(notes["begun"] + sampled) == list(range(LAMPS))
    for file in ("preferences.jsonl", "judgments.jsonl"):
        same(rows_of(alone["by a model"][0] / file), rows_of(folder / "grown" / file))


def _killed(rank: int, notes: Notes, workdir: Path, inputs: dict[str, Path]) -> None:
    with Recorder(rank, notes, "") as recorder:
        moment = Moment(recorder, "judging", check=5)  # after the first batch and its exchanges

        def stop() -> bool:
            if rank == 0 and moment():
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        run("by a model", workdir, inputs, None, recorder.worker(stop=stop))


def test_after_a_kill_of_two_workers_one_goes_on_and_does_nothing_twice(
    tmp_path: Path,
    alone: dict[str, tuple[Path, dict[str, float]]],
    inputs: dict[str, Path],
) -> None:
    workdir = tmp_path / "killed"
    workdir.mkdir()
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        spawn(2, _killed, workdir, inputs)
    sampled, judged = finish(workdir, inputs, alone["by a model"])
    assert sampled == LAMPS
    assert 0 < judged < 2 * LAMPS
