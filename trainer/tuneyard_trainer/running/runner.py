"""The runner: skips each stage whose record matches, runs the others, writes their records last.

Every rank of a worker group runs the same plan. Rank 0 decides which stages to run, runs the stages
that need no model alone, and writes the records. The other ranks wait for its decisions meanwhile.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from tuneyard.api.gates import GateResult
from tuneyard.api.job_facts import FitAnswer
from tuneyard.api.plan import Plan, PlannedStage, SourceInput, StageInput, StageRecord, leading
from tuneyard.api.pods import stage_folder
from tuneyard.api.stage_settings import (
    SHARED_KINDS,
    TRAINING_KINDS,
    EvaluateSettings,
    StageKind,
)
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.running.failures import out_of_memory
from tuneyard_trainer.running.waits import wait_event
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.storage.records import EARLIER_FILE, Store
from tuneyard_trainer.storage.results import Results, is_reusable, result_key
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

if TYPE_CHECKING:
    import torch

MODEL_ROLES = ("model", "judge", "reward", "teacher", "toxicity")
"""The roles of inputs that are models if they come from outside the plan; `reward.0` is one too."""


EARLIER_RESULT = (
    f"The folder {stage_folder('export')} still holds the model of an earlier run, as its file "
    f"{EARLIER_FILE} says."
)

VERSIONED = ("tuneyard", "torch", "transformers", "peft")
"""The packages whose versions a record keeps."""

Emit = Callable[[dict[str, Any]], None]
"""Receives events as JSON values: `stage` (stage, state, identity, record), `progress` (stage,
step, totalSteps, metrics, message, resumedStep) and `wait` (message)."""

Ask = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Sends an event of type `facts` and returns the answer, a `FitAnswer` as JSON. None: a stop was
requested meanwhile."""

StageFunction = Callable[[StageContext], StageOutcome]
"""A stage's `run`."""


def emit_nothing(event: dict[str, Any]) -> None:
    """The `Emit` of a run that nobody watches."""


def is_model(role: str) -> bool:
    """Return whether an input from outside the plan is a model and not a data set."""
    return role.partition(".")[0] in MODEL_ROLES


def _kind(role: str) -> sources.Kind:
    return "model" if is_model(role) else "data"


