"""The memory of a worker's pod: what the trainer does on the CPU beside the GPU."""

from __future__ import annotations

from tuneyard.api.model_facts import ModelFacts
from tuneyard.planning.memory.parameters import TRAINED_BYTES, Trained
from tuneyard.planning.memory.parts import Moment

PROCESS_BYTES = 3 << 30
"""Python with torch, transformers, Ray and CUDA's own memory on the host. An estimate."""
CHECKPOINT_BYTES = 12
"""A parameter and its two moments in float32, copied before they are written."""
EXPORT_BYTES = 128 << 20
"""What an export takes beside the tensor at hand: the blocks that it merges and checks, in float32
and float64. The test of the export's memory has the same bound."""


def checkpoint(trained: Trained) -> Moment:
    """Return the moment at which a checkpoint is written."""
    size = CHECKPOINT_BYTES * trained.parameters
    return Moment.of("writing a checkpoint", ("copy of the trained parameters", size))


def gathered_checkpoint(facts: ModelFacts) -> Moment:
    """Return the moment at which a checkpoint of a sharded model is written, a tensor at a time."""
    size = TRAINED_BYTES * facts.largest_tensor
    return Moment.of("writing a checkpoint", ("largest tensor", size))


def export(facts: ModelFacts, adapter: int, *, merge: bool) -> Moment:
    """Return the moment of the export that takes the most.

    The export reads, writes and checks one tensor of the model at a time, in the type of the base's
    files. `adapter`: its bytes. 0: the model was fully tuned.
    """
    tensor = facts.stored_bytes * facts.largest_tensor if merge or not adapter else 0
    return Moment.of(
        "writing the files",
        ("largest tensor", tensor),
        ("adapter", adapter),
        ("blocks", EXPORT_BYTES),
    )


def merged_model(facts: ModelFacts) -> Moment:
    """Return the moment at which an adapter is merged into a model in float32 on the CPU."""
    return Moment.of("merging the adapter", ("model in float32", TRAINED_BYTES * facts.parameters))
