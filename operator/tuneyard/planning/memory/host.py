"""The memory of a worker's pod: what the trainer does on the CPU beside the GPU."""

from __future__ import annotations

from tuneyard.api.model_facts import ModelFacts
from tuneyard.planning.memory.parameters import TRAINED_BYTES, Trained
from tuneyard.planning.memory.parts import Moment

PROCESS_BYTES = 3 << 30
"""Python with torch, transformers, Ray and CUDA's own memory on the host. An estimate."""
CHECKPOINT_BYTES = 12
"""A parameter and its two moments in float32, copied before they are written."""


def checkpoint(trained: Trained) -> Moment:
    """Return the moment at which a checkpoint is written."""
    size = CHECKPOINT_BYTES * trained.parameters
    return Moment.of("writing a checkpoint", ("copy of the trained parameters", size))


def export(facts: ModelFacts, trained: Trained | None, *, merge: bool) -> Moment:
    """Return the moment of the export that takes the most.

    The export compares what it wrote with the model in float32 on the CPU, whole and unsharded.
    Writing a whole model loads it a second time in the base's own type. `trained`: of the adapter.
    None: the model was fully tuned.
    """
    whole = TRAINED_BYTES * facts.parameters
    twice = 2 * facts.stored_bytes * facts.parameters if trained is None or merge else 0
    adapter = TRAINED_BYTES * trained.parameters if trained else 0
    size = max(whole + adapter, twice)
    return Moment.of("comparing the written files", ("model in float32", size))


def merged_model(facts: ModelFacts) -> Moment:
    """Return the moment at which an adapter is merged into a model in float32 on the CPU."""
    return Moment.of("merging the adapter", ("model in float32", TRAINED_BYTES * facts.parameters))
