"""How a model is trained: `spec.training`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import MERGEABLE, LayerRanges, Probability
from tuneyard.api.meta import AutoInt, Model, Rule

LearningRate = Annotated[float, Field(gt=0, le=10)] | Literal["auto"]


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
