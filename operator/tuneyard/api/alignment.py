"""The alignment steps of an AlignmentJob: preferences, reward models, and the methods DPO, PPO,
GRPO, RLOO and distillation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.evaluation import QUESTION_SHOWS_BOTH, Principles
from tuneyard.api.meta import Model, OneOf, Rule
from tuneyard.api.sources import Dataset, Judge, ModelSource, PromptSet, QuestionText
from tuneyard.api.training import FREEZE_WITHOUT_ADAPTER, Training, TrlTraining


class RuleReward(OneOf):
    """A reward computed by a rule instead of a model. Set exactly one field."""

    exact_match: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of the prompt row's field that the completion must equal. If the field is a list, the
    completion must equal one of its items. White space and case are ignored. The reward is 1 or
    0."""
    json_schema: str | None = Field(default=None, min_length=2, max_length=65536)
    """A JSON Schema, as JSON text, that the completion must satisfy. The reward is 1 or 0."""


class RewardTraining(Model):
    """Train a Bradley-Terry reward model on the job's preferences."""

    adapter: Adapter | None = None
    """The adapter of the reward model: lora or qlora. None: full fine-tuning."""
    training: Training = Training()
    """The training loop."""
    margin: float = Field(default=0.0, ge=0, le=100)
    """Smallest reward difference required between the chosen and the rejected completion
    (Touvron et al. 2023, arXiv:2307.09288, eq. 2)."""
    centering: float = Field(default=0.0, ge=0, le=1)
    """Weight of the loss term that centers rewards on zero (Eisenstein et al. 2023,
    arXiv:2312.09244)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        FREEZE_WITHOUT_ADAPTER,
        Rule(
            cel="!has(self.adapter) || has(self.adapter.lora) || has(self.adapter.qlora)",
            holds=lambda train: (
                train.adapter is None
                or train.adapter.lora is not None
                or train.adapter.qlora is not None
            ),
            message="must be lora or qlora for a reward model: change it, or remove it for full "
            "fine-tuning",
            path="adapter",
            reads=("adapter", "adapter.lora", "adapter.qlora"),
        ),
    )


class RewardModel(OneOf):
    """The reward of a completion. Set exactly one field."""

    train: RewardTraining | None = None
    """Train a reward model on the job's preferences."""
    model: ModelSource | None = None
    """An existing sequence classification model with one output."""
    rule: RuleReward | None = None
    """A rule that computes the reward without a model."""


class WeightedReward(Model):
    """A weighted reward that is added to the reward of `rewardModel`."""

    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """Factor of this reward in the sum; the factor of `rewardModel` is 1."""
    model: ModelSource | None = None
    """An existing sequence classification model with one output. None: `rule` is used."""
    rule: RuleReward | None = None
    """A rule that computes the reward without a model. None: `model` is used."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.model) != has(self.rule)",
            holds=lambda term: (term.model is None) != (term.rule is None),
            message="set exactly one of model, rule",
            reads=("model", "rule"),
        ),
    )


class IndependentReward(OneOf):
    """A reward that nothing is trained on. Set exactly one field."""

    model: ModelSource | None = None
    """An existing sequence classification model with one output."""
    rule: RuleReward | None = None
    """A rule that computes the reward without a model."""


class AiFeedback(Model):
    """Sample completions from the model and let a judge label pairs of them (RLAIF, Lee et al.
    2023, arXiv:2309.00267)."""

    judge: Judge
    """The judge that labels the pairs."""
    prompts: PromptSet
    """The prompts that completions are sampled for."""
    principles: Principles | None = None
    """The criteria of the judge; one is drawn for each pair. None: Tuneyard's default
    principles."""
    responses_per_prompt: int = Field(default=2, ge=2, le=16)
    """Completions sampled per prompt."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature of the completions."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest completion, in tokens."""
    question: QuestionText | None = None
    """Template of the question that asks the judge for A or B; {principle}, {conversation},
    {first} and {second} are replaced. None: Tuneyard's default question."""
    disagreement: Literal["drop", "tie", "average"] = "drop"
    """Treatment of a pair whose label changes when its completions are swapped. drop: leave the
    pair out. tie: keep the pair as a tie. average: use the mean of both label probabilities
    (arXiv:2309.00267, section 2.1)."""

    rules: ClassVar[tuple[Rule, ...]] = (QUESTION_SHOWS_BOTH,)


class Preferences(Model):
    """The source of the preferences, and the treatment of rows that cannot be used."""

    data: list[Dataset] | None = Field(default=None, min_length=1, max_length=64)
    """Data sets of pairs (prompt, chosen, rejected), of rankings, or of single completions labeled
    good or bad (unpaired preferences). The shape is detected from the rows. None:
    `aiFeedback` is used."""
    ai_feedback: AiFeedback | None = None
    """Preferences of a judge, on completions that the model samples. None: `data` is used."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts to hold out for evaluation, at least one prompt. 0: none."""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | Literal["auto"] = "auto"
    """Longest prompt with one completion, in tokens. auto: 1024, or the model's context length if
    that is shorter."""
    on_overlength: Literal["error", "drop"] = "error"
    """Treatment of a longer row. error: fail the stage. drop: leave the row out and count it.
    Rows are never truncated: a truncated completion is not the one that was labeled."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """Treatment of an invalid row (identical sides, an empty completion, different prompts).
    error: fail the stage. skip: leave the row out and count it; at most half of the rows may be
    skipped."""
    reasoning: Literal["keep", "drop"] = Field(
        default="keep", exclude_if=lambda reasoning: reasoning == "keep"
    )
    """Treatment of the assistant's reasoning in prompts and completions, as in `data.reasoning`.
    keep: render it and train on it where the chat template does. drop: leave it out."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.data) != has(self.aiFeedback)",
            holds=lambda given: (given.data is None) != (given.ai_feedback is None),
            message="set exactly one of data, aiFeedback",
            reads=("data", "aiFeedback"),
        ),
    )


