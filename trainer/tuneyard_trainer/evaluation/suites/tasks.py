"""The tasks among the suites of an evaluation, and the check that they can be run.

Nothing here needs a model: a name that the harness does not know, and a task file that cannot be
used, are found before the first stage of a job runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tuneyard.api.stage_settings import SuiteSettings
from tuneyard_trainer.evaluation.suites import harness
from tuneyard_trainer.evaluation.suites.local_task import local_task


def suite_field(number: int) -> str:
    """Return a suite's field in the manifest."""
    return f"spec.evaluate.suites[{number}]"


def task_roles(suites: Sequence[SuiteSettings]) -> Iterator[str]:
    """Yield the roles of the inputs that the tasks read: their files and rows."""
    for number, suite in enumerate(suites):
        if suite.kind == "task" and suite.task is None:
            yield from (f"task.{number}", f"suite.{number}")


def task_of(suite: SuiteSettings, number: int, inputs: Mapping[str, Path]) -> harness.Task:
    """Return a task of the harness, or one of a file and rows of the manifest.

    `number`: that of the suite. `inputs`: those of `task_roles`. Raises StageError TaskFailed and
    InvalidData for a file or rows that cannot be used.
    """
    field, make = suite_field(number), None
    if suite.task is None:
        file, rows = inputs[f"task.{number}"], inputs[f"suite.{number}"]
        make = local_task(suite.name, file, rows, f"{field}.task")
    return harness.Task(
        name=suite.task or suite.name,
        limit=suite.limit,
        few_shot=suite.few_shot,
        chat_template=suite.chat_template,
        field=field,
        make=make,
    )


def require_known(suites: Sequence[SuiteSettings]) -> None:
    """Raise StageError UnknownTask for tasks that the harness does not know."""
    tasks = enumerate(suites)
    harness.require_known(
        task_of(suite, number, {})
        for number, suite in tasks
        if suite.kind == "task" and suite.task is not None
    )


def require_tasks(suites: Sequence[SuiteSettings], inputs: Mapping[str, Path]) -> None:
    """Raise StageError for tasks that cannot be run: UnknownTask, TaskFailed or InvalidData.
    `inputs`: those of `task_roles`."""
    require_known(suites)
    for number, suite in enumerate(suites):
        if suite.kind == "task":
            task_of(suite, number, inputs)
