"""The reporter against a real HTTPS server that is slow, busy, broken or refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.status_server import SUPERSEDED, Reply, StatusServer, serving
from tuneyard.api.progress import (
    MAX_POST_BYTES,
    Outcome,
    Post,
    PostResponse,
    ProgressReport,
    TrainerStatus,
)
from tuneyard.api.status import StageStatus
from tuneyard_trainer.pod import reporter
from tuneyard_trainer.pod.reporter import Reporter, StatusClient


def post(step: int, outcome: Outcome | None = None) -> Post:
    picture = ProgressReport(attempt=1, stage="sft", step=step, total_steps=100, outcome=outcome)
    return Post(trainer_status=TrainerStatus(progress_percentage=step), tuneyard=picture)


FINAL = post(100, Outcome(state="Succeeded"))


class Played:
    """A reporter and everything that it calls."""

    def __init__(self, server: StatusServer, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text("secret\n")
        self.stopped, self.stale = threading.Event(), threading.Event()
        self.logged: list[str] = []
        self.client = StatusClient(server.url, self.token, server.ca)
        self.started: list[Reporter] = []

    def start(self) -> Reporter:
        ours = Reporter(
            self.client.send,
            post(0),
            on_stop=self.stopped.set,
            on_stale=self.stale.set,
            log=lambda event, **_: self.logged.append(event),
        )
        self.started.append(ours)
        return ours


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusServer]:
    with serving(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture
def played(
    server: StatusServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Played]:
    """A reporter whose intervals are short or long enough for the tests."""
    monkeypatch.setattr(reporter, "POST_SECONDS", 0.3)
    monkeypatch.setattr(reporter, "IDLE_SECONDS", 60.0)
    monkeypatch.setattr(reporter, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(reporter, "LAST_RETRY_SECONDS", 0.1)
    played = Played(server, tmp_path)
    yield played
    server.replies, server.reply = [], SUPERSEDED  # ends what still posts
    for started in played.started:
        started.update(post(1), urgent=True)


def steps(server: StatusServer) -> list[int]:
    return [value["tuneyard"].get("step", 0) for value in server.posts]


def test_of_many_reports_the_first_and_the_newest_are_posted(
    server: StatusServer, played: Played
) -> None:
    ours = played.start()
    server.wait_for(1)
    for step in range(1, 50):
        ours.update(post(step))
    server.wait_for(2)
    assert steps(server) == [0, 49]
    assert server.times[1] - server.times[0] >= 0.25
    assert set(server.tokens) == {"Bearer secret"}


def test_an_urgent_report_is_posted_at_once(
    server: StatusServer, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "POST_SECONDS", 60.0)
    ours = played.start()
    server.wait_for(1)
    ours.update(post(7), urgent=True)
    server.wait_for(2)
    assert steps(server) == [0, 7]


def test_a_job_without_news_still_posts_and_receives_the_stop_request(
    server: StatusServer, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "IDLE_SECONDS", 0.1)
    played.start()
    server.wait_for(2)
    assert not played.stopped.is_set()
    server.reply = Reply(stop=True)
    server.wait_for(4)
    assert played.stopped.wait(5)


def test_an_update_never_waits_for_a_server_that_hangs(
    server: StatusServer, played: Played
) -> None:
    """Otherwise a training step would last as long as the server hangs."""
    server.reply = Reply(seconds=3.0)
    ours = played.start()
    server.wait_for(1)
    began = time.monotonic()
    for _ in range(1000):
        ours.update(post(5), urgent=True)
    assert time.monotonic() - began < 1.0
    assert len(server.posts) == 1


def test_the_outcome_is_posted_until_it_is_taken(server: StatusServer, played: Played) -> None:
    ours = played.start()
    server.wait_for(1)
    server.replies = [Reply(500), Reply(403), Reply(503), Reply(302), Reply()]
    assert ours.finish(FINAL)
    assert [value["tuneyard"]["outcome"]["state"] for value in server.posts[1:]] == [
        "Succeeded"
    ] * 5
    assert played.logged == ["post-failed"] * 4


def test_the_outcome_is_posted_after_ten_hours_without_the_operator(
    server: StatusServer, played: Played
) -> None:
    """1,100 failed posts: a wait that doubles without end raises OverflowError at the 1,024th."""
    ours = played.start()
    server.wait_for(1)
    for _ in range(1100):
        ours._back_off(OSError("the operator is away"), False, None)
    assert ours.finish(FINAL)
    assert server.posts[-1]["tuneyard"]["outcome"]["state"] == "Succeeded"


def test_retry_after_is_obeyed(server: StatusServer, played: Played) -> None:
    ours = played.start()
    server.wait_for(1)
    server.replies = [Reply(429, headers={"Retry-After": "1"})]
    assert ours.finish(FINAL)
    assert len(server.posts) == 3
    assert server.times[2] - server.times[1] >= 1.0


def test_a_retry_after_of_zero_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "FIRST_RETRY_SECONDS", 0.05)
    tries = 0
    status = 503

    def send(_: Post) -> Any:
        nonlocal tries
        tries += 1
        raise reporter.Refused(status, "", 0.0)

    ours = Reporter(send, FINAL, on_stop=str, on_stale=str, log=lambda *_, **__: None)
    ended = threading.Thread(target=ours.finish, args=(FINAL,))
    ended.start()
    time.sleep(1.0)
    status = 400
    ended.join(10)
    assert 2 <= tries <= 22


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("7", 7, 7), ("Wed, 21 Oct 2065 07:28:00 GMT", 1e9, 2e9), ("soon", None, None)],
)
def test_retry_after_is_seconds_or_a_date(value: str, least: Any, most: Any) -> None:
    found = reporter._seconds(value)
    assert found is least if least is None else least <= found <= most


def test_an_outcome_that_is_never_taken_is_given_up(
    server: StatusServer, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "FINAL_SECONDS", 0.5)
    server.reply = Reply(500)
    ours = played.start()
    assert not ours.finish(FINAL)
    assert played.logged[-1] == "outcome-not-delivered"


def test_an_outcome_that_the_server_calls_malformed_is_not_posted_again(
    server: StatusServer, played: Played
) -> None:
    ours = played.start()
    server.wait_for(1)
    server.reply = Reply(400)
    assert not ours.finish(FINAL)
    assert len(server.posts) == 2


def test_a_stale_attempt_ends_at_once_and_never_posts_again(
    server: StatusServer, played: Played
) -> None:
    server.reply = SUPERSEDED
    ours = played.start()
    assert played.stale.wait(5)
    ours.update(post(5), urgent=True)
    assert not ours.finish(FINAL)
    assert ours.stale
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(409),
        Reply(409, body=b"<html>conflict</html>"),
        Reply(409, body=b'{"message": "the job does not exist any more"}'),
        Reply(409, body=b"\xff"),
        Reply(200, body=b"<html>welcome</html>"),
        Reply(200, body=b"{}"),
        Reply(204, body=b""),
        *(Reply(status) for status in (301, 400, 401, 403, 404, 410, 413, 422, 429, 500, 502, 503)),
        Reply(503, headers={"Retry-After": "soon"}),
    ],
    ids=lambda reply: f"{reply.status} {(reply.body or b'')[:12]!r}",
)
def test_an_answer_that_is_not_about_the_attempt_neither_ends_nor_stops_it(
    server: StatusServer, played: Played, reply: Reply
) -> None:
    """A proxy answers it, or an operator of another version that cannot read the job."""
    server.reply = reply
    ours = played.start()
    server.wait_for(3)
    server.reply = Reply()
    ours.update(post(5), urgent=True)
    assert ours.finish(FINAL)
    assert not played.stale.is_set()
    assert not played.stopped.is_set()
    assert not ours.stale


def test_a_renewed_token_is_used(server: StatusServer, played: Played) -> None:
    ours = played.start()
    server.wait_for(1)
    played.token.write_text("renewed")
    assert ours.finish(FINAL)
    assert server.tokens == ["Bearer secret", "Bearer renewed"]


def test_a_server_with_another_certificate_gets_no_token(
    server: StatusServer, played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as other:
        played.client = StatusClient(server.url, played.token, other.ca)
        monkeypatch.setattr(reporter, "FINAL_SECONDS", 0.5)
        assert not played.start().finish(FINAL)
    assert server.posts == []


def test_a_token_is_never_sent_unencrypted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not https"):
        StatusClient("http://127.0.0.1/progress", tmp_path / "token", "")


def test_a_post_keeps_below_the_servers_limit() -> None:
    metrics = {f"metric{i}": i / 7 for i in range(100)}
    stages = [StageStatus(name=f"sft-{i}", kind="sft", metrics=metrics) for i in range(100)]
    long = Post(trainer_status=TrainerStatus(), tuneyard=ProgressReport(attempt=1, stages=stages))
    body = reporter._body(long)
    assert len(body) <= MAX_POST_BYTES
    assert len(Post.model_validate_json(body).tuneyard.stages) == 100  # type: ignore[union-attr]


def test_a_response_that_arrives_byte_by_byte_is_given_up_at_the_timeout(
    server: StatusServer, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes before a timeout of one read: 41 bytes in 8 s."""
    monkeypatch.setattr(reporter, "TIMEOUT_SECONDS", 1.0)
    server.replies = [Reply(pause=0.2)]
    with pytest.raises(TimeoutError, match="no complete response within 1 s"):
        played.client.send(post(1))
    assert played.client.send(post(2)).stop is False


