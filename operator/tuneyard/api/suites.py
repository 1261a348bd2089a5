"""Suites: measurements of what the model can do beside the task that it is tuned for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from tuneyard.api.answer_metrics import AnswerMetric
from tuneyard.api.meta import Model, Rule
from tuneyard.api.sources import DataUri, SecretKeyRef, SecretRef

SUITE_PATTERN = r"^[a-zA-Z]([-_a-zA-Z0-9]*[a-zA-Z0-9])?$"
SuiteName = Annotated[str, Field(min_length=1, max_length=40, pattern=SUITE_PATTERN)]
TASK_PATTERN = r"^[^\s,]+$"


class SuiteData(Model):
    """The file with a suite's rows."""

    uri: DataUri
    """Location, as for any data set."""
    token_secret: SecretKeyRef | None = None
    """Access token of a gated hf:// data set. None: anonymous access (`tuneyard run`: HF_TOKEN)."""
    credentials: SecretRef | None = None
    """Credentials of an s3:// or gs:// source, as environment variables. None: the credentials of
    the environment, e.g. of the service account."""


class SuiteAnswers(SuiteData):
    """Prompts, the answers that they should get, and the metrics that compare both."""

    metrics: list[AnswerMetric] = Field(default=[], max_length=8)
    """Metrics of the answers (docs/task-metrics.md)."""
    answer_schema: str | None = Field(default=None, min_length=2, max_length=65536)
    """A JSON Schema, as JSON text, that answers should satisfy; the metric is schemaValid. None:
    not measured."""
    answer_pattern: str | None = Field(default=None, min_length=1, max_length=4096)
    """A regular expression that should be found in answers; the metric is patternMatch. None: not
    measured."""
    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    """Longest answer, in tokens."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="size(self.metrics) > 0 || has(self.answerSchema) || has(self.answerPattern)",
            holds=lambda answers: bool(
                answers.metrics or answers.answer_schema or answers.answer_pattern
            ),
            message="measures nothing: set metrics, answerSchema or answerPattern",
            reads=("metrics", "answerSchema", "answerPattern"),
        ),
    )


class HarnessTask(Model):
    """A task of lm-evaluation-harness, with its own prompts and metrics: one that it knows, or one
    of a task file."""

    name: str | None = Field(default=None, min_length=1, max_length=128, pattern=TASK_PATTERN)
    """Name of the task or of a group of tasks, e.g. arc_easy. Its data comes from the hub. None:
    the task is in a file."""
    file: SuiteData | None = None
    """Task file (YAML) of the harness, with the keys that docs/evaluation.md lists. None: the
    harness knows the task."""
    data: SuiteData | None = None
    """The rows of the task in the file. None: the harness knows the task."""
    few_shot: int | None = Field(default=None, ge=0, le=64)
    """Worked examples before each question. None: as the task says."""
    chat_template: bool = False
    """Whether questions are rendered by the model's chat template."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.name) != has(self.file)",
            holds=lambda task: (task.name is None) != (task.file is None),
            message="set exactly one of name and file",
            reads=("name", "file"),
        ),
        Rule(
            cel="has(self.file) == has(self.data)",
            holds=lambda task: (task.file is None) == (task.data is None),
            message="a task file has its rows in data: set both file and data, or neither",
            reads=("file", "data"),
        ),
    )


LOWER_IS_BETTER = frozenset({"overRefusal", "unsafeCompliance"})
"""The metrics of suites of which the lowest value is the best."""
MAIN = frozenset({"accuracy", *LOWER_IS_BETTER})
"""The metrics of suites that are shown where there is little room."""
KINDS = ("choices", "answers", "refusals", "task")
"""The fields of a suite of which exactly one is set."""


def given(suite: Any) -> list[str]:
    """Return the kinds of items that are set: exactly one in a valid suite."""
    return [kind for kind in KINDS if getattr(suite, kind) is not None]


def is_main(metric: str) -> bool:
    """Return whether a metric is a main one of a suite, SUITE/METRIC."""
    suite, slash, name = metric.partition("/")
    return bool(suite and slash) and name in MAIN


class Suite(Model):
    """Items on which the tuned model and the model before it are measured. Set exactly one of
    choices, answers, refusals and task."""

    name: SuiteName
    """Name of the suite. Its metrics are NAME/METRIC, in the result and in gates."""
    choices: SuiteData | None = None
    """Multiple choice by log-probability. Rows: good and bad texts; or question, choices and
    answer; or input and target_scores; or the columns of TruthfulQA."""
    answers: SuiteAnswers | None = None
    """Prompts that the models answer. Rows: prompt (or messages) and target, a text or several."""
    refusals: SuiteData | None = None
    """Prompts that should be answered, and prompts that should be refused. Rows: prompt and label
    (safe or unsafe), as in XSTest."""
    task: HarnessTask | None = None
    """A task of lm-evaluation-harness."""
    limit: int | None = Field(default=None, ge=1)
    """Number of items, from the start. None: all."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="[has(self.choices), has(self.answers), has(self.refusals), has(self.task)]"
            ".filter(present, present).size() == 1",
            holds=lambda suite: len(given(suite)) == 1,
            message="set exactly one of choices, answers, refusals, task",
            reads=KINDS,
            found=lambda suite: " and ".join(given(suite)) or "none",
        ),
    )


class TrainingSuite(Model):
    """A suite that is measured during training."""

    name: SuiteName
    """Name of a suite of `evaluate.suites` with choices or refusals."""
    limit: int = Field(default=100, ge=1)
    """Number of its items that are measured: a random choice that is the same each time."""
