"""The policy in training: log-probabilities against plain forward passes, reference, values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.speaking import loop_settings
from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import TrainRuntime
from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.layers import trainable
from tuneyard_trainer.reinforcement import actor as actors
from tuneyard_trainer.reinforcement.actor import Actor, Sequences
from tuneyard_trainer.worker import Worker

CPU = torch.device("cpu")
SEQUENCES = Sequences(
    [[5, 6, 7, 20, 21, 2], [9, 30, 2], [11, 12, 13, 14, 15, 40, 41, 42, 43]], [3, 1, 5]
)


def load(model_dir: Path, adapter: Any = None, temperature: float = 1.0, **runtime: Any) -> Actor:
    return actors.load(
        {"model": model_dir},
        None if adapter is None else Adapter.model_validate(adapter),
        LoopSettings.model_validate(loop_settings()),
        TrainRuntime.model_validate(runtime),
        Worker(0, 1, CPU),
        temperature=temperature,
        with_values=True,
        with_reference=True,
    )


def plain_scores(model: Any, temperature: float = 1.0) -> list[tuple[list[float], list[float]]]:
    """Return log-probabilities and entropies of each completion, row by row, without padding."""
    found = []
    for row, start in zip(SEQUENCES.rows, SEQUENCES.starts, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, -len(row) :] / temperature
        logprobs = logits.log_softmax(-1)
        positions = range(start, len(row))
        chosen = [logprobs[t - 1, row[t]].item() for t in positions]
        entropy = [-(logprobs[t - 1].exp() * logprobs[t - 1]).sum().item() for t in positions]
        found.append((chosen, entropy))
    return found


def check(scored: Any, expected: list[tuple[list[float], list[float]]]) -> None:
    for b, (logprobs, entropy) in enumerate(expected):
        length = len(logprobs)
        assert scored.logprobs_BT[b, :length].tolist() == pytest.approx(logprobs, abs=1e-5)
        assert scored.entropy_BT[b, :length].tolist() == pytest.approx(entropy, abs=1e-5)
        assert not scored.logprobs_BT[b, length:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_plain_forward_pass_at_the_temperature(
    temperature: float, tiny_model_dir: Path
) -> None:
    actor = load(tiny_model_dir, temperature=temperature)
    check(actor.score_all(SEQUENCES), plain_scores(actor.model, temperature))


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_the_size_of_micro_batches_changes_nothing(tokens: int, tiny_model_dir: Path) -> None:
    actor = load(tiny_model_dir, micro_batch_tokens=tokens)
    assert sorted(i for layout in actor.micro_batches(SEQUENCES) for i in layout) == [0, 1, 2]
    check(actor.score_all(SEQUENCES), plain_scores(actor.model))


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt", "bottleneck"])
def test_every_adapter_is_scored_like_a_plain_forward_pass(kind: str, tiny_model_dir: Path) -> None:
    actor = load(tiny_model_dir, {kind: {}})
    perturb(actor)
    check(actor.score_all(SEQUENCES), plain_scores(actor.model))


def perturb(actor: Actor) -> None:
    """Change the policy."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(actor.model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("adapter", [None, {"lora": {}}, {"prefix": {}}], ids=str)
def test_the_reference_stays_the_start_model_when_training_changes_the_policy(
    adapter: Any, tiny_model_dir: Path
) -> None:
    actor = load(tiny_model_dir, adapter)
    start = actor.score_all(SEQUENCES).logprobs_BT
    perturb(actor)
    now = actor.score_all(SEQUENCES).logprobs_BT
    assert not torch.allclose(now, start, atol=1e-2)
    assert torch.equal(actor.reference_logprobs(SEQUENCES), start)
    assert torch.equal(actor.score_all(SEQUENCES).logprobs_BT, now)


def test_a_fresh_lora_starts_at_its_base(tiny_model_dir: Path) -> None:
    actor = load(tiny_model_dir, {"lora": {}})
    with adapters.disabled(actor.model):
        base = actor.score_all(SEQUENCES).logprobs_BT
    assert torch.equal(actor.reference_logprobs(SEQUENCES), base)


def test_values_are_zero_at_first_then_linear_in_the_state_before_each_token(
    tiny_model_dir: Path,
) -> None:
    actor = load(tiny_model_dir)
    assert not actor.score_all(SEQUENCES).values_BT.any()
    assert actor.value_head is not None
    torch.manual_seed(0)
    torch.nn.init.normal_(actor.value_head.linear.weight)
    values = actor.score_all(SEQUENCES).values_BT
    for b, (row, start) in enumerate(zip(SEQUENCES.rows, SEQUENCES.starts, strict=True)):
        hidden = actor.model.model(input_ids=torch.tensor([row]))[0][0]
        expected = actor.value_head(hidden)[start - 1 : -1]
        torch.testing.assert_close(values[b, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_a_plain_forward_pass(tiny_model_dir: Path) -> None:
    actor = load(tiny_model_dir)
    scored = actor.score(SEQUENCES)
    scored.logprobs_BT.sum().backward()
    found = {n: p.grad for n, p in trainable(actor.model).items()}
    actor.model.zero_grad(set_to_none=True)
    for row, start in zip(SEQUENCES.rows, SEQUENCES.starts, strict=True):
        logits = actor.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        torch.stack([logits[t - 1, row[t]] for t in range(start, len(row))]).sum().backward()
    for name, parameter in trainable(actor.model).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forward_passes_agree_despite_the_adapters_dropout(
    checkpointing: bool, tiny_model_dir: Path
) -> None:
    """With dropout, a ratio of probabilities would compare two random networks."""
    lora = {"lora": {"dropout": 0.5}}
    actor = load(tiny_model_dir, lora, gradient_checkpointing=checkpointing)
    perturb(actor)
    actor.train()
    first, second = actor.score(SEQUENCES), actor.score(SEQUENCES)
    assert torch.equal(first.logprobs_BT, second.logprobs_BT)
    first.logprobs_BT.sum().backward()
    assert any(_nonzero(p.grad) for p in actor.parameters.values())


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
