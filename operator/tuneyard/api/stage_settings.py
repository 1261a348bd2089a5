"""The settings of every kind of stage, which the planner hands to the trainer. All are identity."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import BlowUp, RuleReward, Sampling
from tuneyard.api.evaluation import Gate
from tuneyard.api.meta import Model
from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.training import EarlyStopping, Freeze, Optimizer, Schedule


class DatasetSettings(Model):
    """How one data set is read; its place is the input `train.N` or `validation.N`."""

    format: DataFormat
    """The shape of a row."""
    fields: FieldMap
    """Field names that differ from the format's own."""
    weight: float
    """How often an epoch sees each row."""
    limit: int | None
    """At most this many rows; None: all."""


class PrepareSettings(Model):
    """Read, check, split and tokenize. Inputs: `model` (for its tokenizer), `train.N`,
    `validation.N`."""

    kind: Literal["prepare"] = "prepare"
    method: Literal["sft", "pretrain"]
    """What the rows are for."""
    train: list[DatasetSettings]
    """One for each input `train.N`."""
    validation: list[DatasetSettings]
    """One for each input `validation.N`; empty: `validation_fraction` decides."""
    validation_fraction: float | None
    """Share of the training rows to hold out; None: `validation` decides."""
    max_length: int | Literal["auto"]
    """Longest sequence in tokens; auto: min(1024, the model's context)."""
    on_overlength: Literal["error", "drop", "truncate", "split"]
    """What to do with longer rows."""
    on_invalid_row: Literal["error", "skip"]
    """What to do with broken rows."""
    train_on: Literal["assistant", "last-assistant", "all"]
    """Which tokens carry loss."""
    system_prompt: str | None
    """System turn for rows without one; None: none."""
    chat_template: str | None
    """Jinja template in place of the tokenizer's; None: the tokenizer's."""
    seed: int
    """Seed of the split."""


class LoopSettings(Model):
    """A training loop, with nothing left open but what the data decides."""

    freeze: Freeze | None
    """Parts of the base to leave; None: none."""
    dropout: float | None
    """Dropout of the base; None: the model's own."""
    epochs: float | None
    """Passes over the data; None: `max_steps` decides."""
    max_steps: int | None
    """Optimizer steps (ppo: updates); None: `epochs` decides."""
    batch_size: int
    """Sequences per optimizer step, over all workers; of preferences: pairs or labeled answers, of
    ppo: answers of a minibatch, of grpo: answers of an update."""
    learning_rate: float
    """Peak learning rate."""
    schedule: Schedule
    """The rate over the run."""
    optimizer: Optimizer
    """AdamW's settings."""
    evaluation_steps: int | None
    """Steps between evaluations; None: each epoch."""
    early_stopping: EarlyStopping | None
    """None: run to the end."""
    keep_best: bool
    """Keep the weights with the lowest held-out loss."""
    precision: Literal["auto", "float32", "bfloat16"]
    """auto: bfloat16 on GPU, float32 on CPU."""
    seed: int
    """Seed of order, dropout, sampling and initial weights."""


class TrainSettings(LoopSettings):
    """Train. Inputs: `model`, `data` (a prepare stage) and, where an earlier stage trained already,
    `tuned`: its weights, to go on from."""

    kind: Literal["sft", "pretrain"]
    adapter: Adapter | None
    """None: full fine-tuning."""
    packing: Literal["auto", "always", "never"]
    """Whether short sequences share a row."""


class ChatSettings(Model):
    """How messages become text, the same in every stage of a job."""

    system_prompt: str | None
    """System turn for conversations without one; None: none."""
    chat_template: str | None
    """Jinja template in place of the tokenizer's; None: the tokenizer's."""


class PromptSettings(Model):
    """How the data set `prompts` is read: only its prompts are used, and a reward's fields."""

    format: DataFormat
    """The shape of a row."""
    fields: FieldMap
    """Field names that differ from the format's own."""
    limit: int | None
    """At most this many rows; None: all."""


class RewardTerm(Model):
    """One part of a reward: a weight times what a model or a rule says."""

    weight: float = 1.0
    """Its weight."""
    role: str | None = None
    """The input with the model that scores: a reward stage's output, or a folder with a sequence
    classifier. None: `rule` scores."""
    rule: RuleReward | None = None
    """The rule. None: the model at `role` scores."""


class JudgeSettings(Model):
    """A judge at an endpoint; where it answers is `TrainRuntime.endpoint`."""

    model: str
    """The model's name there."""
    max_requests: int | None
    """The budget in requests; None: no limit."""
    max_tokens: int | None
    """The budget in tokens; None: no limit."""
    label_tokens: int
    """The longest reply to a comparison."""


