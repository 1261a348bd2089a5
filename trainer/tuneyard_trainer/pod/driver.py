"""The driver: carries out one attempt of a job on a Ray cluster and reports its outcome.

python -m tuneyard_trainer --plan plan.json --attempt 2 --job-uid UID

With --prepare it runs only the leading stages, which need no GPU, in a process of this pod without
Ray, before the attempt has a Ray cluster. It then reports no outcome unless it failed: that would
be the outcome of the attempt.

It writes one line per event to standard output and posts its progress to the operator
(TUNEYARD_PROGRESS_URL, TUNEYARD_TOKEN_FILE, TUNEYARD_CA). An outcome other than success is also the
last line of standard error, `TUNEYARD-OUTCOME {json}`. KubeRay copies that line into the RayJob, so
the operator reads it even if no post reached it.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tuneyard.api.compute import Compute
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import Plan, SourceInput, leading
from tuneyard.api.pods import (
    CA_VARIABLE,
    CACHE_NAME,
    DRIVER_LOG,
    GRACE_SECONDS,
    OUTCOME_PREFIX,
    PREPARE_OPTION,
    PROGRESS_URL_VARIABLE,
    STALE_ATTEMPT,
    TOKEN_FILE_VARIABLE,
    WORKERS_VARIABLE,
    cache_folder,
)
from tuneyard.api.progress import Outcome
from tuneyard.api.quantity import quantity_value
from tuneyard.api.status import Failure
from tuneyard.errors import StageError
from tuneyard_trainer import drain
from tuneyard_trainer.logs.keep import LogPlace, kept, own_files
from tuneyard_trainer.pod.log import Log, copied_output
from tuneyard_trainer.pod.progress import AttemptProgress, finite
from tuneyard_trainer.pod.reporter import Reporter, StatusClient
from tuneyard_trainer.running import processes
from tuneyard_trainer.running.failures import MOST_CHARACTERS, last_line
from tuneyard_trainer.running.group import Places, Resources
from tuneyard_trainer.running.runner import Emit, emit_nothing
from tuneyard_trainer.running.waits import Waits
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.storage.results import results_limit
from tuneyard_trainer.worker import Interrupted

SUCCEEDED, FAILED, INTERRUPTED, STALE = 0, 1, 3, 4
FIT_SECONDS = 60.0
"""How long the first stage that trains waits for the operator's answer whether the job fits: longer
than the restart of an operator."""
LOG_SECONDS = 10.0
"""The least time between two log lines of progress without a message."""
PREPARED_SECONDS = 60.0
"""How long the driver that has prepared the data tries to say so: the operator knows it from the
end of the pod, and the driver that trains says it again."""
FOLDER = Path(tempfile.gettempdir(), "tuneyard")
"""The folder of stores, caches and Ray's results; a pod may write to its /tmp only."""
PREPARING_LOG = FOLDER / "driver.log"
"""The log of a driver that prepares data, from which it is kept."""


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0 succeeded, 1 failed, 3 interrupted, 4 a newer attempt exists."""
    parser = argparse.ArgumentParser(prog="python -m tuneyard_trainer", description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="as `tuneyard plan --json` prints")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--job-uid", help="the uid of the job")
    parser.add_argument(
        PREPARE_OPTION, action="store_true", help="run the leading stages that need no GPU alone"
    )
    options = parser.parse_args(arguments)
    if options.prepare:
        with copied_output(PREPARING_LOG):
            return _drive(options)
    return _drive(options)


def _drive(options: argparse.Namespace) -> int:
    log = Log(sys.stdout)
    try:
        plan = Plan.model_validate_json(options.plan.read_text())
        driver = Driver(plan, options.attempt, options.job_uid, log, preparing=options.prepare)
        with drain.registered(drain.FOLDER, driver.preempted):
            return driver.run()
    except Exception as error:
        return _leave(outcome_of(error), log)


class Driver:
    """One attempt, from claiming the output to reporting its outcome."""

    def __init__(
        self, plan: Plan, attempt: int, uid: str | None, log: Log, *, preparing: bool = False
    ) -> None:
        """`preparing`: run only the leading stages, without Ray."""
        self._plan, self._attempt, self._uid, self._log = plan, attempt, uid, log
        self._preparing = preparing
        fewer = os.environ.get(WORKERS_VARIABLE)
        self._progress = AttemptProgress(
            plan,
            attempt,
            time.time(),
            workers=int(fewer) if fewer else None,
            preparing=preparing,
        )
        self._stop = threading.Event()
        self._stop_cause = ("Preempted", "the driver was asked to end")
        self._logged_at = 0.0
        self._progressing = threading.Lock()
        """Held while the progress is changed or read: a question is asked in a thread."""
        self._waits = Waits(
            lambda message, seconds: log("waiting", what=message, seconds=math.floor(seconds))
        )
        self._store: Store | None = None
        """The output's store. None: the output is not claimed yet."""
        self._track: Emit = emit_nothing
        """Hands an event to the trackers."""
        log("driver", job=plan.job.name, attempt=attempt, stages=[s.name for s in plan.stages])
        self._reporter = self._start_reporter(os.environ)

    def run(self) -> int:
        """Carry the plan out, report the outcome and return the exit code."""
        with ExitStack() as logs:
            outcome = self._outcome(logs)
            if self._preparing and outcome.state == "Succeeded":
                self._log("prepared", stages=[stage.name for stage in leading(self._plan.stages)])
                return SUCCEEDED
            return _leave(outcome, self._log)  # the kept log ends with the outcome

    def _outcome(self, logs: ExitStack) -> Outcome:
        """Carry the plan out; return the outcome that was reported."""
        with self._signals():
            try:
                self._carry_out(logs)
                outcome = self._progress.success()
            except Exception as error:
                outcome = outcome_of(error, self._stop_cause)
            self._waits.end()
            if not _is_stale(outcome) and self._reporter:
                self._report_end(self._reporter, outcome)
        return outcome

    def _report_end(self, reporter: Reporter, outcome: Outcome) -> None:
        """Give the last post."""
        if self._preparing and outcome.state == "Succeeded":
            reporter.finish(self._progress.post(), PREPARED_SECONDS)
        else:
            reporter.finish(self._progress.end(outcome, time.time()))

    def _carry_out(self, logs: ExitStack) -> None:
        output = located(self._plan.output.uri)
        self._waits.begin("claiming the output")
        with self._storage_errors():
            store = Store(output, FOLDER / "store", self._uid)
            store.claim(self._plan.job, self._attempt)
        self._store = store
        self._log("output-claimed", uri=self._plan.output.uri)
        place = LogPlace(output, self._attempt, self._uid, str(drain.FOLDER))
        files = [PREPARING_LOG] if self._preparing else own_files()
        logs.enter_context(kept(place, DRIVER_LOG, files, warn=self._log_not_kept))
        places = Places(
            output=output,
            scratch=str(FOLDER / "scratch"),
            base_dir="/",
            cache_dir=_cache_dir(self._plan.compute),
            job_uid=self._uid,
            drain=str(drain.FOLDER),
            results_bytes=_results_bytes(self._plan.compute),
        )
        with self._tracked(places):
            if self._preparing:
                self._prepare(places)
            else:
                self._run_on_ray(places)

    @contextmanager
    def _tracked(self, places: Places) -> Iterator[None]:
        """Hand the attempt's events to the trackers of the plan. Raises StageError for wrong
        settings."""
        if self._plan.tracking is None:
            yield
            return
        from tuneyard_trainer.tracking.follow import Listener, followed
        from tuneyard_trainer.tracking.trackers import trackers_of

        def new_store() -> Store:
            return Store(places.output, FOLDER / "tracking", places.job_uid)

        trackers = trackers_of(self._plan, self._attempt, new_store(), located)
        listener = Listener(
            note=lambda text: self._log("tracking", what=text),
            warn=lambda text: self._log("tracking-warning", what=text),
        )
        with followed(
            self._plan,
            self._attempt,
            trackers,
            new_store,
            listener,
            interrupted=lambda: "KILLED" if self._stop_cause[0] == "Stopped" else None,
            succeeded=None if self._preparing else "FINISHED",
        ) as tracking:
            self._track = tracking.follow
            yield

    def _prepare(self, places: Places) -> None:
        """Run the leading stages in a process of this pod."""
        Path(places.scratch).mkdir(parents=True, exist_ok=True)
        cpus = math.ceil(quantity_value(self._plan.compute.cpus_per_worker or "4"))
        processes.run(
            self._plan,
            places=places,
            resources=Resources.divided(1, 1, 0, cpus),
            attempt=self._attempt,
            on_event=self._event,
            stop=self._stop,
            review=self._review,
            preparing=True,
        )

    def _run_on_ray(self, places: Places) -> None:
        """Run the plan on the workers of the Ray cluster."""
        self._waits.begin("importing Ray")  # takes long on a small head pod
        from tuneyard_trainer.running import distributed

        resources = distributed.pods_resources(self._plan.compute, os.environ)
        self._waits.begin("connecting to Ray")
        with distributed.pods_cluster(), self._signals():  # ray.init sets a handler of its own
            self._log("ray-connected", workers=resources.workers, least=resources.min_workers)
            distributed.run(
                self._plan,
                places=places,
                resources=resources,
                attempt=self._attempt,
                on_event=self._event,
                stop=self._stop,
                review=self._review,
            )

    def _log_not_kept(self, why: str) -> None:
        self._log("log-not-kept", why=why)

    # ---- events of the workers -----------------------------------------------------------------

    def _event(self, event: dict[str, Any]) -> None:
        if event["type"] == "draining":
            self.preempted()
            return
        with self._progressing:
            self._follow(event)

    def _follow(self, event: dict[str, Any]) -> None:
        """Add an event to the progress, and log it."""
        self._waits.follow(event)
        if event["type"] == "wait":
            return
        at = time.time()
        self._progress.add(event, at)
        self._track(event)
        if self._reporter:
            self._reporter.update(self._progress.post(), urgent=event["type"] == "stage")
        if event["type"] == "stage":
            record = event["record"] or {}
            fields = {"stage": event["stage"], "reused": record.get("reused")}
            metrics = finite(record.get("metrics", {}))
            self._log(f"stage-{event['state'].lower()}", **{**fields, **metrics})
        elif event["message"] or at - self._logged_at >= LOG_SECONDS:
            self._logged_at = at
            place = {name: event[name] for name in ("stage", "step", "totalSteps", "message")}
            self._log("progress", **{**place, **finite(event["metrics"])})

    def _review(self, facts: JobFacts) -> FitAnswer:
        """Return the operator's answer to the job's facts. Without one in time the job trains as
        planned: an operator that is down, or older, stops no training."""
        if facts.model is None:
            self._log("memory-unknown", why=facts.unknown_model)
        if self._reporter is None:
            return FitAnswer()
        with self._progressing:
            self._waits.begin("asking the operator whether the job fits")
            self._progress.set_facts(facts)
            question = self._progress.post()
        response = self._reporter.ask(question, FIT_SECONDS, self._stop.is_set)
        with self._progressing:
            self._waits.end()
            self._progress.set_facts(None)
            self._reporter.update(self._progress.post())  # the question is not repeated
        if response is None or response.fit is None:
            self._log("fit-unknown", answered=response is not None)
            return FitAnswer()
        self._log("fit", **response.fit.model_dump(mode="json", by_alias=True, exclude_none=True))
        return response.fit

    # ---- stop requests --------------------------------------------------------------------------

    def _ask_to_stop(self, reason: str, message: str) -> None:
        if not self._stop.is_set():
            self._stop_cause = (reason, message)
            self._stop.set()

    def preempted(self) -> None:
        """Stop because a pod's preStop hook asked for it. Any thread may call this."""
        self._ask_to_stop("Preempted", "a pod of the attempt is being deleted")
        self._log("stopping", why=self._stop_cause[1])

    def _stopped_by_operator(self) -> None:
        self._ask_to_stop("Stopped", "the operator asked the attempt to stop")
        self._log("stopping", why=self._stop_cause[1])

    def _superseded(self) -> None:
        """Stop, because the operator knows a newer attempt or knows the job no more.

        The workers have GRACE_SECONDS to save a checkpoint if the output still belongs to this
        attempt. Otherwise the driver exits at once: Ray ends the workers of a driver that has
        exited.
        """
        cause = (STALE_ATTEMPT, _not_newest(self._plan.job.name, self._attempt))
        self._ask_to_stop(*cause)
        self._log("stopping", why=cause[1])
        # Nothing is posted any more, so no later answer would end workers that hang.
        deadline = threading.Timer(GRACE_SECONDS, self._leave_at_once, cause)
        deadline.daemon = True
        deadline.start()
        if not self._owns_output():
            self._leave_at_once(*cause)

    def _leave_at_once(self, reason: str, message: str) -> None:
        failure = Failure(reason=reason, message=message)
        _leave(Outcome(state="Interrupted", failure=failure, retryable=True), self._log)
        os._exit(STALE)

    def _owns_output(self) -> bool:
        """Return whether this attempt made the output's last claim, as far as can be read now. The
        workers check the claim again before each write."""
        if self._store is None:
            return False
        try:
            with self._storage_errors():
                self._store.refuse_stale(self._attempt)
        except StageError as error:
            return error.reason != STALE_ATTEMPT
        return True

    def _storage_errors(self) -> AbstractContextManager[None]:
        """Convert the output's errors to StageErrors."""
        source = SourceInput(uri=self._plan.output.uri, path="spec.output.uri")
        return sources.as_stage_errors(source)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, _: FrameType | None) -> None:
            name = signal.Signals(number).name
            self._ask_to_stop("Preempted", f"the driver received {name}")

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_reporter(self, environment: Mapping[str, str]) -> Reporter | None:
        url = environment.get(PROGRESS_URL_VARIABLE)
        if not url:
            self._log("progress-not-posted", why=f"{PROGRESS_URL_VARIABLE} is not set")
            return None
        token_file = Path(environment[TOKEN_FILE_VARIABLE])
        return Reporter(
            StatusClient(url, token_file, environment[CA_VARIABLE]).send,
            self._progress.post(),
            on_stop=self._stopped_by_operator,
            on_stale=self._superseded,
            log=self._log,
        )


