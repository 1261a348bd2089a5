"""The locations of models, data and results, and how data is read and added to."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuneyard.api.cleaning import Clean
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
    """A key of a Secret in the job's namespace. `tuneyard run` reads an environment variable
    instead: TUNEYARD_SECRET_HF_TOKEN for {name: hf, key: token}."""

    name: ObjectName
    """Name of the Secret."""
    key: str = Field(min_length=1, max_length=253, pattern=KEY_PATTERN)
    """Key in the Secret."""

    @property
    def variable(self) -> str:
        """The environment variable that passes the value to the trainer."""
        return "TUNEYARD_SECRET_" + re.sub(r"[^A-Z0-9]", "_", f"{self.name}_{self.key}".upper())


class SecretRef(Model):
    """A Secret in the job's namespace whose keys become environment variables of the job's pods."""

    name: ObjectName
    """Name of the Secret."""


class ModelSource(Model):
    """A causal language model: config, tokenizer and safetensors files, or one GGUF file."""

    uri: ModelUri
    """Location: hf://ORG/NAME, s3://BUCKET/KEY, gs://BUCKET/KEY, pvc://CLAIM/PATH, file://PATH
    (relative to the manifest), pkg://PACKAGE/FILE (in an installed Python package) or job://NAME
    (the result of an earlier job)."""
    revision: str | None = Field(default=None, min_length=1, max_length=128)
    """Branch, tag or commit of an hf:// model. None: the default branch."""
    token_secret: SecretKeyRef | None = None
    """Access token of a gated hf:// model. None: anonymous access (`tuneyard run`: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""

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


class Toxicity(Model):
    """The treatment of rows that a classifier calls toxic. Each turn without the system prompt is
    classified by itself, in windows if it is long; the highest probability counts."""

    classifier: ModelSource
    """Sequence classification model in safetensors, with its tokenizer. No code of it is run."""
    labels: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=64
    )
    """Labels of the classifier that are toxic, as its config names them."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability of any of these labels from which a row is toxic."""
    treatment: Literal["report", "drop"] = "report"
    """report: toxic rows are counted. drop: they are left out."""


class Cleaning(Clean):
    """Rules that remove or change rows. The ledger of the prepare stage counts each rule's rows and
    shows the first three. They apply to training and held-out rows alike."""

    toxicity: Toxicity | None = Field(default=None, exclude_if=lambda value: value is None)
    """Search for toxic rows by a classifier. None: none is searched for."""


URL_PATTERN = r"^https?://[^\s]+$"


class JudgeEndpoint(Model):
    """An OpenAI-compatible chat endpoint."""

    url: str = Field(max_length=1024, pattern=URL_PATTERN)
    """Base URL of the API, e.g. https://judge.example/v1."""
    model: str = Field(min_length=1, max_length=256)
    """Name of the model at the endpoint."""
    key: SecretKeyRef | None = None
    """The API key. None: requests carry no authorization header."""
    max_requests: int | None = Field(default=None, ge=1)
    """Budget in requests, retries included: no request is sent after this many. None: no limit."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Budget in tokens of prompts and replies, as the endpoint counts them. None: no limit."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Most requests in flight at once."""
    timeout_seconds: int = Field(default=120, ge=1, le=3600)
    """Timeout of one request, in seconds."""
    max_attempts: int = Field(default=6, ge=1, le=32)
    """Most attempts for one question, the first one included."""
    label_tokens: int = Field(default=16, ge=1, le=32768)
    """Longest reply to a comparison, in tokens. Set more for a model that reasons before it
    replies."""


class Judge(OneOf):
    """The model that compares or criticizes completions, or that writes training rows. Set exactly
    one field."""

    model: ModelSource | None = None
    """A causal language model that the job's workers run."""
    endpoint: JudgeEndpoint | None = None
    """A model behind an OpenAI-compatible endpoint."""


QuestionText = Annotated[str, Field(min_length=1, max_length=16384)]