class PairsSettings(Model):
    """Read, check, split and tokenize preferences. Inputs: `model` (for its tokenizer),
    `preferences.N` (data sets, or a feedback stage's file)."""

    kind: Literal["pairs"] = "pairs"
    preferences: list[DatasetSettings]
    """One for each input `preferences.N`."""
    labeled: bool
    """False: pairs and rankings. True: single answers with thumbs up or down, for KTO; pairs are
    taken apart into one of each."""
    held_out: float
    """Share of the prompts to hold out; 0: none."""
    max_length: int | Literal["auto"]
    """Longest prompt with one answer, in tokens."""
    on_overlength: Literal["error", "drop"]
    """What to do with longer ones."""
    on_invalid_row: Literal["error", "skip"]
    """What to do with broken rows."""
    chat: ChatSettings
    """How messages become text."""
    seed: int
    """Seed of the split."""


class RewardSettings(Model):
    """Train a reward model. Inputs: `model`, `data` (a pairs stage) and, where an earlier stage
    fine-tuned the model, `tuned`: its weights, to start from."""

    kind: Literal["reward"] = "reward"
    adapter: Adapter | None
    """lora or qlora; None: full fine-tuning."""
    margin: float
    """Least reward difference asked of a pair."""
    centering: float
    """Weight of the term that centres rewards on zero."""
    training: LoopSettings
    """The loop."""


class DpoSettings(Model):
    """Optimise on preferences. Inputs: `model`, `tuned` (where there is one), `data` (a pairs
    stage)."""

    kind: Literal["dpo"] = "dpo"
    adapter: Adapter | None
    """None: full fine-tuning."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "kto"]
    """The loss."""
    beta: float
    """Strength of the pull towards the reference, the model that the stage starts from."""
    label_smoothing: float
    """Assumed share of flipped labels (robust) or smoothing (sigmoid)."""
    training: LoopSettings
    """The loop."""


class PpoSettings(Model):
    """Optimise by PPO. Inputs: `model`, `tuned` (where there is one), `prompts`, and what `reward`
    names."""

    kind: Literal["ppo"] = "ppo"
    adapter: Adapter | None
    """None: full fine-tuning."""
    prompts: PromptSettings
    """What the policy answers."""
    chat: ChatSettings
    """How messages become text."""
    sampling: Sampling
    """How it answers."""
    reward: list[RewardTerm]
    """What scores the answers: the sum of these."""
    rollouts: int
    """Answers per update, over all workers."""
    optimization_epochs: int
    """Passes over each batch of rollouts."""
    clip_range: float
    """Epsilon of the clipped policy loss."""
    value_clip_range: float
    """Epsilon of the clipped value loss."""
    value_coefficient: float
    """Weight of the value loss."""
    entropy_coefficient: float
    """Weight of the entropy bonus."""
    discount: float
    """Gamma."""
    gae_lambda: float
    """Lambda of generalized advantage estimation."""
    kl_coefficient: float
    """Weight of the per-token KL penalty."""
    target_kl: float | None
    """Adapt the coefficient towards this KL, in nats per answer; None: fixed."""
    missing_eos_penalty: float
    """Taken off the reward of an answer without an end."""
    stop_on: BlowUp | None
    """When to stop early."""
    training: LoopSettings
    """The loop; epochs are passes over the prompts."""


class GrpoSettings(Model):
    """Optimise by comparing the answers to one prompt. Inputs: as of ppo."""

    kind: Literal["grpo"] = "grpo"
    estimator: Literal["grpo", "rloo"]
    """Group relative advantages, or leave-one-out."""
    adapter: Adapter | None
    """None: full fine-tuning."""
    prompts: PromptSettings
    """What the policy answers."""
    chat: ChatSettings
    """How messages become text."""
    sampling: Sampling
    """How it answers."""
    reward: list[RewardTerm]
    """What scores the answers: the sum of these."""
    group_size: int
    """Answers per prompt."""
    kl_coefficient: float
    """Weight of the KL penalty."""
    clip_range: float
    """Epsilon of the clipped policy loss."""
    stop_on: BlowUp | None
    """When to stop early."""
    training: LoopSettings
    """The loop; epochs are passes over the prompts."""


class FeedbackSettings(Model):
    """Sample answers and let a judge label pairs of them; leaves `preferences.jsonl`. Inputs:
    `model`, `tuned` (where there is one), `prompts`, `judge` (where it is a model)."""

    kind: Literal["feedback"] = "feedback"
    prompts: PromptSettings
    """What the model answers."""
    chat: ChatSettings
    """How messages become text."""
    judge: JudgeSettings | None
    """The judge at an endpoint; None: the model at the input `judge`."""
    principles: list[str]
    """What the judge decides by, one drawn per pair."""
    question: str
    """How it is asked: `tuneyard.api.constitution.COMPARISON` or the manifest's."""
    responses_per_prompt: int
    """Answers sampled per prompt."""
    temperature: float
    """Sampling temperature of the answers."""
    max_new_tokens: int
    """The longest answer."""
    disagreement: Literal["drop", "tie", "average"]
    """What becomes of a pair that the judge decides differently with the answers swapped."""
    seed: int
    """Seed of answers and principles."""


