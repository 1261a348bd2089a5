"""Tuneyard's preference losses against TRL's trainers, on the same weights and tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.preferring import CPU, loop_settings, separable
from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.models import base
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.kto import UnpairedPreferences
from tuneyard_trainer.preference.losses import pair_loss, reward_loss
from tuneyard_trainer.preference.micro_batches import logprobs
from tuneyard_trainer.preference.reference import ReferencedPreferences
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

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


KTO_PAIRS = separable(6, seed=4)


def kto_trainer(folder: Path, models: tuple[Any, Any], tokenizer: Any, rows: list[Any]) -> Any:
    """Return TRL's trainer whose only batch holds all rows, in their order."""
    return trl.KTOTrainer(
        model=models[0],
        ref_model=models[1],
        args=trl.KTOConfig(
            output_dir=str(folder / "trl"),
            beta=BETA,
            per_device_train_batch_size=len(rows),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def singles(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a pair as a good and a bad completion."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row[side]}],
            "label": side == "chosen",
        }
        for side in ("chosen", "rejected")
    ]


def kto_objective(folder: Path, models: tuple[Any, Any], found: Any) -> UnpairedPreferences:
    """Return Tuneyard's KTO objective over the rows that TRL has tokenized."""
    policy, reference = models
    folder.mkdir()
    with RowWriter(folder, "train") as writer:
        for row in found:
            ids = [*row["prompt_ids"], *row["completion_ids"]]
            mask = [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
            writer.append(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8), 0)
    rows = Rows.open(folder, "train")
    assert rows is not None
    labels = np.array(found["label"], dtype=np.float32)
    data = Preferences(Comparisons(rows, np.arange(len(rows) + 1), labels), None, {"maxLength": 64})
    worker = Worker(0, 1, CPU)
    return UnpairedPreferences(
        model=policy,
        data=data,
        forward=FORWARD,
        worker=worker,
        seed=0,
        settings=DpoSettings(
            adapter=None, loss="kto", beta=BETA, label_smoothing=0.0, training=loop_settings()
        ),
        references=ReferencedPreferences.of(
            data, reference, FORWARD, folder, worker, mismatched=True
        ),
    )


@pytest.mark.parametrize("rows_come", ["one by one", "as pairs"])
def test_the_kl_and_the_loss_of_kto_equal_those_of_trls_kto_trainer(
    tmp_path: Path, models_of: tuple[Any, Any], tiny_tokenizer: Any, rows_come: str
) -> None:
    """One by one, TRL's own mismatched pairs are used: it gives a prompt the completion of the row
    before, and Tuneyard that of the row after, so Tuneyard reads the rows backwards. As pairs,
    half of TRL's are the prompt's own other completion, so TRL is given Tuneyard's."""
    rows = [single for row in KTO_PAIRS for single in singles(row)]
    if rows_come == "one by one":
        rows = [single for i, row in enumerate(KTO_PAIRS) for single in singles(row)[i % 2 :][:1]]
    trainer = kto_trainer(tmp_path, models_of, tiny_tokenizer, rows)
    found = trainer.train_dataset
    own = sum(
        found[i]["KL_completion_ids"]
        in [r["completion_ids"] for r in found if r["prompt_ids"] == p]
        for i, p in enumerate(found["prompt_ids"])
    )
    assert own == (len(rows) // 2 if rows_come == "as pairs" else 0), "of TRL's own pairs"
    if rows_come == "one by one":
        objective = kto_objective(
            tmp_path / "rows", models_of, found.select(range(len(rows))[::-1])
        )
    else:
        objective = kto_objective(tmp_path / "rows", models_of, found)
        given = iter(mismatched_completions(objective))
        found = found.map(lambda _: {"KL_completion_ids": next(given)})
    batch = trainer.data_collator([found[i] for i in range(len(found))])
    with torch.no_grad():
        theirs = float(trainer.compute_loss(models_of[0].eval(), batch))
    their_kl = trainer._metrics["eval"]["kl"][-1]
    ours, _, our_kl = objective.backward(np.arange(len(rows)), 0).tolist()
    models_of[0].zero_grad()
    assert their_kl > 0.01, "the estimate is not cut off at 0"
    assert our_kl == pytest.approx(their_kl, abs=1e-5)
    assert ours == pytest.approx(theirs, abs=1e-5)


def mismatched_completions(objective: UnpairedPreferences) -> list[list[int]]:
    assert objective.references.mismatched is not None
    rows = objective.references.mismatched.rows
    return [rows.ids(row)[rows.mask(row) == 1].tolist() for row in range(len(rows))]


def test_a_mismatched_row_never_joins_a_prompt_with_its_own_completions(
    tmp_path: Path, models_of: tuple[Any, Any], tiny_tokenizer: Any
) -> None:
    """Each completion is used once, as in the paper's estimate, if prompts have equally many."""
    rows = [single for row in KTO_PAIRS for single in singles(row)]
    found = kto_trainer(tmp_path, models_of, tiny_tokenizer, rows).train_dataset
    used = mismatched_completions(kto_objective(tmp_path / "rows", models_of, found))
    for row, completion in zip(found, used, strict=True):
        own = [r["completion_ids"] for r in found if r["prompt_ids"] == row["prompt_ids"]]
        assert completion not in own
    assert sorted(used) == sorted(found["completion_ids"])


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
