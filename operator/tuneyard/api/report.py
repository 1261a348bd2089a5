"""The report of a job as a document: `report.json`, which the page shows and `compare` reads.

Texts are raw: those of models and data rows may contain anything. Numbers that are not finite are
null. A reader ignores fields that it does not know.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from tuneyard.api.gates import GateResult
from tuneyard.api.meta import Report

REPORT = "report.json"
"""The file in the folder of the export stage."""
VERSION = 1
"""Increased when a field is removed or changes its meaning, not when one is added."""

Interval = tuple[float, float]
"""Lower and upper end of a 95% interval; a list of two numbers in JSON."""
Verdict = Literal["better", "worse", "unclear", "equal", "none"]
Scope = Literal["heldOut", "suite", "alignment"]


class Document(Report):
    """Base class of the parts. `strict` is off: JSON has lists for tuples."""

    model_config = ConfigDict(strict=False)


class ReportedJob(Document):
    """The job that the report is about."""

    name: str
    """Name of the job."""
    kind: str
    """FineTuneJob or AlignmentJob."""
    base_model: str
    """URI of the base model, without secrets. "": unknown."""
    base_revision: str | None = None
    """Revision of the base model. None: the default one."""
    method: str
    """Training method, such as sft or dpo."""
    adapter: str | None = None
    """Kind of the adapter, such as lora. None: all weights were trained."""
    seed: int | None = None
    """Seed of the training. None: unknown."""
    versions: dict[str, str] = Field(default={})
    """Versions of the software that trained the model, by package; `tuneyard` is the code's."""
    sentence: str = ""
    """The base model, the method and the adapter in words."""


class Comparison(Document):
    """One metric of the models."""

    metric: str
    """Name of the metric; of a suite SUITE/NAME."""
    label: str
    """Name for people, with the unit."""
    scope: Scope
    """heldOut: held-out rows of the job's own data. alignment: completions of prompts. suite: the
    items of a suite."""
    suite: str | None = None
    """Name of the suite. None: another scope."""
    is_share: bool = False
    """Whether the values are shares from 0 to 1, which the page shows in percent."""
    higher_is_better: bool | None = None
    """Direction of the metric. None: neither direction is better in itself."""
    items: int | None = None
    """Items that the values are means of. None: unknown."""
    base: float | None = None
    """Value of the base model, or of the model that an alignment started from. None: not
    measured."""
    base_interval: Interval | None = None
    base_is_chance: bool = False
    """Whether `base` is the value of a random choice and not of a model."""
    few_shot: float | None = None
    """Value of the base model with worked examples in the prompt. None: not measured."""
    few_shot_interval: Interval | None = None
    tuned: float | None = None
    """Value of the tuned model. None: not finite."""
    tuned_interval: Interval | None = None
    difference: float | None = None
    """tuned - base, of the same items. None: no base."""
    difference_interval: Interval | None = None
    few_shot_difference: float | None = None
    """tuned - fewShot, of the same items. None: not measured."""
    few_shot_difference_interval: Interval | None = None
    clear: bool | None = None
    """Whether the difference is a clear one: its 95% interval excludes 0. None: no interval is
    known."""
    verdict: Verdict = "none"
    """Whether the tuned model is better. unclear: the interval contains 0. equal: no difference.
    none: no base, or no direction."""
    gained: int | None = None
    """Items that only the tuned model has right. None: the values are not right or wrong."""
    lost: int | None = None
    """Items that only the base model has right."""


class Point(Document):
    """One point of a curve."""

    step: int
    value: float | None
    """None: not finite."""


class Curve(Document):
    """One metric by optimizer step."""

    metric: str
    """loss, reward, kl, generalLoss or learningRate."""
    label: str
    """Name for people, with the unit."""
    training: list[Point] = Field(default=[])
    held_out: list[Point] = Field(default=[])
    base: float | None = None
    """Value of the base model on the held-out rows. None: not measured."""


class LedgerLine(Document):
    """One outcome of the rows that were read."""

    outcome: str
    rows: int | None = None
    """None: the line is about tokens alone."""
    tokens: int


class MaskPart(Document):
    """A part of a training row's text."""

    text: str
    trained: bool
    """Whether its tokens carry loss."""


class Score(Document):
    """The value of one metric for one answer. None: not measured."""

    tuned: float | None = None
    base: float | None = None


