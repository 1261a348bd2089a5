"""The comparison of jobs that ran: what their stages write is what a comparison reads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.trainer.jobs import COLORS, manifest, planned
from tuneyard.api.comparison import Comparison
from tuneyard.errors import StageError
from tuneyard_trainer.comparison.compare import compare
from tuneyard_trainer.comparison.job_result import Named
from tuneyard_trainer.comparison.page import render
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import emit_nothing

HELD_OUT = 12


def write_rows(folder: Path) -> None:
    """Write ten training rows and twelve held-out ones."""
    for name, count in (("train", 10), ("validation", HELD_OUT)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Which color has {name} lamp {i}?"},
                    {"role": "assistant", "content": f"Lamp {i} is {COLORS[i % 10]}."},
                ],
                "expected": [COLORS[i % 10]],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Comparison:
    """The comparison of a job that trains, one that hardly does, and one that misses a gate."""
    folder = tmp_path_factory.mktemp("sweep")
    write_rows(folder)
    gate = {"metric": "lossReduction", "atLeast": 0.99}
    outputs = []
    for name, rate, gates in (("slow", 1e-6, []), ("fast", 0.02, []), ("gated", 1e-6, [gate])):
        value = manifest(
            tiny_model_dir,
            output=name,
            training={"maxSteps": 6, "batchSize": 4, "learningRate": rate},
            evaluate={"maxNewTokens": 4, "samples": 2, "gates": gates},
        )
        value["metadata"]["name"] = name
        plan = planned(value)
        with pytest.raises(StageError, match="nothing is exported") if gates else nullcontext():
            torchrun.run(
                plan, str(folder / name), base_dir=folder, cache_dir=folder / "cache",
                emit=emit_nothing,
            )  # fmt: skip
        outputs.append(Named(name, str(folder / name), plan.manifest))
    return compare(outputs)


def test_the_job_that_trained_is_best_on_the_loss_of_the_same_rows(found: Comparison) -> None:
    (loss,) = (row for row in found.metrics if row.metric == "validationLoss")
    assert loss.best == 1
    assert [(each.basis, each.items) for each in loss.differences] == [("paired", HELD_OUT)] * 3
    assert loss.differences[1].better is None  # slow and gated are the same training
    assert loss.differences[1].value == pytest.approx(0, abs=1e-6)
    assert found.sentences[1].startswith("fast is best on validationLoss: better than slow by")


def test_all_answers_are_side_by_side_and_the_settings_and_costs_are_there(
    found: Comparison,
) -> None:
    assert len(found.answers) == HELD_OUT
    assert all(None not in answer.completions for answer in found.answers)
    settings = {each.field: each.values for each in found.settings}
    assert settings["spec.training.learningRate"] == ["1.0e-06", "0.02", "1.0e-06"]
    assert settings["spec.evaluate.gates"][:2] == ["[]", "[]"]
    assert "lossReduction" in (settings["spec.evaluate.gates"][2] or "")
    costs = {each.name: each.values for each in found.costs}
    assert costs["steps"] == [6, 6, 6]
    assert None not in costs["trainingSeconds"]
    assert [each.name for each in found.jobs] == ["slow", "fast", "gated"]
    assert "Comparison of slow, fast, gated" in render(found)
