"""Where models and data come from, and where results go."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import Model, ObjectName, OneOf, Rule

MODEL_SCHEMES = ("hf", "s3", "gs", "pvc", "file", "pkg", "job")
DATA_SCHEMES = ("hf", "s3", "gs", "pvc", "file", "pkg", "https")
OUTPUT_SCHEMES = ("pvc", "s3", "gs", "file")


def _uri_pattern(schemes: tuple[str, ...]) -> str:
    return rf"^({'|'.join(schemes)})://[^\s]+$"


ModelUri = Annotated[str, Field(max_length=1024, pattern=_uri_pattern(MODEL_SCHEMES))]
DataUri = Annotated[str, Field(max_length=1024, pattern=_uri_pattern(DATA_SCHEMES))]
OutputUri = Annotated[str, Field(max_length=1024, pattern=_uri_pattern(OUTPUT_SCHEMES))]


KEY_PATTERN = r"^[-._a-zA-Z0-9]+$"


class SecretKeyRef(Model):
    """One key of a Secret in the job's namespace. On one machine: an environment variable."""

    name: ObjectName
    """The Secret's name."""
    key: str = Field(min_length=1, max_length=253, pattern=KEY_PATTERN)
    """The key inside it."""

    @property
    def variable(self) -> str:
        """The environment variable that carries it into the trainer: TUNEYARD_SECRET_HF_TOKEN for
        {name: hf, key: token}."""
        return "TUNEYARD_SECRET_" + re.sub(r"[^A-Z0-9]", "_", f"{self.name}_{self.key}".upper())


class SecretRef(Model):
    """A Secret in the job's namespace whose keys become environment variables of the job's pods."""

    name: ObjectName
    """The Secret's name."""


class ModelSource(Model):
    """A causal language model: config, tokenizer and safetensors (or one GGUF file)."""

    uri: ModelUri
    """hf://ORG/NAME, s3://…, gs://…, pvc://CLAIM/PATH, file://PATH (relative to the manifest),
    pkg://PACKAGE/FILE (a file inside an installed Python package), job://NAME (an earlier job's
    model)."""
    revision: str | None = Field(default=None, min_length=1, max_length=128)
    """A branch, tag or commit of an hf:// model. None: the default branch."""
    token_secret: SecretKeyRef | None = None
    """The access token of a gated hf:// model. None: anonymous (on one machine: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: ambient ones."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.revision) || self.uri.startsWith('hf://')",
            holds=lambda model: model.revision is None or model.uri.startswith("hf://"),
            message="applies to hf:// models only: remove revision, or name an hf:// model",
            path="revision",
            reads=("revision", "uri"),
            found=lambda model: model.uri,
        ),
    )


DataFormat = Literal[
    "auto",
    "messages",
    "alpaca",
    "flan",
    "sharegpt",
    "openassistant",
    "ultrachat",
    "prompt-completion",
    "text",
]


class FieldMap(Model):
    """The names that a file uses for the fields of its format; None keeps the format's own."""

    messages: str | None = Field(default=None, min_length=1, max_length=128)
    """The list of chat turns (formats messages, sharegpt and ultrachat)."""
    system: str | None = Field(default=None, min_length=1, max_length=128)
    """The system prompt (formats alpaca, sharegpt and prompt-completion)."""
    prompt: str | None = Field(default=None, min_length=1, max_length=128)
    """What the model is given (prompt; alpaca's instruction; flan's inputs)."""
    completion: str | None = Field(default=None, min_length=1, max_length=128)
    """What the model shall answer (completion; alpaca's output; flan's targets)."""
    text: str | None = Field(default=None, min_length=1, max_length=128)
    """The document (format text)."""


class Dataset(Model):
    """One data set: a file, or a folder or glob of files of one format."""

    uri: DataUri
    """Where it lies: file://data/train.jsonl (relative to the manifest), s3://bucket/key,
    hf://datasets/ORG/NAME/file.parquet, pvc://CLAIM/PATH, pkg://PACKAGE/FILE. JSONL, JSON, CSV,
    Parquet and text by suffix, each also .gz, .bz2, .xz or .zst."""
    format: DataFormat = "auto"
    """The shape of a row; auto recognises it from the first rows and says what it chose."""
    fields: FieldMap = FieldMap()
    """Names of the fields, where the file does not use its format's own."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch sees each row: 1.0 once, 2.0 twice, 0.5 a fixed, seeded half of them."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, from the start. None: all."""
    token_secret: SecretKeyRef | None = None
    """The access token of a gated hf:// data set. None: anonymous (on one machine: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: ambient ones."""


class PromptSet(Model):
    """A data set of which only the prompts are used: what a policy samples answers to."""

    uri: DataUri
    """Where it lies, as for any data set."""
    format: DataFormat = "auto"
    """The shape of a row."""
    fields: FieldMap = FieldMap()
    """Names of the fields, where the file does not use its format's own."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, from the start. None: all."""
    token_secret: SecretKeyRef | None = None
    """The access token of a gated hf:// data set. None: anonymous."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: ambient ones."""


class Validation(OneOf):
    """The held-out rows: a seeded fraction of the training data, or data sets of their own."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows to hold out, at least one row."""
    data: list[Dataset] | None = Field(default=None, min_length=1, max_length=64)
    """Data sets that training never reads."""


class FineTuneData(Model):
    """What to train on, what to hold out, and what to do with rows that do not fit."""

    train: list[Dataset] = Field(min_length=1, max_length=64)
    """The training data; rows of all data sets are shuffled together."""
    validation: Validation | None = None
    """The held-out rows. None: none are held out, so no held-out loss, early stopping or gates."""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | Literal["auto"] = "auto"
    """The longest sequence in tokens; auto: 1024, or the model's context where that is shorter."""
    on_overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with a longer row: refuse the data, drop it, cut its end off, or split it into
    sequences (the pieces after the first see no earlier context). Counted in the stage's record."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """What to do with a broken row; skipped rows are counted and the first three are logged."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Put short sequences into one row; they never see each other and no token is lost. auto:
    where the model's attention allows it."""
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    """Which tokens carry loss in chat data: all answers, the last answer, or everything."""
    system_prompt: str | None = Field(default=None, max_length=32768)
    """The system turn for rows that have none. None: none is added, and a chat template's own
    default is kept."""
    chat_template: str | None = Field(default=None, max_length=65536)
    """A Jinja chat template in place of the tokenizer's. None: the tokenizer's own."""


class Output(Model):
    """Where the result goes and what it consists of."""

    uri: OutputUri
    """A folder: pvc://CLAIM/PATH, s3://…, gs://… or file://PATH (relative to the manifest). One
    folder belongs to one job."""
    merge: bool = False
    """Also write the adapter merged into the base weights, as one plain model. Full fine-tuning
    always writes a plain model."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What happens to the output when the job is deleted."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// folder, as environment variables. None: ambient ones."""
