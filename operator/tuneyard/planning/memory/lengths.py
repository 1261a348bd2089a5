"""The lengths of rows and the micro-batches that they make."""

from __future__ import annotations

from dataclasses import dataclass

from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan
from tuneyard.api.stage_settings import PairsSettings, PrepareSettings
from tuneyard.planning.memory.activations import MicroBatch

AUTO_LENGTH = 1024
"""Tokens of a row if `maxLength` is auto, as in the trainer's `models.files`."""
GPU_TOKENS, CPU_TOKENS = 16384, 2048
"""Tokens of a micro-batch under `microBatchTokens: auto`."""
MAX_LOGITS, FEWEST_TOKENS = 1 << 29, 256
"""Logits that such a micro-batch of a causal model may have, and tokens that it always may."""
PROMPT_TOKENS = 512
"""Tokens assumed for a prompt of which nothing is known before the data is read."""


@dataclass(frozen=True)
class Lengths:
    """The longest rows of a job, in tokens."""

    rows: int
    """Rows of fine-tuning data."""
    pairs: int
    """A prompt with one of its completions, in preferences."""
    prompts: int
    """Prompts for which completions are sampled."""

    @classmethod
    def of(cls, plan: Plan, facts: ModelFacts, *, longest: int | None = None) -> Lengths:
        """Return the lengths that a plan allows. `longest`: the length of all rows and prompts, if
        it is known. None: the rows are as long as the plan allows."""
        limit = min(AUTO_LENGTH, facts.context_length or AUTO_LENGTH)
        if longest is not None:
            return cls(longest, longest, longest)
        rows = [s.settings for s in plan.stages if isinstance(s.settings, PrepareSettings)]
        pairs = [s.settings for s in plan.stages if isinstance(s.settings, PairsSettings)]

        def most(found: list[int | str]) -> int:
            return max((limit if isinstance(n, str) else n for n in found), default=limit)

        return cls(
            rows=most([settings.max_length for settings in rows]),
            pairs=most([settings.max_length for settings in pairs]),
            prompts=min(PROMPT_TOKENS, limit),
        )


def default_tokens(facts: ModelFacts, *, gpu: bool, logits: bool = True) -> int:
    """Return the tokens of a micro-batch under `microBatchTokens: auto`. `logits`: whether the
    model has a head over the vocabulary."""
    most = GPU_TOKENS if gpu else CPU_TOKENS
    if not logits:
        return most
    return min(most, max(FEWEST_TOKENS, MAX_LOGITS // facts.vocabulary_size))


def micro_batch(
    length: int, tokens: int, *, share: int, group: int = 1, row_targets: int | None = None
) -> MicroBatch:
    """Return the largest micro-batch of rows of `length` tokens.

    `tokens`: the most tokens, though at least one group of rows is in it. `share`: groups of a step
    on one worker. `group`: rows that stay together, 2 for pairs.
    """
    groups = max(1, tokens // (length * group))
    return MicroBatch(group * min(groups, max(1, share)), length, row_targets)
