"""The loss on the gaps of held-out documents, against a straight loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import tiny_llama
from tests.trainer.data.test_middle import CODER, documents, filled
from tests.trainer.data.test_prepare import Job
from tests.trainer.evaluation.measuring import ALONE, evaluate_stage
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.worker import StageContext


def loss_of_gaps(model: Any, gaps: Rows) -> float:
    """Nats per token of the gaps: each document alone, each target from the tokens before it."""
    losses = []
    for row in range(len(gaps)):
        ids, mask = torch.tensor(gaps.ids(row)).long(), gaps.mask(row)
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].float().log_softmax(-1)
        losses += [-float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i]]
    return math.fsum(losses) / len(losses)


def test_the_loss_of_the_gaps_is_that_of_a_straight_loop(tmp_path: Path) -> None:
    models = {
        "model": tiny_llama(len(CODER)),
        "tuned/weights": tiny_llama(len(CODER), initializer_range=0.1),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    CODER.save_pretrained(tmp_path / "model")
    job = Job(tmp_path, tmp_path / "model")
    job.train(documents(12), validation_fraction=0.5, **filled())
    inputs = {"model": job.model, "tuned": tmp_path / "tuned", "data": job.workdir}
    (tmp_path / "evaluation").mkdir()
    context = StageContext(evaluate_stage(), inputs, tmp_path / "evaluation", ALONE)
    metrics = evaluate.run(context).metrics
    gaps = job.data.gaps
    assert gaps is not None
    assert len(gaps) == 6
    for name, model in (
        ("validationLossOfGaps", "tuned/weights"),
        ("baseValidationLossOfGaps", "model"),
    ):
        wanted = loss_of_gaps(models[model].eval(), gaps)
        assert metrics[name] == pytest.approx(wanted, abs=1e-4)
    assert metrics["validationLossOfGaps"] != pytest.approx(metrics["validationLoss"], abs=1e-3)
