"""The comparison of several jobs as a document: what `tuneyard compare` shows and prints as JSON.

Texts are raw: those of models and data rows may contain anything. Numbers that are not finite are
null. A reader ignores fields that it does not know.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuneyard.api.report import Curve, Document, Interval

VERSION = 1
"""Increased when a field is removed or changes its meaning, not when one is added."""
MAX_JOBS = 8
"""Most jobs of a comparison: as many as there are colors that color-blind readers can tell
apart."""

Basis = Literal["paired", "unpaired", "otherRows", "otherUnit"]
"""How a difference was found.

- paired: from the values of both jobs for the same items.
- unpaired: from the interval of each job. It is not known that the items are the same, or not
  what their values are.
- otherRows: as unpaired, and the items are known to be others. The difference may come from them.
- otherUnit: not at all. The values of the same items have other weights, such as other tokens.
"""


class ComparedJob(Document):
    """One of the jobs."""

    label: str
    """The job's name, with its output if several jobs have the name."""
    name: str
    output: str
    """Folder or URL of the output, without secrets."""
    sentence: str = ""
    """The base model, the method and the adapter in words."""
    base_model: str = ""
    method: str = ""
    adapter: str | None = None
    evaluated: bool = True
    """Whether the job has an evaluation."""


class Difference(Document):
    """The difference between two jobs in one metric."""

    first: int
    """Number of a job, from 0, in `jobs`."""
    second: int
    value: float | None = None
    """Value of the second job minus that of the first, of the same items if the difference is
    paired. None: not known."""
    interval: Interval | None = None
    """95% interval of `value`. None: not known."""
    basis: Basis
    items: int | None = None
    """Items that both jobs have values for. None: the difference is not paired."""
    better: int | None = None
    """Number of the job that is better: the interval excludes 0, and the rows are not others. None:
    no clear difference, or no direction of the metric is better."""


class MetricRow(Document):
    """One metric of all jobs."""

    metric: str
    """Name of the metric; of a suite SUITE/NAME."""
    label: str
    """Name for people, with the unit."""
    is_share: bool = False
    """Whether the values are shares from 0 to 1."""
    higher_is_better: bool | None = None
    """Direction of the metric. None: neither direction is better in itself, or it is unknown."""
    base: float | None = None
    """Value of the base model. None: not measured, or the jobs do not agree on it."""
    values: list[float | None]
    """Of each job. None: not measured, or not finite."""
    intervals: list[Interval | None]
    """95% interval of each value. None: unknown."""
    items: list[int | None]
    """Items of each value. None: unknown."""
    best: int | None = None
    """Number of the job that is better than each other job. None: there is none."""
    differences: list[Difference] = Field(default=[])
    """Of each two jobs that both have a value."""


class Setting(Document):
    """A field of the manifests that differs."""

    field: str
    """Path of the field."""
    values: list[str | None]
    """Value of each job, as YAML in one line. None: the manifest does not have the field, or is
    not known."""


class Cost(Document):
    """One cost of all jobs, such as the time of the training."""

    name: Literal[
        "trainingSeconds",
        "seconds",
        "tokens",
        "tokensPerSecond",
        "peakMemoryBytes",
        "trainedParameters",
        "steps",
    ]
    label: str
    values: list[float | None]
    """Of each job. None: unknown."""


class Completion(Document):
    """The completion of one job."""

    text: str
    right: bool | None = None
    """Whether it is right. None: not checked."""


class ComparedAnswer(Document):
    """One prompt with the completions of all jobs."""

    id: str
    """Name of the item in the first job that has it. "": unknown."""
    prompt: str
    reference: str = ""
    """The expected completion. "": unknown."""
    base: Completion | None = None
    """Of the base model. None: not measured, or the jobs do not agree on it."""
    completions: list[Completion | None]
    """Of each job. None: the job did not complete the prompt, or does not show it."""
    differ: bool = False
    """Whether the completions are not all equal."""
    worse: bool = False
    """Whether a job's completion is wrong where the one of the first job is right."""
    length: int = 0
    """Characters of the longest completion."""


class ComparedCurves(Document):
    """The training curves of one job."""

    job: int
    """Number of the job."""
    curves: list[Curve]


class Comparison(Document):
    """Several jobs, compared."""

    version: int = VERSION
    kind: Literal["Comparison"] = "Comparison"
    jobs: list[ComparedJob]
    sentences: list[str]
    """The result in words, the most important sentence first."""
    notes: list[str] = Field(default=[])
    """Sentences on comparisons that are not possible or may mislead."""
    metrics: list[MetricRow] = Field(default=[])
    settings: list[Setting] = Field(default=[])
    costs: list[Cost] = Field(default=[])
    answers: list[ComparedAnswer] = Field(default=[])
    curves: list[ComparedCurves] = Field(default=[])

    def to_json(self) -> str:
        """Return the comparison as JSON: camelCase fields, indented by one space."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
