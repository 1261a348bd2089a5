"""Whether a job fits: the facts of its driver, the status server's answer and the estimate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.played import KEY, POST, STATUS, Object, PlayedCluster, Served, served
from tests.planning.models import facts
from tuneyard.api.job_facts import Device, FitAnswer, JobFacts
from tuneyard.api.progress import Post, PostResponse
from tuneyard.controller import planner
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
        assert response == PostResponse(stop=False, fit=FitAnswer())
        memory = running.reconciler.cache.job(KEY).observed_state(None).memory
        assert memory is not None
        assert [stage.name for stage in memory.stages] == ["sft"]

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


def test_a_post_without_facts_or_with_an_unknown_model_gets_no_decision(tmp_path: Path) -> None:
    async def act(running: Served) -> None:
        for posted in (None, JobFacts(unknown_model="mamba is not described")):
            assert (await answered(running, tmp_path, posted)).fit is None

    play(PlayedCluster(), act)


def test_the_same_facts_are_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every post of an attempt has them."""
    decided = []

    def decide(plan: Any, posted: JobFacts) -> None:
        decided.append(posted)

    monkeypatch.setattr(planner, "decide", decide)

    async def act(running: Served) -> None:
        for gib in (80, 80, 81, 81):
            await answered(running, tmp_path, known(gib))

    play(PlayedCluster(), act)
    assert decided == [known(80), known(81)]


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
        {"model": "8B"},
        {"rows": -1},
        {"rows": "many"},
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
