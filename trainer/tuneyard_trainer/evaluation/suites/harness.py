"""Tasks of lm-evaluation-harness, run on the model that is in memory.

The task, its metrics, its prompts and its few-shot examples are the harness's own, so the numbers
are those of its command line with the same model, limit and seeds.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.errors import StageError
from tuneyard_trainer.models.files import first_line

CPU_BATCH, GPU_BATCH = 8, 32
"""Requests of a forward pass. The harness sorts them by length."""
NEAREST = 5
"""Known tasks that are named when one is unknown."""


@dataclass(frozen=True)
class Task:
    """A task to run."""

    name: str
    limit: int | None
    """Documents, from the first. None: all."""
    few_shot: int | None
    """Worked examples before each document. None: as the task says."""
    chat_template: bool
    """Whether requests are rendered by the model's chat template."""
    field: str
    """The suite's field in the manifest."""
    make: Callable[[], Any] | None = None
    """Makes the task, for the harness, of a file of the manifest. None: a task of the harness."""


@dataclass(frozen=True)
class TaskResult:
    """The measurements of one model by the harness."""

    metrics: Mapping[str, float]
    """By metric, or TASK/METRIC for the tasks of a group."""
    items: Mapping[str, NDArray[np.float64]]
    """(N,) the value of each document, for the metrics that are the mean of these values."""
    ids: Mapping[str, tuple[str, ...]]
    """(N,) the documents of these metrics."""
    higher_is_better: Mapping[str, bool]
    details: Mapping[str, Any]
    """Versions, configs, numbers of documents and standard errors."""


@functools.cache
def known_tasks() -> Any:
    """Return the tasks that come with the harness, as its `TaskManager`, whose index of 15,000
    files takes seconds. Task files of a manifest are not among them: the harness would run the
    Python code of their templates and includes."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_task(
    task: Task, model: Any, tokenizer: Any, before_batch: Callable[[], None]
) -> TaskResult:
    """Run a task on a loaded model, on this worker alone.

    `before_batch`: called before each forward pass; what it raises ends the task. Raises StageError
    UnknownTask, TaskFailed and SourceUnavailable.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_defaults=False) if task.make else known_tasks()
    require_known([task])
    on_gpu = model.device.type == "cuda"
    hook = model.register_forward_pre_hook(lambda *_: before_batch())
    try:
        with _quiet():
            language_model = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=GPU_BATCH if on_gpu else CPU_BATCH
            )
            found = simple_evaluate(
                language_model,
                tasks=[task.make() if task.make else task.name],
                num_fewshot=task.few_shot,
                limit=task.limit,
                bootstrap_iters=0,
                apply_chat_template=task.chat_template,
                task_manager=known,
            )
    except (StageError, MemoryError):
        raise
    except Exception as error:
        if _is_offline(error):
            raise _unreachable(task, error) from error
        if not isinstance(error, _faults()):
            raise
        raise StageError(
            "TaskFailed",
            f"{task.field}: lm-evaluation-harness cannot run the task {task.name}: "
            f"{first_line(error)}.",
            advice=f"Correct the file and the data of {task.field}.task."
            if task.make
            else f"Name another task in {task.field}.task.name, or change its settings.",
        ) from error
    finally:
        hook.remove()
    if found is None:  # another worker of a sharded model returns the result
        return TaskResult({}, {}, {}, {}, {})
    _require_numbers(task, found.get("samples", {}))
    return _result(task, found)


