"""The training loop: `spec.training`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import MERGEABLE, LayerRanges, Probability
from tuneyard.api.meta import AutoInt, Model, Rule
from tuneyard.api.preserving import Guard, Preserve
from tuneyard.api.suites import TrainingSuite

LearningRate = Annotated[float, Field(gt=0, le=10)] | Literal["auto"]


class Freeze(Model):
    """Parts of the base model that full fine-tuning does not train."""

    layers: LayerRanges | None = None
    """Decoder layers to freeze, e.g. "0-11". None: none."""
    embeddings: bool = False
    """Freeze the input embeddings (and the head, if it is tied to them)."""
    head: bool = False
    """Freeze the language-model head. `embeddings` freezes a head that is tied to them."""


class EarlyStopping(Model):
    """Stop when the held-out loss, or the metric of `bestBy`, no longer improves."""

    patience: int = Field(default=3, ge=1, le=1000)
    """Number of evaluations in a row without improvement before training stops."""
    min_delta: float = Field(default=0.0, ge=0, le=100)
    """Smallest change of the held-out loss that counts as an improvement, in nats per token; with
    `bestBy`, of that metric in its unit. It does not change which checkpoint is kept."""


class Schedule(Model):
    """The learning rate schedule."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up; cosine and linear end at `finalFraction`."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly from 0."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""


class Optimizer(Model):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay; not applied to biases and norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Constant added to the denominator for numerical stability."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """Limit that the global gradient norm is clipped to. null: no clipping."""


class Training(Model):
    """The training loop."""

    engine: Literal["native", "trl"] = Field(
        default="native", exclude_if=lambda engine: engine == "native"
    )
    """The program that takes the optimizer steps. native: Tuneyard's own loop. trl: the trainers of
    TRL (docs/engines.md)."""
    # Left out of a plan where it is native: plans of 0.2.0 keep their bytes, and so their digests.
    trl: dict[str, Any] | None = Field(
        default=None, max_length=64, exclude_if=lambda arguments: arguments is None
    )
    """Further arguments of TRL's trainer config, by their names in TRL, e.g. `neftune_noise_alpha:
    5`; only with `engine: trl` (docs/engines.md). None: TRL's defaults."""
    epochs: float | None = Field(default=None, gt=0, le=10000)
    """Epochs over the data. None: 3 for fine-tuning, 1 for a reward model or an alignment, unless
    `maxSteps` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps, in place of `epochs`. None: `epochs` decides."""
    batch_size: AutoInt = "auto"
    """Sequences per optimizer step, over all workers. auto: by method (docs/defaults.md)."""
    micro_batch_tokens: AutoInt = "auto"
    """Most tokens of a micro-batch on one worker, padding included; gradients accumulate over as
    many micro-batches as a step needs. A longer row, or preference, is a micro-batch of its own.
    auto: 2048 on CPU, 16384 on GPU, or fewer if the job would not fit its memory otherwise."""
    learning_rate: LearningRate = "auto"
    """Peak learning rate. auto: by method (docs/defaults.md)."""
    schedule: Schedule = Schedule()
    """The learning rate schedule."""
    optimizer: Optimizer = Optimizer()
    """Settings of the AdamW optimizer."""
    dropout: Probability | None = None
    """Dropout probability in the base model's own layers. None: the value of the model's config."""
    freeze: Freeze | None = None
    """Parts of the base model to freeze, in full fine-tuning only. None: everything is trained."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the forward and backward pass. auto: bfloat16 on GPU, float32 on CPU."""
    gradient_checkpointing: bool = False
    """True: recompute activations in the backward pass, which saves memory and takes about a third
    more time. False: only if the job would not fit its memory otherwise."""
    evaluation_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the held-out rows. None: at the end of each epoch."""
    suites: list[TrainingSuite] = Field(
        default=[], max_length=8, exclude_if=lambda value: not value
    )
    """Suites that are measured at each evaluation, and before training (docs/evaluation.md)."""
    early_stopping: EarlyStopping | None = None
    """Stop when the held-out loss no longer decreases; requires held-out rows, or a metric of a
    suite in `bestBy`. None: train to the end."""
    keep_best: bool = True
    """True: keep the weights of the best evaluation. False, or without held-out rows and `bestBy`:
    the last weights."""
    best_by: str | None = Field(
        default=None, min_length=1, max_length=64, exclude_if=lambda name: name is None
    )
    """The metric that decides which evaluation is the best, and when to stop early
    (docs/forgetting.md). SUITE/METRIC is a metric of one of `suites`. The lowest loss, overRefusal
    or unsafeCompliance is the best, or the highest of any other metric. None: validationLoss."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. None: every 10 minutes and at each evaluation."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Seed of the data order, dropout and the initial adapter weights."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!(has(self.epochs) && has(self.maxSteps))",
            holds=lambda training: training.epochs is None or training.max_steps is None,
            message="cannot be combined with epochs: remove maxSteps or epochs",
            path="maxSteps",
            reads=("epochs", "maxSteps"),
        ),
    )


class FineTuning(Training):
    """The training loop of a fine-tuning."""

    preserve: Preserve | None = Field(default=None, exclude_if=lambda value: value is None)
    """Terms against forgetting in the loss (docs/forgetting.md). None: none."""
    guard: Guard | None = Field(default=None, exclude_if=lambda value: value is None)
    """A bound on forgetting that stops training (docs/forgetting.md). None: no bound."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Training.rules,
        Rule(
            cel="!has(self.guard) || self.keepBest",
            holds=lambda training: training.guard is None or training.keep_best,
            message="needs the weights before the bound was crossed: remove keepBest or guard",
            path="guard",
            reads=("guard", "keepBest"),
        ),
    )


class TrlTraining(Training):
    """The training loop of a method that only TRL has."""

    engine: Literal["native", "trl"] = Field(
        default="trl", exclude_if=lambda engine: engine == "trl"
    )
    """The program that takes the optimizer steps; native does not have this method
    (docs/engines.md)."""


FREEZE_WITHOUT_ADAPTER = Rule(
    cel="!has(self.adapter) || !has(self.training.freeze)",
    holds=lambda spec: spec.adapter is None or spec.training.freeze is None,
    message="applies to full fine-tuning only, as an adapter freezes the whole base model: remove "
    "training.freeze or adapter",
    path="training.freeze",
    reads=("adapter", "training.freeze"),
)

STOPPING_NEEDS_VALIDATION = Rule(
    cel="!has(self.training.earlyStopping) || has(self.data.validation)"
    " || (has(self.training.bestBy) && self.training.bestBy.contains('/'))",
    holds=lambda spec: (
        spec.training.early_stopping is None
        or spec.data.validation is not None
        or "/" in (spec.training.best_by or "")
    ),
    message="needs held-out rows: set data.validation, or training.bestBy to a metric of a suite, "
    "or remove training.earlyStopping",
    path="training.earlyStopping",
    reads=("training.earlyStopping", "data.validation", "training.bestBy"),
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