@dataclass
class StageInputs:
    """The inputs of a plan's stages: their local paths and digests, and which stages are done.

    Needs no torch.
    """

    plan: Plan
    store: Store
    base_dir: Path
    """The manifest's folder, which relative file:// sources are relative to."""
    cache_dir: Path
    """The folder of fetched sources and their digests."""
    emit: Emit = emit_nothing
    """Receives the waits for the sources."""
    records: dict[str, StageRecord] = field(default_factory=dict)
    """The records of the stages that are done, by name."""
    source_digests: dict[str, str] | None = None
    """`Store.source_digests` and those of new folders. None: not read yet."""
    _fetched: dict[tuple[str, str | None], Path] = field(default_factory=dict)

    def pending(self) -> list[str]:
        """Return the names of the stages that are not done: the first without a matching record,
        and all after it, since their inputs may change."""
        for index, stage in enumerate(self.plan.stages):
            record = self.store.done(stage, self.digests(stage))
            if record is None:
                return [later.name for later in self.plan.stages[index:]]
            self.records[stage.name] = record
        return []

    def digests(self, stage: PlannedStage) -> dict[str, str]:
        """Return the content digest of each input."""
        return {
            role: self.records[source.stage].digest
            if isinstance(source, StageInput)
            else self._source_digest(role, source)
            for role, source in stage.inputs.items()
        }

    def have(self, stage: PlannedStage, digests: Mapping[str, str]) -> bool:
        """Return whether the inputs still have these digests: a stage reads its inputs after they
        are taken, and somebody may change a file meanwhile."""
        try:
            return self.digests(stage) == digests
        except (StageError, OSError):  # it was removed
            return False

    def _source_digest(self, role: str, source: SourceInput) -> str:
        """Return the digest that a source's decisive files had in this output at first. It covers
        every file of a folder, as in 0.2: either version continues an output of the other."""
        path = self._fetch(role, source)
        self.emit(wait_event(f"reading {source.uri}"))
        if not path.is_dir():
            return sources.digest_of(path, cache_dir=self.cache_dir)
        decisive = sources.decisive_digest(path, _kind(role), self.cache_dir)
        if self.source_digests is None:
            self.source_digests = self.store.source_digests()
        if decisive not in self.source_digests:
            self.source_digests[decisive] = sources.digest_of(path, cache_dir=self.cache_dir)
        return self.source_digests[decisive]

    def at_hand(self, stage: PlannedStage, role: str) -> Path | None:
        """Return the path of an input that needs neither a download nor a stage that is not done.
        None: it does, or it cannot be read."""
        source = stage.inputs[role]
        if isinstance(source, StageInput):
            done = source.stage in self.records
            return self.store.workdir(source.stage) / (source.file or "") if done else None
        fetched = self._fetched.get((source.uri, source.revision))
        if fetched is not None or not sources.is_local(source.uri):
            return fetched
        try:
            return self._fetch(role, source)
        except StageError:  # the stage that reads it reports what is wrong
            return None

    def inputs(self, stage: PlannedStage, roles: Iterable[str] | None = None) -> dict[str, Path]:
        """Return the local path of each input. `roles`: of these alone. None: of all."""
        chosen = stage.inputs if roles is None else {role: stage.inputs[role] for role in roles}
        return {
            role: self.store.workdir(source.stage) / (source.file or "")
            if isinstance(source, StageInput)
            else self._local_path(role, source)
            for role, source in chosen.items()
        }

    def _local_path(self, role: str, source: SourceInput) -> Path:
        """Return the path of a source. A GGUF model is unpacked into a folder first."""
        path = self._fetch(role, source)
        if not is_model(role) or path.suffix.lower() != ".gguf":
            return path
        self.emit(wait_event(f"unpacking {path.name}"))
        from tuneyard_trainer.models.gguf_unpack import unpacked

        return unpacked(path, self.cache_dir)

    def _fetch(self, role: str, source: SourceInput) -> Path:
        key = (source.uri, source.revision)
        if key not in self._fetched:
            self.emit(wait_event(f"fetching {source.uri}"))
            self._fetched[key] = sources.fetch(
                source,
                base_dir=self.base_dir,
                cache_dir=self.cache_dir,
                kind=_kind(role),
            )
        return self._fetched[key]


