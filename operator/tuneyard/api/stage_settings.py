"""The settings of every kind of stage, passed from the planner to the trainer.

All of them are a part of the stage's identity. An input "(a pairs stage)" is the output of a
stage of that kind.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import RuleReward, Sampling, StopConditions
from tuneyard.api.answer_metrics import AnswerMetric
from tuneyard.api.cleaning import Clean
from tuneyard.api.evaluation import Gate
from tuneyard.api.meta import Model
from tuneyard.api.preserving import GuardLimits, PreserveTerms
from tuneyard.api.sources import DataFormat, DocumentFields, FieldMap, FillInTheMiddle
from tuneyard.api.training import EarlyStopping, Freeze, Optimizer, Schedule


class DatasetSettings(Model):
    """How one data set is read; an input such as `train.N` gives its location."""

    format: DataFormat
    """Format of a row. auto: detected from the first rows."""
    fields: FieldMap
    """Field names that differ from the format's own."""
    weight: float
    """How often an epoch contains each row."""
    limit: int | None
    """Number of rows to read, from the start. None: all."""
    paths: Literal["all"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Conversations taken from a tree of messages. None: the best one."""


class ReplaySettings(Model):
    """General data among the training data sets."""

    datasets: int
    """How many of the last inputs `train.N` are general data."""
    share: float
    """Their share of an epoch's sequences."""


class RetrievalSettings(Model):
    """How each row gets a context of passages from the input `documents`."""

    fields: DocumentFields
    """Names of the fields of documents."""
    passages: int
    """Passages of a context."""
    gold_share: float
    """Share of the rows whose context has the right passage."""
    passage_words: int
    """Longest passage, in words."""
    cite: bool
    """Whether the number of the right passage is appended to the answer."""


class ToxicitySettings(Model):
    """How rows are judged by the classifier in the input `toxicity`."""

    labels: list[str]
    """Labels that are toxic."""
    threshold: float
    """Probability of any of these labels from which a row is toxic."""
    treatment: Literal["report", "drop"]
    """Treatment of toxic rows."""


class PrepareSettings(Model):
    """Read, check, split and tokenize training data.

    Inputs: `model` (for its tokenizer), `train.N`, `validation.N`, `general.N`, `guard.N`,
    `documents` with `retrieval`, and `toxicity` with `toxicity`.
    """

    kind: Literal["prepare"] = "prepare"
    method: Literal["sft", "pretrain"]
    """Training method that the rows are prepared for."""
    train: list[DatasetSettings]
    """Settings of each input `train.N`."""
    validation: list[DatasetSettings]
    """Settings of each input `validation.N`. Empty: `validation_fraction` decides."""
    validation_fraction: float | None
    """Share of the training rows to hold out. None: `validation` decides."""
    max_length: int | Literal["auto"]
    """Longest sequence, in tokens. auto: min(1024, the model's context length)."""
    on_overlength: Literal["error", "drop", "truncate", "split"]
    """Treatment of longer rows."""
    on_invalid_row: Literal["error", "skip"]
    """Treatment of invalid rows."""
    train_on: Literal["assistant", "last-assistant", "all"]
    """Tokens of chat data with loss."""
    reasoning: Literal["drop"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Treatment of the assistant's reasoning. None: it is kept where the chat template renders
    it."""
    system_prompt: str | None
    """System prompt of rows that have none. None: no system prompt is added."""
    chat_template: str | None
    """Jinja chat template in place of the tokenizer's. None: the tokenizer's own."""
    seed: int
    """Seed of the held-out split."""
    temperature: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Temperature of the mixture of data sets. None: 1."""
    replay: ReplaySettings | None = Field(default=None, exclude_if=lambda value: value is None)
    """General data among `train`. None: there is none."""
    fill_in_the_middle: FillInTheMiddle | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """How documents learn to fill gaps. None: they stay as they are."""
    clean: Clean | None = Field(default=None, exclude_if=lambda value: value is None)
    """Rules that remove or change rows by their text. None: rows stay as they are."""
    toxicity: ToxicitySettings | None = Field(default=None, exclude_if=lambda value: value is None)
    """Rows that a classifier calls toxic. None: none is searched for."""
    leaks: Literal["error", "off"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Treatment of held-out rows that are also in training. None: name them, in a warning."""
    retrieval: RetrievalSettings | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """A context before each question. None: rows stay as they are."""
    augmented: Literal[True] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Whether the last input `train.N` has augmented rows. None: no input has."""
    general: list[DatasetSettings] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Settings of each input `general.N`: what the terms of `TrainSettings.preserve` read. None:
    there is none."""
    guard: list[DatasetSettings] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Settings of each input `guard.N`: what `TrainSettings.guard` measures. None: there is
    none."""


class ChatSettings(Model):
    """How messages are formatted as text; the same in every stage of a job."""

    system_prompt: str | None
    """System prompt of conversations that have none. None: no system prompt is added."""
    chat_template: str | None
    """Jinja chat template in place of the tokenizer's. None: the tokenizer's own."""


class TrainingSuiteSettings(Model):
    """The items of a suite that are measured during training. The input `suite.N` of suite N holds
    its rows."""

    name: str
    """Prefix of its metrics."""
    kind: Literal["choices", "refusals"]
    """How the model is measured on the items."""
    limit: int | None
    """Number of rows to choose items from, from the start. None: all."""
    items: int
    """Number of items that are measured, chosen at random; all of them if there are fewer."""
    chat: ChatSettings | None
    """How the prompts of refusals are formatted as text. None: by the template of the tokenizer."""


class LoopSettings(Model):
    """A training loop. `auto` is resolved, except where its value depends on the machine."""

    engine: Literal["trl"] | None = Field(default=None, exclude_if=lambda engine: engine is None)
    """The program that takes the steps. None: the native loop."""
    trl: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Further arguments of TRL's trainer config. None: none."""
    freeze: Freeze | None
    """Parts of the base model to freeze. None: none."""
    dropout: float | None
    """Dropout probability in the base model's layers. None: the value of the model's config."""
    epochs: float | None
    """Epochs over the data. None: `max_steps` decides."""
    max_steps: int | None
    """Number of optimizer steps (ppo: updates). None: `epochs` decides."""
    batch_size: int
    """Sequences per optimizer step, over all workers. dpo, reward: pairs or labeled completions.
    ppo: completions of a minibatch. grpo: completions of an update. distill: prompts."""
    learning_rate: float
    """Peak learning rate."""
    schedule: Schedule
    """Learning rate schedule."""
    optimizer: Optimizer
    """Settings of AdamW."""
    evaluation_steps: int | None
    """Steps between evaluations on the held-out rows. None: at the end of each epoch."""
    suites: list[TrainingSuiteSettings] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Suites that are measured at each evaluation and before training. None: there are none."""
    early_stopping: EarlyStopping | None
    """When to stop early. None: train to the end."""
    keep_best: bool
    """Keep the weights of the best evaluation."""
    best_by: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The metric that decides which evaluation is the best. None: validationLoss."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Data type of the forward and backward pass. auto: bfloat16 on GPU, float32 on CPU."""
    seed: int
    """Seed of the data order, dropout, sampling and the initial adapter weights."""


class TrainSettings(LoopSettings):
    """Train on prepared rows.

    Inputs: `model`, `data` (a prepare stage) and, if an earlier stage trained the model, `tuned`:
    the weights to continue from; with `suites`, here and in other stages that train, `suite.N`.
    """

    kind: Literal["sft", "pretrain"]
    adapter: Adapter | None
    """Parameter-efficient method. None: full fine-tuning."""
    packing: Literal["auto", "always", "never"]
    """Whether several short sequences are packed into one row of a batch."""
    preserve: PreserveTerms | None = Field(default=None, exclude_if=lambda value: value is None)
    """Terms against forgetting in the loss. None: none."""
    guard: GuardLimits | None = Field(default=None, exclude_if=lambda value: value is None)
    """The bound on forgetting that stops training. None: no bound."""


class PromptSettings(Model):
    """How the data set `prompts` is read: its prompts, and the fields that reward rules name."""

    format: DataFormat
    """Format of a row. auto: detected from the first rows."""
    fields: FieldMap
    """Field names that differ from the format's own."""
    limit: int | None
    """Number of rows to read, from the start. None: all."""
    reasoning: Literal["drop"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Treatment of the assistant's reasoning. None: it is kept."""


class LeaksSettings(Model):
    """Search the items of suites in the training data.

    Inputs: `train.N`, `preferences.N` and `prompts.N`, as far as the job has them from outside, and
    `suite.N` of each suite with a file of items.
    """

    kind: Literal["leaks"] = "leaks"
    train: list[DatasetSettings]
    """Settings of each input `train.N`. Empty: there is none."""
    preferences: list[DatasetSettings] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Settings of each input `preferences.N`. None: there is none."""
    prompts: list[PromptSettings] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Settings of each input `prompts.N`. None: there is none."""
    suites: list[SuiteSettings]
    """Settings of the suites."""
    leaks: Literal["error"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Treatment of items that are also in training. None: name them, in a warning."""


class RewardTerm(Model):
    """One term of a reward: a weight times the score of a model or a rule."""

    weight: float = 1.0
    """Factor of the score in the sum."""
    role: str | None = None
    """Role of the input that holds the reward model: the output of a reward stage, or a folder with
    a sequence classification model. None: `rule` computes the score."""
    rule: RuleReward | None = None
    """Rule that computes the score. None: the model at `role` does."""


class JudgeSettings(Model):
    """A judge behind an endpoint; `TrainRuntime.endpoint` gives the URL."""

    model: str
    """Name of the model at the endpoint."""
    max_requests: int | None
    """Budget in requests. None: no limit."""
    max_tokens: int | None
    """Budget in tokens of prompts and replies. None: no limit."""
    label_tokens: int
    """Longest reply to a comparison, in tokens."""


class ParaphraseSettings(Model):
    """How questions are asked in other words."""

    requests: list[str]
    """Templates of the requests; each chosen row gets one paraphrase by each of them."""
    share: float
    """Share of the rows to paraphrase."""


class InversionSettings(Model):
    """How questions are written for answers."""

    request: str
    """Template of the request."""
    share: float
    """Share of the rows with one question and one answer that get a new question."""


class AugmentSettings(Model):
    """Make new training rows from those of the job; writes `augmented.jsonl` for a prepare stage.

    Inputs: `model` (for its chat template, and to write without another model), `train.N`, and
    `judge`, if another model that the job runs writes.
    """

    kind: Literal["augment", "rewrite"]
    """rewrite: the workers run a model. augment: they run none, and the stage needs no GPU."""
    train: list[DatasetSettings]
    """Settings of each input `train.N`."""
    on_invalid_row: Literal["error", "skip"]
    """Treatment of invalid rows."""
    clean: Clean | None
    """Rules that remove or change rows before a model sees them. None: rows stay as they are."""
    documents: bool
    """Whether rows name documents, which the new rows then name too."""
    chat_template: str | None
    """Jinja chat template in place of that of `model`. None: its own."""
    judge: JudgeSettings | None
    """The model behind an endpoint that writes. None: the model at the input `judge`; without such
    an input, `model`."""
    paraphrase: ParaphraseSettings | None
    """How questions are asked in other words. None: no paraphrases."""
    inversion: InversionSettings | None
    """How questions are written for answers. None: none are."""
    templates: list[str]
    """Texts that questions are put into. Empty: none."""
    max_new_tokens: int
    """Longest reply, in tokens."""
    seed: int
    """Seed of the choice of rows."""


class PairsSettings(Model):
    """Read, check, split and tokenize preferences.

    Inputs: `model` (for its tokenizer), `preferences.N` (data sets, or the file of a feedback
    stage).
    """

    kind: Literal["pairs"] = "pairs"
    preferences: list[DatasetSettings]
    """Settings of each input `preferences.N`."""
    labeled: bool
    """False: pairs and rankings. True: single completions labeled good or bad, for KTO; a pair
    becomes one of each."""
    held_out: float
    """Share of the prompts to hold out. 0: none."""
    max_length: int | Literal["auto"]
    """Longest prompt with one completion, in tokens. auto: min(1024, the model's context
    length)."""
    on_overlength: Literal["error", "drop"]
    """Treatment of longer rows."""
    on_invalid_row: Literal["error", "skip"]
    """Treatment of invalid rows."""
    reasoning: Literal["drop"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Treatment of the assistant's reasoning. None: it is kept where the chat template renders
    it."""
    chat: ChatSettings
    """How messages are formatted as text."""
    seed: int
    """Seed of the held-out split."""


class RewardSettings(Model):
    """Train a reward model.

    Inputs: `model`, `data` (a pairs stage) and, if an earlier stage fine-tuned the model, `tuned`:
    the weights to start from.
    """

    kind: Literal["reward"] = "reward"
    adapter: Adapter | None
    """lora or qlora. None: full fine-tuning."""
    margin: float
    """Smallest reward difference required between the completions of a pair."""
    centering: float
    """Weight of the loss term that centers rewards on zero."""
    training: LoopSettings
    """The training loop."""


class DpoSettings(Model):
    """Optimize on preferences.

    Inputs: `model`, `tuned` (if an earlier stage trained the model), `data` (a pairs stage).
    """

    kind: Literal["dpo"] = "dpo"
    adapter: Adapter | None
    """Parameter-efficient method. None: full fine-tuning."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "kto"]
    """The loss function."""
    beta: float
    """Strength of the regularization toward the reference: the model that the stage starts from."""
    label_smoothing: float
    """Assumed share of flipped labels (robust), or label smoothing (sigmoid)."""
    training: LoopSettings
    """The training loop."""


class PpoSettings(Model):
    """Optimize a policy by PPO.

    Inputs: `model`, `tuned` (if an earlier stage trained the model), `prompts`, and the reward
    models that `reward` names.
    """

    kind: Literal["ppo"] = "ppo"
    adapter: Adapter | None
    """Parameter-efficient method. None: full fine-tuning."""
    prompts: PromptSettings
    """How the prompts are read."""
    chat: ChatSettings
    """How messages are formatted as text."""
    sampling: Sampling
    """How completions are sampled."""
    reward: list[RewardTerm]
    """Terms whose sum is the reward of a completion."""
    independent_reward: RewardTerm | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """A reward that nothing is trained on, beside `reward`. None: there is none."""
    rollouts: int
    """Completions per update, over all workers."""
    optimization_epochs: int
    """Epochs over each batch of rollouts."""
    clip_range: float
    """Epsilon of the clipped policy loss."""
    value_clip_range: float
    """Epsilon of the clipped value loss."""
    value_coefficient: float
    """Weight of the value loss."""
    entropy_coefficient: float
    """Weight of the entropy bonus."""
    discount: float
    """Discount factor gamma."""
    gae_lambda: float
    """Lambda of generalized advantage estimation."""
    kl_coefficient: float
    """Weight of the per-token KL penalty."""
    target_kl: float | None
    """KL divergence that the coefficient is adapted toward, in nats per completion. None: the
    coefficient is fixed."""
    missing_eos_penalty: float
    """Penalty subtracted from the reward of a completion without an end token."""
    stop_on: StopConditions | None
    """Bounds that end the run early. None: no bounds."""
    training: LoopSettings
    """The training loop; an epoch is one pass over the prompts."""


class GrpoSettings(Model):
    """Optimize a policy by GRPO or RLOO. Inputs: the same as for ppo."""

    kind: Literal["grpo"] = "grpo"
    estimator: Literal["grpo", "rloo"]
    """How advantages are estimated: relative to the group, or leave-one-out."""
    adapter: Adapter | None
    """Parameter-efficient method. None: full fine-tuning."""
    prompts: PromptSettings
    """How the prompts are read."""
    chat: ChatSettings
    """How messages are formatted as text."""
    sampling: Sampling
    """How completions are sampled."""
    reward: list[RewardTerm]
    """Terms whose sum is the reward of a completion."""
    independent_reward: RewardTerm | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """A reward that nothing is trained on, beside `reward`. None: there is none."""
    group_size: int
    """Completions per prompt."""
    kl_coefficient: float
    """Weight of the KL penalty."""
    clip_range: float
    """Epsilon of the clipped policy loss."""
    stop_on: StopConditions | None
    """Bounds that end the run early. None: no bounds."""
    training: LoopSettings
    """The training loop; an epoch is one pass over the prompts."""


class DistillSettings(Model):
    """Distill a teacher into the policy, on the policy's own completions.

    Inputs: `model`, `tuned` (if an earlier stage trained the model), `teacher`, `prompts`.
    """

    kind: Literal["distill"] = "distill"
    adapter: Adapter | None
    """Parameter-efficient method. None: full fine-tuning."""
    prompts: PromptSettings
    """How the prompts are read."""
    chat: ChatSettings
    """How messages are formatted as text."""
    sampling: Sampling
    """How completions are sampled; the temperature is that of the loss too."""
    beta: float
    """Weight of the teacher in the mixture of the generalized Jensen-Shannon divergence. 0: forward
    KL. 1: reverse KL."""
    training: LoopSettings
    """The training loop; an epoch is one pass over the prompts."""


class FeedbackSettings(Model):
    """Sample completions and let a judge label pairs of them; writes `preferences.jsonl`.

    Inputs: `model`, `tuned` (if an earlier stage trained the model), `prompts`, `judge` (if the
    judge is a model run by the job).
    """

    kind: Literal["feedback"] = "feedback"
    prompts: PromptSettings
    """How the prompts are read."""
    chat: ChatSettings
    """How messages are formatted as text."""
    judge: JudgeSettings | None
    """The judge behind an endpoint. None: the model at the input `judge`."""
    principles: list[str]
    """Criteria of the judge; one is drawn for each pair."""
    question: str
    """Template of the question that asks for A or B."""
    responses_per_prompt: int
    """Completions sampled per prompt."""
    temperature: float
    """Sampling temperature of the completions."""
    max_new_tokens: int
    """Longest completion, in tokens."""
    disagreement: Literal["drop", "tie", "average"]
    """Treatment of a pair whose label changes when its completions are swapped."""
    seed: int
    """Seed of the completions and of the drawn principles."""


class CritiqueSettings(Model):
    """Sample, criticize and revise completions; writes `revisions.jsonl`, chat rows for a prepare
    stage. Inputs: the same as for feedback."""

    kind: Literal["critique"] = "critique"
    prompts: PromptSettings
    """How the prompts are read."""
    chat: ChatSettings
    """How messages are formatted as text."""
    judge: JudgeSettings | None
    """The model behind an endpoint that criticizes and revises. None: the model at the input
    `judge`; without such an input, the model itself."""
    principles: list[str]
    """Criteria of the critiques; one is drawn for each revision."""
    critique_request: str
    """Template of the request for a critique."""
    revision_request: str
    """Template of the request for a revision."""
    revisions: int
    """Rounds of critique and revision per prompt."""
    max_new_tokens: int
    """Longest completion, critique or revision, in tokens."""
    seed: int
    """Seed of the completions and of the drawn principles."""


class WinRateSettings(Model):
    """A judge's comparison of the tuned model with the model before."""

    judge: JudgeSettings | None
    """The judge behind an endpoint. None: the model at the input `judge`."""
    principles: list[str]
    """Criteria of the judge; one is drawn for each prompt."""
    question: str
    """Template of the question that asks for A or B."""


class CompletionsSettings(Model):
    """Completions that both models sample, and the signs of reward hacking in them."""

    prompts: PromptSettings | None
    """How the input `prompts` is read, for prompts if no pairs are held out. None: there is no
    such input."""
    sampling: Sampling
    """How completions are sampled."""


class PreferencesSettings(Model):
    """The implicit rewards of the held-out preferences."""

    beta: float
    """Scale of the implicit rewards (Rafailov et al. 2023, section 4)."""


class AnswersSettings(Model):
    """How the models answer the prompts of a suite, and how the answers are measured."""

    metrics: list[AnswerMetric]
    """Metrics of the answers."""
    answer_schema: str | None
    """JSON Schema of answers, as JSON text. None: answers need satisfy none."""
    answer_pattern: str | None
    """Regular expression that is searched in answers. None: none is."""
    max_new_tokens: int
    """Longest answer, in tokens."""


class SuiteSettings(Model):
    """The items of a suite. The input `suite.N` of suite N holds its rows, and `task.N` its task
    file; a task that lm-evaluation-harness knows has neither."""

    name: str
    """Prefix of its metrics."""
    kind: Literal["choices", "answers", "refusals", "task"]
    """How the models are measured on the items."""
    limit: int | None
    """Number of items, from the start. None: all."""
    answers: AnswersSettings | None = None
    """Of kind answers: how the models answer. None: of another kind."""
    task: str | None = None
    """Of kind task: its name in lm-evaluation-harness. None: it has a task file."""
    few_shot: int | None = None
    """Of kind task: worked examples before each question. None: as the task says."""
    chat_template: bool = False
    """Of kind task: whether questions are rendered by the model's chat template."""


class EvaluateSettings(Model):
    """Measure a model, and compare it with the model before: the one that its training started
    from. Each part is measured that has its settings and its inputs.

    Inputs: `model`, and each of these that the job has: `tuned` (the weights to measure; if it is
    absent, the reward model alone is measured), `start` (the weights of the model before; if it is
    absent, this is `model`), `data` (a prepare stage: its held-out rows are measured), `pairs` (a
    pairs stage), `prompts`, `judge` (of `win_rate`, if the judge is a model run by the job), and
    the reward models that `reward` names, `suite.N` and `task.N`.
    """

    kind: Literal["evaluate"] = "evaluate"
    compare_with_base: bool
    """Also measure the model before."""
    samples: int
    """Number of prompts whose completions are shown side by side."""
    max_new_tokens: int
    """Longest completion, in tokens."""
    gates: list[Gate]
    """Bounds that the result must meet."""
    # What 0.2 did not know is left out where it is None: the plans of 0.2 keep their bytes.
    engine: Literal["vllm"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """The library with which the models answer and sample. None: transformers."""
    metrics: list[AnswerMetric] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Metrics of the answers to held-out questions of `data`. None: no others than answerAccuracy
    of rows with expected texts."""
    few_shot: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Worked examples before each question, with which the model before is asked too. None: it is
    not."""
    answer_schema: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """JSON Schema of answers, as JSON text. None: answers need satisfy none."""
    answer_pattern: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Regular expression that is searched in answers. None: none is."""
    chat: ChatSettings | None = Field(default=None, exclude_if=lambda value: value is None)
    """How messages are formatted as text. None: as in `data`."""
    completions: CompletionsSettings | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """What both models sample. None: nothing; they answer held-out questions of `data`."""
    preferences: PreferencesSettings | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """What is measured on the held-out preferences of `pairs`. None: nothing but the reward
    model."""
    reward: list[RewardTerm] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Terms whose sum is the reward of a completion. None: no reward."""
    independent_reward: RewardTerm | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """A reward that nothing was trained on. None: there is none."""
    win_rate: WinRateSettings | None = Field(default=None, exclude_if=lambda value: value is None)
    """How a judge compares completions. None: no win rate is measured."""
    suites: list[SuiteSettings] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Other items to measure the models on. None: there are none."""
    seed: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Seed of the sampled completions and of the drawn principles. None: nothing is drawn."""


class AssessSettings(Model):
    """The evaluation of an alignment in a plan of 0.2, which `api.earlier` turns into
    EvaluateSettings. No plan of this version has it.

    Inputs: as of EvaluateSettings, but `data` is a pairs stage.
    """

    kind: Literal["assess"] = "assess"
    chat: ChatSettings
    prompts: PromptSettings | None
    sampling: Sampling
    reward: list[RewardTerm]
    beta: float
    win_rate: WinRateSettings | None
    samples: int
    gates: list[Gate]
    seed: int


class ExportSettings(Model):
    """Write the result in the form that users load.

    Inputs: `model`, `tuned`, and `data`, `leaks` and `evaluation` if the job has them.
    """

    kind: Literal["export"] = "export"
    merge: bool
    """Also write a model with the adapter merged into the base weights."""


Settings = Annotated[
    PrepareSettings
    | AugmentSettings
    | LeaksSettings
    | TrainSettings
    | CritiqueSettings
    | FeedbackSettings
    | PairsSettings
    | RewardSettings
    | DpoSettings
    | PpoSettings
    | GrpoSettings
    | DistillSettings
    | EvaluateSettings
    | AssessSettings
    | ExportSettings,
    Field(discriminator="kind"),
]


def scoring_terms(settings: PpoSettings | GrpoSettings | EvaluateSettings) -> list[RewardTerm]:
    """Return the terms of all rewards that a stage computes, the independent one included."""
    independent = settings.independent_reward
    return [*(settings.reward or ()), *([independent] if independent else ())]


StageKind = Literal[
    "augment",
    "rewrite",
    "prepare",
    "leaks",
    "sft",
    "pretrain",
    "critique",
    "feedback",
    "pairs",
    "reward",
    "dpo",
    "ppo",
    "grpo",
    "distill",
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
    "distill",
)
"""The kinds of stages that train, in the order in which one job runs them."""
PREPARING_KINDS: Final[tuple[StageKind, ...]] = ("augment", "prepare", "leaks", "pairs")
"""The kinds of stages that run no model: they read data. Those at the beginning of a plan need no
GPU."""
EVALUATION_KINDS: Final[tuple[StageKind, ...]] = ("evaluate", "assess")
"""The kinds of stages that measure the result. `assess` is that of an alignment in 0.2."""
SHARED_KINDS: Final[tuple[StageKind, ...]] = (
    *TRAINING_KINDS,
    "rewrite",
    "critique",
    "feedback",
    *EVALUATION_KINDS,
)
"""The kinds of stages that run a model, and that all workers therefore run together."""