# ---- outcomes -----------------------------------------------------------------------------------


def outcome_of(error: BaseException, why: tuple[str, str] = ("Stopped", "")) -> Outcome:
    """Return the outcome of an attempt that raised `error`.

    `why`: the reason and the message of the stop request, for an attempt that was interrupted.
    """
    if isinstance(error, Interrupted):
        reason, message = why
        failure = Failure(reason=reason, message=f"{message}: {error}")
        return Outcome(state="Interrupted", failure=failure, retryable=True)
    if isinstance(error, StageError):
        failure = Failure(
            reason=error.reason, message=error.message[:MOST_CHARACTERS], advice=error.advice
        )
        return Outcome(state="Failed", failure=failure, retryable=error.retryable)
    from_ray = type(error).__module__.partition(".")[0] == "ray"
    return Outcome(
        state="Failed",
        failure=Failure(reason="DriverError", message=f"the driver failed: {last_line(error)}"),
        retryable=from_ray
        or isinstance(error, OSError),  # a fault of the cluster, not of the trainer
    )


def _not_newest(job: str, attempt: int) -> str:
    return f"attempt {attempt} of {job} is not the operator's newest"


def _is_stale(outcome: Outcome) -> bool:
    return outcome.failure is not None and outcome.failure.reason == STALE_ATTEMPT


