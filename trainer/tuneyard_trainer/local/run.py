"""`tuneyard run`: run plans on this machine, in processes of its own."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tuneyard.api.exports import named_job, with_models
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import Plan, SourceInput, StageRecord
from tuneyard.api.pods import DRIVER_LOG, model_uri, stage_folder
from tuneyard.errors import Fault, PlanError, StageError
from tuneyard_trainer.local.console import Console
from tuneyard_trainer.logs.keep import LogPlace, kept
from tuneyard_trainer.running import processes
from tuneyard_trainer.running.group import Places
from tuneyard_trainer.running.runner import Emit, StageInputs, emit_nothing, stage_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.storage.results import results_limit
from tuneyard_trainer.worker import Interrupted

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


Decide = Callable[[Plan, JobFacts], tuple[FitAnswer, Sequence[str]]]
"""Returns whether and how a job trains on this machine, and lines that say what it takes."""


def run(plans: Sequence[Plan], base_dir: Path, decide: Decide | None = None) -> int:
    """Run the plans one after another; return the exit code of the first that does not succeed.

    `base_dir`: the manifest's folder, which file:// paths are relative to. `decide`: called before
    the first stage that trains. None: every job trains as planned. Raises PlanError for a manifest
    that needs a cluster.
    """
    plans = localized(plans)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for plan in plans:
            code = _run(plan, base_dir, decide)
            if code != OK:
                return code
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, former)
    return OK


def localized(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans with each job:// source replaced by the output of that job of the manifest.

    Raises PlanError with every source and output that exists on a cluster only.
    """
    faults = [fault for plan in plans for fault in _cluster_only(plan)]
    jobs = {plan.job.name: plan for plan in plans}
    resolved = []
    for plan in plans:
        try:
            resolved.append(with_models(plan, jobs))
        except PlanError as error:
            faults += error.faults
    faults += [fault for plan in resolved for fault in _unknown_jobs(plan)]
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    return resolved


def _unknown_jobs(plan: Plan) -> Iterator[Fault]:
    for source in _sources(plan):
        if name := named_job(source):
            yield Fault(
                source.path,
                f"on one machine {source.uri} names a job of the same manifest file, which has no "
                f"job {name!r}: add it, or write its model folder, {model_uri('file://OUTPUT')}",
            )


def _sources(plan: Plan) -> list[SourceInput]:
    inputs = (source for stage in plan.stages for source in stage.inputs.values())
    return [source for source in inputs if isinstance(source, SourceInput)]


def _cluster_only(plan: Plan) -> Iterator[Fault]:
    places = [(source.path, source.uri) for source in _sources(plan)]
    places.append(("spec.output.uri", plan.output.uri))
    if plan.tracking and plan.tracking.tensorboard and plan.tracking.tensorboard.uri:
        places.append(("spec.tracking.tensorboard.uri", plan.tracking.tensorboard.uri))
    for path, uri in places:
        if uri.startswith("pvc://"):
            yield Fault(path, f"{uri} exists on a cluster only: on one machine write file://PATH")


def _run(plan: Plan, base_dir: Path, decide: Decide | None) -> int:
    output = _located(plan.output.uri, base_dir)
    cache_dir = cache_folder()
    with (
        Console() as console,
        # After a second Ctrl-C the helpers that keep the logs still read there.
        tempfile.TemporaryDirectory(prefix="tuneyard-", ignore_cleanup_errors=True) as scratch,
        ExitStack() as logs,
    ):
        try:
            console.start(plan)
            store = Store(output, Path(scratch) / "store")
            with store.lock():
                _carry_out(
                    plan, store, output, base_dir, cache_dir, Path(scratch), console, logs, decide
                )
        except StageError as error:
            console.failure(error)
            return FAILED
        except Interrupted as stopped:
            console.interrupted(stopped)
            return INTERRUPTED
    return OK


