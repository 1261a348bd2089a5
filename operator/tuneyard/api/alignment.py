"""How to train: adapters, the training loop's settings, evaluation, and the alignment methods."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.evaluation import Evaluate
from tuneyard.api.meta import Model, OneOf, Rule
from tuneyard.api.sources import Dataset, ModelSource, PromptSet, SecretKeyRef
from tuneyard.api.training import FREEZE_WITHOUT_ADAPTER, Training

# ---- alignment --------------------------------------------------------------------------------


class RuleReward(OneOf):
    """A reward computed by a rule instead of a model; exactly one."""

    exact_match: str | None = Field(default=None, min_length=1, max_length=128)
    """The prompt row's field that the answer must equal, white space and case aside."""
    json_schema: str | None = Field(default=None, min_length=2, max_length=65536)
    """A JSON Schema, as JSON text, that the answer must satisfy."""


class RewardTraining(Model):
    """A Bradley-Terry reward model trained on the job's preferences."""

    adapter: Adapter | None = None
    """lora or qlora. None: full fine-tuning."""
    training: Training = Training()
    """The training loop."""
    margin: float = Field(default=0.0, ge=0, le=100)
    """Least reward difference asked of a pair (Touvron et al. 2023, eq. 2)."""
    centering: float = Field(default=0.0, ge=0, le=1)
    """Weight of the term that centres rewards on zero (Eisenstein et al. 2023)."""

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
    """What scores an answer; exactly one."""

    train: RewardTraining | None = None
    """Train one on the job's preferences."""
    model: ModelSource | None = None
    """An existing sequence classifier with one output."""
    rule: RuleReward | None = None
    """A rule."""


class RewardAddend(Model):
    """What is added to a reward: another model or a rule, with its weight."""

    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """By what it is multiplied; `rewardModel` itself counts once."""
    model: ModelSource | None = None
    """An existing sequence classifier with one output."""
    rule: RuleReward | None = None
    """A rule."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.model) != has(self.rule)",
            holds=lambda term: (term.model is None) != (term.rule is None),
            message="set exactly one of model, rule",
            reads=("model", "rule"),
        ),
    )


class Judge(OneOf):
    """Who labels; exactly one."""

    model: ModelSource | None = None
    """A causal model run by the job."""
    endpoint: JudgeEndpoint | None = None
    """An OpenAI-compatible endpoint."""


URL_PATTERN = r"^https?://[^\s]+$"


class JudgeEndpoint(Model):
    """An OpenAI-compatible chat endpoint."""

    url: str = Field(max_length=1024, pattern=URL_PATTERN)
    """The API's base, e.g. https://judge.example/v1."""
    model: str = Field(min_length=1, max_length=256)
    """The model's name there."""
    key: SecretKeyRef | None = None
    """The API key. None: no authorization header."""
    max_requests: int | None = Field(default=None, ge=1)
    """The budget: ask no more after this many requests, repeated ones included. None: no limit."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The budget in tokens of prompts and replies, as the endpoint counts them. None: no limit."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at once."""
    timeout_seconds: int = Field(default=120, ge=1, le=3600)
    """How long one request may take."""
    max_attempts: int = Field(default=6, ge=1, le=32)
    """How often one question is asked before it is given up."""
    label_tokens: int = Field(default=16, ge=1, le=32768)
    """The longest reply to a comparison, in tokens: more for models that think aloud first."""


QuestionText = Annotated[str, Field(min_length=1, max_length=16384)]
Principles = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=256)
]


QUESTION_SHOWS_BOTH = Rule(
    cel="!has(self.question) || ['{first}', '{second}'].all(place, self.question.contains(place))",
    holds=lambda asked: (
        asked.question is None or ("{first}" in asked.question and "{second}" in asked.question)
    ),
    message="must hold {first} and {second}, where the two answers go",
    path="question",
    reads=("question",),
)


class AiFeedback(Model):
    """Preference pairs sampled from the model and labelled by a judge (RLAIF, arXiv:2309.00267)."""

    judge: Judge
    """Who labels."""
    prompts: PromptSet
    """What the model answers."""
    principles: Principles | None = None
    """What the judge decides by, one drawn per pair. None: Tuneyard's default principles."""
    responses_per_prompt: int = Field(default=2, ge=2, le=16)
    """Answers sampled per prompt."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature of the answers."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """The longest answer, in tokens."""
    question: QuestionText | None = None
    """How the judge is asked to choose A or B; {principle}, {conversation}, {first} and {second}
    are filled in. None: Tuneyard's default question."""
    disagreement: Literal["drop", "tie", "average"] = "drop"
    """What becomes of a pair that the judge decides differently with the answers swapped: dropped,
    kept as a tie, or decided by the mean of both label probabilities (arXiv:2309.00267, 2.1)."""

    rules: ClassVar[tuple[Rule, ...]] = (QUESTION_SHOWS_BOTH,)


class WinRate(Model):
    """A second judge, who knows nothing of the reward, compares the aligned model's answers with
    those of the model before: where the reward rises and this does not, the reward was gamed."""

    judge: Judge
    """Who compares; asked twice about each pair, the answers in either order."""
    principles: Principles | None = None
    """What the judge decides by, one drawn per prompt. None: Tuneyard's default principles."""
    question: QuestionText | None = None
    """How the judge is asked to choose A or B; {principle}, {conversation}, {first} and {second}
    are filled in. None: Tuneyard's default question."""

    rules: ClassVar[tuple[Rule, ...]] = (QUESTION_SHOWS_BOTH,)


