"""AlignmentJob: reward models, DPO, PPO, GRPO, RLOO, distillation, AI feedback and constitutional
AI."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import (
    Constitution,
    IndependentReward,
    Optimize,
    Preferences,
    RewardModel,
    WeightedReward,
)
from tuneyard.api.compute import Compute, RunPolicy
from tuneyard.api.evaluation import Evaluate
from tuneyard.api.meta import API_VERSION, Model, ObjectMeta, Rule
from tuneyard.api.sources import FineTuneData, ModelSource, Output
from tuneyard.api.status import JobStatus
from tuneyard.api.tracking import Tracking
from tuneyard.api.training import MERGE_NEEDS_LINEARITY, STOPPING_NEEDS_VALIDATION, FineTuning


class SupervisedStep(Model):
    """Supervised fine-tuning before the alignment."""

    data: FineTuneData
    """Training and held-out data."""
    training: FineTuning = FineTuning()
    """The training loop."""

    rules: ClassVar[tuple[Rule, ...]] = (STOPPING_NEEDS_VALIDATION,)


class AlignmentSpec(Model):
    """The specification of an alignment. Steps run in the order of these fields."""

    model: ModelSource
    """The base model."""
    sft: SupervisedStep | None = None
    """Supervised fine-tuning. None: start from the base model."""
    constitution: Constitution | None = None
    """Critique and revise completions, then fine-tune on the revisions. None: skip this step."""
    preferences: Preferences | None = None
    """Preferences of people or of a judge; required by optimize.dpo and rewardModel.train. None:
    no preferences."""
    reward_model: RewardModel | None = None
    """The reward of a completion; required by ppo, grpo and rloo. None: no reward."""
    reward_terms: list[WeightedReward] = Field(default=[], max_length=8)
    """Weighted rewards to add to the reward of `rewardModel`. Empty: none."""
    independent_reward: IndependentReward | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """A reward that is measured beside the optimized one, and that nothing is trained on: if the
    reward rises and this one falls, the policy exploits the reward. None: it is not measured."""
    # Left out of a plan without it: plans of 0.2 keep their bytes.
    optimize: Optimize | None = None
    """The alignment method. None: the job ends after the steps above."""
    rounds: int = Field(default=1, ge=1, le=32)
    """How often to sample, label and optimize; each round starts from the model of the last
    round."""
    adapter: Adapter | None = None
    """A parameter-efficient method, used by every step. None: full fine-tuning."""
    evaluate: Evaluate = Evaluate()
    """The measurements of the result, and the bounds it must meet."""
    leaks: Literal["warn", "error", "off"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Treatment of items of suites that are also in the training data, which are the rows of `sft`
    and `preferences` and the prompts, as `sft.data.leaks` describes it. None: `sft.data.leaks`,
    or warn without `sft`."""
    output: Output
    """The location of the result and its content."""
    compute: Compute = Compute()
    """The workers that the job runs on."""
    tracking: Tracking | None = None
    """The trackers that follow the job. None: none."""
    run_policy: RunPolicy = RunPolicy()
    """How the job is run. It may change while the job runs."""

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
            cel="!has(self.optimize) || has(self.optimize.dpo) || has(self.optimize.distill) || "
            "has(self.rewardModel)",
            holds=lambda spec: (
                spec.optimize is None
                or spec.optimize.dpo is not None
                or spec.optimize.distill is not None
                or spec.reward_model is not None
            ),
            message="ppo, grpo and rloo need a reward: add rewardModel, or optimize by dpo or "
            "distill",
            path="optimize",
            reads=("optimize", "optimize.dpo", "optimize.distill", "rewardModel"),
        ),
        Rule(
            cel="!has(self.rewardTerms) || self.rewardTerms.size() == 0 || has(self.rewardModel)",
            holds=lambda spec: not spec.reward_terms or spec.reward_model is not None,
            message="are added to the reward of rewardModel, which is not set: set rewardModel",
            path="rewardTerms",
            reads=("rewardTerms", "rewardModel"),
        ),
        Rule(
            cel="!has(self.independentReward) || has(self.optimize)",
            holds=lambda spec: spec.independent_reward is None or spec.optimize is not None,
            message="is measured on an aligned model, and optimize is not set: set optimize, or "
            "remove independentReward",
            path="independentReward",
            reads=("independentReward", "optimize"),
        ),
        Rule(
            cel="self.rounds == 1 || has(self.optimize)",
            holds=lambda spec: spec.rounds == 1 or spec.optimize is not None,
            message="must be 1 without optimize: add optimize or remove rounds",
            path="rounds",
            reads=("rounds", "optimize"),
        ),
        MERGE_NEEDS_LINEARITY,
    )


class AlignmentJob(Model):
    """Align a language model with preferences or a reward."""

    api_version: Literal["tuneyard.io/v1alpha1"] = API_VERSION
    """The API's group and version."""
    kind: Literal["AlignmentJob"]
    """The resource's kind."""
    metadata: ObjectMeta
    """Name, namespace and labels."""
    spec: AlignmentSpec
    """The specification of the job."""
    status: JobStatus | None = Field(default=None)
    """The state of the job, as the operator reports it. None: not reported yet."""