DataFormat = Literal[
    "auto",
    "messages",
    "alpaca",
    "dolly",
    "flan",
    "question-answer",
    "sharegpt",
    "openassistant",
    "ultrachat",
    "prompt-completion",
    "text",
    "preference",
    "ranking",
    "labeled",
    "feedback",
]


def _column() -> Any:
    """Return the field of a column that plans leave out where it is None, so that the plan of a
    manifest without it keeps its bytes and its digest."""
    return Field(default=None, min_length=1, max_length=128, exclude_if=lambda value: value is None)


class FieldMap(Model):
    """The names that a file uses for the fields of its format."""

    messages: str | None = Field(default=None, min_length=1, max_length=128)
    """Field of the list of chat turns (formats messages, sharegpt, ultrachat, and the turns before
    rated answers). None: the format's own name."""
    system: str | None = Field(default=None, min_length=1, max_length=128)
    """Field of the system prompt (every format of conversations but flan and ultrachat). None: the
    format's own name; messages has none."""
    prompt: str | None = Field(default=None, min_length=1, max_length=128)
    """Field of the prompt (`prompt`; `instruction` in alpaca, `inputs` in flan). None: the
    format's own name."""
    input: str | None = _column()
    """Field of a text that follows the prompt after an empty line, such as Dolly's `context`. None:
    `input` beside an `instruction`, and no text beside any other prompt."""
    completion: str | None = Field(default=None, min_length=1, max_length=128)
    """Field of the completion (`completion`; `output` in alpaca, `targets` in flan). None:
    the format's own name."""
    text: str | None = Field(default=None, min_length=1, max_length=128)
    """Field of the document (format text), or of a message's text (format openassistant). None:
    `text`."""
    history: str | None = _column()
    """Field of the earlier turns, as pairs of question and answer (format alpaca). None:
    `history`."""
    tools: str | None = _column()
    """Field of the tools that the assistant may call, as a list or as JSON text. None: `tools`."""
    reasoning: str | None = _column()
    """Field of the reasoning before the completion. None: no field; turns have their own."""
    expected: str | None = _column()
    """Field of the right answers, which an evaluation compares completions with. None:
    `expected`."""
    role: str | None = _column()
    """Key of the role in a turn, or in a message of a tree. None: `role`, or `from`."""
    content: str | None = _column()
    """Key of the text in a turn. None: `content`, or `value`."""
    chosen: str | None = _column()
    """Field of the better answer (format preference). None: `chosen`."""
    rejected: str | None = _column()
    """Field of the worse answer (format preference). None: `rejected`."""
    answers: str | None = _column()
    """Field of the list of answers (format ranking). None: `answers`, `responses` or
    `completions`."""
    ranks: str | None = _column()
    """Field of the answers' ranks; 1 is best (format ranking). None: `ranks`."""
    scores: str | None = _column()
    """Field of the answers' scores; higher is better (format ranking), or of the score of one
    answer (format feedback). None: `scores`; `score` in feedback."""
    answer: str | None = _column()
    """Key of the text in each of the `answers` (format ranking). None: `answer`, `response`, `text`
    or `generation`."""
    rank: str | None = _column()
    """Key of the rank in each of the `answers` (format ranking), or in a message (format
    openassistant). None: `rank`."""
    score: str | None = _column()
    """Key of the score in each of the `answers` (format ranking). None: `overall_score`, `score` or
    `rating`."""
    score_chosen: str | None = _column()
    """Field of the better answer's score (format preference). None: `score_chosen`."""
    score_rejected: str | None = _column()
    """Field of the worse answer's score (format preference). None: `score_rejected`."""
    probability: str | None = _column()
    """Field of the probability that the chosen answer is better (format preference). None:
    `probability`."""
    instances: str | None = _column()
    """Field of the list of inputs and outputs of one instruction (format alpaca). None:
    `instances`."""
    parent: str | None = _column()
    """Field of the id of the message before (format openassistant). None: `parent_id`."""
    replies: str | None = _column()
    """Field of the replies to a message (format openassistant, trees). None: `replies`."""
    deleted: str | None = _column()
    """Field that says whether a message was deleted (format openassistant). None: `deleted`."""
    reviewed: str | None = _column()
    """Field that says whether a message was accepted (format openassistant). None:
    `review_result`."""
    label: str | None = _column()
    """Field of the label of a single completion (formats labeled, feedback). None: `label`,
    `thumbs` or `kto_tag`."""
    event: str | None = _column()
    """Field of the kind of an event (format feedback). None: `event`."""
    id: str | None = _column()
    """Field of the id of a request or an answer (format feedback), or of a message (format
    openassistant). None: `id`; `message_id` in openassistant."""
    of: str | None = _column()
    """Field of the id that an event is about (format feedback). None: `of`."""
    by: str | None = _column()
    """Field of the id of the answer that replaced a retried one (format feedback). None: `by`."""
    session: str | None = _column()
    """Field of the session's id (format feedback). None: `session` or `session_id`."""
    document: str | None = _column()
    """Field of the id of the document that answers a row (with `retrieval`). None: `document`."""


