"""Tuneyard's preference losses against TRL's trainers, on the same weights and tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.preferring import CPU, separable
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.models import base
from tuneyard_trainer.preference.losses import pair_loss, reward_loss
from tuneyard_trainer.preference.micro_batches import logprobs
from tuneyard_trainer.training.losses import Forward

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = separable(8)
BETA, SMOOTHING = 0.3, 0.15
FORWARD = Forward(CPU, torch.float32, 3, pack=False, capacity=64, max_tokens=1 << 20)


@pytest.fixture(scope="module")
def models_of(tiny_model_dir: Path) -> tuple[Any, Any]:
    """A policy, and the reference that it differs from."""
    reference = base.load_base(tiny_model_dir, dtype=torch.float32, device=CPU)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy, reference


def rows_of(folder: Path, batch: dict[str, torch.Tensor]) -> Rows:
    """Return TRL's batch as rows: all chosen ones, then all rejected ones."""
    folder.mkdir()
    with RowWriter(folder, "train") as writer:
        for ids, attended, mask in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        ):
            kept = attended.bool()
            writer.append(ids[kept].numpy().astype(np.int32), mask[kept].numpy(), 0)
    rows = Rows.open(folder, "train")
    assert rows is not None
    return rows


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"])
def test_the_loss_of_a_batch_equals_that_of_trls_dpo_trainer(
    tmp_path: Path, models_of: tuple[Any, Any], tiny_tokenizer: Any, loss: str
) -> None:
    policy, reference = models_of
    smoothing = SMOOTHING if loss == "robust" else 0.0
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type=[loss],
            beta=BETA,
            label_smoothing=smoothing,
            per_device_train_batch_size=len(PAIRS),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "chosen": [{"role": "assistant", "content": row["chosen"]}],
                    "rejected": [{"role": "assistant", "content": row["rejected"]}],
                }
                for row in PAIRS
            ]
        ),
        processing_class=tiny_tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(policy.eval(), batch))
    rows = rows_of(tmp_path / "rows", batch)
    chosen = np.arange(len(rows), dtype=np.int64)
    with torch.no_grad():
        ratios = logprobs(policy, rows, chosen, FORWARD) - logprobs(
            reference, rows, chosen, FORWARD
        )
    if loss == "ipo":
        ratios = ratios / torch.from_numpy(rows.targets)
    better, worse = ratios.chunk(2)
    ours = pair_loss(loss, better, worse, beta=BETA, label_smoothing=smoothing)  # type: ignore[arg-type]
    assert float(ours.mean()) == pytest.approx(theirs, abs=1e-5)


def test_the_loss_of_pairs_equals_that_of_trls_reward_trainer() -> None:
    """The expected value repeats its `compute_loss`, which cannot be called without a trainer."""
    better, worse = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.3, 0.7, 2.5])
    margin, coefficient = 0.25, 0.01
    theirs = -torch.nn.functional.logsigmoid(better - worse - margin).mean()
    theirs += coefficient * torch.mean((better + worse) ** 2)
    ours = reward_loss(
        torch.stack([better, worse], dim=1),
        torch.tensor([2, 2, 2]),
        torch.ones(3),
        margin=margin,
        centering=coefficient,
    )
    assert float(ours.mean()) == pytest.approx(float(theirs), abs=1e-6)