def _carry_out(
    plan: Plan,
    store: Store,
    output: str,
    base_dir: Path,
    cache_dir: Path,
    scratch: Path,
    console: Console,
    logs: ExitStack,
    decide: Decide | None,
) -> None:
    store.claim(plan.job, attempt=1)
    inputs = StageInputs(plan, store, base_dir, cache_dir, console.event)
    pending = inputs.pending()
    if not pending:
        _track_records(plan, inputs.records, output, base_dir, scratch, console)
    else:
        logs.enter_context(_log(output, scratch, console))
        places = Places(
            output,
            str(scratch),
            str(base_dir.absolute()),
            str(cache_dir),
            results_bytes=results_limit(os.environ),
        )
        resources = processes.local_resources(plan.compute)

        def review(facts: JobFacts) -> FitAnswer:
            answer, lines = decide(plan, facts) if decide else (FitAnswer(), ())
            for line in lines:
                console.note(line)
            return answer

        with (
            _tracked(plan, output, base_dir, scratch, console) as track,
            _orderly_stop(console) as stop,
        ):

            def on_event(event: dict[str, Any]) -> None:
                console.event(event)
                track(event)

            processes.run(
                plan,
                places=places,
                resources=resources,
                on_event=on_event,
                stop=stop,
                review=review,
            )
    records = {stage.name: store.record(stage.name) for stage in plan.stages}
    console.summary(
        {name: record for name, record in records.items() if record},
        output,
        store.root / stage_folder("export"),
        skipped_all=not pending,
    )


@contextmanager
def _tracked(
    plan: Plan,
    output: str,
    base_dir: Path,
    scratch: Path,
    console: Console,
    *,
    is_done: bool = False,
) -> Iterator[Emit]:
    """Yield what the trackers of the plan get the events by. `is_done`: only those that do not have
    the whole run of a job that is done. Raises StageError for wrong settings."""
    if plan.tracking is None:
        yield emit_nothing
        return
    from tuneyard_trainer.tracking.follow import Listener, followed
    from tuneyard_trainer.tracking.trackers import trackers_of, unfinished

    def new_store() -> Store:
        return Store(output, scratch / "tracking")

    trackers = trackers_of(plan, 1, new_store(), partial(_located, base_dir=base_dir))
    if is_done:
        trackers = unfinished(trackers, plan, new_store())
    listener = Listener(console.note, console.warn)
    with followed(plan, 1, trackers, new_store, listener, interrupted=lambda: "KILLED") as tracking:
        yield tracking.follow


def _track_records(
    plan: Plan,
    records: Mapping[str, StageRecord],
    output: str,
    base_dir: Path,
    scratch: Path,
    console: Console,
) -> None:
    """Hand a job that is done to trackers that did not get the whole of it, or that are new."""
    with _tracked(plan, output, base_dir, scratch, console, is_done=True) as track:
        for name, record in records.items():
            track(stage_event(name, "Skipped", record.identity, record))


@contextmanager
def _log(output: str, scratch: Path, console: Console) -> Iterator[None]:
    """Keep the lines of the run in the output. The lines of an earlier run stay before them."""
    with ExitStack() as stack:
        file = stack.enter_context((scratch / "driver.log").open("w", 1, encoding="utf-8"))
        stack.enter_context(kept(LogPlace(output, 1), DRIVER_LOG, [Path(file.name)], console.warn))
        console.record(file)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise


@contextmanager
def _orderly_stop(console: Console) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets: save a checkpoint and end.

    A second Ctrl-C ends the run at once.
    """
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.event(
            {
                "type": "progress",
                "stage": "",
                "step": 0,
                "totalSteps": 0,
                "metrics": {},
                "message": "stopping after this step; press Ctrl-C again to stop at once",
            }
        )

    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def cache_folder() -> Path:
    """Return TUNEYARD_CACHE, or the user's cache folder by the XDG base directory specification."""
    if own := os.environ.get("TUNEYARD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneyard"


def _located(uri: str, base_dir: Path) -> str:
    """Return an output as fsspec takes it: file:// paths become absolute paths."""
    if uri.startswith("file://"):
        return str((base_dir.absolute() / uri.removeprefix("file://")).resolve())
    return uri