def _leave(outcome: Outcome, log: Log) -> int:
    """Log the outcome, write it to standard error unless it is success; return the exit code."""
    if outcome.state == "Succeeded":
        result = outcome.result
        log("succeeded", uri=result and result.uri, digest=result and result.digest)
        return SUCCEEDED
    failure = outcome.failure
    if failure:
        log(
            outcome.state.lower(),
            reason=failure.reason,
            message=failure.message,
            advice=failure.advice,
            retryable=outcome.retryable,
        )
    text = outcome.model_dump_json(by_alias=True, exclude_none=True)
    sys.stderr.write(f"\n{OUTCOME_PREFIX}{text}\n")
    sys.stderr.flush()
    if _is_stale(outcome):
        return STALE
    return INTERRUPTED if outcome.state == "Interrupted" else FAILED


# ---- the output and the cache -------------------------------------------------------------------


def _cache_dir(compute: Compute) -> str:
    """Return the cache: on the claim that pods share, or in this pod's own /tmp."""
    if compute.cache_claim is not None:
        return cache_folder(compute.cache_claim)
    return str(FOLDER / "cache")


def _results_bytes(compute: Compute) -> int:
    """Return the most bytes of prepared data that the cache keeps for other jobs: those of the
    environment on a claim, and none in a cache that ends with its pod. Raises StageError
    CacheUnusable."""
    return results_limit(os.environ) if compute.cache_claim is not None else 0


def located(uri: str) -> str:
    """Return an output as fsspec takes it: pvc://CLAIM/PATH becomes a folder of the mounted claim.

    Raises StageError OutputUnavailable.
    """
    scheme, _, rest = uri.partition("://")
    if scheme != "pvc":
        return uri
    claim, _, path = rest.partition("/")
    volume = sources.PVC_ROOT / claim
    if not volume.is_dir() or {"..", CACHE_NAME} & {claim, *Path(path).parts}:
        raise StageError(
            "OutputUnavailable",
            f"{uri}: the claim is not mounted at {volume}, or the path leaves it, or is in the "
            "cache of other jobs.",
            advice="Correct spec.output.uri.",
        )
    return str(volume / path)
