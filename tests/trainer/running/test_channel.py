"""Events from the workers to the driver, and the request to stop."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from typing import Any

import pytest

from tuneyard_trainer.running import channel
from tuneyard_trainer.running.channel import EventClient, EventServer


@pytest.fixture
def server() -> Iterator[EventServer]:
    server = EventServer("127.0.0.1")
    yield server
    server._listener.close()


def client(server: EventServer) -> EventClient:
    return EventClient(server.address, server.key)


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


def received(server: EventServer, count: int) -> list[dict[str, Any]]:
    return [server.events.get(timeout=10) for _ in range(count)]


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_a_dropped_progress_event_adds_its_metrics_to_the_next_one(server: EventServer) -> None:
    ours = client(server)
    ours.emit(progress(1, loss=3.0))
    ours.emit(progress(2, loss=2.0))
    ours.emit(progress(2, validationLoss=2.5))
    ours.emit(progress(3, loss=1.0) | {"message": "loading"})
    first, second = received(server, 2)
    assert first["step"] == 1
    assert (second["step"], second["metrics"]) == (3, {"loss": 1.0, "validationLoss": 2.5})
    assert server.events.empty()


@pytest.mark.parametrize(
    "event",
    [progress(100), progress(5) | {"resumedStep": 0}, progress(5) | {"message": "x"}],
    ids=["last step", "resumption", "message"],
)
def test_progress_that_must_not_be_replaced_is_sent_at_once(
    server: EventServer, event: dict[str, Any]
) -> None:
    ours = client(server)
    ours.emit(progress(1))
    ours.emit(event)
    assert received(server, 2)[1]["step"] == event["step"]


def test_metrics_of_one_stage_are_not_sent_with_the_next(
    server: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "POST_SECONDS", 1e9)
    ours = client(server)
    ours.emit(progress(1, loss=3.0))  # held back
    ours.emit({"type": "stage", "stage": "evaluate", "state": "Running", "record": None})
    monkeypatch.setattr(channel, "POST_SECONDS", 0.0)
    ours.emit(progress(1, accuracy=1.0))
    assert received(server, 2)[1]["metrics"] == {"accuracy": 1.0}


def test_all_workers_receive_the_stop_request_also_those_that_connect_later(
    server: EventServer,
) -> None:
    early = client(server)
    assert eventually(lambda: server.has_clients)
    assert not early.stopped()
    server.ask_to_stop()
    late = client(server)
    assert eventually(early.stopped)
    assert eventually(late.stopped)


def test_a_worker_whose_pod_is_deleted_tells_the_driver(server: EventServer) -> None:
    client(server).ask_to_stop()
    assert received(server, 1) == [{"type": "draining"}]


def test_a_client_without_the_key_is_refused_and_blocks_no_worker(server: EventServer) -> None:
    for _ in range(2):
        with socket.create_connection(server.address) as knock:
            knock.sendall(b"\x00\x00\x00\x02hi")
    with pytest.raises(Exception):  # noqa: B017  whichever side notices first
        EventClient(server.address, b"guessed")
    ours = client(server)
    ours.emit({"type": "finished"})
    assert received(server, 1) == [{"type": "finished"}]


def test_a_worker_learns_that_its_driver_has_ended(server: EventServer) -> None:
    lost = threading.Event()
    EventClient(server.address, server.key, on_lost=lost.set)
    assert eventually(lambda: server.has_clients)
    assert not lost.is_set()
    with socket.socket(fileno=os.dup(server._connections[0].fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    assert lost.wait(10)


def test_silent_strangers_keep_no_worker_from_its_driver(
    server: EventServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user of the machine can open a connection, and so can pods that reach the head."""
    monkeypatch.setattr(channel, "AUTHENTICATION_SECONDS", 0.5)
    silent = [socket.create_connection(server.address) for _ in range(20)]
    try:
        client(server).emit(progress(1))
        assert server.events.get(timeout=20)["step"] == 1
        for connection in silent:
            connection.settimeout(20)
            while connection.recv(1024):  # the challenge, then the end
                pass
    finally:
        for connection in silent:
            connection.close()


def test_a_stranger_without_the_key_sends_no_event(server: EventServer) -> None:
    with pytest.raises(AuthenticationError):
        EventClient(server.address, b"a guess")
    client(server).emit(progress(2))
    assert server.events.get(timeout=20)["step"] == 2
    assert server.events.empty()


# ---- questions ----------------------------------------------------------------------------------


def test_a_worker_waits_for_the_drivers_answer_which_is_no_request_to_stop(
    server: EventServer,
) -> None:
    ours, other = client(server), client(server)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ours.ask({"type": "facts"})))
    asking.start()
    assert received(server, 1) == [{"type": "facts"}]
    assert not answers
    server.answer({"settings": {}})
    asking.join(10)
    assert answers == [{"settings": {}}]
    assert not ours.stopped()
    assert not other.stopped()


def test_a_worker_that_is_asked_to_stop_waits_for_no_answer(server: EventServer) -> None:
    ours = client(server)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ours.ask({"type": "facts"})))
    asking.start()
    received(server, 1)
    server.ask_to_stop()
    asking.join(10)
    assert answers == [None]
