"""Test that every example runs with its own data and settings, on a tiny model."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.jobs import planned
from tuneyard.api.plan import Plan
from tuneyard_trainer.running import processes, torchrun
from tuneyard_trainer.running.group import Places
from tuneyard_trainer.running.runner import Emit
from tuneyard_trainer.storage.records import Store

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def fine_tune_jobs() -> list[Path]:
    """Return the manifests that run on one machine, without those that use a PVC."""
    paths = [*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("adapters/*.yaml")]
    return [path for path in sorted(paths) if "pvc://" not in path.read_text()]


def shortened(path: Path, model: Path) -> dict[str, Any]:
    """Return the job with two steps on the tiny model and without an evaluation gate.

    Random weights learn nothing in two steps and would fail the gate.
    """
    value: dict[str, Any] = yaml.safe_load(path.read_text())
    spec = value["spec"]
    spec["model"] = {"uri": f"file://{model}"}
    spec.setdefault("training", {}).pop("epochs", None)
    spec["training"] |= {"maxSteps": 2}
    if isinstance(spec["data"].get("maxLength"), int):
        spec["data"]["maxLength"] *= 4  # the tiny tokenizer needs more tokens for the same text
    spec["evaluate"] = {"maxNewTokens": 2, "samples": 1}
    freeze = spec["training"].get("freeze")
    if freeze and "layers" in freeze:
        spec["training"]["freeze"] = freeze | {"layers": "0"}
    adapter = next(iter((spec.get("adapter") or {}).values()), {})
    if adapter and "layers" in adapter:
        adapter["layers"] = "1"
    return value


@pytest.fixture(scope="session")
def long_context_model_dir(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 4096 tokens."""
    folder = tmp_path_factory.mktemp("long-context")
    tiny_llama(VOCABULARY, max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4096}))
    return folder


def run(plan: Plan, base_dir: Path, folder: Path, emit: Emit) -> None:
    """Run a plan in this process, or with several workers in processes as `tuneyard run` does: one
    worker refuses to share a model with nobody."""
    output, cache_dir = str(folder / "out"), folder / "cache"
    if (plan.compute.workers or 1) == 1:
        torchrun.run(plan, output, base_dir=base_dir, cache_dir=cache_dir, emit=emit)
        return
    scratch = folder / "scratch"
    scratch.mkdir()
    Store(output, scratch).claim(plan.job, attempt=1)
    processes.run(
        plan,
        places=Places(output, str(scratch), str(base_dir), str(cache_dir)),
        resources=processes.local_resources(plan.compute),
        on_event=emit,
        stop=threading.Event(),
    )


@pytest.mark.parametrize("path", fine_tune_jobs(), ids=lambda path: path.stem)
def test_an_example_runs_to_its_result(
    path: Path, tmp_path: Path, long_context_model_dir: Path
) -> None:
    states: dict[str, str] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage":
            states[event["stage"]] = event["state"]

    run(planned(shortened(path, long_context_model_dir)), path.parent, tmp_path, emit)
    assert set(states.values()) == {"Succeeded"}
    assert (tmp_path / "out" / "result" / "README.md").exists()


def shortened_alignment(path: Path, model: Path) -> dict[str, Any]:
    """Return the job with two steps per method on the tiny model, which is also the judge."""
    value: dict[str, Any] = yaml.safe_load(path.read_text())
    spec = value["spec"]
    spec["model"] = {"uri": f"file://{model}"}
    spec["evaluate"] = {"maxNewTokens": 2, "samples": 1}
    steps = [spec.get("sft"), (spec.get("rewardModel") or {}).get("train")]
    steps += (spec.get("optimize") or {}).values()
    for step in filter(None, steps):
        step["training"].pop("epochs", None)
        step["training"]["maxSteps"] = 2
        if "sampling" in step:
            step["sampling"]["maxNewTokens"] = 4
        if "teacher" in step:
            step["teacher"] = {"uri": f"file://{model}"}
    if feedback := (spec.get("preferences") or {}).get("aiFeedback"):
        feedback |= {"judge": {"model": {"uri": f"file://{model}"}}, "maxNewTokens": 4}
        feedback["disagreement"] = "average"  # random weights prefer a position
    return value


def alignment_jobs() -> list[Path]:
    """Return the alignment manifests without the constitution.

    A model of random weights writes empty critiques, which end the job with a reason of its own.
    test_ai_feedback runs a constitution.
    """
    paths = sorted(EXAMPLES.glob("alignment/*.yaml"))
    return [path for path in paths if path.stem != "constitutional"]


@pytest.mark.parametrize("path", alignment_jobs(), ids=lambda path: path.stem)
def test_an_alignment_example_runs_to_its_result(
    path: Path, tmp_path: Path, long_context_model_dir: Path
) -> None:
    states: dict[str, str] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage":
            states[event["stage"]] = event["state"]

    torchrun.run(
        planned(shortened_alignment(path, long_context_model_dir)),
        str(tmp_path / "out"),
        base_dir=path.parent,
        cache_dir=tmp_path / "cache",
        emit=emit,
    )
    assert set(states.values()) == {"Succeeded"}
    assert (tmp_path / "out" / "result" / "README.md").exists()
