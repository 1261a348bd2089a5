"""The trackers that a plan names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tuneyard.api.plan import Plan
from tuneyard_trainer import extras
from tuneyard_trainer.storage.records import EVENTS_FOLDER, Store
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.tracker import Tracker
from tuneyard_trainer.worker import persist_nothing


def trackers_of(
    plan: Plan, attempt: int, store: Store, locate: Callable[[str], str]
) -> list[Tracker]:
    """Return the trackers of a plan. `store`: of the output, for them alone. `locate`: returns the
    local folder of a pvc:// or file:// URI. Raises StageError MissingExtra."""
    if plan.tracking is None:
        return []
    extras.require_tracking(plan.tracking)
    return list(_trackers(plan, attempt, store, locate))


def unfinished(trackers: Sequence[Tracker], plan: Plan, store: Store) -> list[Tracker]:
    """Return the trackers that do not have the whole run of a job that is done."""
    return [
        tracker
        for tracker in trackers
        if not TrackerState.of(store, tracker.name, tracker.place, plan).ended
    ]


def _trackers(
    plan: Plan, attempt: int, store: Store, locate: Callable[[str], str]
) -> Iterator[Tracker]:
    assert plan.tracking is not None
    if plan.tracking.mlflow:
        from tuneyard_trainer.tracking.mlflow_run import MlflowRun

        yield MlflowRun(plan.tracking.mlflow, plan, attempt)
    if plan.tracking.tensorboard:
        from tuneyard_trainer.tracking.event_files import EventFiles

        settings = plan.tracking.tensorboard
        if settings.uri:
            folder, where, persist = Path(locate(settings.uri)), settings.uri, persist_nothing
        else:
            folder = store.root / EVENTS_FOLDER
            where = f"{store.uri.rstrip('/')}/{EVENTS_FOLDER}"
            persist = partial(store.persist, attempt=attempt)
        yield EventFiles(folder, plan, persist, place=settings.uri or EVENTS_FOLDER, where=where)