class Answer(Document):
    """One prompt with the completions of the models."""

    id: str
    """Name of the item, such as `row 12`; equal in reports on the same rows. "": unknown."""
    suite: str | None = None
    """Name of the suite whose prompt it is. None: it is of none."""
    prompt: str
    reference: str = ""
    """The expected completion; of a suite the targets, one a line. "": unknown."""
    expected: list[str] = Field(default=[])
    """Any of these texts in a completion makes it right."""
    base: str | None = None
    """Completion of the base model. None: not measured."""
    few_shot: str | None = None
    """Completion of the base model with worked examples. None: not measured."""
    tuned: str
    base_right: bool | None = None
    """Whether the completion is right. None: not checked."""
    few_shot_right: bool | None = None
    tuned_right: bool | None = None
    scores: dict[str, Score] = Field(default={})
    """Values of the metrics that are known for this item, by metric."""
    flipped: Literal["gained", "lost", "none"] = "none"
    """gained: only the tuned model is right. lost: only the base model is."""
    worse: bool = False
    """Whether the tuned model is worse: the answer is no longer right, or its first metric with
    another value fell."""
    length: int
    """Characters of the tuned model's completion."""
    base_length: int | None = None
    clipped: bool = False
    """Whether a text was cut off in this document."""


class Suite(Document):
    """One suite of the evaluation."""

    name: str
    kind: str = ""
    """choices, answers, refusals or task. "": unknown."""
    items: int | None = None
    metrics: list[str] = Field(default=[])
    """Metrics of its comparisons, as in `comparisons`."""


class Forgetting(Document):
    """The loss on general data, which the guard watches."""

    base_loss: float | None = None
    loss: float | None = None
    increase: float | None = None
    allowed: float | None = None
    """Largest increase that the guard allows. None: no guard."""
    stopped: str | None = None
    """How the guard stopped the training. None: it did not."""


class StageMemory(Document):
    """The memory of one stage on one worker."""

    stage: str
    measured_bytes: int | None = None
    """Measured peak of the first worker."""
    planned_bytes: int | None = None
    """Peak that was calculated before the training. None: unknown."""


class Stage(Document):
    """One finished stage."""

    name: str
    kind: str
    started_at: str
    finished_at: str
    seconds: float
    """Time of all attempts that trained, or of the last attempt of another stage."""
    attempt: int
    digest: str
    """Digest of the output."""
    reused: bool = False


class Tokens(Document):
    """Tokens of the training."""

    prepared: int | None = None
    """Tokens of the prepared rows."""
    targets: int | None = None
    """Of these, tokens that carry loss."""
    trained: int | None = None
    """Tokens of all epochs."""
    per_second: float | None = None


class Source(Document):
    """An input of the job that none of its stages wrote."""

    role: str
    """model, train.0, validation.0, documents, ..."""
    uri: str
    """Location, without secrets. "": unknown."""
    revision: str | None = None
    digest: str


class Parent(Document):
    """A job whose output this job was made from."""

    role: str
    uri: str
    """job://NAME."""


class Lineage(Document):
    """The origin of the result."""

    sources: list[Source] = Field(default=[])
    parents: list[Parent] = Field(default=[])


class File(Document):
    """A file or a folder beside the report."""

    name: str
    description: str


class JobReport(Document):
    """The report of one job."""

    version: int = VERSION
    kind: Literal["Report"] = "Report"
    job: ReportedJob
    summary: list[str]
    """Sentences: what got better, what got worse, whether it was worth it."""
    warnings: list[str] = Field(default=[])
    """Sentences on why the metrics may mislead."""
    comparisons: list[Comparison] = Field(default=[])
    gates: list[GateResult] = Field(default=[])
    """Verdicts on the gates."""
    metrics: dict[str, float | None] = Field(default={})
    """All metrics of the evaluation, by name."""
    few_shot_examples: int | None = None
    """Worked examples of the base model's prompt. None: not measured."""
    few_shot_tokens: float | None = None
    """Tokens that they add to each request."""
    curves: list[Curve] = Field(default=[])
    ledger: list[LedgerLine] = Field(default=[])
    mask_samples: list[list[MaskPart]] = Field(default=[])
    """The first training rows, in parts that carry loss and parts that do not."""
    answers: list[Answer] = Field(default=[])
    answers_held_out: bool = True
    """Whether nothing was trained on the prompts."""
    answers_total: int = 0
    """Answers of the evaluation; `answers` holds the first of them."""
    suite_answers: list[Answer] = Field(default=[])
    """Answers to the prompts of suites, some of each."""
    suites: list[Suite] = Field(default=[])
    forgetting: Forgetting | None = None
    """None: no general data is watched."""
    memory: list[StageMemory] = Field(default=[])
    """Stages that trained."""
    stages: list[Stage] = Field(default=[])
    seconds: float = 0.0
    """Time of all these stages."""
    tokens: Tokens = Tokens()
    lineage: Lineage = Lineage()
    files: list[File] = Field(default=[])

    def to_json(self) -> str:
        """Return the report as JSON: camelCase fields, indented by one space."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