class Dataset(Model):
    """A data set: a file, or a folder or glob of files of one format."""

    uri: DataUri
    """Location: file://data/train.jsonl (relative to the manifest), s3://BUCKET/KEY,
    hf://datasets/ORG/NAME/file.parquet, pvc://CLAIM/PATH or pkg://PACKAGE/FILE. The suffix decides
    between JSONL, JSON, CSV, Parquet and text; each may be compressed (.gz, .bz2, .xz, .zst)."""
    format: DataFormat = "auto"
    """Format of a row. auto: detected from the first rows and logged."""
    fields: FieldMap = FieldMap()
    """Names of the fields, if the file does not use the format's own."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch contains each row: 1.0 once, 2.0 twice, 0.5 a fixed, seeded half of the
    rows."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read, from the start. None: all."""
    paths: Literal["best", "all"] = Field(default="best", exclude_if=lambda paths: paths == "best")
    """Conversations taken from a tree of messages (format openassistant). best: the one that
    follows the best reply at each turn. all: one for each last answer."""
    token_secret: SecretKeyRef | None = None
    """Access token of a gated hf:// data set. None: anonymous access (`tuneyard run`: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""


class PromptSet(Model):
    """A data set of which only the prompts are used, to sample completions for them."""

    uri: DataUri
    """Location, as for any data set."""
    format: DataFormat = "auto"
    """Format of a row. auto: detected from the first rows and logged."""
    fields: FieldMap = FieldMap()
    """Names of the fields, if the file does not use the format's own."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read, from the start. None: all."""
    reasoning: Literal["keep", "drop"] = Field(
        default="keep", exclude_if=lambda reasoning: reasoning == "keep"
    )
    """Treatment of the reasoning in the assistant's turns of a prompt. keep: render it where the
    chat template does. drop: leave it out."""
    token_secret: SecretKeyRef | None = None
    """Access token of a gated hf:// data set. None: anonymous access (`tuneyard run`: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""


class DocumentFields(Model):
    """The names that a file of documents uses for its fields."""

    id: str = Field(default="id", min_length=1, max_length=128)
    """Field of a document's id, which rows name in their field `document`."""
    text: str = Field(default="text", min_length=1, max_length=128)
    """Field of a document's text."""


class Documents(Model):
    """The documents that answer the rows: text or Markdown files, each of them one document, or
    rows with an id and a text."""

    uri: DataUri
    """Location, as for any data set. The id of a text file is its name relative to the folder."""
    fields: DocumentFields = DocumentFields()
    """Names of the fields of rows."""
    token_secret: SecretKeyRef | None = None
    """Access token of a gated hf:// data set. None: anonymous access (`tuneyard run`: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""


class Retrieval(Model):
    """A context of numbered passages before each question (RAFT, arXiv:2403.10131). The passages
    are ranked by BM25. Each row must have one question and one answer."""

    documents: Documents
    """The documents that the passages are cut from."""
    passages: int = Field(default=4, ge=1, le=64)
    """Passages of a context. Those that are not the right one are distractors: the best matches to
    the question from other documents."""
    gold_share: float = Field(default=0.8, ge=0, le=1)
    """Share of the rows whose context has the right passage. The others have distractors only. A
    row's content decides, so that equal rows have equal contexts."""
    passage_words: int = Field(default=100, ge=8, le=4096)
    """Longest passage, in words. A longer document is cut into passages of nearly equal length."""
    cite: bool = True
    """Append the number of the right passage to the answer, as in `[2]`, where the context has
    it."""


