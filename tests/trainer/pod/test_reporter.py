"""The reporter against a real HTTPS server that is slow, busy, broken or refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.status_server import Reply, StatusServer, serving
from tuneyard.api.progress import MAX_POST_BYTES, Outcome, Post, ProgressReport, TrainerStatus
from tuneyard.api.status import StageStatus
from tuneyard_trainer.pod import reporter
from tuneyard_trainer.pod.reporter import Channel, Reporter


def post(step: int, outcome: Outcome | None = None) -> Post:
    picture = ProgressReport(attempt=1, stage="sft", step=step, total_steps=100, outcome=outcome)
    return Post(trainer_status=TrainerStatus(progress_percentage=step), tuneyard=picture)


FINAL = post(100, Outcome(state="Succeeded"))


class EventServer:
    """A reporter with everything it calls."""

    def __init__(self, server: StatusServer, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text("secret\n")
        self.stopped, self.stale = threading.Event(), threading.Event()
        self.said: list[str] = []
        self.channel = Channel(server.url, self.token, server.ca)
        self.started: list[Reporter] = []

    def start(self) -> Reporter:
        ours = Reporter(
            self.channel.send,
            post(0),
            on_stop=self.stopped.set,
            on_stale=self.stale.set,
            say=lambda event, **_: self.said.append(event),
        )
        self.started.append(ours)
        return ours


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusServer]:
    with serving(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture
def desk(
    server: StatusServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EventServer]:
    """Paced so that only what a test is about happens within its seconds."""
    monkeypatch.setattr(reporter, "POST_SECONDS", 0.3)
    monkeypatch.setattr(reporter, "IDLE_SECONDS", 60.0)
    monkeypatch.setattr(reporter, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(reporter, "LAST_RETRY_SECONDS", 0.1)
    desk = EventServer(server, tmp_path)
    yield desk
    server.replies, server.reply = [], Reply(409)  # ends what still posts
    for started in desk.started:
        started.tell(post(1), urgent=True)


def steps(server: StatusServer) -> list[int]:
    return [value["tuneyard"].get("step", 0) for value in server.posts]


def test_of_many_pictures_the_first_and_the_newest_are_posted(
    server: StatusServer, desk: EventServer
) -> None:
    ours = desk.start()
    server.wait_for(1)
    for step in range(1, 50):
        ours.tell(post(step))
    server.wait_for(2)
    assert steps(server) == [0, 49]
    assert server.times[1] - server.times[0] >= 0.25
    assert set(server.tokens) == {"Bearer secret"}


def test_an_urgent_picture_does_not_wait_for_its_turn(
    server: StatusServer, desk: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "POST_SECONDS", 60.0)
    ours = desk.start()
    server.wait_for(1)
    ours.tell(post(7), urgent=True)
    server.wait_for(2)
    assert steps(server) == [0, 7]


def test_a_job_without_news_still_asks_whether_to_stop(
    server: StatusServer, desk: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "IDLE_SECONDS", 0.1)
    desk.start()
    server.wait_for(2)
    assert not desk.stopped.is_set()
    server.reply = Reply(stop=True)
    server.wait_for(4)
    assert desk.stopped.wait(5)


def test_telling_never_waits_for_a_server_that_hangs(
    server: StatusServer, desk: EventServer
) -> None:
    """A training step that told of itself would last as long as the server's silence."""
    server.reply = Reply(seconds=3.0)
    ours = desk.start()
    server.wait_for(1)
    began = time.monotonic()
    for _ in range(1000):
        ours.tell(post(5), urgent=True)
    assert time.monotonic() - began < 1.0
    assert len(server.posts) == 1


def test_the_ending_is_posted_until_it_is_taken(server: StatusServer, desk: EventServer) -> None:
    ours = desk.start()
    server.wait_for(1)
    server.replies = [Reply(500), Reply(403), Reply(503), Reply(302), Reply()]
    assert ours.finish(FINAL)
    assert [value["tuneyard"]["outcome"]["state"] for value in server.posts[1:]] == [
        "Succeeded"
    ] * 5
    assert desk.said == ["post-failed"] * 4


def test_a_server_that_asks_for_patience_gets_it(server: StatusServer, desk: EventServer) -> None:
    ours = desk.start()
    server.wait_for(1)
    server.replies = [Reply(429, headers={"Retry-After": "1"})]
    assert ours.finish(FINAL)
    assert len(server.posts) == 3
    assert server.times[2] - server.times[1] >= 1.0


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("7", 7, 7), ("Wed, 21 Oct 2065 07:28:00 GMT", 1e9, 2e9), ("soon", None, None)],
)
def test_retry_after_is_seconds_or_a_date(value: str, least: Any, most: Any) -> None:
    found = reporter._seconds(value)
    assert found is least if least is None else least <= found <= most


def test_an_ending_that_is_never_taken_is_given_up(
    server: StatusServer, desk: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "FINAL_SECONDS", 0.5)
    server.reply = Reply(500)
    ours = desk.start()
    assert not ours.finish(FINAL)
    assert desk.said[-1] == "ending-not-delivered"


def test_an_ending_that_is_malformed_is_not_posted_again(
    server: StatusServer, desk: EventServer
) -> None:
    ours = desk.start()
    server.wait_for(1)
    server.reply = Reply(400)
    assert not ours.finish(FINAL)
    assert len(server.posts) == 2


def test_a_stale_attempt_is_told_at_once_and_never_posts_again(
    server: StatusServer, desk: EventServer
) -> None:
    server.reply = Reply(409)
    ours = desk.start()
    assert desk.stale.wait(5)
    ours.tell(post(5), urgent=True)
    assert not ours.finish(FINAL)
    assert ours.stale
    assert len(server.posts) == 1


def test_a_renewed_token_is_used(server: StatusServer, desk: EventServer) -> None:
    ours = desk.start()
    server.wait_for(1)
    desk.token.write_text("renewed")
    assert ours.finish(FINAL)
    assert server.tokens == ["Bearer secret", "Bearer renewed"]


def test_a_server_with_another_certificate_gets_no_token(
    server: StatusServer, desk: EventServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as other:
        desk.channel = Channel(server.url, desk.token, other.ca)
        monkeypatch.setattr(reporter, "FINAL_SECONDS", 0.5)
        assert not desk.start().finish(FINAL)
    assert server.posts == []


def test_a_token_is_never_sent_in_the_clear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not https"):
        Channel("http://127.0.0.1/progress", tmp_path / "token", "")


def test_a_post_keeps_below_the_servers_limit() -> None:
    metrics = {f"metric{i}": i / 7 for i in range(100)}
    stages = [StageStatus(name=f"sft-{i}", kind="sft", metrics=metrics) for i in range(100)]
    long = Post(trainer_status=TrainerStatus(), tuneyard=ProgressReport(attempt=1, stages=stages))
    body = reporter._body(long)
    assert len(body) <= MAX_POST_BYTES
    assert len(Post.model_validate_json(body).tuneyard.stages) == 100  # type: ignore[union-attr]
