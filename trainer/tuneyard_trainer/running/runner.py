"""Walks a plan: each stage is skipped if its record matches, else run, its record written last.

Every rank of a worker group walks the same plan. Rank 0 decides, runs the single-worker stages and
writes; the others follow its word over a channel that waits as long as a stage takes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneyard.api.plan import Plan, PlannedStage, SourceInput, StageInput, StageRecord
from tuneyard.api.stage_settings import TRAINING_KINDS, StageKind
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.running.failures import out_of_memory
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

if TYPE_CHECKING:
    import torch

MODEL_ROLES = ("model", "judge", "reward")
"""Inputs that are model folders where they come from outside the plan; `reward.0` counts as one."""


def is_model(role: str) -> bool:
    """Whether an input from outside the plan is a model folder, not a data set."""
    return role.partition(".")[0] in MODEL_ROLES


VERSIONED = ("tuneyard", "torch", "transformers", "peft")

Emit = Callable[[dict[str, Any]], None]
"""Receives events as JSON values: `stage` (stage, state, record) and `progress` (stage, step,
totalSteps, metrics, message, resumedStep)."""

StageFunction = Callable[[StageContext], StageOutcome]
"""A stage's `run`."""


@dataclass
class StageInputs:
    """What one process knows of a plan's inputs: where they are, what they contain, what is done.
    Needs no torch."""

    plan: Plan
    store: Store
    base_dir: Path
    """What relative file:// sources are relative to: the manifest's folder."""
    cache_dir: Path
    """Where fetched sources and their digests are kept."""
    records: dict[str, StageRecord] = field(default_factory=dict)
    """Of the stages that are done, by name."""
    _fetched: dict[tuple[str, str | None], Path] = field(default_factory=dict)

    def pending(self) -> list[str]:
        """Names of the stages that a run would have to run: the first without a matching record,
        and, as far as can be told beforehand, all after it."""
        for index, stage in enumerate(self.plan.stages):
            record = self.store.done(stage, self.digests(stage))
            if record is None:
                return [later.name for later in self.plan.stages[index:]]
            self.records[stage.name] = record
        return []

    def digests(self, stage: PlannedStage) -> dict[str, str]:
        """The content digest of each input."""
        return {
            role: self.records[source.stage].digest
            if isinstance(source, StageInput)
            else sources.digest_of(self._fetch(role, source), cache_dir=self.cache_dir)
            for role, source in stage.inputs.items()
        }

    def inputs(self, stage: PlannedStage) -> dict[str, Path]:
        """The local path of each input."""
        return {
            role: self.store.workdir(source.stage) / (source.file or "")
            if isinstance(source, StageInput)
            else self._usable(role, source)
            for role, source in stage.inputs.items()
        }

    def _usable(self, role: str, source: SourceInput) -> Path:
        """The source as stages take it: models as folders, never as one GGUF file."""
        path = self._fetch(role, source)
        if not is_model(role) or path.suffix != ".gguf":
            return path
        from tuneyard_trainer.models.gguf_unpack import unpacked

        return unpacked(path, self.cache_dir)

    def _fetch(self, role: str, source: SourceInput) -> Path:
        key = (source.uri, source.revision)
        if key not in self._fetched:
            self._fetched[key] = sources.fetch(
                source,
                base_dir=self.base_dir,
                cache_dir=self.cache_dir,
                kind="model" if is_model(role) else "data",
            )
        return self._fetched[key]