@dataclass
class PlanRunner:
    """Runs the plan on one worker."""

    stage_inputs: StageInputs
    worker: Worker
    emit: Emit
    ask: Ask | None = None
    """Asks whether and how the job trains, on rank 0, before the first stage that trains. None:
    nobody decides, and it trains as planned."""
    neighbors: int = 1
    """Workers that share the memory of this machine or pod."""
    preparing: bool = False
    """Run only the leading stages, which need no GPU, and ask then from their rows whether the job
    fits workers that do not exist yet. On one worker."""
    results: Results | None = None
    """The prepared data of other jobs. None: this job shares none."""
    _answer: FitAnswer | None = None
    """The answer. None: not asked yet."""
    _has_known_tasks: bool = False
    """Whether the tasks of suites were looked up."""
    _has_earlier_result: bool = False
    """Whether the output has the model of an earlier run, of which this one differs."""

    def run(self) -> dict[str, StageRecord]:
        """Skip or run every stage; return the records by name. Raises StageError or Interrupted.

        While a stage before the export runs, the result of an earlier run says that it is one.
        """
        try:
            return self._run()
        except StageError as error:
            if not self._has_earlier_result:
                raise
            raise error.with_message(f"{error.message} {EARLIER_RESULT}") from error

    def _run(self) -> dict[str, StageRecord]:
        control = Control(self.worker.world_size)
        known, store = self.stage_inputs, self.stage_inputs.store
        for stage in leading(known.plan.stages) if self.preparing else known.plan.stages:
            digests = known.digests(stage) if self.worker.is_main else {}
            record = control.agree(self._done(stage, digests) if self.worker.is_main else None)
            if not self.worker.is_main:
                store.pull(stage.name)
            if record is None:
                if stage.kind in TRAINING_KINDS and self._answer is None:
                    asked = self._ask(stage) if self.worker.is_main else None
                    self._answer = control.agree(asked)
                    self._refuse_misfit()
                running = stage
                if stage.kind in TRAINING_KINDS:
                    running = control.agree(self._settled(stage) if self.worker.is_main else None)
                record = control.agree(self._execute_or_stop(running, digests))
                if isinstance(record, Interrupted):
                    raise record
                store.pull(stage.name)
            known.records[stage.name] = record
        if self.preparing:
            self._ask_ahead()
        return known.records

    def _ask_ahead(self) -> None:
        """Ask about the first stage that trains, before it has workers. Raises StageError
        DoesNotFit if it does not fit these for certain."""
        training = [s for s in self.stage_inputs.plan.stages if s.kind in TRAINING_KINDS]
        # A stage with a record may be done, which only its workers find out, from its inputs.
        if not training or self.stage_inputs.store.record(training[0].name) is not None:
            return
        compute = self.stage_inputs.plan.compute
        devices = (compute.workers or 1) * compute.processes_per_worker
        self._answer = self._answer_about(training[0], None, devices)
        self._refuse_misfit()

    def _ask(self, stage: PlannedStage) -> FitAnswer:
        """Return the answer to the job's facts. The model's folder is that of `stage`. Raises
        StageError."""
        self._require_same_vocabularies()
        return self._answer_about(stage, self.worker.device, self.worker.world_size)

    def _answer_about(
        self, stage: PlannedStage, device: torch.device | None, devices: int
    ) -> FitAnswer:
        """Return the answer to the job's facts. `device` None: it is not known yet. `devices`: that
        train together. Raises StageError."""
        if self.ask is None:
            return FitAnswer()
        from tuneyard_trainer.running.facts import facts_event, job_facts

        try:
            facts = job_facts(
                self.stage_inputs.plan,
                self.stage_inputs.inputs(stage)["model"],
                self.stage_inputs.records,
                self.stage_inputs.at_hand,
                device,
                devices=devices,
                neighbors=self.neighbors,
            )
        except OSError as error:
            raise disk_error(error, self.stage_inputs.store.workdir(stage.name)) from error
        return FitAnswer.model_validate_json(json.dumps(self.ask(facts_event(facts)) or {}))

    def _require_tasks(self, later: Sequence[PlannedStage]) -> None:
        """Raise StageError for a suite of a later stage that is a task which cannot be run. That
        stage may begin hours later. Tasks are looked up once."""
        if self._has_known_tasks:
            return
        self._has_known_tasks = True
        for stage in later:
            settings = stage.settings
            suites = settings.suites if isinstance(settings, EvaluateSettings) else None
            if not any(suite.kind == "task" for suite in suites or ()):
                continue
            self.emit(wait_event("looking up the tasks of spec.evaluate.suites"))
            from tuneyard_trainer.evaluation.suites.tasks import require_tasks, task_roles

            require_tasks(suites or (), self.stage_inputs.inputs(stage, task_roles(suites or ())))

    def _require_same_vocabularies(self) -> None:
        """Raise StageError VocabularyMismatch before the first stage that trains: the one with the
        teacher may begin hours later."""
        for stage in self.stage_inputs.plan.stages:
            if "teacher" in stage.inputs:
                from tuneyard_trainer.models.vocabulary import require_same_vocabulary

                inputs = self.stage_inputs.inputs(stage)
                require_same_vocabulary(inputs["model"], inputs["teacher"])

    def _refuse_misfit(self) -> None:
        """Raise StageError DoesNotFit if the answer is that the job does not fit."""
        failure = self._answer.refusal if self._answer else None
        if failure is not None:
            raise StageError(failure.reason, failure.message, advice=failure.advice)

    def _settled(self, stage: PlannedStage) -> PlannedStage:
        """Return a stage that trains with the settings of its checkpoints, else with those that
        were chosen for this attempt; its identity does not cover them. Raises StageError."""
        from tuneyard_trainer.running.facts import device_of
        from tuneyard_trainer.running.kept_settings import settle

        store = self.stage_inputs.store
        chosen = self._answer.settings.get(stage.name) if self._answer else None
        workdir = store.workdir(stage.name)
        device = device_of(self.worker.device, self.neighbors)
        try:
            with store.owned(self.worker.attempt):
                return settle(stage, chosen, workdir, device, self.worker.world_size)
        except OSError as error:
            raise disk_error(error, workdir) from error

    def _done(self, stage: PlannedStage, digests: Mapping[str, str]) -> StageRecord | None:
        """Return the record of a stage that is done. None: it must run, and its folder is ready.

        Raises StageError if a package is missing that this stage or a later one needs, or if a
        later one could not run a task of its suites.
        """
        store = self.stage_inputs.store
        if found := self.stage_inputs.source_digests:
            store.keep_source_digests(found, self.worker.attempt)
        record = store.done(stage, digests)
        if record is None:
            stages = self.stage_inputs.plan.stages
            extras.require(stages[stages.index(stage) :])
            self._require_tasks(stages[stages.index(stage) + 1 :])
            if stage.kind != "export" and not self._has_earlier_result:
                self._has_earlier_result = store.mark_result(self.worker.attempt)
            store.begin(stage.name, stage.identity(digests), self.worker.attempt)
        else:
            store.drop_checkpoints(stage.name, self.worker.attempt)  # a kill may have left them
            if stage.kind == "export":
                store.unmark_result(self.worker.attempt)
            self.emit(stage_event(stage.name, "Skipped", record.identity, record))
        store.pull(stage.name)
        return record

    def _execute_or_stop(
        self, stage: PlannedStage, digests: Mapping[str, str]
    ) -> StageRecord | Interrupted | None:
        """Return the record, or the interruption, which the ranks then agree on.

        No rank returns until rank 0 has saved its checkpoint: an early exit would end the group.
        """
        try:
            if self.worker.is_main and self.worker.stop() and not _is_shared(stage):
                return Interrupted(stage.name, 0)
            return self._execute(stage, digests)
        except Interrupted as stopped:
            return stopped

    def _execute(self, stage: PlannedStage, digests: Mapping[str, str]) -> StageRecord | None:
        """Run the stage on the ranks that it needs. Return the record on rank 0, None elsewhere."""
        if not self.worker.is_main and not _is_shared(stage):
            return None
        store = self.stage_inputs.store
        workdir = store.workdir(stage.name)
        if self.worker.is_main:
            self.emit(stage_event(stage.name, "Running", stage.identity(digests)))
        started = now()
        with _named_errors(stage, workdir):
            inputs = self.stage_inputs.inputs(stage)
        worker = self._worker(stage, digests)
        context = StageContext(
            stage, inputs, workdir, worker, digests=digests, suites_of=_suites_of
        )
        if self.results is not None and is_reusable(stage):
            return self._reuse_or_run(self.results, context, digests, started)
        outcome = self._outcome(context)
        if not self.worker.is_main:
            return None
        return self._completed(stage, self._record(context, digests, outcome, started))

    def _reuse_or_run(
        self, results: Results, context: StageContext, digests: Mapping[str, str], started: str
    ) -> StageRecord:
        """Return the record of a stage that rank 0 runs alone. Its files are those that another job
        prepared, or it runs and its files are kept for other jobs."""
        stage, workdir = context.stage, context.workdir
        key = result_key(stage, stage.identity(digests), context.inputs)
        with results.held(key, context.worker) as entry:
            # A newer attempt may have taken over while this one waited.
            self.stage_inputs.store.refuse_stale(self.worker.attempt)
            with _named_errors(stage, workdir):
                found = entry.copied_to(workdir) if entry else None
            if found is None:
                outcome = self._outcome(context)
                record = self._record(context, digests, outcome, started)
                self._completed(stage, record)
                if entry and self.stage_inputs.have(stage, digests):
                    entry.keep(workdir, record, outcome.contents or ())
                elif entry:
                    context.worker.report(
                        message="the data is not kept for other jobs: an input has changed while "
                        "it was prepared"
                    )
                return record
        own = {"stage": stage.name, "attempt": self.worker.attempt}
        times = {"started_at": started, "finished_at": now()}
        return self._completed(stage, found.model_copy(update={**own, **times, "reused": True}))

    def _outcome(self, context: StageContext) -> StageOutcome:
        """Run a stage. Return its outcome with the names of its output."""
        stage, workdir = context.stage, context.workdir
        with _named_errors(stage, workdir):
            self.emit(wait_event(f"importing the libraries of {stage.name}"))
            run = _stage_function(stage)
            if stage.kind in TRAINING_KINDS:
                _reset_peak_memory(self.worker.device)
            outcome = run(context)
        if outcome.contents is None:
            return replace(outcome, contents=tuple(path.name for path in workdir.iterdir()))
        return outcome

    def _completed(self, stage: PlannedStage, record: StageRecord) -> StageRecord:
        """Write the record of a stage, tell of it, and return it."""
        self.stage_inputs.store.write_record(record)
        self.emit(stage_event(stage.name, "Succeeded", record.identity, record))
        return record

    def _record(
        self,
        context: StageContext,
        digests: Mapping[str, str],
        outcome: StageOutcome,
        started: str,
    ) -> StageRecord:
        stage = context.stage
        output = [context.workdir / name for name in sorted(outcome.contents or ())]
        return StageRecord(
            stage=stage.name,
            kind=stage.kind,
            identity=stage.identity(digests),
            input_digests=dict(digests),
            digest=sources.digest_of(output),
            attempt=self.worker.attempt,
            started_at=started,
            finished_at=now(),
            metrics=dict(outcome.metrics),
            details={**outcome.details, **self._planned(stage)},
            versions=versions(),
        )

    def _planned(self, stage: PlannedStage) -> dict[str, int]:
        """Return the memory that was calculated for a stage that trains; {}: it is not known."""
        planned = self._answer.planned_bytes.get(stage.name) if self._answer else None
        if planned is None or stage.kind not in TRAINING_KINDS:
            return {}
        return {"plannedMemoryBytes": planned}

    def _worker(self, stage: PlannedStage, digests: Mapping[str, str]) -> Worker:
        if not self.worker.is_main:
            return replace(self.worker, stage=stage.name)
        store = self.stage_inputs.store
        return replace(
            self.worker,
            stage=stage.name,
            report=partial(_report, self.emit, stage.name, self.worker.device),
            persist=partial(store.persist, attempt=self.worker.attempt),
            owned=partial(store.owned, self.worker.attempt),
            identity=stage.identity(digests),
            manifest=self.stage_inputs.plan.manifest,
        )


