"""Sampling and measuring: the moments of stages without gradients."""

from __future__ import annotations

from tuneyard.api.model_facts import ModelFacts
from tuneyard.planning.memory.activations import Computation, MicroBatch, inference_bytes

CACHE_SHARE, CPU_CACHE_BYTES = 0.25, 2 << 30
"""The most memory of a batch's key-value cache, as in the trainer's `generation.sampling`."""
GPU_BATCH, CPU_BATCH = 256, 64
"""The most completions of a batch, as in `generation.sampling`."""
GREEDY_BATCH = 32
"""Prompts that `evaluate` completes at a time, as in `generation.greedy`."""
SAMPLED_LOGIT_BYTES = 32
"""Bytes of a logit while a token is drawn: three tensors in float32, two sums in float64, and the
result."""
MEASURED_LOGIT_BYTES = 8
"""Bytes of a logit of a held-out row beside the head's own: two tensors in float32."""


def cache_bytes_per_token(facts: ModelFacts, precision: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * facts.layers * facts.key_value_size * precision


def sampled_batch(
    facts: ModelFacts, *, completions: int, length: int, memory: int | None, precision: int
) -> int:
    """Return how many completions are sampled at a time.

    `length`: tokens of a prompt with its completion. `memory`: bytes of the GPU. None: no GPU.
    """
    share = CPU_CACHE_BYTES if memory is None else int(CACHE_SHARE * memory)
    fitting = share // (cache_bytes_per_token(facts, precision) * length)
    most = CPU_BATCH if memory is None else GPU_BATCH
    return max(1, min(most, fitting, completions))


def generation_parts(
    facts: ModelFacts, batch: MicroBatch, new_tokens: int, how: Computation
) -> tuple[tuple[str, int], ...]:
    """Return the parts of a call of `generate`: its cache, of which a layer is copied to grow, and
    the larger one of the prompts' forward pass and the choice of a token.

    `batch`: the prompts.
    """
    per_token = cache_bytes_per_token(facts, how.precision)
    positions = batch.rows * (batch.width + new_tokens)
    cache = positions * (per_token + per_token // facts.layers)
    logits = SAMPLED_LOGIT_BYTES * facts.vocabulary_size * batch.rows
    work = max(inference_bytes(facts, batch, how), logits)
    return ("key-value cache", cache), ("activations and logits", work)


def measured_parts(
    facts: ModelFacts, batch: MicroBatch, how: Computation
) -> tuple[tuple[str, int], ...]:
    """Return the parts of the loss of held-out rows, of which every position may be a target."""
    logits = (how.precision + MEASURED_LOGIT_BYTES) * facts.vocabulary_size * batch.targets
    return ("activations", inference_bytes(facts, batch, how)), ("logits", logits)