class Constitution(Model):
    """Constitutional AI: critique and revise completions, then fine-tune on the revisions (Bai et
    al. 2022, arXiv:2212.08073)."""

    prompts: PromptSet
    """The prompts whose completions are revised."""
    principles: Principles | None = None
    """The criteria of the critiques; one is drawn for each revision. None: Tuneyard's default
    principles."""
    revisions: int = Field(default=1, ge=1, le=16)
    """Rounds of critique and revision per prompt."""
    judge: Judge | None = None
    """The model that criticizes and revises. None: the model that is trained."""
    critique_request: QuestionText | None = None
    """Template of the request for a critique; {principle} is replaced. None: Tuneyard's default
    request."""
    revision_request: QuestionText | None = None
    """Template of the request for a revision; {principle} is replaced. None: Tuneyard's default
    request."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest completion, critique or revision, in tokens."""
    training: Training = Training()
    """Settings of the fine-tuning on the revisions."""


class Dpo(Model):
    """Direct preference optimization and its variants (Rafailov et al. 2023, arXiv:2305.18290)."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "kto"] = "sigmoid"
    """The loss function; kto takes unpaired completions labeled good or bad."""
    beta: float = Field(default=0.1, gt=0, le=100)
    """Strength of the regularization toward the reference model."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (robust), or label smoothing (sigmoid)."""
    training: Training = Training()
    """The training loop."""


class Sampling(Model):
    """How completions of the policy are sampled."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with at least this probability."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest completion, in tokens."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The library that generates. vllm needs a trainer image with vLLM: see docs/ppo.md."""


class StopConditions(Model):
    """Bounds that end a reinforcement learning run early; its best checkpoint is kept."""

    max_kl: float | None = Field(default=None, gt=0)
    """Stop if the mean KL divergence from the reference exceeds this, in nats per completion. None:
    no bound."""
    min_entropy: float | None = Field(default=None, ge=0)
    """Stop if the mean entropy of the policy falls below this, in nats per token. None: no
    bound."""
    max_length_ratio: float | None = Field(default=None, gt=0)
    """Stop if the mean completion length exceeds this multiple of the first batch's. None: no
    bound."""


class Ppo(Model):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347)."""

    prompts: PromptSet
    """The prompts that completions are sampled for."""
    sampling: Sampling = Sampling()
    """How completions are sampled."""
    rollouts: int = Field(default=64, ge=1, le=65536)
    """Completions per update, over all workers."""
    optimization_epochs: int = Field(default=4, ge=1, le=64)
    """Epochs over each batch of rollouts."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Epsilon of the clipped policy loss (eq. 7)."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Epsilon of the clipped value loss."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount factor gamma."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438)."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Weight of the per-token KL penalty."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL divergence that `klCoefficient` is adapted toward, in nats per completion. None: the
    coefficient is fixed."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Penalty subtracted from the reward of a completion that reaches `maxNewTokens`."""
    training: Training = Training()
    """The training loop; `maxSteps` counts updates."""
    stop_on: StopConditions | None = None
    """Bounds that end the run early. None: no bounds."""


class GroupRelative(Model):
    """The settings that GRPO and RLOO share: both compare several completions of one prompt."""

    prompts: PromptSet
    """The prompts that completions are sampled for."""
    sampling: Sampling = Sampling()
    """How completions are sampled."""
    group_size: int = Field(default=8, ge=2, le=256)
    """Completions per prompt."""
    kl_coefficient: float = Field(default=0.04, ge=0)
    """Weight of the KL penalty; 0: no reference model is needed."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Epsilon of the clipped policy loss."""
    training: Training = Training()
    """The training loop."""
    stop_on: StopConditions | None = None
    """Bounds that end the run early. None: no bounds."""


class Grpo(GroupRelative):
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300)."""


class Rloo(GroupRelative):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740)."""


class Distill(Model):
    """On-policy distillation: the model completes prompts, and learns the distribution of a teacher
    at each token of its own completions (Agarwal et al. 2024, arXiv:2306.13649)."""

    teacher: ModelSource
    """The model to learn from. Its tokenizer must have the same tokens with the same ids."""
    prompts: PromptSet
    """The prompts that completions are sampled for."""
    sampling: Sampling = Sampling()
    """How completions are sampled. The temperature also divides the logits of both models in the
    loss."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """Divergence to minimize. 0: forward KL, which covers all that the teacher may say. 1: reverse
    KL, which avoids what the teacher would not say. Between: the generalized Jensen-Shannon
    divergence, with the teacher's weight `beta` in the mixture."""
    training: TrlTraining = TrlTraining()
    """The training loop, which TRL's trainer runs."""


class Optimize(OneOf):
    """The alignment method. Set exactly one field."""

    dpo: Dpo | None = None
    """Direct preference optimization: trains on preferences, without a reward model."""
    ppo: Ppo | None = None
    """Proximal policy optimization of the reward."""
    grpo: Grpo | None = None
    """Group relative policy optimization of the reward."""
    rloo: Rloo | None = None
    """REINFORCE leave-one-out optimization of the reward."""
    distill: Distill | None = None
    """Distillation: learns from a teacher's distribution, without preferences and without a
    reward."""

    @property
    def reinforcement(self) -> Ppo | GroupRelative | None:
        """The settings of PPO, GRPO or RLOO. None: the method has no reward."""
        return self.ppo or self.grpo or self.rloo

    @property
    def on_policy(self) -> Ppo | GroupRelative | Distill | None:
        """The settings of a method that samples completions of prompts. None: the method is DPO."""
        return self.reinforcement or self.distill


Judge.model_rebuild()
