"""Whether a job fits: the facts of its driver, the status server's answer and the estimate."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.played import (
    KEY,
    POST,
    STATUS,
    Object,
    PlayedCluster,
    Served,
    send,
    served,
)
from tests.planning.models import facts
from tuneyard.api.job_facts import Device, FitAnswer, JobFacts
from tuneyard.api.plan import Plan
from tuneyard.api.progress import Post, PostResponse
from tuneyard.api.status import AttemptStatus
from tuneyard.controller import planner
from tuneyard.planning.decision import Decision, decide
from tuneyard_trainer.pod.reporter import Refused

GIB = 1 << 30


def known(gib: int) -> JobFacts:
    """Return the facts of an 8B model on a GPU of `gib` GiB."""
    return JobFacts(model=facts("8B"), device=Device(gpu="NVIDIA H100", memory=gib * GIB))


def with_facts(value: Any) -> Object:
    return {**POST, "tuneyard": {**POST["tuneyard"], "facts": value}}


async def answered(running: Served, folder: Path, posted: JobFacts | None) -> PostResponse:
    value = posted and posted.model_dump(mode="json", by_alias=True)
    post = Post.model_validate(with_facts(value))
    return await asyncio.to_thread(running.client(folder).send, post)


def play(cluster: PlayedCluster, act: Callable[[Served], Awaitable[None]]) -> None:
    async def run() -> None:
        async with served(cluster) as running:
            await act(running)

    asyncio.run(run())


def test_a_job_that_fits_is_told_so_and_its_estimate_is_kept_for_the_status(
    tmp_path: Path,
) -> None:
    async def act(running: Served) -> None:
        response = await answered(running, tmp_path, known(200))
        attempt = AttemptStatus(number=1, ray_job="job-1", started_at="")
        memory = running.reconciler.cache.job(KEY).observed_state(attempt).memory
        assert memory is not None
        (stage,) = memory.stages
        assert stage.name == "sft"
        planned = FitAnswer(planned_bytes={"sft": stage.total_bytes})
        assert response == PostResponse(stop=False, fit=planned)

    play(PlayedCluster(), act)


def test_a_job_that_does_not_fit_is_told_why_and_is_not_asked_to_stop(tmp_path: Path) -> None:
    """The driver ends it with this reason; a stop would be an interruption, and another attempt."""

    async def act(running: Served) -> None:
        response = await answered(running, tmp_path, known(79))
        assert response.fit is not None
        assert response.fit.refusal is not None
        assert response.fit.refusal.reason == "DoesNotFit"
        assert response.stop is False

    play(PlayedCluster(), act)


@pytest.mark.parametrize(("role", "preparing"), [("prepare", True), ("", False)])
def test_whether_a_pod_prepares_data_is_read_from_its_labels_and_not_from_its_posts(
    tmp_path: Path, role: str, preparing: bool
) -> None:
    """Else the pod of the Job could report the success of a job that has not trained."""

    async def act(running: Served) -> None:
        report = {**POST["tuneyard"], "preparing": not preparing}
        await send(running.client(tmp_path), {**POST, "tuneyard": report})
        stored = running.reconciler.cache.job(KEY).post
        assert stored is not None
        assert stored.tuneyard is not None
        assert (stored.tuneyard.preparing, stored.tuneyard.step) == (preparing, 7)

    cluster = PlayedCluster()
    cluster.role = role
    play(cluster, act)


def test_a_post_without_facts_or_with_an_unknown_model_gets_no_decision(tmp_path: Path) -> None:
    async def act(running: Served) -> None:
        for posted in (None, JobFacts(unknown_model="mamba is not described")):
            assert (await answered(running, tmp_path, posted)).fit is None

    play(PlayedCluster(), act)


class Deciding:
    """The decisions that are made, each of which waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[JobFacts] = []
        self.threads: set[threading.Thread] = set()
        self.go_on = threading.Event()
        monkeypatch.setattr(planner, "decide", self._decide)

    def _decide(self, plan: Plan, posted: JobFacts) -> Decision | None:
        self.asked.append(posted)
        self.threads.add(threading.current_thread())
        assert self.go_on.wait(20)
        return decide(plan, posted)


@pytest.fixture
def deciding(monkeypatch: pytest.MonkeyPatch) -> Deciding:
    return Deciding(monkeypatch)


def test_an_attempt_is_decided_once_whatever_it_posts_afterwards(
    tmp_path: Path, deciding: Deciding
) -> None:
    """A driver that posts other facts each time keeps no operator busy."""
    deciding.go_on.set()

    async def act(running: Served) -> None:
        first, *others = [await answered(running, tmp_path, known(gib)) for gib in (79, 79, 200)]
        assert first.fit is not None
        assert first.fit.refusal is not None
        assert all(other.fit == first.fit for other in others)

    play(PlayedCluster(), act)
    assert deciding.asked == [known(79)]


