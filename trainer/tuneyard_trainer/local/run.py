"""`tuneyard run`: run plans on this machine, in a Ray cluster of its own."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tuneyard.api.plan import Plan, SourceInput
from tuneyard.api.pods import model_uri, stage_folder
from tuneyard.errors import Fault, PlanError, StageError
from tuneyard_trainer.local.console import Console
from tuneyard_trainer.running.runner import StageInputs
from tuneyard_trainer.running.waits import wait_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run(plans: Sequence[Plan], base_dir: Path) -> int:
    """Run the plans one after another; return the exit code of the first that does not succeed.

    `base_dir`: the manifest's folder, which file:// paths are relative to. Raises PlanError for a
    manifest that needs a cluster.
    """
    plans = localized(plans)
    code = OK
    try:
        for plan in plans:
            code = _run(plan, base_dir)
            if code != OK:
                break
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        # The training thread may still use Ray, whose exit handlers would then change the exit
        # code. Ray's processes end when they notice that this one has ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def localized(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans with each job:// source replaced by the output of that job of the manifest.

    Raises PlanError with every source and output that exists on a cluster only.
    """
    faults = [fault for plan in plans for fault in _cluster_only(plan)]
    outputs = {plan.job.name: plan.output.uri for plan in plans}
    resolved = []
    for plan in plans:
        stages = []
        for stage in plan.stages:
            inputs = dict(stage.inputs)
            for role, source in inputs.items():
                if isinstance(source, SourceInput) and source.uri.startswith("job://"):
                    name = source.uri.removeprefix("job://")
                    if name not in outputs:
                        faults.append(_unknown_job(source, name))
                        continue
                    inputs[role] = source.model_copy(update={"uri": model_uri(outputs[name])})
            stages.append(stage.model_copy(update={"inputs": inputs}))
        resolved.append(plan.model_copy(update={"stages": stages}))
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    return resolved


def _unknown_job(source: SourceInput, name: str) -> Fault:
    return Fault(
        source.path,
        f"on one machine {source.uri} names a job of the same manifest file, which has no job "
        f"{name!r}: add it, or write its model folder, {model_uri('file://OUTPUT')}",
    )


def _cluster_only(plan: Plan) -> Iterator[Fault]:
    sources = [
        source
        for stage in plan.stages
        for source in stage.inputs.values()
        if isinstance(source, SourceInput)
    ]
    places = [(source.path, source.uri) for source in sources]
    for path, uri in [*places, ("spec.output.uri", plan.output.uri)]:
        if uri.startswith("pvc://"):
            yield Fault(path, f"{uri} exists on a cluster only: on one machine write file://PATH")


def _run(plan: Plan, base_dir: Path) -> int:
    output = _located(plan.output.uri, base_dir)
    cache_dir = _cache_dir()
    with (
        Console() as console,
        # After a second Ctrl-C the workers still write there.
        tempfile.TemporaryDirectory(prefix="tuneyard-", ignore_cleanup_errors=True) as scratch,
    ):
        try:
            console.start(plan)
            store = Store(output, Path(scratch) / "store")
            with store.lock():
                _carry_out(plan, store, output, base_dir, cache_dir, Path(scratch), console)
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
) -> None:
    store.claim(plan.job, attempt=1)
    pending = StageInputs(plan, store, base_dir, cache_dir, console.event).pending()
    if pending:
        console.event(wait_event("importing Ray"))  # only if a stage has to run
        from tuneyard_trainer.running import distributed

        resources = distributed.local_resources(plan.compute)
        places = distributed.Places(output, str(scratch), str(base_dir.absolute()), str(cache_dir))
        console.event(wait_event("starting Ray"))
        with _orderly_stop(console) as stop, distributed.local_cluster(resources):
            distributed.run(
                plan,
                places=places,
                resources=resources,
                attempt=1,
                on_event=console.event,
                stop=stop,
            )
    records = {stage.name: store.record(stage.name) for stage in plan.stages}
    console.summary(
        {name: record for name, record in records.items() if record},
        output,
        store.root / stage_folder("export"),
        skipped_all=not pending,
    )


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


def _cache_dir() -> Path:
    """Return TUNEYARD_CACHE, or the user's cache folder by the XDG base directory specification."""
    if own := os.environ.get("TUNEYARD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneyard"


def _located(uri: str, base_dir: Path) -> str:
    """Return an output as fsspec takes it: file:// paths become absolute paths."""
    if uri.startswith("file://"):
        return str((base_dir.absolute() / uri.removeprefix("file://")).resolve())
    return uri