# ---- questions ----------------------------------------------------------------------------------

FITS = Reply(body=b'{"stop": false, "fit": {"settings": {"sft": {"microBatchTokens": 512}}}}')


def ask(ours: Reporter, seconds: float = 20.0) -> PostResponse | None:
    return ours.ask(post(9), seconds, lambda: False)


def test_a_question_is_posted_at_once_and_its_own_response_is_returned(
    server: StatusServer, played: Played
) -> None:
    server.replies = [Reply(seconds=0.3), FITS]  # the first post is on its way meanwhile
    ours = played.start()
    server.wait_for(1)
    response = ask(ours)
    assert steps(server)[:2] == [0, 9]
    assert response is not None
    assert response.fit is not None
    assert response.fit.settings["sft"].micro_batch_tokens == 512


def test_a_question_is_posted_again_until_the_operator_responds(
    server: StatusServer, played: Played
) -> None:
    ours = played.start()
    server.wait_for(1)
    server.replies = [Reply(503), Reply(503), FITS]
    response = ask(ours)
    assert response is not None
    assert response.fit is not None


def test_an_operator_that_is_down_is_waited_for_no_longer_than_the_limit(
    server: StatusServer, played: Played
) -> None:
    server.reply = Reply(503)
    assert ask(played.start(), seconds=0.5) is None