class Validation(OneOf):
    """The held-out rows. Set exactly one field."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows to hold out, chosen by a fixed seed; at least one row."""
    data: list[Dataset] | None = Field(default=None, min_length=1, max_length=64)
    """Separate data sets, which training does not read."""


class Replay(Model):
    """General data that is trained on beside the job's own, against forgetting."""

    data: list[Dataset] = Field(min_length=1, max_length=16)
    """The data sets. `weight` divides the share among them. No row of them is held out."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of an epoch's sequences. The job's own rows stay as many as they were."""


class Paraphrase(Model):
    """A model asks the question of a row in other words. The answer stays."""

    per_row: int = Field(default=1, ge=1, le=16)
    """Paraphrases of each chosen row, each by another request."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the rows to paraphrase, chosen by their content and a fixed seed."""
    requests: list[QuestionText] | None = Field(default=None, min_length=1, max_length=16)
    """Templates of what the model is asked; {prompt} is replaced by the question. None: Tuneyard's
    four default requests."""


class Inversion(Model):
    """A model writes a question for the answer of a row, which becomes a new row with the old
    answer (instruction backtranslation, Li et al. 2023, arXiv:2308.06259). For rows with one
    question and one answer."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Share of these rows, chosen by their content and a fixed seed."""
    request: QuestionText | None = None
    """Template of what the model is asked; {answer} and {prompt} are replaced by the answer and the
    old question. None: Tuneyard's default request, which does not show the old question."""


class Augment(Model):
    """New training rows, made from those of `train` and marked. None of them is held out, and none
    is made from a row that is held out or left out. Set at least one of paraphrase, inversion and
    templates."""

    by: Judge | None = None
    """The model that writes paraphrases and questions. None: the model that is trained, before it
    is trained."""
    paraphrase: Paraphrase | None = None
    """Questions in other words. None: none."""
    inversion: Inversion | None = None
    """New questions for the answers. None: none."""
    templates: list[QuestionText] | None = Field(default=None, min_length=1, max_length=32)
    """Texts with {prompt} in them. Each row is repeated with its question in each of them. None:
    none."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch contains each new row, as for any data set."""
    max_new_tokens: int = Field(default=128, ge=1, le=32768)
    """Longest reply of the model, in tokens."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.paraphrase) || has(self.inversion) || has(self.templates)",
            holds=lambda augment: bool(
                augment.paraphrase or augment.inversion or augment.templates
            ),
            message="set at least one of paraphrase, inversion, templates",
            reads=("paraphrase", "inversion", "templates"),
        ),
        Rule(
            cel="!has(self.by) || has(self.paraphrase) || has(self.inversion)",
            holds=lambda augment: (
                augment.by is None or bool(augment.paraphrase or augment.inversion)
            ),
            message="writes paraphrases and questions, and neither is asked for: set paraphrase or "
            "inversion, or remove by",
            path="by",
            reads=("by", "paraphrase", "inversion"),
        ),
    )


class FillMarkers(Model):
    """The special tokens before the parts of a document: each one token of the model's tokenizer,
    in none of the documents."""

    prefix: str = Field(min_length=1, max_length=64)
    """Token before the text that precedes the gap."""
    suffix: str = Field(min_length=1, max_length=64)
    """Token before the text that follows the gap."""
    middle: str = Field(min_length=1, max_length=64)
    """Token before the text of the gap."""


class FillInTheMiddle(Model):
    """Continued pre-training also learns to write what lies between two texts (Bavarian et al.
    2022)."""

    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of the training sequences of documents whose middle part comes last. The others stay as
    they are."""
    mode: Literal["psm", "spm", "both"] = "both"
    """Order of the parts. psm: prefix, suffix, middle. spm: suffix, prefix, middle. both: each for
    half of the changed sequences."""
    markers: FillMarkers | None = None
    """Tokens before the parts. None: the model's own, as of Qwen2.5-Coder, StarCoder,
    DeepSeek-Coder or Code Llama."""


