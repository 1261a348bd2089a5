"""Task files of lm-evaluation-harness: the settings that a manifest may bring.

The harness runs Python code that a task file names: by tags, includes, metrics and arguments of the
generation, and by templates, which it renders without a sandbox. So a file is read here, as plain
YAML with a fixed list of keys and values, and its templates are rendered by `local_task`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from tuneyard.api.suites import TASK_PATTERN
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.example import printable

MAX_BYTES = 1 << 16
"""The longest task file."""
SUFFIXES = (".yaml", ".yml")

OutputType = Literal["multiple_choice", "generate_until", "loglikelihood"]
METRICS: dict[OutputType, tuple[str, ...]] = {
    "multiple_choice": (
        "acc",
        "acc_norm",
        "acc_bytes",
        "acc_mutual_info",
        "brier_score",
        "f1",
        "mcc",
    ),
    "generate_until": ("exact_match", "bleu", "chrf", "chrf++", "ter"),
    "loglikelihood": ("acc", "perplexity"),
}
"""The metrics that the harness computes by itself. It would load others from the hub, as code."""

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ["str", "int", "float", "bool", "null", "seq", "map"]
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MetricEntry(_Part):
    """An item of `metric_list`."""

    metric: str
    """One of METRICS."""
    aggregation: (
        Literal[
            "mean",
            "nanmean",
            "median",
            "perplexity",
            "f1",
            "matthews_corrcoef",
            "bleu",
            "chrf",
            "chrf++",
            "ter",
            "brier_score",
        ]
        | None
    ) = None
    higher_is_better: bool | None = None
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None

    @field_validator("metric")
    @classmethod
    def _is_known(cls, name: str) -> str:
        known = dict.fromkeys(metric for metrics in METRICS.values() for metric in metrics)
        if name not in known:
            raise ValueError(
                f"{name!r} is not a metric that is read: use one of {', '.join(known)}"
            )
        return name


class Function(_Part):
    """A step of a filter of answers."""

    function: Literal["take_first", "lowercase", "uppercase", "remove_whitespace", "regex"]
    regex_pattern: str | None = Field(default=None, max_length=1000)
    group_select: int | None = None
    fallback: str | None = None

    @field_validator("regex_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern


class Filter(_Part):
    """An item of `filter_list`."""

    name: str = Field(pattern=TASK_PATTERN)
    filter: list[Function] = Field(min_length=1)


class Generation(_Part):
    """How the model answers: greedily. Other arguments could load code."""

    until: str | list[str] | None = None
    max_gen_toks: int | None = Field(default=None, ge=1, le=8192)
    do_sample: Literal[False] | None = None
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None


class Metadata(_Part):
    """The task's own version."""

    version: int | float | str


class TaskFile(_Part):
    """The keys of a task file that are read."""

    task: str | None = None
    output_type: OutputType = "generate_until"
    doc_to_text: str = Field(min_length=1)
    doc_to_target: str | int
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    description: str = ""
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0, le=64)
    generation_kwargs: Generation | None = None
    metric_list: list[MetricEntry] | None = Field(default=None, min_length=1)
    filter_list: list[Filter] | None = Field(default=None, min_length=1)
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _agrees(self) -> TaskFile:
        """Refuse keys of another output type."""
        kind = self.output_type
        if (self.doc_to_choice is not None) != (kind == "multiple_choice"):
            raise ValueError("doc_to_choice and output_type multiple_choice belong together")
        if self.generation_kwargs is not None and kind != "generate_until":
            raise ValueError("generation_kwargs belongs to output_type generate_until")
        own = METRICS[kind]
        for entry in self.metric_list or ():
            if entry.metric not in own:
                raise ValueError(
                    f"the metric {entry.metric} is none of output_type {kind}, which has "
                    f"{', '.join(own)}"
                )
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are rendered over each row."""
        names = ("doc_to_text", "doc_to_target", "doc_to_choice", "description")
        return {name: getattr(self, name) for name in names}

    def config(self) -> dict[str, Any]:
        """Return the settings of the task in the harness, as the file has them."""
        rendered = {*self.fields, "task"}
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude=rendered)


REPLACED = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "tag",
)
"""Keys of the data, which `data` of the manifest stands for, and of lists of tasks."""


def read_task_file(path: Path, field: str) -> TaskFile:
    """Return the task in a file, or in a folder with one file. `field`: the file's field in the
    manifest. Raises StageError TaskFailed, with all keys that cannot be used."""
    try:
        return TaskFile.model_validate(_loaded(_text(path)))
    except ValidationError as error:
        faults = "; ".join(_fault(each) for each in error.errors())
        raise _refused(field, faults) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refused(field, str(error) or type(error).__name__) from error


def _refused(field: str, why: str) -> StageError:
    return StageError(
        "TaskFailed",
        f"{field}: the task file cannot be used: {printable(why)}.",
        advice=f"Correct the file of {field}: docs/evaluation.md lists the keys that are read.",
    )


def _text(path: Path) -> str:
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
    if len(files) != 1:
        raise ValueError(f"the folder has {len(files)} YAML files, and one is needed")
    if (size := files[0].stat().st_size) > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, and {MAX_BYTES} are the most")
    return files[0].read_text(encoding="utf-8")


def _loaded(text: str) -> dict[str, Any]:
    """Return the keys that are read. Raises ValueError for tags, anchors and other documents."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has an alias (*name): write the value out")
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it is no mapping of keys to values")
    _require_plain(root, "")
    found: dict[str, Any] = yaml.safe_load(text)
    return {key: value for key, value in found.items() if key not in REPLACED}


def _require_plain(node: yaml.Node, where: str) -> None:
    """Raise ValueError for a tag such as !function, with its key."""
    if node.tag not in _PLAIN_TAGS:
        tag = re.sub(r"^tag:yaml\.org,2002:", "!!", node.tag)
        raise ValueError(f"{where or 'it'} has the tag {tag}, which is not read: remove it")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _require_plain(key, where)
            _require_plain(value, f"{where}.{key.value}".strip("."))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _require_plain(value, f"{where}[{number}]")


def _fault(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [*TaskFile.model_fields, *REPLACED] if len(error["loc"]) == 1 else []
        hint = f", which reads {', '.join(known)}" if known else ""
        return f"{where} is not a key that Tuneyard reads{hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