@pytest.mark.parametrize("status", [400, 413])
def test_an_operator_that_does_not_accept_the_question_is_not_waited_for(
    server: StatusServer, played: Played, status: int
) -> None:
    ours = played.start()
    server.wait_for(1)
    server.reply = Reply(status)
    assert ask(ours, seconds=1e6) is None


def test_a_question_ends_with_a_request_to_stop_and_with_a_newer_attempt(
    server: StatusServer, played: Played
) -> None:
    server.reply = Reply(503)
    assert played.start().ask(post(9), 1e6, lambda: True) is None
    server.reply = SUPERSEDED
    assert ask(played.start(), seconds=1e6) is None


def test_the_outcome_is_the_last_post_though_a_question_is_still_open(
    server: StatusServer, played: Played
) -> None:
    """A group may end while its question is being answered in another thread."""
    server.reply = Reply(503)
    ours, answers = played.start(), list[PostResponse | None]()
    asking = threading.Thread(target=lambda: answers.append(ask(ours, seconds=1e6)))
    asking.start()
    server.wait_for(2)
    ending = threading.Thread(target=lambda: ours.finish(FINAL))
    ending.start()
    asking.join(10)
    assert answers == [None]
    ours.update(post(2))  # as a driver does once its question is over
    server.reply = Reply()
    ending.join(10)
    assert ours.delivered
    assert steps(server)[-1] == 100