class FineTuneData(Model):
    """The training and held-out data, and how rows become sequences."""

    train: list[Dataset] = Field(min_length=1, max_length=64)
    """The training data sets; their rows are shuffled together."""
    temperature: float | None = Field(default=None, gt=0, le=100, exclude_if=lambda t: t is None)
    """Evens out data sets of unequal size: the part of each in an epoch is in proportion to the
    (1/temperature)th power of its sequences times `weight`. 1: as they are; the higher, the more
    alike. The epoch keeps its length. None: 1."""
    replay: Replay | None = Field(default=None, exclude_if=lambda replay: replay is None)
    """General data against forgetting. None: none."""
    fill_in_the_middle: FillInTheMiddle | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Learn to fill gaps too (method pretrain, documents). None: documents stay as they are."""
    validation: Validation | None = None
    """The held-out rows. None: no rows are held out; there is no held-out loss, early stopping or
    gate."""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | Literal["auto"] = "auto"
    """Longest sequence, in tokens. auto: 1024, or the model's context length if that is shorter."""
    on_overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """Treatment of a longer row. error: fail the stage. drop: leave the row out. truncate: cut its
    end off. split: make several sequences of it, each without the context of the previous ones.
    The stage's record counts the rows."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """Treatment of an invalid row. error: fail the stage. skip: leave the row out; skipped rows
    are counted and the first three are logged."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Pack several short sequences into one row of a batch; they do not attend to each other, and
    no token is lost. auto: if the model's attention supports it."""
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    """Tokens of chat data with loss. assistant: all assistant turns. last-assistant: the last one.
    all: every token. A turn with `weight` or `train` decides for itself, except with all."""
    reasoning: Literal["keep", "drop"] = Field(
        default="keep", exclude_if=lambda reasoning: reasoning == "keep"
    )
    """Treatment of the assistant's reasoning (`reasoning_content` or `thinking` of a turn, and
    <think> at the start of its text). keep: render it and train on it where the chat template
    does. drop: leave it out."""
    system_prompt: str | None = Field(default=None, max_length=32768)
    """System prompt of rows that have none. None: no system prompt is added; the chat template's
    default, if any, applies."""
    chat_template: str | None = Field(default=None, max_length=65536)
    """Jinja chat template in place of the tokenizer's. None: the tokenizer's own."""
    # Both are left out of plans where they have no effect, so that a plan of 0.2.0 keeps its bytes.
    clean: Cleaning | None = Field(default=None, exclude_if=lambda value: value is None)
    """Rules that remove or change rows before they are tokenized. None: rows stay as they are."""
    leaks: Literal["warn", "error", "off"] = Field(
        default="warn", exclude_if=lambda value: value == "warn"
    )
    """Treatment of held-out rows, and of items of suites, that are also in the training data: 13
    words in sequence, or nearly all words. warn: name them in the log, the record and the report.
    error: fail the stage. off: do not search for them."""
    retrieval: Retrieval | None = Field(default=None, exclude_if=lambda value: value is None)
    """A context of retrieved passages before each question. None: rows stay as they are."""
    augment: Augment | None = Field(default=None, exclude_if=lambda value: value is None)
    """New training rows made from those of `train`. None: none."""


class Output(Model):
    """The location of the result and its content."""

    uri: OutputUri
    """Folder of the result: pvc://CLAIM/PATH, s3://BUCKET/KEY, gs://BUCKET/KEY or file://PATH
    (relative to the manifest). Each job needs a folder of its own."""
    merge: bool = False
    """Also write a model with the adapter merged into the base weights. Full fine-tuning always
    writes a whole model."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """Treatment of the output when the job is deleted. Retain: keep it. Delete: delete it."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// folder, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""