class CritiqueSettings(Model):
    """Answer, criticise, revise; leaves `revisions.jsonl`, chat rows that prepare reads. Inputs: as
    of feedback."""

    kind: Literal["critique"] = "critique"
    prompts: PromptSettings
    """What provokes the answers to revise."""
    chat: ChatSettings
    """How messages become text."""
    judge: JudgeSettings | None
    """Who criticises and revises: the model at an endpoint; None: the one at the input `judge`, or,
    without such an input, the model itself."""
    principles: list[str]
    """What to criticise by, one drawn per round."""
    critique_request: str
    """How a critique is asked for: `tuneyard.api.constitution.CRITIQUE` or the manifest's."""
    revision_request: str
    """How a revision is asked for: `tuneyard.api.constitution.REVISION` or the manifest's."""
    revisions: int
    """Rounds of critique and revision per prompt."""
    max_new_tokens: int
    """The longest answer, critique and revision."""
    seed: int
    """Seed of answers and principles."""


class EvaluateSettings(Model):
    """Compare. Inputs: `model`, `data`, `tuned` (a training stage)."""

    kind: Literal["evaluate"] = "evaluate"
    compare_with_base: bool
    """Measure the base too."""
    samples: int
    """Answers to show side by side."""
    max_new_tokens: int
    """Longest sampled answer."""
    gates: list[Gate]
    """Bounds to meet."""


class WinRateSettings(Model):
    """A second judge's comparison of the aligned model's answers with those of the model before."""

    judge: JudgeSettings | None
    """The judge at an endpoint; None: the model at the input `judge`."""
    principles: list[str]
    """What the judge decides by, one drawn per prompt."""
    question: str
    """How it is asked: `tuneyard.api.constitution.COMPARISON` or the manifest's."""


class AssessSettings(Model):
    """Measure an alignment. Inputs: `model`, `tuned` (the aligned model), `start` (who trained what
    it was aligned from), `data` (a pairs stage), `prompts`, `judge` (a win_rate's, where it is a
    model), and what `reward` names; all but `model` where there are such. Without `tuned`: the
    reward model alone."""

    kind: Literal["assess"] = "assess"
    chat: ChatSettings
    """How messages become text."""
    prompts: PromptSettings | None
    """What is answered where no pairs are held out; None: nothing."""
    sampling: Sampling
    """How answers are sampled."""
    reward: list[RewardTerm]
    """What scores the answers; empty: no reward."""
    beta: float
    """Scale of the implicit rewards (Rafailov et al. 2023, section 4)."""
    win_rate: WinRateSettings | None
    """What a second judge is asked; None: none is."""
    samples: int
    """Answers to show side by side."""
    gates: list[Gate]
    """Bounds to meet."""
    seed: int
    """Seed of the answers."""


class ExportSettings(Model):
    """Write what users load. Inputs: `model`, `tuned`; `data` and `evaluation` where there are
    such."""

    kind: Literal["export"] = "export"
    merge: bool
    """Write the merged model too."""


Settings = Annotated[
    PrepareSettings
    | TrainSettings
    | CritiqueSettings
    | FeedbackSettings
    | PairsSettings
    | RewardSettings
    | DpoSettings
    | PpoSettings
    | GrpoSettings
    | EvaluateSettings
    | AssessSettings
    | ExportSettings,
    Field(discriminator="kind"),
]


StageKind = Literal[
    "prepare",
    "sft",
    "pretrain",
    "critique",
    "feedback",
    "pairs",
    "reward",
    "dpo",
    "ppo",
    "grpo",
    "evaluate",
    "assess",
    "export",
]

SUPERVISED_KINDS: Final[tuple[StageKind, ...]] = ("sft", "pretrain")
REINFORCEMENT_KINDS: Final[tuple[StageKind, ...]] = ("ppo", "grpo")
TRAINING_KINDS: Final[tuple[StageKind, ...]] = (
    *SUPERVISED_KINDS,
    "reward",
    "dpo",
    *REINFORCEMENT_KINDS,
)
"""The kinds of stages that train, in the order in which one job runs them."""
