"""A flood of tokens: the reviews, the caches and the waiting posts stay bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.controller.played import GOOD, POST, PlayedCluster, Served, send, served
from tuneyard.controller import review_limits, status_server
from tuneyard.controller.cluster import Key
from tuneyard.controller.review_limits import MOST_AT_ONCE, REFUSALS_AT_ONCE, Recent, ReviewLimits
from tuneyard_trainer.pod.reporter import Refused


async def status_of(running: Served, folder: Path, token: str) -> int:
    """Return the status of the response to a post."""
    folder.mkdir(exist_ok=True)
    try:
        await send(running.client(folder, token), POST)
    except Refused as refused:
        # A response that does not say when to try again is not the one that is expected.
        return refused.status if refused.status != 429 or refused.retry_after else 0
    return 200


def test_ever_new_invalid_tokens_cause_a_bounded_number_of_reviews(tmp_path: Path) -> None:
    async def flood() -> tuple[int, set[int]]:
        cluster = PlayedCluster()
        async with served(cluster) as running:
            answers = [
                await status_of(running, tmp_path, f"bad.token.{number}") for number in range(150)
            ]
        return cluster.num_reviews, set(answers)

    num_reviews, answers = asyncio.run(flood())
    assert answers == {401, 429}
    assert REFUSALS_AT_ONCE <= num_reviews < 100


def test_a_refused_token_is_not_reviewed_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_server, "REFUSAL_SECONDS", 600.0)

    async def repeat() -> tuple[int, set[int]]:
        cluster = PlayedCluster()
        async with served(cluster) as running:
            answers = [await status_of(running, tmp_path, "bad.token") for _ in range(80)]
        return cluster.num_reviews, set(answers)

    num_reviews, answers = asyncio.run(repeat())
    assert answers == {401}, "its pod learns the reason and is not told to wait"
    assert num_reviews == 1


def test_a_pod_whose_token_is_known_posts_during_a_flood_from_its_address(tmp_path: Path) -> None:
    async def flood() -> int:
        async with served(PlayedCluster()) as running:
            await status_of(running, tmp_path, GOOD)
            number = 0  # a slow machine forgives some refusals meanwhile
            while await status_of(running, tmp_path, f"bad.token.{number}") != 429:
                number += 1
            return await status_of(running, tmp_path, GOOD)

    assert asyncio.run(flood()) == 200


def test_valid_tokens_are_never_counted_as_a_flood(tmp_path: Path) -> None:
    async def many() -> set[int]:
        async with served(PlayedCluster()) as running:
            tokens = [f"{GOOD}.{number}" for number in range(REFUSALS_AT_ONCE + 20)]
            return {await status_of(running, tmp_path, token) for token in tokens}

    assert asyncio.run(many()) == {200}


def test_reviews_run_a_few_at_a_time_and_the_others_wait_for_them(tmp_path: Path) -> None:
    async def storm() -> tuple[int, set[int]]:
        cluster = PlayedCluster()
        cluster.review_seconds = 0.05
        async with served(cluster) as running:
            posts = [
                status_of(running, tmp_path / str(number), f"{GOOD}.{number}")
                for number in range(3 * MOST_AT_ONCE)
            ]
            answers = set(await asyncio.gather(*posts))
        return cluster.most_reviewing, answers

    most, answers = asyncio.run(storm())
    assert most <= MOST_AT_ONCE
    assert answers == {200}


def test_posts_do_not_wait_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_limits, "MOST_AT_ONCE", 1)
    monkeypatch.setattr(review_limits, "MOST_WAITING", 2)

    async def waiting() -> list[str]:
        limits, ends = ReviewLimits(), asyncio.Event()

        async def review(address: str) -> str:
            try:
                async with limits.review(address):
                    await ends.wait()
            except review_limits.TooManyReviews as error:
                return str(error)
            return "reviewed"

        tasks = [asyncio.create_task(review(str(number))) for number in range(4)]
        await asyncio.sleep(0)
        ends.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(waiting()) == [*["reviewed"] * 3, "too many tokens are being reviewed"]


def test_an_address_gets_its_refusals_back_with_time_and_others_keep_theirs() -> None:
    async def scenario() -> None:
        now = 0.0
        limits = ReviewLimits(clock=lambda: now)

        async def is_free(address: str) -> bool:
            try:
                async with limits.review(address):
                    return True
            except review_limits.TooManyReviews:
                return False

        for _ in range(REFUSALS_AT_ONCE):
            limits.count_refusal("10.0.0.1")
        assert not await is_free("10.0.0.1")
        assert await is_free("10.0.0.2")
        now = 1.0
        assert await is_free("10.0.0.1")
        limits.count_refusal("10.0.0.1")
        assert not await is_free("10.0.0.1")
        now = 100.0
        assert await is_free("10.0.0.1")

    asyncio.run(scenario())


def test_a_cache_has_a_limit_and_drops_what_has_expired() -> None:
    now = 0.0
    cache: Recent[int, str] = Recent(3, 10.0, clock=lambda: now)
    for number in range(1000):
        cache.put(number, "value")
    assert len(cache) == 3
    assert (cache.get(999), cache.get(1)) == ("value", None)
    now = 10.0
    assert cache.get(999) is None
    cache.put(7, "value")
    assert len(cache) == 1


def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_server, "CONNECTION_SECONDS", 0.2)

    async def silent() -> bytes:
        async with served(PlayedCluster()) as running:
            tls = running.client_context()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=tls)
            writer.write(b"POST /v1alpha1/")
            async with asyncio.timeout(30):
                received = await reader.read()
            writer.close()
            return received

    assert asyncio.run(silent()) == b""


def test_a_post_that_does_not_arrive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_server, "READ_SECONDS", 0.1)

    async def slow() -> bytes:
        async with served(PlayedCluster()) as running:
            tls = running.client_context()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=tls)
            head = f"POST {running.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            writer.write(f"{head}Authorization: Bearer {GOOD}\r\n\r\n{{".encode())
            async with asyncio.timeout(30):
                line = await reader.readline()
            writer.transport.abort()
            return line

    assert asyncio.run(slow()).startswith(b"HTTP/1.1 408 ")


def test_posts_for_a_job_that_is_gone_are_one_read_of_the_api_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod whose token is valid may post as often as it likes."""
    cluster = PlayedCluster()
    reads: list[Key] = []

    async def gone(key: Key) -> None:
        reads.append(key)

    monkeypatch.setattr(cluster, "job", gone)

    async def flood() -> set[bool]:
        async with served(cluster) as running:
            client = running.client(tmp_path, GOOD)
            return {await send(client, POST) for _ in range(20)}

    assert asyncio.run(flood()) == {True}, "each post is answered with the request to stop"
    assert len(reads) == 1