def _suites_of(context: StageContext, loop: Any, model: Any) -> Callable[[], dict[str, float]]:
    """Return the measurement of a stage's suites, with imports of an evaluation alone then."""
    from tuneyard_trainer.evaluation.suites.during_training import suites_of

    return suites_of(context, loop, model)


@contextmanager
def _named_errors(stage: PlannedStage, workdir: Path) -> Iterator[None]:
    """Convert the errors of a full disk and of a full memory to StageErrors."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, workdir) from error
    except (MemoryError, RuntimeError) as error:
        if named := out_of_memory(error, stage.name):
            raise named from error
        raise


def _reset_peak_memory(device: torch.device) -> None:
    """Make the peak that a training stage reports its own: one process runs all stages."""
    from tuneyard_trainer.models.base import reset_peak_memory

    reset_peak_memory(device)


class Control:
    """Broadcasts rank 0's decisions in a gloo group of its own, with a timeout of a week.

    The training group's timeout stays short, so that a collective that hangs is noticed.
    """

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        self._alone = world_size == 1
        if not self._alone:
            import torch.distributed as dist

            week = datetime.timedelta(days=7)
            self._group = dist.new_group(backend="gloo", timeout=week)

    def agree(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self._alone:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _is_shared(stage: PlannedStage) -> bool:
    """Return whether all workers run a stage: those that train, and those that measure or judge.
    Those that run no model are rank 0's alone."""
    return stage.kind in SHARED_KINDS


