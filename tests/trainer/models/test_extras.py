"""Packages beside the trainer's own: missing ones are told before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.speaking import grpo_stage, ppo_stage
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.running import torchrun


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a package look as if it were not installed."""
    found = importlib.util.find_spec

    def hide(package: str) -> None:
        look = lambda name, *more: None if name == package else found(name, *more)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", look)

    return hide


def test_a_missing_package_is_told_before_the_first_stage_and_not_where_all_is_done(
    tmp_path: Path, tiny_model_dir: Path, without: Any
) -> None:
    write_data(tmp_path)
    plan = planned(manifest(tiny_model_dir, adapter={"qlora": {}}))
    events: list[Any] = []

    def walk() -> None:
        where = {"base_dir": tmp_path, "cache_dir": tmp_path / "cache"}
        torchrun.run(plan, str(tmp_path / "out"), emit=events.append, **where)

    with pytest.MonkeyPatch.context() as hidden:
        hidden.setattr(importlib.util, "find_spec", lambda *_: None)
        with pytest.raises(StageError, match="bitsandbytes") as caught:
            walk()
    assert caught.value.reason == "MissingExtra"
    assert not [event for event in events if event["type"] == "stage"]
    walk()
    without("bitsandbytes")
    events.clear()
    walk()
    assert {event["state"] for event in events if event["type"] == "stage"} == {"Skipped"}


@pytest.mark.parametrize("make", [ppo_stage, grpo_stage])
def test_vllm_is_wanted_by_the_stages_that_sample_with_it_alone(make: Any, without: Any) -> None:
    without("vllm")
    extras.require([make()])
    with pytest.raises(StageError, match=r"compute\.image") as caught:
        extras.require([make(), make(sampling={"engine": "vllm"})])
    assert caught.value.reason == "MissingExtra"
