"""The policy in training: the probabilities and values that it gives to the tokens of answers.

Shapes: B answers, T tokens of an answer, L of prompt and answer, N positions that predict an
answer's token, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import TrainRuntime
from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.models import base, layers, policies
from tuneyard_trainer.models.base import autocast, precision_of
from tuneyard_trainer.models.layers import head_at, head_of
from tuneyard_trainer.models.policies import Reference
from tuneyard_trainer.reinforcement.arithmetic import entropy, token_logprobs
from tuneyard_trainer.training.batches import micro_batches
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker


class ValueHead(nn.Module):
    """The value of a completion so far: one number per position, read off the policy's own states.

    Policy and value share a trunk (Schulman et al. 2017, section 5, eq. 9), so there is no second
    model in memory and an adapter serves both. V(s) = w h + b, in float32 whatever the trunk
    computes in: returns differ in the digits that bfloat16 does not have.

    It starts at zero, so that the first update's advantages are those of no critic at all instead
    of a random one's.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """(N,) values; `hidden_NH`: what the model's own head sees."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N1: Tensor = self.linear(hidden_NH.float())
        return values_N1.squeeze(-1)


class Scored(NamedTuple):
    """What a policy says of answers' tokens; (B, T) each, 0 where there is padding."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    """0 where nobody asked for it."""
    values_BT: Tensor
    """0 without a value head."""


@dataclass(frozen=True)
class Texts:
    """Prompts with their answers, as tokens."""

    rows: Sequence[Sequence[int]]
    starts: Sequence[int]
    """Where each row's answer begins."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int]) -> Texts:
        return Texts([self.rows[i] for i in chosen], [self.starts[i] for i in chosen])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]

    def mask(self, device: torch.device, width: int | None = None) -> Tensor:
        """(B, T) True on an answer's own tokens; T: the longest, or `width`."""
        lengths = torch.tensor(self.lengths, device=device, dtype=torch.long)
        longest = max(self.lengths, default=1) if width is None else width
        return torch.arange(longest, device=device)[None, :] < lengths[:, None]