def _require_numbers(task: Task, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise StageError TaskFailed for a log-probability that is NaN: the harness takes it for the
    likeliest, so that a model that diverged would have the accuracy of chance. `samples`: the
    documents of each task."""
    for name, documents in samples.items():
        for document in documents:
            if _has_nan(document.get("resps")):
                raise StageError(
                    "TaskFailed",
                    f"{task.field}: a log-probability of {name} document {document['doc_id']} is "
                    "not a number.",
                    advice="The model has diverged: lower training.learningRate.",
                )


def _has_nan(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_nan(each) for each in value)
    return isinstance(value, float) and math.isnan(value)


def require_known(tasks: Iterable[Task]) -> None:
    """Raise StageError UnknownTask for all tasks that the harness does not know, with the nearest
    names. Tasks of a file are left out, and nothing is looked up without others."""
    named = [task for task in tasks if task.make is None]
    known: list[str] = known_tasks().all_tasks if named else []
    unknown = [task for task in named if task.name not in known]
    if not unknown:
        return
    fields = ", ".join(f"{task.field}.task.name" for task in unknown)
    raise StageError(
        "UnknownTask",
        " ".join(_unknown(task, known) for task in unknown),
        advice=f"Correct {fields}.",
    )


def _unknown(task: Task, known: list[str]) -> str:
    near = difflib.get_close_matches(task.name, known, NEAREST, cutoff=0.5)
    hint = f" The nearest names: {', '.join(near)}." if near else ""
    return f"{task.field}.task.name: lm-evaluation-harness knows no task {task.name!r}.{hint}"


def _faults() -> tuple[type[Exception], ...]:
    """Return the errors of a task itself: missing columns, broken templates, data that is not on
    the hub or must not be read there."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    own = (ValueError, KeyError, AssertionError, FileNotFoundError, TypeError)
    return (*own, DatasetsError, HfHubHTTPError)


def _is_offline(error: BaseException) -> bool:
    """Return whether an error, or one that it comes from, is of a hub that cannot be reached or
    that cannot reply now."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (ConnectionError, TimeoutError)) or _is_of_hub(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _is_of_hub(error: BaseException) -> bool:
    """Return whether an error is of a request that failed on the way, or that the hub refuses for
    now."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", 0)
    refused = "HfHubHTTPError" in kinds and (status in (408, 429) or status >= 500)
    return refused or bool(kinds & {"TransportError", "LocalEntryNotFoundError"})


def _unreachable(task: Task, error: BaseException) -> StageError:
    return StageError(
        "SourceUnavailable",
        f"{task.field}: the data of the task {task.name} cannot be fetched from the hub: "
        f"{first_line(error)}.",
        advice="Wait until the hub can be reached, or measure local rows as a suite of choices.",
        retryable=True,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's progress bars and its log from the terminal."""
    log = logging.getLogger("lm_eval")
    before, log.disabled = log.level, False
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


# ---- results ------------------------------------------------------------------------------------


def _result(task: Task, found: Mapping[str, Any]) -> TaskResult:
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[np.float64]] = {}
    ids: dict[str, tuple[str, ...]] = {}
    higher: dict[str, bool] = {}
    for name, result in found["results"].items():
        prefix = "" if name == task.name else f"{name}/"
        for key, value in result.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            if isinstance(value, int | float) and chosen:
                shown = prefix + _named(metric, chosen)
                metrics[shown] = float(value)
                higher[shown] = found["higher_is_better"].get(name, {}).get(metric) is not False
    for name, samples in found.get("samples", {}).items():
        prefix = "" if name == task.name else f"{name}/"
        for metric, chosen in {(m, s["filter"]) for s in samples for m in s["metrics"]}:
            own = [s for s in samples if s["filter"] == chosen]
            values = [s.get(metric) for s in own]
            shown = prefix + _named(metric, chosen)
            if _is_mean(metrics.get(shown), values):
                items[shown] = np.array([float(value) for value in values])
                ids[shown] = tuple(f"{name} document {s['doc_id']}" for s in own)
    details = {
        "versions": dict(found.get("versions", {})),
        "documents": dict(found.get("n-samples", {})),
        "fewShot": dict(found.get("n-shot", {})),
    }
    return TaskResult(metrics, items, ids, higher, details)


def _is_mean(metric: float | None, values: Sequence[Any]) -> bool:
    """Return whether a metric is the mean of these values. A perplexity is not: the values of its
    documents are log-probabilities, of which higher is better."""
    if metric is None or not all(isinstance(value, bool | int | float) for value in values):
        return False
    return bool(values) and math.isclose(metric, np.mean(values), rel_tol=1e-6, abs_tol=1e-9)


def _named(metric: str, chosen: str) -> str:
    """Return a metric's name. `chosen`: the harness's filter of answers, `none` if there is only
    one."""
    return metric if chosen == "none" else f"{metric}.{chosen}"
