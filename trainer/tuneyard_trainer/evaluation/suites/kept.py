"""Measurements of suites that are kept: what follows a finished suite may fail, and does not cost
its measurement.

Each suite has a file for each model in the stage's folder `measured`, named by a digest of all that
decides its values: the model, the items, the settings and the versions of the packages. Files that
fit nothing of this run are removed, so a changed suite or model is measured anew.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.plan import digest
from tuneyard.api.stage_settings import EvaluateSettings, SuiteSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation.part import Found, Loaded, Part
from tuneyard_trainer.evaluation.suites.harness import TaskResult
from tuneyard_trainer.models.files import first_line
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.records import REUSED_FOLDER
from tuneyard_trainer.worker import StageContext

Measured = Mapping[str, NDArray[np.float64]] | tuple[str, ...] | TaskResult
"""The measurement of one model: the value of each item by metric, its answers, or a task's
result."""
MODELS = (("model", "start", "tuned"), ("model", "start"))
"""The inputs that decide the tuned model, and the model before."""
VERSIONED = ("tuneyard", "torch", "transformers", "peft")
"""The packages whose versions decide a measurement; of a task lm_eval too, and the engine's that
answers the prompts of a suite."""
ANSWERED = ("answers", "refusals")
"""The kinds of suites whose prompts the engine of the evaluation answers."""


def kept(
    context: StageContext,
    shared: SharedStage,
    suites: Iterable[Part[Any]],
    chat_template: Any,
) -> Iterator[Part[Any]]:
    """Yield each suite of the stage, in order, as a part that is not measured again. All workers
    call it. `chat_template`: of the tokenizer with which the suites are measured."""
    settings = context.settings(EvaluateSettings).suites or []
    folder = context.workdir / REUSED_FOLDER

    def read() -> tuple[list[list[str]], dict[str, Measured]]:
        names = [
            [_key(context, number, suite, roles, chat_template) for roles in MODELS]
            for number, suite in enumerate(settings if context.digests else ())
        ]
        return names, _read_all(context, folder, names)

    names, known = shared.from_main(read)  # the other workers know no digests
    finished: list[str] = []
    for number, (suite, part) in enumerate(zip(settings, suites, strict=True)):
        own = names[number] if names else ()
        found = [known.get(name) for name in own] or [None, None]
        files = [folder / f"{name}.json" for name in own]
        yield KeptSuite(suite.name, part, context, found, files, finished)


@dataclass(frozen=True)
class KeptSuite:
    """A suite that is measured unless an earlier attempt or run did so."""

    name: str
    suite: Part[Any]
    context: StageContext
    known: Sequence[Measured | None]
    """The measurements of the tuned model and of the model before."""
    files: Sequence[Path]
    """The files of both, which rank 0 writes. (): nothing is kept."""
    finished: list[str] = field(default_factory=list)
    """The names of the suites whose measurements are kept so far; all suites share it."""

    def measure(self, loaded: Loaded, tuned: Measured | None, /) -> Measured:
        """Return the measurement of a model, which is written at once. Raises StageError with the
        suite's name."""
        of = 0 if tuned is None else 1
        measured = self.known[of]
        if measured is None:
            with self._named(loaded.name):
                measured = self.suite.measure(loaded, tuned)
            if self.files and loaded.worker.is_main:
                _write(self.context, self.files[of], measured)
        if self.files:
            self.finished.append(f"{self.name} of {loaded.name}")
        return measured

    def compare(self, tuned: Measured | None, before: Measured | None, /) -> Found:
        """Return what the suite says of both measurements."""
        return self.suite.compare(tuned, before)

    @contextmanager
    def _named(self, model: str) -> Iterator[None]:
        """Name the suite in an error, and the suites that need not be measured again."""
        where = f"the suite {self.name} cannot be measured of {model}"
        done = f" These suites are kept: {', '.join(self.finished)}." if self.finished else ""
        try:
            yield
        except StageError as error:
            if error.message.startswith(where):  # of another worker, which has named the suite
                raise
            raise error.with_message(f"{where}: {error.message}{done}") from error
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise StageError(
                "SuiteFailed",
                f"{where}: {type(error).__name__}: {first_line(error)}.{done}",
                advice="Read the workers' logs for the place of the error; change the rows of this "
                "suite, or take it out of spec.evaluate.suites.",
            ) from error


def _key(
    context: StageContext,
    number: int,
    suite: SuiteSettings,
    roles: Sequence[str],
    chat_template: Any,
) -> str:
    """Return the name of the file of a suite and a model."""
    settings = context.settings(EvaluateSettings)
    chat = settings.chat
    packages = [*VERSIONED, *(["lm_eval"] if suite.kind == "task" else [])]
    if suite.kind in ANSWERED and settings.engine:  # a build for the CPU has another name
        packages += importlib.metadata.packages_distributions()[settings.engine]
    decides = {
        "model": {role: context.digests.get(role) for role in roles},
        "suite": suite.model_dump(mode="json", exclude={"name"}),
        "files": {name: context.digests.get(f"{name}.{number}") for name in ("suite", "task")},
        "chatTemplate": chat_template,
        "systemPrompt": chat.system_prompt if chat else None,
        "device": context.worker.device.type,  # which decides the type of the weights
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    return digest(decides).removeprefix("sha256:")


# ---- files --------------------------------------------------------------------------------------


def _read_all(
    context: StageContext, folder: Path, names: Sequence[Sequence[str]]
) -> dict[str, Measured]:
    """Return the measurements that are kept, by name, and remove those of other models and
    suites."""
    if not names:
        return {}
    wanted = {name for each in names for name in each}
    found = {}
    with context.worker.owned():
        for file in [*folder.glob("*.json")]:
            measured = _read(file) if file.stem in wanted else None
            if measured is None:
                file.unlink(missing_ok=True)
            else:
                found[file.stem] = measured
    return found


def _write(context: StageContext, file: Path, measured: Measured) -> None:
    value: dict[str, Any]
    if isinstance(measured, TaskResult):
        value = {
            "metrics": measured.metrics,
            "items": _lists(measured.items),
            "ids": measured.ids,
            "higherIsBetter": measured.higher_is_better,
            "details": measured.details,
        }
    elif isinstance(measured, tuple):
        value = {"answers": list(measured)}
    else:
        value = {"items": _lists(measured)}
    with context.worker.owned():
        write_atomically(file, json.dumps(value, ensure_ascii=False).encode())
    context.worker.persist(file.parent)


def _lists(values: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """Return values as JSON has them: the shortest text of a float64 is read as the same number,
    and NaN stays NaN."""
    return {name: each.tolist() for name, each in values.items()}


def _read(file: Path) -> Measured | None:
    """Return a measurement. None: the file is damaged."""
    try:
        value = json.loads(file.read_text())
        if "answers" in value:
            return tuple(value["answers"])
        items = {name: np.array(each, dtype=np.float64) for name, each in value["items"].items()}
        if "metrics" not in value:
            return items
        ids = {name: tuple(each) for name, each in value["ids"].items()}
        higher = value["higherIsBetter"]
        return TaskResult(value["metrics"], items, ids, higher, value["details"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