def _engine(stage: PlannedStage) -> str | None:
    """Return the engine of a stage's training loop; None: the native one, or no loop."""
    loop = getattr(stage.settings, "training", stage.settings)
    return getattr(loop, "engine", None)


def _estimator(stage: PlannedStage) -> str | None:
    """Return how a stage of kind grpo estimates advantages; None: another kind."""
    return getattr(stage.settings, "estimator", None)


def _stage_function(stage: PlannedStage) -> StageFunction:  # noqa: C901  one case for each kind
    """Return a stage's `run`. Imported here, so that reading records costs no torch."""
    kind: StageKind = stage.kind
    match kind:
        case "augment" | "rewrite":
            from tuneyard_trainer.judging.augment import run
        case "prepare":
            from tuneyard_trainer.data.prepare import run
        case "leaks":
            from tuneyard_trainer.evaluation.suite_leaks import run
        case "sft" | "pretrain" if _engine(stage) == "trl":
            from tuneyard_trainer.trl_engine.sft import run
        case "sft" | "pretrain":
            from tuneyard_trainer.training.sft import run
        case "pairs":
            from tuneyard_trainer.preference.pairs import run
        case "dpo" if _engine(stage) == "trl" and getattr(stage.settings, "loss", None) == "kto":
            from tuneyard_trainer.trl_engine.kto import run
        case "dpo" if _engine(stage) == "trl":
            from tuneyard_trainer.trl_engine.dpo import run
        case "reward" if _engine(stage) == "trl":
            from tuneyard_trainer.trl_engine.reward import run
        case "reward":
            from tuneyard_trainer.preference.reward import run
        case "dpo":
            from tuneyard_trainer.preference.dpo import run
        case "ppo":
            from tuneyard_trainer.reinforcement.ppo import run
        case "grpo" if _engine(stage) == "trl" and _estimator(stage) == "rloo":
            from tuneyard_trainer.trl_engine.rloo import run
        case "grpo" if _engine(stage) == "trl":
            from tuneyard_trainer.trl_engine.grpo import run
        case "grpo":
            from tuneyard_trainer.reinforcement.grpo import run
        case "distill":
            from tuneyard_trainer.trl_engine.distill import run
        case "feedback":
            from tuneyard_trainer.judging.feedback import run
        case "critique":
            from tuneyard_trainer.judging.critique import run
        case "evaluate" | "assess":
            from tuneyard_trainer.evaluation.evaluate import run
        case "export":
            from tuneyard_trainer.reporting.export import run
        case _:
            assert_never(kind)
    return run


