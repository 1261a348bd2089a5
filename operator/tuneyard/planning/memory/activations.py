"""The memory of a micro-batch: activations of a decoder layer, of the head and of the loss.

A layer's activations are the tensors that autograd keeps for the backward pass, counted per token
and operation as transformers computes them; tests/trainer/models compares them with autograd.

Where autocast casts the input of a linear layer, each layer keeps a copy of its own, and copies of
trained weights live until the end of the forward pass. PEFT casts the input of an adapted layer to
float32 first. FSDP2 casts the parameters instead, so that layers share their input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tuneyard.api.model_facts import LinearInput, ModelFacts
from tuneyard.planning.memory.parameters import Trained
from tuneyard.planning.memory.parts import Sharding

Loss = Literal["crossEntropy", "tokenLogprobs", "score", "tiled"]
"""crossEntropy: of logits cast to float32. tokenLogprobs: PPO's and GRPO's, of logits divided by
the temperature. score: a reward model's, without logits. tiled: TRL's, which computes the logits a
tile at a time and once more in the backward pass."""
TILE_TOKENS, TILE_WORDS = 4096, 32768
"""The most tokens and words of a tile (TRL 1.16)."""
TILE_LOGIT_BYTES = 33
"""Bytes of a tile's logit without a GPU, whose kernel would need none: eight tensors in float32 and
one of booleans."""


class MicroBatch(NamedTuple):
    """The shape of one forward pass."""

    rows: int
    width: int
    """Tokens of a row or of a bin of packed rows."""
    row_targets: int | None = None
    """Positions of a row whose logits are computed. None: all."""

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def targets(self) -> int:
        """Positions whose logits are computed."""
        return self.rows * (self.width if self.row_targets is None else self.row_targets)


@dataclass(frozen=True)
class Computation:
    """How the forward pass is computed."""

    precision: int
    """Bytes of the type that matrix products are computed in: 2 for bfloat16, 4 for float32."""
    stream: int
    """Bytes of a value of the residual stream."""
    casts: bool
    """Whether autocast casts the input of each linear layer."""
    masked: bool
    """Whether attention has a mask, as it has for packed and for padded rows."""

    @classmethod
    def of(
        cls, trained: Trained, precision: int, sharding: Sharding, *, masked: bool
    ) -> Computation:
        """Return how a model is computed. `precision`: bytes of the forward pass's type."""
        mixed = precision == 2 and sharding == "none"
        stream = 4 if mixed and trained.adapter is None else precision
        return cls(precision, stream, casts=mixed, masked=masked)


# ---- a decoder layer ----------------------------------------------------------------------------


def layer_bytes(facts: ModelFacts, trained: Trained, batch: MicroBatch, how: Computation) -> int:
    """Return the bytes that the backward pass of one decoder layer needs of its forward pass."""
    per_token = (
        _norms(facts, trained, how)
        + _attention(facts, batch, how)
        + _linear_inputs(facts, trained, how)
        + _mlp(facts, how)
        + _adapter(facts, trained, how)
    )
    return per_token * batch.tokens


def _norms(facts: ModelFacts, trained: Trained, how: Computation) -> int:
    """Return the bytes per token: norms keep their input in float32, and trained ones the
    normalized values too."""
    if facts.norm == "layer":
        return facts.norms * (4 * facts.hidden_size + 8)
    normalized = 4 if facts.norm == "rmsFloat32" else how.stream
    kept = 4 + (normalized if trained.norms else 0)
    total = facts.norms * (kept * facts.hidden_size + 4)
    if facts.query_key_norm != "none":
        of_head = 4 if facts.norm == "rmsFloat32" else how.precision
        kept = 4 + (of_head if trained.norms else 0)
        total += kept * (facts.query_size + facts.key_value_size)
        total += 4 * (facts.attention_heads + facts.key_value_heads)
    return total


def _attention(facts: ModelFacts, batch: MicroBatch, how: Computation) -> int:
    """Return the bytes per token: queries, keys, values, output, and the log-sum of each head.

    With a mask, keys and values are repeated for every query head, and the mask becomes a bias in
    the type of the queries, anew in each layer.
    """
    keys = facts.query_size if how.masked else facts.key_value_size
    bias = how.precision * batch.width if how.masked else 0
    kept = how.precision * (2 * facts.query_size + 2 * keys)
    return kept + bias + 4 * facts.attention_heads


def _linear_inputs(facts: ModelFacts, trained: Trained, how: Computation) -> int:
    """Return the bytes per token of the inputs of linear layers, apart from those that attention
    and MLP keep anyway."""
    needed = [linear for linear in facts.linears if linear.name in trained.keeps_input]
    shared: dict[LinearInput, int] = {linear.reads: linear.inputs for linear in needed}
    if how.casts and trained.adapter:  # each adapted layer casts its input to float32 and back
        return how.precision * sum(linear.inputs for linear in needed)
    if how.casts:
        inputs = ("attentionInput", "mlpInput")
        own = sum(linear.inputs for linear in needed if linear.reads in inputs)
        return how.precision * (own + shared.get("mlpHidden", 0))
    without_output = sum(size for reads, size in shared.items() if reads != "attentionOutput")
    return how.precision * without_output


