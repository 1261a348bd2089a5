"""The driver's side of a group: events are relayed while a question is answered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.jobs import manifest, planned
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard_trainer.running import group
from tuneyard_trainer.running.channel import EventClient, EventServer

QUESTION: dict[str, Any] = {"type": "facts", "facts": {"devices": 2}}


def follow(folder: Path, train: Any, server: EventServer, on_event: Any, review: Any) -> None:
    plan = planned(manifest(folder))
    group.follow(plan, train, server, on_event, threading.Event(), review)


def test_events_are_relayed_while_a_question_is_answered(tmp_path: Path) -> None:
    """Another rank may have something to say in the minute that the operator takes."""
    server, relayed = EventServer("127.0.0.1"), threading.Event()
    answers = []

    def train() -> None:
        asking, other = (EventClient(server.address, server.key) for _ in range(2))
        other.emit({"type": "wait", "message": "before"})
        answers.append(asking.ask(QUESTION))
        for client in (asking, other):
            client.emit({"type": "finished"})
            client._connection.close()

    def on_event(event: dict[str, Any]) -> None:
        if event["message"] == "during":
            relayed.set()

    def review(facts: JobFacts) -> FitAnswer:
        assert facts.devices == 2
        server.events.put({"type": "wait", "message": "during"})
        assert relayed.wait(10), "the relay waits for the answer"
        return FitAnswer()

    follow(tmp_path, train, server, on_event, review)
    assert answers == [{"settings": {}}]


def test_a_question_that_cannot_be_answered_ends_the_run_with_its_error(tmp_path: Path) -> None:
    server, ended = EventServer("127.0.0.1"), threading.Event()

    def train() -> None:
        EventClient(server.address, server.key).emit(QUESTION)
        ended.wait(10)

    def review(_: JobFacts) -> FitAnswer:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        follow(tmp_path, train, server, lambda _: None, review)
    ended.set()