class AlignmentEvaluate(Evaluate):
    """What to measure of the aligned model."""

    win_rate: WinRate | None = None
    """Let a second judge compare answers. None: nobody is asked."""


class Preferences(Model):
    """Where preferences come from, and what to do with those that do not fit."""

    data: list[Dataset] | None = Field(default=None, min_length=1, max_length=64)
    """Pairs (prompt, chosen, rejected), rankings, or single answers with thumbs up or down; the
    shape is recognised from the rows."""
    ai_feedback: AiFeedback | None = None
    """A judge's."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts that training never sees, at least one; what is measured is measured on
    them. 0: none."""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | Literal["auto"] = "auto"
    """The longest prompt with one answer, in tokens; auto: 1024, or the model's context where that
    is shorter."""
    on_overlength: Literal["error", "drop"] = "error"
    """What to do with longer ones: refuse the data, or drop and count them. None is cut: half an
    answer is not what was preferred."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """What to do with broken rows (identical sides, empty answers, differing prompts); at most half
    of the rows may be skipped."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.data) != has(self.aiFeedback)",
            holds=lambda given: (given.data is None) != (given.ai_feedback is None),
            message="set exactly one of data, aiFeedback",
            reads=("data", "aiFeedback"),
        ),
    )


class Constitution(Model):
    """Critique and revise, then fine-tune on the revisions (Bai et al. 2022, arXiv:2212.08073)."""

    prompts: PromptSet
    """What provokes the answers to revise."""
    principles: Principles | None = None
    """What to criticise by, one drawn per round. None: Tuneyard's default principles."""
    revisions: int = Field(default=1, ge=1, le=16)
    """Rounds of critique and revision per prompt."""
    judge: Judge | None = None
    """Who criticises and revises. None: the model itself."""
    critique_request: QuestionText | None = None
    """How a critique is asked for; {principle} is filled in. None: Tuneyard's default request."""
    revision_request: QuestionText | None = None
    """How a revision is asked for; {principle} is filled in. None: Tuneyard's default request."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """The longest answer, critique and revision, in tokens."""
    training: Training = Training()
    """Fine-tuning on the revisions."""


class Dpo(Model):
    """Direct preference optimization and its relatives (Rafailov et al. 2023, arXiv:2305.18290)."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "kto"] = "sigmoid"
    """The loss; kto takes unpaired answers with thumbs up or down."""
    beta: float = Field(default=0.1, gt=0, le=100)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (robust) or smoothing (sigmoid)."""
    training: Training = Training()
    """The training loop."""


class Sampling(Model):
    """How the policy's answers are sampled."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: sample from the least set of tokens with this much probability."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """The longest answer, in tokens."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. vllm needs an image that has it: docs/ppo.md tells which."""


class BlowUp(Model):
    """When to stop a reinforcement run; the best checkpoint is kept. None: not watched."""

    max_kl: float | None = Field(default=None, gt=0)
    """Mean KL from the reference, in nats per answer."""
    min_entropy: float | None = Field(default=None, ge=0)
    """Mean entropy of the policy, in nats per token."""
    max_length_ratio: float | None = Field(default=None, gt=0)
    """Mean answer length as a multiple of the first batch's."""


class Ppo(Model):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347)."""

    prompts: PromptSet
    """What the policy answers."""
    sampling: Sampling = Sampling()
    """How it answers."""
    rollouts: int = Field(default=64, ge=1, le=65536)
    """Answers per update, over all workers."""
    optimization_epochs: int = Field(default=4, ge=1, le=64)
    """Passes over each batch of rollouts."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Epsilon of the clipped policy loss (eq. 7)."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Epsilon of the clipped value loss."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Gamma."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation (arXiv:1506.02438)."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Weight of the per-token KL penalty."""
    target_kl: float | None = Field(default=None, gt=0)
    """Adapt the coefficient towards this KL, in nats per answer. None: fixed coefficient."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken off the reward of an answer that hits `maxNewTokens`."""
    training: Training = Training()
    """The optimizer loop; `maxSteps` counts updates."""
    stop_on: BlowUp | None = None
    """When to stop early."""


class GroupRelative(Model):
    """What GRPO and RLOO share: several answers per prompt, compared with each other."""

    prompts: PromptSet
    """What the policy answers."""
    sampling: Sampling = Sampling()
    """How it answers."""
    group_size: int = Field(default=8, ge=2, le=256)
    """Answers per prompt."""
    kl_coefficient: float = Field(default=0.04, ge=0)
    """Weight of the KL penalty; 0 needs no reference."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Epsilon of the clipped policy loss."""
    training: Training = Training()
    """The optimizer loop."""
    stop_on: BlowUp | None = None
    """When to stop early."""


class Grpo(GroupRelative):
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300)."""


class Rloo(GroupRelative):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740)."""


class Optimize(OneOf):
    """How the model is aligned; exactly one."""

    dpo: Dpo | None = None
    """Directly on preferences, without a reward model."""
    ppo: Ppo | None = None
    """Proximal policy optimization against the reward."""
    grpo: Grpo | None = None
    """Group relative policy optimization against the reward."""
    rloo: Rloo | None = None
    """REINFORCE leave-one-out against the reward."""


Judge.model_rebuild()
