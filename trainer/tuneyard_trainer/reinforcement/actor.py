"""The policy in training: its probabilities and values for the tokens of completions.

Shapes: B completions, T tokens of a completion, L of prompt and completion, N positions that
predict a completion's token, V vocabulary, H hidden size.
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
from tuneyard_trainer.models.sharding import in_step
from tuneyard_trainer.reinforcement.arithmetic import entropy, token_logprobs
from tuneyard_trainer.training import batches
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker


class ValueHead(nn.Module):
    """The value of a completion so far, for each position, from the policy's hidden states.

    Policy and value share a trunk (Schulman et al. 2017, section 5, eq. 9), so there is no second
    model in memory and an adapter serves both. V(s) = w h + b, in float32 whatever the trunk's
    precision: returns differ in digits that bfloat16 does not have.

    The head starts at zero: the first update's advantages are those without a critic, not those of
    a random critic.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return the values (N,). `hidden_NH`: the input of the model's own head."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N1: Tensor = self.linear(hidden_NH.float())
        return values_N1.squeeze(-1)


class Scored(NamedTuple):
    """A policy's numbers for the tokens of completions; (B, T) each, 0 for padding."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    """0 if it was not requested."""
    values_BT: Tensor
    """0 without a value head."""


@dataclass(frozen=True)
class Sequences:
    """Prompts with their completions, as tokens."""

    rows: Sequence[Sequence[int]]
    starts: Sequence[int]
    """Index of the first completion token in each row."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int]) -> Sequences:
        return Sequences([self.rows[i] for i in chosen], [self.starts[i] for i in chosen])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]

    def mask(self, device: torch.device, width: int | None = None) -> Tensor:
        """Return (B, T), True on a completion's tokens; T: `width`, or the longest completion."""
        lengths = torch.tensor(self.lengths, device=device, dtype=torch.long)
        longest = max(self.lengths, default=1) if width is None else width
        return torch.arange(longest, device=device)[None, :] < lengths[:, None]


@dataclass
class Actor:
    """The policy in training with its value head and reference. Dropout is off in all of them, so
    that a probability ratio compares two forward passes of the same network."""

    model: Any
    device: torch.device
    precision: torch.dtype
    pad: int
    temperature: float
    """The policy is softmax(logits / temperature): completions are sampled from it, and
    log-probabilities are computed at the same temperature."""
    max_tokens: int
    """Maximum tokens of a micro-batch."""
    value_head: ValueHead | None = None
    reference: Reference | None = None
    """The model as it was at the start; None: the method needs none."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        heads = self.value_head.named_parameters() if self.value_head else ()
        return layers.trainable(self.model) | {f"value_head.{name}": p for name, p in heads}

    def micro_batches(self, sequences: Sequences) -> list[list[int]]:
        """Return the row indices of each micro-batch, the longest rows first."""
        lengths = np.array([len(row) for row in sequences.rows], dtype=np.int64)
        indices = np.arange(len(sequences), dtype=np.int64)
        layouts = batches.micro_batches(
            indices, lengths, capacity=0, max_tokens=self.max_tokens, pack=False
        )
        return [[row for members in layout.bins for row in members] for layout in layouts]

    def score(self, sequences: Sequences, *, with_entropy: bool = False) -> Scored:
        """Score one micro-batch, with gradients if they are enabled. Without `with_entropy`, which
        costs as much memory as the logits, the entropies are 0."""
        return self._score(sequences, self.value_head, with_entropy=with_entropy)

    @torch.no_grad()
    def score_all(self, sequences: Sequences) -> Scored:
        """Score any number of rows, in micro-batches, without gradients."""
        return self._score_all(sequences, self.value_head, with_entropy=True)

    @torch.no_grad()
    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        """Return the log-probabilities (B, T) that the reference model gives to the tokens."""
        if self.reference is None:
            raise TypeError("this actor was loaded without a reference")
        with self.reference.active():
            return self._score_all(sequences, None, with_entropy=False).logprobs_BT

    def train(self) -> None:
        """Enable activation checkpointing, which transformers has in training mode only."""
        self.model.train(self.checkpointing)

    def _score_all(
        self, sequences: Sequences, head: ValueHead | None, *, with_entropy: bool
    ) -> Scored:
        self.model.eval()
        shape = len(sequences), max(sequences.lengths, default=1)
        whole = Scored(*(torch.zeros(shape, device=self.device) for _ in range(3)))
        own = self.micro_batches(sequences)
        for chosen, is_own in in_step(self.model, own, []):
            scored = sequences.take(chosen) if is_own else Sequences([[self.pad] * 2], [1])
            part = self._score(scored, head, with_entropy=with_entropy)
            if not is_own:
                continue
            rows = torch.tensor(chosen, device=self.device)
            for all_BT, some_BT in zip(whole, part, strict=True):
                all_BT[rows, : some_BT.shape[1]] = some_BT
        return whole

    def _score(self, sequences: Sequences, head: ValueHead | None, *, with_entropy: bool) -> Scored:
        ids_BL, attention_BL = self._padded(sequences)
        mask_BT = sequences.mask(self.device)
        rows_N, token_N = mask_BT.nonzero(as_tuple=True)
        starts_B = torch.tensor(sequences.starts, device=self.device)
        columns_N = starts_B[rows_N] + token_N
        # The state before a token predicts the token; the head receives no other state.
        at_N = head_at(self.model, rows_N, columns_N - 1, ids_BL.shape[1])
        with autocast(self.device, self.precision), at_N as hidden:
            output = self.model(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False)
        logits_NV = output.logits[0].float() / self.temperature
        logprobs_N = token_logprobs(logits_NV, ids_BL[rows_N, columns_N])
        entropy_N = entropy(logits_NV) if with_entropy else torch.zeros_like(logprobs_N)
        values_N = head(hidden[-1]) if head else torch.zeros_like(logprobs_N)
        return Scored(*(scatter(x_N, mask_BT) for x_N in (logprobs_N, entropy_N, values_N)))

    def _padded(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L), padded on the right, and the attention mask."""
        width = max(len(row) for row in sequences.rows)
        ids_BL = torch.full((len(sequences), width), self.pad)
        attention_BL = torch.zeros_like(ids_BL)
        for index, row in enumerate(sequences.rows):
            ids_BL[index, : len(row)] = torch.tensor(row)
            attention_BL[index, : len(row)] = 1
        return ids_BL.to(self.device), attention_BL.to(self.device)


def scatter(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Return (B, T): the values in order at the True places of the mask, and 0 elsewhere.
    Differentiable."""
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
    shards: int = 1,
) -> Actor:
    """Load the input `model` and, if an earlier stage trained it, `tuned`, for training. `shards`:
    the workers that each keep a part of the base; 1: each keeps all of it."""
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
        shards=shards,
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
        reference=policies.Reference(model) if with_reference else None,
        checkpointing=runtime.gradient_checkpointing,
    )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, the adapter's too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and base.DROPOUT.search(name):
                setattr(module, name, 0.0)
