"""Defenses against forgetting: `spec.training.preserve` and `spec.training.guard`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tuneyard.api.meta import Model, Rule
from tuneyard.api.sources import Dataset


class L2Sp(Model):
    """L2-SP (Li et al. 2018, arXiv:1802.01483): the loss grows by strength / 2 times the squared
    distance of the trained weights from those at the start."""

    strength: float = Field(default=0.01, gt=0, le=1e6)
    """Weight of the term."""


class Ewc(Model):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): like L2-SP, and the
    squared distance of each weight counts by its Fisher information: how much it matters for
    predicting a token of the general data."""

    strength: float = Field(default=100.0, gt=0, le=1e12)
    """Weight of the term, lambda in the paper."""
    samples: int = Field(default=64, ge=1, le=1_000_000)
    """Sequences of the general data from which the Fisher information is estimated; all of them if
    there are fewer."""


class Kl(Model):
    """Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282), with general data in place
    of the new task's: the loss grows by strength times KL(start || tuned), the mean over the
    target tokens of general sequences, in nats per token."""

    strength: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of the term."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature T of both distributions. The divergence is multiplied by T squared, so that the
    gradient keeps its size (Hinton et al. 2015, arXiv:1503.02531). The paper uses 2."""
    batch_size: int = Field(default=4, ge=1, le=65536)
    """Sequences of the general data in each optimizer step, over all workers."""


class PreserveTerms(Model):
    """Terms that are added to the loss of each step, against forgetting. Those that are set are
    summed."""

    l2_sp: L2Sp | None = None
    """Stay near the weights at the start (full fine-tuning). None: off."""
    ewc: Ewc | None = None
    """Stay near the weights at the start, the more a weight matters for general data (full
    fine-tuning). None: off."""
    kl: Kl | None = None
    """Predict general data as the model at the start does. None: off."""


class Preserve(PreserveTerms):
    """Terms that are added to the loss, against forgetting. Those that are set are summed."""

    data: list[Dataset] | None = Field(default=None, min_length=1, max_length=16)
    """General data of `ewc` and `kl`, which is never among the training rows. None: there is
    none."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.l2Sp) || has(self.ewc) || has(self.kl)",
            holds=lambda preserve: bool(preserve.l2_sp or preserve.ewc or preserve.kl),
            message="set at least one of l2Sp, ewc, kl",
            reads=("l2Sp", "ewc", "kl"),
        ),
        Rule(
            cel="has(self.data) == (has(self.ewc) || has(self.kl))",
            holds=lambda preserve: (preserve.data is not None) == bool(preserve.ewc or preserve.kl),
            message="is the general data of ewc and kl: set it with either of them, and only then",
            path="data",
            reads=("data", "ewc", "kl"),
        ),
    )


class GuardLimits(Model):
    """When training on a narrow task has cost too much of what the model could do before."""

    worsens_by: float = Field(default=0.1, gt=0, le=100)
    """Largest allowed increase of the general loss over that of the base, in nats per token."""
    patience: int = Field(default=1, ge=1, le=1000)
    """Number of evaluations in a row beyond this bound after which training stops."""


class Guard(GuardLimits):
    """A bound on forgetting: the loss of general data is measured at every evaluation, and training
    stops when it is too high. No checkpoint beyond the bound is kept."""

    data: list[Dataset] = Field(min_length=1, max_length=16)
    """General data to measure, which training does not read."""
