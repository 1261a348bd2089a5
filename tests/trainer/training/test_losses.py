"""SFT's loss and gradients against a direct computation: one row at a time, full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.trainer.rows import Row, random_rows, train_stage, write_prepared
from tests.trainer.several_workers import Notes, spawn
from tuneyard.api.stage_settings import TrainSettings
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.sft import build as build_loop
from tuneyard_trainer.worker import StageContext, Worker

ROWS = random_rows(9)
CPU = torch.device("cpu")


def reference(model: Any, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean over all targets of -log softmax(logits)[next token], in float64, and its
    gradients. Each row has a forward pass of its own: no packing, padding or masking."""
    model.train()
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for position in range(1, len(ids)):
            if mask[position]:
                scores = logits[position - 1]
                total = total + torch.logsumexp(scores, 0) - scores[ids[position]]
                targets += 1
    mean = total / targets
    mean.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(mean.detach()), gradients


def build(folder: Path, model_dir: Path, worker: Worker, **settings: Any) -> Loop:
    stage = train_stage(**settings)
    workdir = folder / f"work-{worker.rank}"
    workdir.mkdir(exist_ok=True)
    inputs = {"model": model_dir, "data": folder / "data"}
    context = StageContext(stage, inputs, workdir, worker)
    return build_loop(context, context.settings(TrainSettings))


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("max_tokens", ["auto", 64])
def test_loss_and_gradients_equal_the_reference_packed_and_padded(
    packing: str, max_tokens: Any, tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    expected_loss, expected = reference(AutoModelForCausalLM.from_pretrained(tiny_model_dir), ROWS)
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS)
    loop = build(
        tmp_path,
        tiny_model_dir,
        Worker(0, 1, CPU),
        packing=packing,
        runtime={"micro_batch_tokens": max_tokens},
    )
    metrics, _ = loop.backward(np.arange(len(ROWS)), step=0)
    assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-5)
    assert_close(
        {name: p.grad for name, p in loop.parameters.items() if p.grad is not None}, expected
    )


def test_a_packed_row_does_not_attend_to_the_row_before_it(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """The loss of a row does not depend on the tokens of the other row in its bin."""
    losses = []
    for first in (5, 77):
        rows = [([first, 9, 9, 9, 9, 9], [0] * 6), ROWS[0]]
        folder = tmp_path / str(first)
        write_prepared(folder / "data", tiny_tokenizer, rows)
        loop = build(folder, tiny_model_dir, Worker(0, 1, CPU), packing="always")
        losses.append(loop.backward(np.arange(2), step=0)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


BATCHES = {"a batch": list(range(9)), "fewer rows than workers": [4]}


def _worker(rank: int, notes: Notes, folder: Path, model_dir: Path) -> None:
    loop = build(folder, model_dir, Worker(rank, 2, CPU), packing="always")
    found = {}
    for name, rows in BATCHES.items():
        metrics, stop = loop.backward(np.array(rows), step=0)
        gradients = {key: p.grad for key, p in loop.parameters.items() if p.grad is not None}
        found[name] = {"loss": metrics["loss"], "stop": stop, "gradients": gradients}
        loop.optimizer.zero_grad(set_to_none=True)
    torch.save(found, folder / f"rank-{rank}.pt")


def test_two_workers_compute_the_reference(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS)
    spawn(2, _worker, tmp_path, tiny_model_dir)
    for name, rows in BATCHES.items():
        expected_loss, expected = reference(
            AutoModelForCausalLM.from_pretrained(tiny_model_dir), [ROWS[i] for i in rows]
        )
        for rank in range(2):
            found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)[name]
            assert found["loss"] == pytest.approx(expected_loss, abs=1e-5)
            assert not found["stop"]
            assert_close(found["gradients"], expected)


@pytest.mark.parametrize("adapter", ["lora", "prompt", "prefix", "bottleneck", "ia3"])
def test_adapters_compute_the_same_loss_packed_or_not(
    adapter: str, tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """The reference is the model with its adapter, with one row per forward pass."""
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS)
    loop = build(tmp_path, tiny_model_dir, Worker(0, 1, CPU), adapter={adapter: {}})
    _randomize(loop.parameters)
    metrics, _ = loop.backward(np.arange(len(ROWS)), step=0)
    found = {name: p.grad.clone() for name, p in loop.parameters.items() if p.grad is not None}
    loop.optimizer.zero_grad()
    expected_loss, expected = reference(WithoutVirtualTokens(loop.model), ROWS)
    assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-5)
    assert found
    assert_close(found, {name.removeprefix("model."): g for name, g in expected.items()})


def _randomize(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class WithoutVirtualTokens(nn.Module):
    """A model without the logits of the virtual tokens that some adapters prepend."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        output.logits = output.logits[:, -input_ids.shape[1] :]
        return output
