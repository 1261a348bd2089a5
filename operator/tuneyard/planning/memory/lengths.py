"""The lengths of rows and the micro-batches that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tuneyard.api.job_facts import PromptFacts, RowFacts
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage, StageInput
from tuneyard.api.stage_settings import PairsSettings, PrepareSettings
from tuneyard.planning.memory.activations import MicroBatch

AUTO_LENGTH = 1024
"""Tokens of a row if `maxLength` is auto, as in the trainer's `models.files`."""
GPU_TOKENS, CPU_TOKENS = 16384, 2048
"""Tokens of a micro-batch under `microBatchTokens: auto`."""
MAX_LOGITS, FEWEST_TOKENS = 1 << 29, 256
"""Logits that such a micro-batch of a causal model may have, and tokens that it always may."""
CPU_BIN_TOKENS = 256
"""Most tokens of a bin of packed rows on the CPU, unless a row is longer."""
PROMPT_TOKENS = 512
"""Tokens assumed for a prompt of which nothing is known before the data is read."""


@dataclass(frozen=True)
class Lengths:
    """The longest rows of a job, in tokens."""

    rows: int
    """Most tokens of a row of fine-tuning data."""
    pairs: int
    """Most tokens of a prompt with one of its completions, in preferences."""
    prompts: int
    """Tokens of a prompt for which completions are sampled, unless the prompts were measured."""
    row_bins: int = 0
    """Most tokens of the bin that packed rows share. 0: as long as the longest row."""
    pair_bins: int = 0
    """The same for the completions of preferences."""
    measured_rows: Mapping[str, RowFacts] = field(default_factory=dict)
    """What was measured of prepared rows, by the stage that prepared them."""
    measured_prompts: Mapping[str, PromptFacts] = field(default_factory=dict)
    """What was measured of prompts, by the stage that completes them."""

    @classmethod
    def of(cls, plan: Plan, facts: ModelFacts, *, longest: int | None = None) -> Lengths:
        """Return the lengths that a plan allows. `longest`: the length of all rows and prompts.
        None: they are as long as the plan allows."""
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

    def measured(self, stage: PlannedStage) -> RowFacts | None:
        """Return what was measured of the rows that a stage reads. None: nothing."""
        data = stage.inputs.get("data")
        return self.measured_rows.get(data.stage) if isinstance(data, StageInput) else None


def default_tokens(facts: ModelFacts, *, gpu: bool, logits: bool = True) -> int:
    """Return the tokens of a micro-batch under `microBatchTokens: auto`. `logits`: whether the
    model has a head over the vocabulary."""
    most = GPU_TOKENS if gpu else CPU_TOKENS
    if not logits:
        return most
    return min(most, max(FEWEST_TOKENS, MAX_LOGITS // facts.vocabulary_size))


def packed_bins(longest: int, capacity: int, tokens: int, rows: int) -> tuple[int, int]:
    """Return the width and the number of the bins that `rows` rows share, each `longest` tokens.

    `capacity`: most tokens of a bin. `tokens`: most tokens of a micro-batch.
    """
    width = min(max(capacity, longest), max(tokens, longest))
    bins = -(-rows // (width // longest))
    return (width if bins > 1 else min(width, rows * longest)), bins


def micro_batch(
    length: int, tokens: int, *, share: int, group: int = 1, row_targets: int | None = None
) -> MicroBatch:
    """Return the largest micro-batch of rows of `length` tokens.

    `tokens`: the most tokens, though at least one group of rows is in it. `share`: groups of a step
    on one worker. `group`: rows that stay together, 2 for pairs.
    """
    groups = max(1, tokens // (length * group))
    return MicroBatch(group * min(groups, max(1, share)), length, row_targets)
