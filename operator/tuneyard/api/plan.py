"""The wire between planner, operator and trainer: Plan, PlannedStage, StageRecord.

A Plan is JSON, deterministic for a manifest. A stage's *fingerprint* covers its settings and the
wiring of its inputs; its *identity* adds the digests that its inputs turned out to have. Neither
ever covers where anything lies, so moving a bucket retrains nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tuneyard.api.compute import Compute
from tuneyard.api.meta import Model
from tuneyard.api.methods import (
    Adapter,
    EarlyStopping,
    Freeze,
    Gate,
    Optimizer,
    Schedule,
)
from tuneyard.api.sources import DataFormat, FieldMap, Output, SecretKeyRef, SecretRef


def digest(value: Any) -> str:
    """`sha256:` and the hash of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class StageInput(Model):
    """The output of an earlier stage."""

    stage: str
    """That stage's name."""


class SourceInput(Model):
    """Something from outside the plan: a model or a data set."""

    uri: str
    """Where it lies; no part of any identity."""
    revision: str | None = None
    """The revision of an hf:// model; None: the default branch."""
    token_secret: SecretKeyRef | None = None
    """The access token; None: anonymous."""
    credentials: SecretRef | None = None
    """Object store credentials; None: ambient."""
    path: str = ""
    """The manifest's field path, for messages."""


Input = StageInput | SourceInput


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


class TrainSettings(Model):
    """Train. Inputs: `model`, `data` (a prepare stage)."""

    kind: Literal["sft", "pretrain"]
    adapter: Adapter | None
    """None: full fine-tuning."""
    freeze: Freeze | None
    """Parts of the base to leave; None: none."""
    dropout: float | None
    """Dropout of the base; None: the model's own."""
    epochs: float | None
    """Passes over the data; None: `max_steps` decides."""
    max_steps: int | None
    """Optimizer steps; None: `epochs` decides."""
    batch_size: int
    """Sequences per optimizer step, over all workers."""
    learning_rate: float
    """Peak learning rate."""
    schedule: Schedule
    """The rate over the run."""
    optimizer: Optimizer
    """AdamW's settings."""
    packing: Literal["auto", "always", "never"]
    """Whether short sequences share a row."""
    evaluation_steps: int | None
    """Steps between evaluations; None: each epoch."""
    early_stopping: EarlyStopping | None
    """None: run to the end."""
    keep_best: bool
    """Keep the weights with the lowest held-out loss."""
    precision: Literal["auto", "float32", "bfloat16"]
    """auto: bfloat16 on GPU, float32 on CPU."""
    seed: int
    """Seed of order, dropout and initial weights."""


class TrainRuntime(Model):
    """How training is carried out: nothing here changes the result beyond rounding, so nothing here
    is part of an identity."""

    micro_batch_tokens: int | Literal["auto"] = "auto"
    """The most tokens of one pass on one worker."""
    gradient_checkpointing: bool = False
    """Recompute activations."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints; None: every 10 minutes and at each evaluation."""


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


class ExportSettings(Model):
    """Write what users load. Inputs: `model`, `data`, `tuned`, `evaluation`."""

    kind: Literal["export"] = "export"
    merge: bool
    """Write the merged model too."""


Settings = Annotated[
    PrepareSettings | TrainSettings | EvaluateSettings | ExportSettings,
    Field(discriminator="kind"),
]
StageKind = Literal["prepare", "sft", "pretrain", "evaluate", "export"]


class PlannedStage(Model):
    """One stage of a plan."""

    name: str
    """Unique in the plan; also the folder of its output."""
    settings: Settings
    """What it does; all of it is identity."""
    inputs: dict[str, StageInput | SourceInput]
    """What it reads, by role."""
    runtime: TrainRuntime = TrainRuntime()
    """How it is carried out; never identity."""
    fingerprint: str
    """Digest of settings, kind version and input roles (`planning.fingerprint`)."""

    @property
    def kind(self) -> StageKind:
        return self.settings.kind

    def identity(self, input_digests: Mapping[str, str]) -> str:
        """The digest that a record must carry to stand for this stage. `input_digests`: the content
        digest of each input, by role."""
        return digest({"fingerprint": self.fingerprint, "inputs": dict(input_digests)})


class JobRef(Model):
    """Whose plan it is."""

    kind: str
    """FineTuneJob or AlignmentJob."""
    name: str
    """The job's name."""
    namespace: str | None = None
    """Its namespace; None on one machine."""


class Plan(Model):
    """Everything the trainer needs to know."""

    api_version: str
    """The contract's version."""
    kind: Literal["Plan"] = "Plan"
    job: JobRef
    """Whose plan it is."""
    stages: list[PlannedStage]
    """In execution order."""
    output: Output
    """Where records and results go."""
    compute: Compute
    """What it runs on."""
    manifest: dict[str, Any]
    """The job as the user wrote it, defaults filled in; exported beside the weights. Without its
    run policy, which may change under way: no plan depends on it."""
    notes: list[str] = Field(default=[])
    """What the planner decided in the user's stead, and why."""

    def to_json(self) -> str:
        """The wire form: camelCase JSON, two spaces, sorted keys."""
        value = self.model_dump(mode="json", by_alias=True)
        return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class StageRecord(Model):
    """What a finished stage leaves beside its output, written last."""

    stage: str
    """The stage's name."""
    kind: StageKind
    """What it did."""
    identity: str
    """`PlannedStage.identity` at the time: a record with the same identity means done."""
    input_digests: dict[str, str]
    """The digests that the identity was made of."""
    digest: str
    """The digest of the output files."""
    attempt: int = Field(ge=1)
    """Which attempt wrote it."""
    started_at: str
    """RFC 3339, UTC."""
    finished_at: str
    """RFC 3339, UTC."""
    metrics: dict[str, float] = Field(default={})
    """Numbers worth comparing."""
    details: dict[str, Any] = Field(default={})
    """Anything else worth showing: formats found, rows skipped, sampled answers."""
    versions: dict[str, str] = Field(default={})
    """Versions of tuneyard, torch, transformers and peft that made it."""