def test_a_decision_holds_up_no_other_post_and_a_repeated_question_waits_for_it(
    tmp_path: Path, deciding: Deciding
) -> None:
    async def act(running: Served) -> None:
        asking = [asyncio.create_task(answered(running, tmp_path, known(200))) for _ in range(2)]
        while not deciding.asked:
            await asyncio.sleep(0.01)
        response = await answered(running, tmp_path, None)
        assert response == PostResponse(stop=False, fit=None)
        assert not any(task.done() for task in asking)
        deciding.go_on.set()
        answers = [(await task).fit for task in asking]
        assert all(each is not None and not each.refusal and not each.settings for each in answers)
        assert len({str(each) for each in answers}) == 1

    play(PlayedCluster(), act)
    assert len(deciding.asked) == 1
    assert threading.main_thread() not in deciding.threads


def test_a_decision_about_a_job_that_was_replaced_meanwhile_is_dropped(
    tmp_path: Path, deciding: Deciding
) -> None:
    async def act(running: Served) -> None:
        cache = running.reconciler.cache
        asking = asyncio.create_task(answered(running, tmp_path, known(79)))
        while not deciding.asked:
            await asyncio.sleep(0.01)
        body = copy.deepcopy(running.cluster.body)
        body["metadata"] |= {"uid": "another", "resourceVersion": "9"}
        cache.store_job(KEY, body)
        deciding.go_on.set()
        assert (await asking).fit is None
        assert cache.job(KEY).uid == "another"
        assert cache.job(KEY).fit is None

    play(PlayedCluster(), act)


def test_the_estimate_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    async def act(running: Served) -> None:
        await answered(running, tmp_path, known(200))
        cached = running.reconciler.cache.job(KEY)
        attempts = [AttemptStatus(number=n, ray_job="r", started_at="") for n in (1, 2)]
        memory = [cached.observed_state(attempt).memory for attempt in attempts]
        assert memory[0] is not None
        assert memory[1] is None, "the second attempt has not asked yet"

    play(PlayedCluster(), act)


def test_an_outcome_is_taken_although_the_plan_cannot_be_fetched(tmp_path: Path) -> None:
    """Nobody waits for the answer any more, and the driver may not end before it is told."""
    cluster = PlayedCluster()
    cluster.body["status"], cluster.is_down = STATUS, True
    facts = known(79).model_dump(mode="json", by_alias=True)
    outcome = {"state": "Failed", "failure": {"reason": "Broken", "message": "it broke"}}

    async def act(running: Served) -> None:
        value = with_facts(facts)
        value["tuneyard"]["outcome"] = outcome
        sending = asyncio.to_thread(running.client(tmp_path).send, Post.model_validate(value))
        task = asyncio.create_task(sending)
        while running.reconciler.cache.job(KEY).post is None and not task.done():
            await asyncio.sleep(0.01)
        attempt = {**STATUS["attempts"][0], "finishedAt": "2026-11-21T13:00:00Z"}
        cluster.body["status"] = {**STATUS, "attempts": [attempt]}
        assert (await task).fit is None

    play(cluster, act)


def test_a_plan_that_cannot_be_read_refuses_nothing(tmp_path: Path) -> None:
    cluster = PlayedCluster()
    cluster.body["status"] = STATUS  # the digest of no plan

    async def act(running: Served) -> None:
        response = await answered(running, tmp_path, known(79))
        assert response == PostResponse(stop=False, fit=None)

    play(cluster, act)


def test_while_the_plan_cannot_be_fetched_the_driver_posts_again(tmp_path: Path) -> None:
    cluster = PlayedCluster()
    cluster.body["status"], cluster.is_down = STATUS, True

    async def act(running: Served) -> None:
        with pytest.raises(Refused) as refused:
            await answered(running, tmp_path, known(79))
        assert (refused.value.status, refused.value.superseded) == (503, False)

    play(cluster, act)


@pytest.mark.parametrize(
    "malformed",
    [
        {"model": {"layers": 3}},
        {"model": facts("8B").model_dump(mode="json", by_alias=True) | {"layers": 4097}},
        {"model": "8B"},
        {"rows": {"prepare": {"longest": -1}}},
        {"rows": 900},
        {"prompts": {str(n): {"longest": 1, "count": 1} for n in range(257)}},
        {"device": {"memory": 1 << 60}},
        [],
    ],
)
def test_malformed_facts_are_refused_with_the_field_and_change_nothing(
    tmp_path: Path, malformed: Any
) -> None:
    async def act(running: Served) -> None:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.port, ssl=running.client_context()
        )
        body = json.dumps(with_facts(malformed)).encode()
        head = (
            f"POST {Served.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a.good.token\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 400 ")
        assert "tuneyard.facts" in answer
        assert running.reconciler.cache.job(KEY).post is None

    play(PlayedCluster(), act)