@dataclass
class Actor:
    """What is trained. Dropout is off in all of it: a probability ratio compares two passes of one
    network, not of two that dropout drew."""

    model: Any
    device: torch.device
    precision: torch.dtype
    pad: int
    temperature: float
    """Answers are sampled from softmax(logits / temperature), and that is the policy: its
    probabilities are taken at the same temperature."""
    max_tokens: int
    """The most tokens of one pass."""
    value_head: ValueHead | None = None
    reference: Reference | None = None
    """The model as it was at the start; None: nobody asks."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        heads = self.value_head.named_parameters() if self.value_head else ()
        return layers.trainable(self.model) | {f"value_head.{name}": p for name, p in heads}

    def passes(self, texts: Texts) -> list[list[int]]:
        """Indices of the rows that go through the model together, the longest first."""
        lengths = np.array([len(row) for row in texts.rows], dtype=np.int64)
        indices = np.arange(len(texts), dtype=np.int64)
        layouts = micro_batches(
            indices, lengths, capacity=0, max_tokens=self.max_tokens, pack=False
        )
        return [[row for members in layout.bins for row in members] for layout in layouts]

    def score(self, texts: Texts, *, with_entropy: bool = False) -> Scored:
        """One pass over a few rows, with gradients where they are on. Without `with_entropy`, which
        costs as much memory as the logits, the entropies are 0."""
        return self._score(texts, self.value_head, with_entropy=with_entropy)

    @torch.no_grad()
    def scores(self, texts: Texts) -> Scored:
        """Of any number of rows, in passes, without gradients."""
        return self._in_passes(texts, self.value_head, with_entropy=True)

    @torch.no_grad()
    def reference_logprobs(self, texts: Texts) -> Tensor:
        """(B, T) what the model at the start would have given the same tokens."""
        if self.reference is None:
            raise TypeError("this actor was loaded without a reference")
        with self.reference.active():
            return self._in_passes(texts, None, with_entropy=False).logprobs_BT

    def train(self) -> None:
        """Before passes with gradients: transformers checkpoints activations in this mode only."""
        self.model.train(self.checkpointing)

    def _in_passes(self, texts: Texts, head: ValueHead | None, *, with_entropy: bool) -> Scored:
        self.model.eval()
        width = max(texts.lengths, default=1)
        whole = Scored(*(torch.zeros(len(texts), width, device=self.device) for _ in range(3)))
        for chosen in self.passes(texts):
            part = self._score(texts.take(chosen), head, with_entropy=with_entropy)
            rows = torch.tensor(chosen, device=self.device)
            for all_BT, some_BT in zip(whole, part, strict=True):
                all_BT[rows, : some_BT.shape[1]] = some_BT
        return whole

    def _score(self, texts: Texts, head: ValueHead | None, *, with_entropy: bool) -> Scored:
        ids_BL, seen_BL = self._padded(texts)
        mask_BT = texts.mask(self.device)
        rows_N, token_N = mask_BT.nonzero(as_tuple=True)
        starts_B = torch.tensor(texts.starts, device=self.device)
        columns_N = starts_B[rows_N] + token_N
        # The state before a token predicts it; no other state reaches the head.
        at_N = head_at(self.model, rows_N, columns_N - 1, ids_BL.shape[1])
        with autocast(self.device, self.precision), at_N as hidden:
            output = self.model(input_ids=ids_BL, attention_mask=seen_BL, use_cache=False)
        logits_NV = output.logits[0].float() / self.temperature
        logprobs_N = token_logprobs(logits_NV, ids_BL[rows_N, columns_N])
        entropy_N = entropy(logits_NV) if with_entropy else torch.zeros_like(logprobs_N)
        values_N = head(hidden[-1]) if head else torch.zeros_like(logprobs_N)
        return Scored(*(spread(x_N, mask_BT) for x_N in (logprobs_N, entropy_N, values_N)))

    def _padded(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """(B, L) tokens, padded on the right, and where they are real."""
        width = max(len(row) for row in texts.rows)
        ids_BL = torch.full((len(texts), width), self.pad)
        seen_BL = torch.zeros_like(ids_BL)
        for index, row in enumerate(texts.rows):
            ids_BL[index, : len(row)] = torch.tensor(row)
            seen_BL[index, : len(row)] = 1
        return ids_BL.to(self.device), seen_BL.to(self.device)


def spread(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T) the values at the mask's places, in order, and 0 elsewhere; differentiable."""
    empty_BT = torch.zeros(mask_BT.shape, dtype=x_N.dtype, device=x_N.device)
    return empty_BT.masked_scatter(mask_BT, x_N)


# ---- loading ------------------------------------------------------------------------------------


def load(
    inputs: Mapping[str, Path],
    adapter: Adapter | None,
    training: LoopSettings,
    runtime: TrainRuntime,
    worker: Worker,
    *,
    temperature: float,
    with_values: bool,
    with_reference: bool,
) -> Actor:
    """The inputs `model` and, where an earlier stage trained it, `tuned`, to be trained on."""
    precision, device = precision_of(training, worker), worker.device
    tokenizer = base.load_tokenizer(inputs["model"])
    model = policies.load(
        inputs,
        adapter,
        training,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=runtime.gradient_checkpointing,
    )
    without_dropout(model)
    forward = Forward.of(
        model,
        device=device,
        precision=precision,
        pad=0,
        pack=False,
        max_length=1,
        max_tokens=runtime.micro_batch_tokens,
    )
    return Actor(
        model=model,
        device=device,
        precision=precision,
        pad=int(tokenizer.pad_token_id),
        temperature=temperature,
        max_tokens=forward.max_tokens,
        value_head=ValueHead(head_of(model).in_features, device) if with_values else None,
        reference=policies.Reference(layers.trainable(model)) if with_reference else None,
        checkpointing=runtime.gradient_checkpointing,
    )


def without_dropout(model: nn.Module) -> None:
    """No dropout in any mode: the adapter's too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and base.DROPOUT.search(name):
                setattr(module, name, 0.0)
