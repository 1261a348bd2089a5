"""How to train: adapters, the training loop's settings, evaluation, and the alignment methods."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import AutoInt, Model, OneOf, Rule
from tuneyard.api.sources import Dataset, ModelSource, PromptSet, SecretKeyRef

Rank = Annotated[int, Field(ge=1, le=1024)]
Probability = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=10)] | Literal["auto"]
LAYERS_PATTERN = r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"
LayerRanges = Annotated[str, Field(max_length=256, pattern=LAYERS_PATTERN)]
"""Layer indices from 0, as a string: "0-11", "0-3,8"."""


ModuleNames = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)
]


class Lora(Model):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Rank = 16
    """Rank of the update."""
    alpha: int = Field(default=32, ge=1, le=4096)
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank): `rankStabilized`)."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear", "attention"] | ModuleNames = "all-linear"
    """Which linear layers: all but the head, the attention projections, or a list of names."""
    layers: LayerRanges | None = None
    """Only these layers, e.g. "15-29". None: all."""
    rank_stabilized: bool = False
    """rsLoRA scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    decomposed: bool = False
    """DoRA: magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""


class Qlora(Lora):
    """LoRA over a base quantized to 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quantization: bool = True
    """Quantize the quantization constants too (0.4 bits less per weight)."""


class PrefixTuning(Model):
    """Trained keys and values before every layer (Li & Liang 2021, arXiv:2101.00190)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Virtual tokens."""


class PromptTuning(Model):
    """Trained embeddings before the input (Lester et al. 2021, arXiv:2104.08691)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Virtual tokens."""
    initial_text: str | None = Field(default=None, min_length=1, max_length=4096)
    """Start from this text's embeddings, repeated to `length`. None: random vocabulary rows."""


class Ia3(Model):
    """Learned rescaling of keys, values and MLP activations (Liu et al. 2022, arXiv:2205.05638)."""


class Bottleneck(Model):
    """Houlsby adapters: a small two-layer network after attention and after the MLP, inside each
    residual branch (Houlsby et al. 2019, arXiv:1902.00751). Not mergeable: it is not linear."""

    size: int = Field(default=64, ge=1, le=8192)
    """Width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The non-linearity."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    layers: LayerRanges | None = None
    """Only these layers. None: all."""


class Adapter(OneOf):
    """A parameter-efficient method; exactly one. Absent as a whole: full fine-tuning."""

    lora: Lora | None = None
    """Low-rank adaptation."""
    qlora: Qlora | None = None
    """LoRA over a 4-bit base."""
    prefix: PrefixTuning | None = None
    """Prefix tuning."""
    prompt: PromptTuning | None = None
    """Prompt tuning."""
    ia3: Ia3 | None = None
    """(IA)^3."""
    bottleneck: Bottleneck | None = None
    """Houlsby bottleneck adapters."""


MERGEABLE = ("lora", "qlora", "ia3")


class Freeze(Model):
    """Parts of the base that full fine-tuning leaves as they are."""

    layers: LayerRanges | None = None
    """Decoder layers, e.g. "0-11". None: none are frozen."""
    embeddings: bool = False
    """The input embeddings (and the head where it is tied to them)."""
    head: bool = False
    """The language-model head. A head tied to the embeddings is frozen with them only."""


class EarlyStopping(Model):
    """Stop when the held-out loss no longer falls."""

    patience: int = Field(default=3, ge=1, le=1000)
    """Evaluations in a row without improvement before stopping."""
    min_delta: float = Field(default=0.0, ge=0, le=100)
    """The least fall of the held-out loss, in nats per token, that counts as improvement."""


class Schedule(Model):
    """The learning rate over the run."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape after warm-up; cosine and linear end at `finalFraction`."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps over which the rate rises linearly from 0."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The last step's rate as a share of the peak."""


class Optimizer(Model):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay; never applied to biases and norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to the denominator."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this. None: no clipping."""