def _report(
    emit: Emit,
    stage: str,
    device: torch.device,
    *,
    step: int = 0,
    total_steps: int = 0,
    metrics: Mapping[str, float] | None = None,
    message: str | None = None,
    resumed_step: int | None = None,
    gates: Sequence[GateResult] = (),
) -> None:
    values = dict(metrics or {})
    if values and device.type == "cuda":
        import torch

        values["gpuMemoryBytes"] = float(torch.cuda.memory_reserved(device))
    event = {
        "type": "progress",
        "stage": stage,
        "step": step,
        "totalSteps": total_steps,
        "metrics": values,
        "message": message,
        "resumedStep": resumed_step,
    }
    if gates:
        event["gates"] = [gate.model_dump(mode="json", by_alias=True) for gate in gates]
    emit(event)


def stage_event(
    stage: str, state: str, identity: str, record: StageRecord | None = None
) -> dict[str, Any]:
    """Return the event of a stage that begins, or that is done and has a record."""
    value = record.model_dump(mode="json", by_alias=True) if record else None
    return {
        "type": "stage",
        "stage": stage,
        "state": state,
        "identity": identity,
        "record": value,
    }


def failure_event(error: StageError | Interrupted) -> dict[str, Any]:
    """Return the event of a run that ended early."""
    if isinstance(error, Interrupted):
        return {"type": "interrupted", "stage": error.stage, "step": error.step}
    return {
        "type": "failed",
        "reason": error.reason,
        "message": error.message,
        "advice": error.advice,
        "retryable": error.retryable,
    }


def now() -> str:
    """Return the time as RFC 3339, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}
