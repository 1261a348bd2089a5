"""Optional packages: a missing one is reported before the first stage runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.measuring import evaluate_stage
from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.preferring import planned as planned_preferences
from tests.trainer.rows import train_stage
from tests.trainer.speaking import grpo_stage, ppo_stage
from tests.trainer.trl_engine.test_dpo import settings
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.running import torchrun


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a package appear as not installed."""
    find_spec = importlib.util.find_spec

    def hide(package: str) -> None:
        def find(name: str, *rest: Any) -> Any:
            return None if name == package else find_spec(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return hide


def test_a_missing_package_is_reported_before_the_first_stage_unless_all_stages_are_done(
    tmp_path: Path, tiny_model_dir: Path, without: Any
) -> None:
    write_data(tmp_path)
    plan = planned(manifest(tiny_model_dir, adapter={"qlora": {}}))
    events: list[Any] = []

    def run() -> None:
        folders = {"base_dir": tmp_path, "cache_dir": tmp_path / "cache"}
        torchrun.run(plan, str(tmp_path / "out"), emit=events.append, **folders)

    with pytest.MonkeyPatch.context() as hidden:
        hidden.setattr(importlib.util, "find_spec", lambda *_: None)
        with pytest.raises(StageError, match="bitsandbytes") as caught:
            run()
    assert caught.value.reason == "MissingExtra"
    assert not [event for event in events if event["type"] == "stage"]
    run()
    without("bitsandbytes")
    events.clear()
    run()
    assert {event["state"] for event in events if event["type"] == "stage"} == {"Skipped"}


@pytest.mark.parametrize(
    ("package", "clean"),
    [("ftfy", {"repairEncoding": True}), ("py3langid", {"languages": ["en"]})],
)
def test_only_rules_that_use_a_package_of_cleaning_need_it(
    package: str, clean: Any, tiny_model_dir: Path, without: Any
) -> None:
    without(package)
    value = manifest(tiny_model_dir)
    extras.require(planned(value).stages)
    value["spec"]["data"]["clean"] = clean
    with pytest.raises(StageError, match=rf"data\.clean\..*{package}") as caught:
        extras.require(planned(value).stages)
    assert caught.value.reason == "MissingExtra"
    assert "tuneyard[cleaning]" in caught.value.advice


@pytest.mark.parametrize("make", [ppo_stage, grpo_stage])
def test_only_stages_that_sample_with_vllm_need_it(make: Any, without: Any) -> None:
    without("vllm")
    extras.require([make()])
    with pytest.raises(StageError, match=r"compute\.image") as caught:
        extras.require([make(), make(sampling={"engine": "vllm"})])
    assert caught.value.reason == "MissingExtra"


def test_an_evaluation_needs_vllm_only_if_the_manifest_names_it(without: Any) -> None:
    without("vllm")
    extras.require([evaluate_stage()])
    with pytest.raises(StageError, match=r"^evaluate\.engine is vllm") as caught:
        extras.require([evaluate_stage(engine="vllm")])
    assert caught.value.reason == "MissingExtra"
    assert "or remove evaluate.engine" in caught.value.advice


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: train_stage(engine=engine),
        lambda engine: planned_preferences(settings(engine=engine)),
    ],
    ids=["sft", "dpo"],
)
def test_only_stages_that_trl_trains_need_it(make: Any, without: Any) -> None:
    without("trl")
    extras.require([make(None)])
    with pytest.raises(StageError, match=r"training\.engine") as caught:
        extras.require([make(None), make("trl")])
    assert caught.value.reason == "MissingExtra"
