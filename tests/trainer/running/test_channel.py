"""Events from the workers to the driver, and the word to stop back."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tuneyard_trainer.running import channel
from tuneyard_trainer.running.channel import EventClient, EventServer


@pytest.fixture
def desk() -> Iterator[EventServer]:
    desk = EventServer("127.0.0.1")
    yield desk
    desk._listener.close()


def line(desk: EventServer) -> EventClient:
    return EventClient(desk.address, desk.key)


def progress(step: int, *, total: int = 100, **metrics: float) -> dict[str, Any]:
    return {
        "type": "progress",
        "stage": "sft",
        "step": step,
        "totalSteps": total,
        "metrics": metrics,
        "message": None,
        "resumedStep": None,
    }


def received(desk: EventServer, count: int) -> list[dict[str, Any]]:
    return [desk.events.get(timeout=10) for _ in range(count)]


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_progress_that_is_held_back_leaves_its_metrics_to_what_follows(desk: EventServer) -> None:
    ours = line(desk)
    ours.emit(progress(1, loss=3.0))
    ours.emit(progress(2, loss=2.0))
    ours.emit(progress(2, validationLoss=2.5))
    ours.emit(progress(3, loss=1.0) | {"message": "a word"})
    first, second = received(desk, 2)
    assert first["step"] == 1
    assert (second["step"], second["metrics"]) == (3, {"loss": 1.0, "validationLoss": 2.5})
    assert desk.events.empty()


@pytest.mark.parametrize(
    "event",
    [progress(100), progress(5) | {"resumedStep": 0}, progress(5) | {"message": "x"}],
    ids=["last step", "resumption", "message"],
)
def test_news_that_cannot_be_overtaken_is_sent_at_once(
    desk: EventServer, event: dict[str, Any]
) -> None:
    ours = line(desk)
    ours.emit(progress(1))
    ours.emit(event)
    assert received(desk, 2)[1]["step"] == event["step"]


def test_metrics_of_one_stage_are_not_told_of_the_next(
    desk: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "POST_SECONDS", 1e9)
    ours = line(desk)
    ours.emit(progress(1, loss=3.0))  # held back
    ours.emit({"type": "stage", "stage": "evaluate", "state": "Running", "record": None})
    monkeypatch.setattr(channel, "POST_SECONDS", 0.0)
    ours.emit(progress(1, accuracy=1.0))
    assert received(desk, 2)[1]["metrics"] == {"accuracy": 1.0}


def test_all_workers_hear_the_word_also_those_that_call_later(desk: EventServer) -> None:
    early = line(desk)
    assert eventually(lambda: desk.called)
    assert not early.stopped()
    desk.ask_to_stop()
    late = line(desk)
    assert eventually(early.stopped)
    assert eventually(late.stopped)


def test_a_worker_whose_pod_goes_tells_the_driver(desk: EventServer) -> None:
    line(desk).ask_to_stop()
    assert received(desk, 1) == [{"type": "draining"}]


def test_strangers_are_turned_away_and_keep_nobody_out(desk: EventServer) -> None:
    for _ in range(2):
        with socket.create_connection(desk.address) as knock:
            knock.sendall(b"\x00\x00\x00\x02hi")
    with pytest.raises(Exception):  # noqa: B017  whichever side notices first
        EventClient(desk.address, b"guessed")
    ours = line(desk)
    ours.emit({"type": "finished"})
    assert received(desk, 1) == [{"type": "finished"}]