class Training(Model):
    """The training loop."""

    epochs: float | None = Field(default=None, gt=0, le=10000)
    """Passes over the data. None: 3, unless `maxSteps` is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of epochs."""
    batch_size: AutoInt = "auto"
    """Sequences per optimizer step, over all workers; auto: by method (docs/defaults.md)."""
    micro_batch_tokens: AutoInt = "auto"
    """The most tokens of one forward and backward pass on one worker; gradients accumulate over as
    many passes as a step needs. auto: 2048 on CPU, 16384 on GPU."""
    learning_rate: LearningRate = "auto"
    """The peak learning rate; auto: by method (docs/defaults.md)."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    dropout: Probability | None = None
    """Dropout of the base model's own layers, where its architecture has any. None: the model's."""
    freeze: Freeze | None = None
    """Parts of the base to leave as they are (full fine-tuning only). None: all are trained."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bfloat16 on GPU, float32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    evaluation_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the held-out rows. None: at the end of each epoch."""
    early_stopping: EarlyStopping | None = None
    """Stop when the held-out loss no longer falls; needs held-out rows. None: run to the end."""
    keep_best: bool = True
    """Keep the weights with the lowest held-out loss; without held-out rows, the last ones."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. None: every 10 minutes and at each evaluation."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Seed of the data order, dropout and initial adapter weights."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!(has(self.epochs) && has(self.maxSteps))",
            holds=lambda training: training.epochs is None or training.max_steps is None,
            message="excludes epochs: remove maxSteps or epochs",
            path="maxSteps",
            reads=("epochs", "maxSteps"),
        ),
    )


FREEZE_WITHOUT_ADAPTER = Rule(
    cel="!has(self.adapter) || !has(self.training.freeze)",
    holds=lambda spec: spec.adapter is None or spec.training.freeze is None,
    message="applies to full fine-tuning, and an adapter freezes the whole base: remove "
    "training.freeze or adapter",
    path="training.freeze",
    reads=("adapter", "training.freeze"),
)
STOPPING_NEEDS_VALIDATION = Rule(
    cel="!has(self.training.earlyStopping) || has(self.data.validation)",
    holds=lambda spec: spec.training.early_stopping is None or spec.data.validation is not None,
    message="needs held-out rows: set data.validation, or remove training.earlyStopping",
    path="training.earlyStopping",
    reads=("training.earlyStopping", "data.validation"),
)
MERGE_NEEDS_LINEARITY = Rule(
    cel="!self.output.merge || !has(self.adapter) || "
    + " || ".join(f"has(self.adapter.{name})" for name in MERGEABLE),
    holds=lambda spec: (
        not spec.output.merge
        or spec.adapter is None
        or any(getattr(spec.adapter, name) is not None for name in MERGEABLE)
    ),
    message=f"needs one of the adapters {', '.join(MERGEABLE)}, as the others are not linear in "
    "the base weights: remove output.merge or change the adapter",
    path="output.merge",
    reads=("output.merge", "adapter", *(f"adapter.{name}" for name in MERGEABLE)),
)


Metric = Literal[
    "validationLoss",
    "validationPerplexity",
    "lossReduction",
    "answerAccuracy",
    "answerAccuracyGain",
]
"""What a gate can look at. lossReduction: 1 - tuned/base held-out loss. answerAccuracy: share of
the held-out rows with an `expected` field whose sampled answer contains it; the gain: over base."""


AlignmentMetric = Literal[
    "preferenceAccuracy",
    "preferenceMargin",
    "rewardAccuracy",
    "rewardMargin",
    "reward",
    "rewardGain",
    "kl",
    "lengthRatio",
    "distinctRatio",
    "repetition",
    "complete",
    "sycophancyShift",
    "winRate",
]
"""What a gate of an alignment can look at. preferenceAccuracy, preferenceMargin: the aligned
model's log-probabilities against the start's on the held-out pairs. rewardAccuracy, rewardMargin:
the reward model's on the same pairs. reward: mean over the aligned model's own answers to held-out
prompts; the gain: over the start's. kl: nats per answer from the start. lengthRatio: mean length of
an answer over the start's. distinctRatio: different pairs of words among all in the answers
together (distinct-2), over the start's: low where every prompt gets the same answer. repetition:
share of an answer's sequences of 4 words that it said before. complete: share of answers that end
by themselves. sycophancyShift: how much likelier a wrong answer becomes once the user holds it.
winRate: share of the aligned model's answers that `evaluate.contest`'s judge prefers to the
start's."""


class Gate(Model):
    """A bound that the tuned model must meet; a job that misses one fails and exports nothing."""

    metric: str = Field(min_length=1, max_length=128)
    """A metric of the evaluation: one of `Metric` (of an alignment, `AlignmentMetric`), or
    SUITE/METRIC."""
    at_least: float | None = None
    """The metric must not be lower. None: no lower bound."""
    at_most: float | None = None
    """The metric must not be higher. None: no upper bound."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.atLeast) || has(self.atMost)",
            holds=lambda gate: gate.at_least is not None or gate.at_most is not None,
            message="has no bound: set atLeast, atMost or both",
            reads=("atLeast", "atMost"),
        ),
    )


class Evaluate(Model):
    """What to measure of the tuned model."""

    compare_with_base: bool = True
    """Measure the base model on the same held-out rows too."""
    samples: int = Field(default=3, ge=0, le=100)
    """Held-out prompts whose answers, of base and tuned model, are shown side by side."""
    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    """The longest sampled answer, in tokens."""
    few_shot: int = Field(default=0, ge=0, le=64)
    """Worked examples before each question of a suite."""
    suites: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        default=[], max_length=64
    )
    """Benchmark suites by their lm-evaluation-harness names."""
    gates: list[Gate] = Field(default=[], max_length=64)
    """Bounds that decide whether the result is good enough."""


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


class Contest(Model):
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

    contest: Contest | None = None
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