def _mlp(facts: ModelFacts, how: Computation) -> int:
    """Return the bytes per token of the MLP's hidden tensors.

    A mixture computes each token `per_token` times and keeps the experts' inputs and outputs.
    """
    if facts.experts is None:
        return facts.activation_tensors * how.precision * facts.intermediate_size
    experts = facts.experts
    tensors = (facts.activation_tensors + 1) * experts.intermediate_size
    return how.precision * experts.per_token * (tensors + 2 * facts.hidden_size)


def _adapter(facts: ModelFacts, trained: Trained, how: Computation) -> int:
    """Return the bytes per token that an adapter adds, apart from the inputs of linear layers."""
    adapter = trained.adapter
    if adapter is None:
        return 0
    if lora := trained.lora:
        low_rank = how.precision * lora.rank * len(trained.added_linears)
        dropped = sum(linear.inputs for linear in trained.added_linears) if lora.dropout else 0
        outputs = sum(linear.outputs for linear in trained.added_linears)
        return low_rank + dropped + (how.precision * outputs if lora.decomposed else 0)
    if adapter.bottleneck:
        return 2 * how.precision * (facts.hidden_size + 2 * adapter.bottleneck.size)
    if adapter.ia3:
        return how.precision * (2 * facts.key_value_size + facts.intermediate_size)
    return 0


def temporary_bytes(
    facts: ModelFacts, trained: Trained, batch: MicroBatch, how: Computation
) -> int:
    """Return the bytes of the temporary tensors in the MLP of one layer, where most are alive.

    Under PEFT's casts this is the forward pass: the float32 copy of the hidden tensor, the tensor
    itself and sums of the output. Otherwise it is the backward pass: the gradients of the hidden
    tensors.
    """
    width = facts.intermediate_size
    if facts.experts:
        width = facts.experts.intermediate_size * facts.experts.per_token
    stream = 3 * how.stream * facts.hidden_size
    if how.casts and "mlpHidden" in _kept_reads(facts, trained) and trained.adapter:
        return ((4 + how.precision) * width + stream) * batch.tokens
    gradients = 3 if facts.activation_tensors > 1 else 2
    return (gradients * how.precision * width + stream) * batch.tokens


def _kept_reads(facts: ModelFacts, trained: Trained) -> set[LinearInput]:
    return {linear.reads for linear in facts.linears if linear.name in trained.keeps_input}


# ---- the head and the loss ----------------------------------------------------------------------


def head_input_bytes(
    facts: ModelFacts, trained: Trained, batch: MicroBatch, how: Computation
) -> int:
    """Return the bytes of the last norm and of the head's input."""
    norm = (4 + (how.stream if trained.norms else 0)) * facts.hidden_size if facts.final_norm else 0
    states = how.stream * facts.hidden_size
    cast = how.precision * facts.hidden_size if how.casts and trained.head else 0
    return norm * batch.tokens + (states + cast) * batch.targets


def logits_bytes(facts: ModelFacts, loss: Loss, batch: MicroBatch) -> int:
    """Return the bytes of logits and of their gradients.

    crossEntropy: the log-probabilities and two gradients, each in float32. tokenLogprobs: the
    logits, the softmax and two products of the gradient.
    """
    per_logit = {"crossEntropy": 12, "tokenLogprobs": 16, "score": 0, "tiled": 0}[loss]
    return per_logit * facts.vocabulary_size * batch.targets


def tile_bytes(
    facts: ModelFacts, trained: Trained, batch: MicroBatch, how: Computation, *, on_gpu: bool
) -> int:
    """Return the bytes of TRL's loss: a tile of logits with the weights of its words, and the
    gradients of the head's input and of the head's weights, in float32."""
    tokens = min(TILE_TOKENS, batch.targets)
    tile = how.precision * tokens * TILE_WORDS
    if not on_gpu:
        tile += TILE_LOGIT_BYTES * tokens * min(TILE_WORDS, facts.vocabulary_size)
    words = how.precision * TILE_WORDS if how.casts else 0
    gradients = batch.targets + (facts.vocabulary_size if trained.head else 0)
    return tile + (words + 4 * gradients) * facts.embedding_size


def forward_logits_bytes(facts: ModelFacts, loss: Loss, batch: MicroBatch, how: Computation) -> int:
    """Return the bytes of the logits while autocast still keeps its copies of the weights: those of
    the head and, if the loss is computed there too, two tensors in float32."""
    per_logit = {
        "crossEntropy": how.precision + 8,
        "tokenLogprobs": how.precision,
        "score": 0,
        "tiled": 0,
    }
    return per_logit[loss] * facts.vocabulary_size * batch.targets


# ---- without gradients --------------------------------------------------------------------------


def inference_bytes(facts: ModelFacts, batch: MicroBatch, how: Computation) -> int:
    """Return the bytes of a forward pass without gradients, apart from the logits: the tensors of
    one layer, in its MLP, and the mask with its bias."""
    width = facts.intermediate_size
    if facts.experts:
        width = facts.experts.intermediate_size * facts.experts.per_token
    tensors = 3 * how.precision * width + 4 * how.stream * facts.hidden_size
    mask = (1 + how.precision) * batch.width if how.masked else 0
    return (tensors + mask) * batch.tokens
