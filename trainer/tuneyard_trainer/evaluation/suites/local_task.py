"""A task of lm-evaluation-harness over rows of the manifest: the harness gets rendered texts alone.

The templates of the task file are rendered in a sandbox, in a process with limits. The task that
the harness runs reads plain columns, so it renders nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.example import RowError, printable
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN
from tuneyard_trainer.evaluation.bounded import BoundedProcess
from tuneyard_trainer.evaluation.suites.rows import read_items
from tuneyard_trainer.evaluation.suites.task_file import TaskFile, read_task_file
from tuneyard_trainer.reinforcement.patterns import Pattern

ROW_SECONDS = 5.0
"""The longest rendering of one row. It takes microseconds."""
CHILD = "tuneyard_trainer.evaluation.suites.template_child"
EXPECTED = "the columns that the task file names"
SPLIT = "test"

Columns = Mapping[str, Sequence[Any]]
"""The rendered texts of all rows: text, target, description, and choices if there are any."""


def local_task(name: str, file: Path, rows: Path, field: str) -> Callable[[], Any]:
    """Return what makes a task for the harness, named `name`.

    `file`: the task file. `rows`: the rows. `field`: the task's field in the manifest. Raises
    StageError TaskFailed, InvalidData and those of `read_items`.
    """
    task = read_task_file(file, f"{field}.file.uri")
    found = read_items(rows, dict, None, f"{field}.data.uri", EXPECTED)
    return partial(_configured, name, task, rendered(task, found, f"{field}.data.uri"))


def rendered(task: TaskFile, rows: Mapping[str, Mapping[str, Any]], field: str) -> Columns:
    """Return the texts of all rows, which are by their file and row. `field`: the rows' field.
    Raises StageError TaskFailed for a template that does not end, and InvalidData."""
    empty = dict.fromkeys(column for row in rows.values() for column in row)
    columns: dict[str, list[Any]] = {"text": [], "target": [], "description": []}
    if task.doc_to_choice is not None:
        columns["choices"] = []
    faults: list[str] = []
    with BoundedProcess(CHILD, "renders the templates of task files") as process:
        for where, row in rows.items():
            # As in the harness, a column that only other rows have is empty.
            request = {"fields": task.fields, "row": {**empty, **row}}
            found = process.ask(request, ROW_SECONDS)
            if found is None:
                raise StageError(
                    "TaskFailed",
                    f"{field}: the templates of the task file did not end within {ROW_SECONDS:g} "
                    f"seconds, or needed too much memory, for {where}.",
                    advice="Shorten the loops of the templates.",
                )
            try:
                texts = _checked(found, task)
            except RowError as error:
                faults.append(f"{where}: {error}")
                continue
            for column, values in columns.items():
                values.append(texts[column])
    kinds = {type(target) for target in columns["target"]}
    if not faults and len(kinds) > 1:
        faults.append("some rows have a list of targets, and others a single one")
    if faults:
        raise StageError(
            "InvalidData",
            f"{field}: {len(faults)} of {len(rows)} rows are no items of this suite. "
            f"{'; '.join(faults[:FAULTS_SHOWN])}.",
            advice="Correct the templates and columns that the task file names, or the rows.",
        )
    return columns


def _checked(found: Mapping[str, Any], task: TaskFile) -> dict[str, Any]:
    """Return the rendered fields of a row as the harness takes them. Raises RowError."""
    if "error" in found:
        raise RowError(printable(str(found["error"])), "UnknownShape")
    text, target, choices = found["text"], found["target"], found["choices"]
    if not isinstance(text, str):
        raise RowError(f"doc_to_text is a text, and it is {text!r}", "UnknownShape")
    if task.doc_to_choice is None:
        target = _answers(target, task)
    else:
        choices, target = _options(choices), _place(target, choices)
    description = found["description"]
    if not isinstance(description, str):
        raise RowError(f"description is a text, and it is {description!r}", "UnknownShape")
    return {"text": text, "target": target, "choices": choices, "description": description}


def _answers(target: Any, task: TaskFile) -> str | list[str]:
    """Return the right answer or answers, a number as its text."""
    if isinstance(target, list) and task.output_type == "generate_until" and target:
        others = {entry.metric for entry in task.metric_list or ()} - {"exact_match"}
        if others:
            names = ", ".join(sorted(others))
            raise RowError(
                f"doc_to_target is a list, which exact_match alone compares: remove {names}"
            )
        if all(isinstance(each, str) for each in target):
            return target
    elif isinstance(target, str | int | float) and not isinstance(target, bool):
        return str(target)
    raise RowError(f"doc_to_target is a text, and it is {target!r}", "InvalidLabel")


def _options(choices: Any) -> list[str]:
    given = choices if isinstance(choices, list) else []
    if len(given) > 1 and all(isinstance(each, str) and each for each in given):
        return given
    raise RowError(f"doc_to_choice is at least two texts, and it is {choices!r}", "UnknownShape")


def _place(target: Any, choices: Any) -> int:
    """Return the place of the right option."""
    if isinstance(target, str) and target in choices:
        return int(choices.index(target))
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
        return target
    raise RowError(
        f"doc_to_target is the place or the text of an option, and it is {target!r}", "InvalidLabel"
    )


def _regex_filter(**settings: Any) -> Any:
    """Return the filter `regex` of the harness, which itself would search without an end."""
    from lm_eval.filters.extraction import RegexFilter

    found = RegexFilter(**settings)
    found.regex = Pattern(found.regex_pattern)
    return found


def _filters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters of a task, if it has any."""
    functions = {"regex": _regex_filter}
    return {
        key: [
            {
                **each,
                "filter": [
                    {**step, "function": functions.get(step["function"], step["function"])}
                    for step in each["filter"]
                ],
            }
            for each in value
        ]
        for key, value in config.items()
        if key == "filter_list"
    }


def _configured(name: str, task: TaskFile, columns: Columns) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = Dataset.from_dict(dict(columns))
    own = task.config()
    config = {
        **own,
        **_filters(own),
        "task": name,
        "custom_dataset": lambda **_: {SPLIT: data},
        "test_split": SPLIT,
        "fewshot_split": SPLIT,  # a question is never among its own examples
        "doc_to_text": "text",
        "doc_to_target": "target",
    }
    config |= {"doc_to_choice": "choices"} if "choices" in columns else {}
    config |= {"description": "description"} if any(columns["description"]) else {}
    return ConfigurableTask(config=config)
