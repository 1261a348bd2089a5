"""AlignmentJob: reward models, DPO, PPO, GRPO, RLOO, AI feedback and constitutional AI."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import (
    AlignmentEvaluate,
    Constitution,
    Optimize,
    Preferences,
    RewardAddend,
    RewardModel,
)
from tuneyard.api.compute import Compute, RunPolicy
from tuneyard.api.meta import API_VERSION, Model, ObjectMeta, Rule
from tuneyard.api.sources import FineTuneData, ModelSource, Output
from tuneyard.api.status import JobStatus
from tuneyard.api.training import MERGE_NEEDS_LINEARITY, STOPPING_NEEDS_VALIDATION, Training


class SupervisedStep(Model):
    """Supervised fine-tuning before the alignment proper: the first of the four-step pipeline."""

    data: FineTuneData
    """Training and held-out data."""
    training: Training = Training()
    """The training loop."""

    rules: ClassVar[tuple[Rule, ...]] = (STOPPING_NEEDS_VALIDATION,)


class AlignmentSpec(Model):
    """What to align, by which preferences, and how. Steps run in the order of these fields."""

    model: ModelSource
    """The model to start from."""
    sft: SupervisedStep | None = None
    """Fine-tune first. None: start from the model as it is."""
    constitution: Constitution | None = None
    """Critique, revise and fine-tune on the revisions. None: skip."""
    preferences: Preferences | None = None
    """What people or a judge prefer; needed by dpo and by rewardModel.train. None: none."""
    reward_model: RewardModel | None = None
    """What scores answers; needed by ppo, grpo and rloo. None: no reward."""
    reward_terms: list[RewardAddend] = Field(default=[], max_length=8)
    """Added to what `rewardModel` says, each by its weight: a mixture. Empty: nothing."""
    optimize: Optimize | None = None
    """How the model is aligned. None: stop after the steps above."""
    rounds: int = Field(default=1, ge=1, le=32)
    """Sample, label and optimise this many times, each round from the last one's model."""
    adapter: Adapter | None = None
    """A parameter-efficient method for every step. None: full fine-tuning."""
    evaluate: AlignmentEvaluate = AlignmentEvaluate()
    """What to measure of the result."""
    output: Output
    """Where the result goes."""
    compute: Compute = Compute()
    """What the job runs on."""
    run_policy: RunPolicy = RunPolicy()
    """How it is run; may change while it runs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.sft) || has(self.constitution) || has(self.rewardModel) || "
            "has(self.optimize)",
            holds=lambda spec: any((spec.sft, spec.constitution, spec.reward_model, spec.optimize)),
            message="nothing to do: set sft, constitution, rewardModel or optimize",
            reads=("sft", "constitution", "rewardModel", "optimize"),
        ),
        Rule(
            cel="!has(self.optimize) || !has(self.optimize.dpo) || has(self.preferences)",
            holds=lambda spec: (
                spec.optimize is None or spec.optimize.dpo is None or spec.preferences is not None
            ),
            message="needs preferences: add preferences.data or preferences.aiFeedback",
            path="optimize.dpo",
            reads=("optimize", "optimize.dpo", "preferences"),
        ),
        Rule(
            cel="!has(self.rewardModel) || !has(self.rewardModel.train) || has(self.preferences)",
            holds=lambda spec: (
                spec.reward_model is None
                or spec.reward_model.train is None
                or spec.preferences is not None
            ),
            message="needs preferences: add preferences.data or preferences.aiFeedback",
            path="rewardModel.train",
            reads=("rewardModel", "rewardModel.train", "preferences"),
        ),
        Rule(
            cel="!has(self.optimize) || has(self.optimize.dpo) || has(self.rewardModel)",
            holds=lambda spec: (
                spec.optimize is None
                or spec.optimize.dpo is not None
                or spec.reward_model is not None
            ),
            message="ppo, grpo and rloo need a reward: add rewardModel, or optimize by dpo",
            path="optimize",
            reads=("optimize", "optimize.dpo", "rewardModel"),
        ),
        Rule(
            cel="!has(self.rewardTerms) || self.rewardTerms.size() == 0 || has(self.rewardModel)",
            holds=lambda spec: not spec.reward_terms or spec.reward_model is not None,
            message="are added to rewardModel, and there is none: set rewardModel",
            path="rewardTerms",
            reads=("rewardTerms", "rewardModel"),
        ),
        Rule(
            cel="self.rounds == 1 || has(self.optimize)",
            holds=lambda spec: spec.rounds == 1 or spec.optimize is not None,
            message="above 1 needs optimize: add optimize or remove rounds",
            path="rounds",
            reads=("rounds", "optimize"),
        ),
        MERGE_NEEDS_LINEARITY,
    )


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