@dataclass
class PlanRunner:
    """One worker's way through the plan."""

    ledger: StageInputs
    worker: Worker
    emit: Emit

    def run(self) -> dict[str, StageRecord]:
        """Every stage to its record. Raises StageError or Interrupted."""
        control = Control(self.worker.world_size)
        ledger, store = self.ledger, self.ledger.store
        for stage in ledger.plan.stages:
            digests = ledger.digests(stage) if self.worker.is_main else {}
            record = control.agree(self._done(stage, digests) if self.worker.is_main else None)
            if not self.worker.is_main:
                store.pull(stage.name)
            if record is None:
                record = control.agree(self._execute_or_stop(stage, digests))
                if isinstance(record, Interrupted):
                    raise record
                store.pull(stage.name)
            ledger.records[stage.name] = record
        return ledger.records

    def _done(self, stage: PlannedStage, digests: Mapping[str, str]) -> StageRecord | None:
        """The record of a stage that need not run; for one that must, its folder is readied. Raises
        StageError where it or a later one lacks a package."""
        store = self.ledger.store
        record = store.done(stage, digests)
        if record is None:
            stages = self.ledger.plan.stages
            extras.require(stages[stages.index(stage) :])
            store.begin(stage.name, stage.identity(digests))
        else:
            self.emit(_stage_event(stage, "Skipped", record))
        store.pull(stage.name)
        return record

    def _execute_or_stop(
        self, stage: PlannedStage, digests: Mapping[str, str]
    ) -> StageRecord | Interrupted | None:
        """An interruption is agreed on like a record: nobody leaves, and so takes the group down,
        before rank 0 has its checkpoint on disk."""
        try:
            if self.worker.is_main and self.worker.stop() and stage.kind not in TRAINING_KINDS:
                return Interrupted(stage.name, 0)
            return self._execute(stage, digests)
        except Interrupted as stopped:
            return stopped

    def _execute(self, stage: PlannedStage, digests: Mapping[str, str]) -> StageRecord | None:
        """Runs the stage where it belongs; the record on rank 0, None elsewhere."""
        if stage.kind not in TRAINING_KINDS and not self.worker.is_main:
            return None
        store = self.ledger.store
        workdir = store.workdir(stage.name)
        if self.worker.is_main:
            self.emit(_stage_event(stage, "Running"))
        started = now()
        try:
            inputs = self.ledger.inputs(stage)
            run = _stage_function(stage.kind)
            outcome = run(StageContext(stage, inputs, workdir, self._worker(stage, digests)))
        except OSError as error:
            raise disk_error(error, workdir) from error
        except (MemoryError, RuntimeError) as error:
            if named := out_of_memory(error, stage.name):
                raise named from error
            raise
        if not self.worker.is_main:
            return None
        record = self._record(stage, digests, outcome, started)
        store.write_record(record)
        self.emit(_stage_event(stage, "Succeeded", record))
        return record

    def _record(
        self, stage: PlannedStage, digests: Mapping[str, str], outcome: StageOutcome, started: str
    ) -> StageRecord:
        workdir = self.ledger.store.workdir(stage.name)
        names = outcome.contents or [path.name for path in workdir.iterdir()]
        return StageRecord(
            stage=stage.name,
            kind=stage.kind,
            identity=stage.identity(digests),
            input_digests=dict(digests),
            digest=sources.digest_of([workdir / name for name in sorted(names)]),
            attempt=self.worker.attempt,
            started_at=started,
            finished_at=now(),
            metrics=dict(outcome.metrics),
            details=dict(outcome.details),
            versions=versions(),
        )

    def _worker(self, stage: PlannedStage, digests: Mapping[str, str]) -> Worker:
        if not self.worker.is_main:
            return self.worker
        return replace(
            self.worker,
            report=partial(_report, self.emit, stage.name, self.worker.device),
            persist=self._persist,
            identity=stage.identity(digests),
            manifest=self.ledger.plan.manifest,
        )

    def _persist(self, folder: Path) -> None:
        self.ledger.store.refuse_stale(self.worker.attempt)
        self.ledger.store.persist(folder)


class Control:
    """Rank 0's word to the other ranks. A group of its own, over gloo with a limit of a week: the
    training group's limit must stay short, so that a hung collective is noticed."""

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        self._alone = world_size == 1
        if not self._alone:
            import torch.distributed as dist

            week = datetime.timedelta(days=7)
            self._group = dist.new_group(backend="gloo", timeout=week)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._alone:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _stage_function(kind: StageKind) -> StageFunction:  # noqa: C901  one case for each kind
    """The `run` of a stage; imported here, so that reading records costs no torch."""
    match kind:
        case "prepare":
            from tuneyard_trainer.data.prepare import run
        case "sft" | "pretrain":
            from tuneyard_trainer.training.sft import run
        case "pairs":
            from tuneyard_trainer.preference.pairs import run
        case "reward":
            from tuneyard_trainer.preference.reward import run
        case "dpo":
            from tuneyard_trainer.preference.dpo import run
        case "ppo":
            from tuneyard_trainer.reinforcement.ppo import run
        case "grpo":
            from tuneyard_trainer.reinforcement.grpo import run
        case "feedback":
            from tuneyard_trainer.judging.feedback import run
        case "critique":
            from tuneyard_trainer.judging.critique import run
        case "evaluate":
            from tuneyard_trainer.evaluation.evaluate import run
        case "assess":
            from tuneyard_trainer.evaluation.assess import run
        case "export":
            from tuneyard_trainer.reporting.export import run
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
) -> None:
    values = dict(metrics or {})
    if values and device.type == "cuda":
        import torch

        values["gpuMemoryBytes"] = float(torch.cuda.memory_reserved(device))
    emit(
        {
            "type": "progress",
            "stage": stage,
            "step": step,
            "totalSteps": total_steps,
            "metrics": values,
            "message": message,
            "resumedStep": resumed_step,
        }
    )


def _stage_event(
    stage: PlannedStage, state: str, record: StageRecord | None = None
) -> dict[str, Any]:
    value = record.model_dump(mode="json", by_alias=True) if record else None
    return {"type": "stage", "stage": stage.name, "state": state, "record": value}


def failure_event(error: StageError | Interrupted) -> dict[str, Any]:
    """The event that ends a walk early."""
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
    """RFC 3339, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}
