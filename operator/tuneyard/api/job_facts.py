"""The facts that a running job reports before it trains, and the answer to them.

The memory of a job is calculated from these numbers before its training stages begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from tuneyard.api.meta import Report
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.status import Failure

MOST_PARAMETERS = 10**14
"""A model with more parameters is refused: no such model exists, and its bytes may not fit an
int64."""

Length = Annotated[int, Field(ge=1, le=1 << 24)]
"""Tokens of a row."""
StageName = Annotated[str, Field(max_length=64)]
ModelName = Annotated[str, Field(max_length=128)]
Parameters = Annotated[int, Field(ge=0, le=MOST_PARAMETERS)]


MOST_STAGES = 256
"""Stages of a plan."""


class Device(Report):
    """The device of one worker."""

    gpu: str | None = Field(default=None, max_length=128)
    """Name that CUDA or ROCm gives to the worker's GPU. None: the worker computes on the CPU."""
    memory: int = Field(ge=0, le=1 << 50)
    """Bytes of the GPU; without a GPU, the worker's share of the memory of its machine or pod."""
    most: int | None = Field(default=None, ge=0, le=1 << 50)
    """Without a GPU, all bytes that the processes of that machine or pod may take, swap included.
    None: those of `memory`."""


class RowFacts(Report):
    """The lengths of the rows that a stage has prepared."""

    longest: Length
    """Tokens of the longest row to train on; of preferences, a prompt with one completion."""
    held_out: Length | None = None
    """Tokens of the longest held-out row. None: no rows are held out."""
    general: Length | None = Field(default=None, exclude_if=lambda length: length is None)
    """Tokens of the longest row of general data against forgetting. None: there is none."""


class PromptFacts(Report):
    """The prompts that a stage completes."""

    longest: Length
    """Tokens of the longest prompt."""
    count: int = Field(ge=1, le=1 << 32)
    """Number of prompts."""


class JobFacts(Report):
    """The numbers that decide a job's memory, once its data is prepared. No rows and no paths."""

    model: ModelFacts | None = None
    """The model that the stages start from. None: its config is not described."""
    unknown_model: str = Field(default="", max_length=1024)
    """Why the model is None."""
    done: list[StageName] = Field(default=[], max_length=MOST_STAGES)
    """Names of the stages that are done: their memory is not needed any more."""
    rows: dict[StageName, RowFacts] = Field(default={}, max_length=MOST_STAGES)
    """Prepared rows, by the names of the stages that prepared them. Stages that are not done are
    absent."""
    prompts: dict[StageName, PromptFacts] = Field(default={}, max_length=MOST_STAGES)
    """Prompts by the names of the stages that complete them, as far as they can be read."""
    models: dict[ModelName, Parameters] = Field(default={}, max_length=MOST_STAGES)
    """Parameters of reward models, judges and teachers from outside the job, as far as their
    config.json is at hand and described, by `STAGE/ROLE`. A reward model is counted without a
    vocabulary head."""
    device: Device | None = None
    """The device of the first worker. None: unknown."""
    devices: int = Field(default=1, ge=1, le=1 << 20)
    """Devices that train together."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.model and self.model.parameters > MOST_PARAMETERS:
            count = self.model.parameters
            raise ValueError(f"a model of {count} parameters: at most {MOST_PARAMETERS} are read")
        return self


class ChosenSettings(Report):
    """The settings of a training stage that `auto` leaves open, chosen so that the job fits."""

    micro_batch_tokens: int = Field(ge=1)
    """Most tokens of a micro-batch on one worker."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""


class FitAnswer(Report):
    """The answer to a job's facts: whether it may train, and how."""

    refusal: Failure | None = None
    """Why the job cannot fit, with the fields that would make it fit. None: it may train."""
    settings: Mapping[str, ChosenSettings] = Field(default={})
    """Settings by the names of stages, where they differ from those of the plan."""
    planned_bytes: Mapping[str, int] = Field(default={}, exclude_if=lambda value: not value)
    """Calculated peak of a worker's memory by the names of stages, for their records."""
