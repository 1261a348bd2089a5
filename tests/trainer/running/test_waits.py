"""What a run waits for, as it is told."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from tuneyard_trainer.running import waits
from tuneyard_trainer.running.waits import Waits, wait_event

Told = queue.Queue[tuple[str, float]]


@pytest.fixture
def told() -> Told:
    return queue.Queue()


def following(told: Told, *events: dict[str, Any]) -> Waits:
    """Return the waits after the events."""
    found = Waits(lambda message, seconds: told.put((message, seconds)))
    for event in events:
        found.follow(event)
    return found


def test_a_wait_is_told_again_with_its_seconds_until_the_next_event(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(waits, "REPEAT_SECONDS", 0.01)
    found = following(told, wait_event("starting Ray"))
    (first, short), (second, long) = told.get(timeout=60), told.get(timeout=60)
    assert (first, second) == ("starting Ray", "starting Ray")
    assert 0.0 < short < long
    found.follow(wait_event("importing torch"))
    while told.get(timeout=60)[0] != "importing torch":
        pass
    found.end()


def test_a_short_wait_is_not_told(told: Told) -> None:
    stage = {"type": "stage", "stage": "sft", "state": "Running", "record": None}
    found = following(told, wait_event("reading rows"), stage)
    assert found._ended.is_set()
    assert told.empty()


def test_a_message_of_a_stage_without_a_step_is_repeated_and_a_step_ends_it(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "REPEAT_SECONDS", 0.01)
    message = {"type": "progress", "stage": "sft", "step": 0, "message": "loading the model"}
    found = following(told, message)
    assert told.get(timeout=60)[0] == "loading the model"
    found.follow(message | {"step": 1, "message": None})
    assert found._ended.is_set()
