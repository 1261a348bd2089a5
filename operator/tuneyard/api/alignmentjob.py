"""AlignmentJob: reward models, DPO, PPO, GRPO, RLOO, AI feedback and constitutional AI."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuneyard.api.compute import Compute, RunPolicy
from tuneyard.api.meta import API_VERSION, Model, ObjectMeta, Rule
from tuneyard.api.methods import (
    MERGEABLE,
    Adapter,
    Constitution,
    Evaluate,
    Optimize,
    Preferences,
    RewardModel,
    Training,
)
from tuneyard.api.sources import FineTuneData, ModelSource, Output
from tuneyard.api.status import JobStatus


class SupervisedStep(Model):
    """Supervised fine-tuning before the alignment proper: the first of the four-step pipeline."""

    data: FineTuneData
    """Training and held-out data."""
    training: Training = Training()
    """The training loop."""


class AlignmentSpec(Model):
    """What to align, by which preferences, and how. Steps run in the order of these fields."""

    model: ModelSource
    """The model to start from."""
    sft: SupervisedStep | None = None
    """Fine-tune first. None: start from the model as it is."""
    constitution: Constitution | None = None
    """Critique, revise and fine-tune on the revisions. None: skip."""
    preferences: Preferences | None = None
    """What people or a judge prefer; needed by dpo and by rewardModel.train. None: no preferences."""
    reward_model: RewardModel | None = None
    """What scores answers; needed by ppo, grpo and rloo. None: no reward."""
    optimize: Optimize | None = None
    """How the model is aligned. None: stop after the steps above."""
    rounds: int = Field(default=1, ge=1, le=32)
    """Sample, label and optimise this many times, each round from the last one's model."""
    adapter: Adapter | None = None
    """A parameter-efficient method for every step. None: full fine-tuning."""
    evaluate: Evaluate = Evaluate()
    """What to measure of the result."""
    output: Output
    """Where the result goes."""
    compute: Compute = Compute()
    """What the job runs on."""
    run_policy: RunPolicy = RunPolicy()
    """How it is run; may change while it runs."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.sft) || has(self.constitution) || has(self.rewardModel) || has(self.optimize)",
            "nothing to do: set sft, constitution, rewardModel or optimize",
        ),
        Rule(
            "!has(self.optimize) || !has(self.optimize.dpo) || has(self.preferences)",
            "optimize.dpo needs preferences",
        ),
        Rule(
            "!has(self.rewardModel) || !has(self.rewardModel.train) || has(self.preferences)",
            "rewardModel.train needs preferences",
        ),
        Rule(
            "!has(self.optimize) || has(self.optimize.dpo) || has(self.rewardModel)",
            "optimize.ppo, grpo and rloo need rewardModel",
        ),
        Rule(
            "self.rounds == 1 || has(self.optimize)",
            "rounds above 1 need optimize",
        ),
        Rule(
            "!self.output.merge || !has(self.adapter) || "
            + " || ".join(f"has(self.adapter.{name})" for name in MERGEABLE),
            f"output.merge needs one of the adapters {', '.join(MERGEABLE)}: the others are not "
            "linear in the base weights",
        ),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if not (self.sft or self.constitution or self.reward_model or self.optimize):
            faults.append("nothing to do: set sft, constitution, rewardModel or optimize")
        if self.optimize and self.optimize.dpo and not self.preferences:
            faults.append("optimize.dpo needs preferences")
        if self.reward_model and self.reward_model.train and not self.preferences:
            faults.append("rewardModel.train needs preferences")
        if self.optimize and not self.optimize.dpo and not self.reward_model:
            faults.append(f"optimize.{self.optimize.kind} needs rewardModel")
        if self.rounds > 1 and not self.optimize:
            faults.append(f"rounds is {self.rounds}: rounds above 1 need optimize")
        if self.output.merge and self.adapter and self.adapter.kind not in MERGEABLE:
            faults.append(
                f"output.merge needs one of the adapters {', '.join(MERGEABLE)}: "
                f"{self.adapter.kind} is not linear in the base weights; remove output.merge"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


class AlignmentJob(Model):
    """An alignment job."""

    api_version: Literal["tuneyard.io/v1alpha1"] = API_VERSION
    """The API's group and version."""
    kind: Literal["AlignmentJob"]
    """The resource's kind."""
    metadata: ObjectMeta
    """Name, namespace and labels."""
    spec: AlignmentSpec
    """What the user wants."""
    status: JobStatus | None = Field(default=None)
    """What the operator saw; None before it looked."""
