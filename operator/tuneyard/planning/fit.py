"""Whether a job fits its GPUs, what `auto` would choose to make it fit, and what else would.

The choice is runtime of an attempt: it is no part of a plan's bytes or of an identity (ADR 0003).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tuneyard.api.adapters import Adapter, Lora, Qlora
from tuneyard.api.alignment import Sampling
from tuneyard.api.compute import MIN_SHARDS
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage
from tuneyard.api.stage_settings import (
    AugmentSettings,
    DpoSettings,
    EvaluateSettings,
    ExportSettings,
    PairsSettings,
    PrepareSettings,
    RewardSettings,
    TrainSettings,
    scoring_terms,
)
from tuneyard.planning.hardware import CPU_PROCESS_BYTES, GPUS, Cpu, Gpu
from tuneyard.planning.limits import can_shard
from tuneyard.planning.memory.lengths import FEWEST_TOKENS, Lengths
from tuneyard.planning.memory.parts import GIB, Settings, StageMemory
from tuneyard.planning.memory.stages import (
    Machine,
    job_memory,
    loop_of,
    settings_of,
    sharding_obstacle,
)

LENGTH_STEP = 128
"""Row lengths are searched in steps of this many tokens."""
WORKERS = (2, 4, 8, 16, 32, 64)
"""Numbers of workers that are tried to share a model."""


class Remedy(NamedTuple):
    """A change of the manifest after which the job fits."""

    change: str
    """The fields and their values, as an instruction."""
    peak: int | None
    """The most bytes on a GPU after it. None: it was not calculated."""


@dataclass(frozen=True)
class Fit:
    """A job on its devices."""

    memory: list[StageMemory]
    """The memory of the stages that load a model, with the chosen settings."""
    limit: int
    """Bytes that a device offers."""
    chosen: Mapping[str, Settings]
    """The settings that are chosen for each stage that trains."""
    certain: list[StageMemory]
    """The part of that memory that rests on no assumption, with the settings that take least."""
    remedies: tuple[Remedy, ...] = ()
    """Ways to make a job fit that does not."""

    @property
    def peak(self) -> int:
        """The most bytes on a device."""
        return max((stage.peak.total for stage in self.memory), default=0)

    @property
    def too_large(self) -> list[StageMemory]:
        """The stages that do not fit."""
        return [stage for stage in self.memory if stage.peak.total > self.limit]

    def impossible(self, most: int) -> list[StageMemory]:
        """Return the certain memory of the stages that take more than `most` bytes for certain."""
        return [stage for stage in self.certain if stage.peak.total > most]

    @property
    def fits(self) -> bool:
        return not self.too_large


@dataclass(frozen=True)
class Job:
    """A job, its model and its devices."""

    plan: Plan
    facts: ModelFacts
    device: Gpu | Cpu
    """The GPU of each worker process, or the memory that the process may take."""
    devices: int
    """Devices that train together."""
    lengths: Lengths
    done: frozenset[str] = frozenset()
    """Names of the stages that are done, and take no memory any more."""
    models: Mapping[str, int] = field(default_factory=dict)
    """Parameters of models from outside the job, by STAGE/ROLE, as far as they are known."""

    @property
    def machine(self) -> Machine:
        gpu = None if isinstance(self.device, Cpu) else self.device.memory
        return Machine(gpu, self.devices)

    @property
    def training(self) -> list[PlannedStage]:
        """The stages that train."""
        stages = self.plan.stages
        return [stage for stage in stages if loop_of(stage) and stage.name not in self.done]

    def memory(self, chosen: Mapping[str, Settings]) -> list[StageMemory]:
        """Return the memory of all stages that are left, with some settings."""
        found = job_memory(self.plan, self.facts, self.machine, self.lengths, chosen, self.models)
        return [memory for memory in found if memory.stage not in self.done]

    def certain(self, chosen: Mapping[str, Settings]) -> list[StageMemory]:
        """Return the memory that the stages which are left take whatever is assumed, where their
        activations are recomputed."""
        recomputed = {
            name: settings._replace(gradient_checkpointing=True)
            for name, settings in chosen.items()
        }
        found = job_memory(
            self.plan, self.facts, self.machine, self.lengths, recomputed, self.models, least=True
        )
        return [memory for memory in found if memory.stage not in self.done]

    def peak(self, stage: PlannedStage, settings: Settings) -> int:
        """Return the most bytes on a GPU in one stage with some settings."""
        alone = self.plan.model_copy(update={"stages": [stage]})
        chosen = {stage.name: settings}
        found = job_memory(alone, self.facts, self.machine, self.lengths, chosen, self.models)
        return max(memory.peak.total for memory in found)


def fit(job: Job) -> Fit:
    """Return how a job fits its devices, with ways to make it fit if it does not."""
    chosen = {stage.name: choose(job, stage) for stage in job.training}
    found = _fit_with(job, chosen)
    if found.fits:
        return found
    return replace(found, remedies=_all_remedies(job, found))


def _fit_with(job: Job, chosen: Mapping[str, Settings]) -> Fit:
    return Fit(job.memory(chosen), job.device.usable, chosen, job.certain(chosen))


# ---- what `auto` chooses ------------------------------------------------------------------------


def choose(job: Job, stage: PlannedStage) -> Settings:
    """Return the settings of a stage: the first that fit, of those that the manifest leaves open.

    Smaller micro-batches come first, down to a quarter: they hardly cost time. Then activations are
    recomputed, which costs a third of the time. If nothing fits, the settings that take least are
    returned.
    """
    candidates = list(_candidates(job, stage))
    for settings in candidates:
        if job.peak(stage, settings) <= job.device.usable:
            return settings
    return min(candidates, key=lambda settings: job.peak(stage, settings))


def _candidates(job: Job, stage: PlannedStage) -> Iterator[Settings]:
    given = settings_of(stage, job.facts, job.machine)
    yield given
    auto = stage.runtime.micro_batch_tokens == "auto"
    most = given.micro_batch_tokens
    sizes = [most, *_sizes(most)] if auto else [most]
    large = [size for size in sizes if 4 * size >= most]
    if not given.gradient_checkpointing:
        for size in large:
            yield Settings(size, False, given.sharding)
    for size in sizes:
        yield Settings(size, True, given.sharding)


def _sizes(most: int) -> Iterator[int]:
    """Yield the sizes of micro-batches to try after `most`: powers of two, the largest first."""
    size = 1 << (most - 1).bit_length() - 1
    while size >= FEWEST_TOKENS:
        yield size
        size //= 2


# ---- what would make it fit ---------------------------------------------------------------------


def _all_remedies(job: Job, found: Fit) -> tuple[Remedy, ...]:
    """Return at least two ways: if fewer are known, the others are hints without a number."""
    hints = (
        Remedy("set spec.model.uri to a smaller model", None),
        Remedy("run it on GPUs with more memory than any that is described", None),
    )
    found_ways = tuple(_remedies(_without_repeats(job), found))
    return found_ways + hints[: max(0, 2 - len(found_ways))]


def _without_repeats(job: Job) -> Job:
    """Return a job without the stages that take the same memory as one before: those of its later
    rounds, whose settings are the fields of the first round too."""
    first: dict[tuple[Any, ...], PlannedStage] = {}
    for stage in job.plan.stages:
        same = ("done", stage.name) if stage.name in job.done else _what_counts(job, stage)
        first.setdefault(same, stage)
    return replace(job, plan=job.plan.model_copy(update={"stages": list(first.values())}))


def _what_counts(job: Job, stage: PlannedStage) -> tuple[Any, ...]:
    """Return all of a stage that its memory depends on."""
    inputs = sorted(
        (role, type(source).__name__, job.models.get(f"{stage.name}/{role}"))
        for role, source in stage.inputs.items()
    )
    measured = job.lengths.measured(stage), job.lengths.measured_prompts.get(stage.name)
    return (repr(stage.settings), repr(stage.runtime), repr(measured), *inputs)


def _remedies(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield changes after which every stage fits, as far as they exist."""
    settings = list(_if_it_fits(job, []))
    yield from settings or _shorter_rows(job)
    yield from _sharded(job)
    yield from _other_adapter(job)
    yield from _without_vllm(job, found)
    yield from _without_evaluation(job, found)
    if isinstance(job.device, Cpu):
        yield _more_memory(job, found)
    elif not settings:
        yield from _larger_gpu(job, job.device)


def _if_it_fits(job: Job, changes: list[str]) -> Iterator[Remedy]:
    """Yield the remedy of some changes of the manifest, if the job fits after them, or after them
    and the settings that they need. `job`: with the changes."""
    own = _fit_with(job, {stage.name: choose(job, stage) for stage in job.training})
    if changes and own.fits:
        yield Remedy(", ".join(changes), own.peak)
        return
    tried = _with_free_settings(job)
    needed = [*changes, *_settings_changes(job, tried.chosen)]
    if needed and tried.fits:
        yield Remedy(", ".join(needed), tried.peak)


def _with_free_settings(job: Job) -> Fit:
    """Return how a job fits with the settings that `auto` would choose for each stage."""
    chosen = {stage.name: choose(job, _opened(stage)) for stage in job.training}
    return _fit_with(job, chosen)


def _opened(stage: PlannedStage) -> PlannedStage:
    """Return a stage whose micro-batches the manifest leaves open."""
    runtime = stage.runtime.model_copy(update={"micro_batch_tokens": "auto"})
    return stage.model_copy(update={"runtime": runtime})


def _settings_changes(job: Job, chosen: Mapping[str, Settings]) -> Iterator[str]:
    """Yield the fields that give a job the settings, where the manifest keeps it from choosing
    them. A field that several rounds share gets the least."""
    least: dict[str, int] = {}
    for stage in job.training:
        given, wanted = stage.runtime.micro_batch_tokens, chosen[stage.name].micro_batch_tokens
        if given not in ("auto", wanted):
            path = training_path(job.plan, stage)
            least[path] = min(wanted, least.get(path, wanted))
    for path, wanted in least.items():
        yield f"set {path}.microBatchTokens to {wanted}"


def _shorter_rows(job: Job) -> Iterator[Remedy]:
    """Yield the longest rows with which the job fits."""
    shorter = longest_row(job, below=max(job.lengths.rows, job.lengths.pairs))
    if shorter is not None:
        yield from _if_it_fits(_with_rows(job, shorter), _length_fields(job, shorter))


def _length_fields(job: Job, length: int) -> list[str]:
    """Return the fields that keep a job's rows and pairs at a length, where they are longer."""
    names = {stage.settings.kind for stage in job.plan.stages}
    of = _data_path(job.plan)
    found = []
    if "prepare" in names and job.lengths.rows > length:
        found.append(f"set {of}.maxLength to {length}")
    if "pairs" in names and job.lengths.pairs > length:
        found.append(f"set spec.preferences.maxLength to {length}")
    return found


def _with_rows(job: Job, length: int) -> Job:
    lengths = replace(
        job.lengths, rows=min(job.lengths.rows, length), pairs=min(job.lengths.pairs, length)
    )
    return replace(job, lengths=lengths)


def longest_row(job: Job, *, below: int) -> int | None:
    """Return the longest rows with which a job fits, in steps of 128 tokens; None: none do.

    `below`: a length that need not be tried.
    """
    low, high = 0, (below - 1) // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if _with_free_settings(_with_rows(job, middle * LENGTH_STEP)).fits:
            low = middle
        else:
            high = middle - 1
    return low * LENGTH_STEP or None


def _other_adapter(job: Job) -> Iterator[Remedy]:
    """Yield LoRA in the place of full fine-tuning, or else QLoRA."""
    for adapter in (Adapter(lora=Lora()), Adapter(qlora=Qlora())):
        replaced = [stage for stage in job.training if _is_lighter(adapter, stage)]
        if not replaced:
            continue
        stages = [_with_adapter(s, adapter) if s in replaced else s for s in job.plan.stages]
        tried = replace(job, plan=job.plan.model_copy(update={"stages": stages}))
        rewards = [isinstance(stage.settings, RewardSettings) for stage in replaced]
        if adapter.qlora and not all(rewards) and any(map(_samples_with_vllm, job.plan.stages)):
            continue  # vLLM cannot run such a policy: see `limits.IN_VLLM`
        if not can_shard(adapter):
            if any(stage.runtime.sharding == "fsdp" for stage in stages):
                continue  # planning refuses it
            tried = replace(tried, plan=_unshared(tried.plan))
        fields = [] if all(rewards) else [f"set spec.adapter to {adapter.kind}"]
        if any(rewards):
            fields.append(f"set spec.rewardModel.train.adapter to {adapter.kind}")
        frozen = [stage for stage in replaced if (loop := loop_of(stage)) and loop.freeze]
        paths = dict.fromkeys(training_path(job.plan, stage) for stage in frozen)
        fields += [f"remove {path}.freeze" for path in paths]
        remedy = next(_if_it_fits(tried, fields), None)
        if remedy:
            yield remedy
            return


def _sharded(job: Job) -> Iterator[Remedy]:
    """Yield the fewest workers that can share the model of a fine-tuning, or of DPO and KTO, under
    the engine trl."""
    shared = [_shared(stage) for stage in job.plan.stages]
    stages = [stage for stage in shared if stage is not None]
    on_one_machine = isinstance(job.device, Cpu) and job.plan.job.namespace is None
    if on_one_machine or len(stages) < len(shared):
        return
    plan = job.plan.model_copy(update={"stages": stages})
    compute, loops = job.plan.compute, [stage.settings for stage in job.plan.stages]
    trained = [(stage, loop) for stage in job.training if (loop := loop_of(stage))]
    engines = sorted(
        {
            f"{training_path(job.plan, stage)}.engine to trl"
            for stage, loop in trained
            if not loop.engine
        }
    )
    packed = any(isinstance(loop, TrainSettings) and loop.packing == "always" for loop in loops)
    each = compute.processes_per_worker
    present = job.devices // each
    for workers in sorted({present, *WORKERS}):
        devices = workers * each
        if workers < present or devices < MIN_SHARDS or _obstacles(job, stages, devices):
            continue
        fields = [*engines, "spec.compute.sharding to fsdp"]
        if packed:
            fields.append(f"{_data_path(job.plan)}.packing to auto")
        if workers > present:
            fields.append(f"spec.compute.workers to {workers}")
        if compute.min_workers is not None and compute.min_workers * each < MIN_SHARDS:
            fields.append(f"spec.compute.minWorkers to {MIN_SHARDS}")
        first = ", ".join(fields[:-1])
        change = f"set {first} and {fields[-1]}" if first else f"set {fields[-1]}"
        remedy = next(_if_it_fits(replace(job, plan=plan, devices=devices), [change]), None)
        if remedy:
            yield remedy
            return


def _obstacles(job: Job, stages: Iterable[PlannedStage], devices: int) -> bool:
    """Return whether the model of any of these stages cannot be shared by so many devices."""
    shared = [stage for stage in stages if stage.runtime.sharding == "fsdp"]
    return any(sharding_obstacle(stage, job.facts, devices) for stage in shared)


def _shared(stage: PlannedStage) -> PlannedStage | None:
    """Return a stage whose model the workers share, under the engine trl. None: it cannot be."""
    settings: Any = stage.settings
    if isinstance(settings, PrepareSettings | PairsSettings | ExportSettings):
        return stage
    if isinstance(settings, AugmentSettings):
        return stage if settings.kind == "augment" else None
    if isinstance(settings, TrainSettings) and can_shard(settings.adapter):
        settings = settings.model_copy(update={"engine": "trl", "packing": "never"})
    elif isinstance(settings, DpoSettings) and can_shard(settings.adapter):
        if settings.loss == "sigmoid" and settings.label_smoothing:
            return None  # TRL does not smooth these labels
        loop = settings.training.model_copy(update={"engine": "trl"})
        settings = settings.model_copy(update={"training": loop})
    elif isinstance(settings, EvaluateSettings):
        needs_whole_models = settings.engine == "vllm" or "judge" in stage.inputs
        if needs_whole_models or any(term.role for term in scoring_terms(settings)):
            return None
    else:
        return None
    runtime = stage.runtime.model_copy(update={"sharding": "fsdp"})
    return stage.model_copy(update={"settings": settings, "runtime": runtime})


def _samples_with_vllm(stage: PlannedStage) -> bool:
    sampling: Sampling | None = getattr(stage.settings, "sampling", None)
    return sampling is not None and sampling.engine == "vllm"


def _is_lighter(adapter: Adapter, stage: PlannedStage) -> bool:
    """Return whether an adapter takes less memory than what the stage trains."""
    given: Adapter | None = getattr(stage.settings, "adapter", None)
    return given is None or (given.kind == "lora" and adapter.kind == "qlora")


def _with_adapter(stage: PlannedStage, adapter: Adapter) -> PlannedStage:
    given: Adapter | None = getattr(stage.settings, "adapter", None)
    if given and given.lora:  # the manifest's rank and targets
        adapter = Adapter(qlora=Qlora.model_validate(given.lora.model_dump()))
    settings = stage.settings.model_copy(update={"adapter": adapter})
    return stage.model_copy(update={"settings": settings})


def _unshared(plan: Plan) -> Plan:
    """Return a plan whose stages hold the whole model on each worker."""
    alone = {"sharding": "none"}
    stages = [
        stage.model_copy(update={"runtime": stage.runtime.model_copy(update=alone)})
        for stage in plan.stages
    ]
    return plan.model_copy(update={"stages": stages})


def _without_vllm(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield a job whose evaluation answers with transformers, if it does not fit with vLLM."""
    by_vllm = [stage for stage in job.plan.stages if _evaluates_with_vllm(stage)]
    if {stage.name for stage in by_vllm} & {stage.stage for stage in found.too_large}:
        stages = [
            stage.model_copy(
                update={"settings": stage.settings.model_copy(update={"engine": None})}
            )
            if stage in by_vllm
            else stage
            for stage in job.plan.stages
        ]
        tried = replace(job, plan=job.plan.model_copy(update={"stages": stages}))
        yield from _if_it_fits(tried, ["remove spec.evaluate.engine"])


def _evaluates_with_vllm(stage: PlannedStage) -> bool:
    return isinstance(stage.settings, EvaluateSettings) and stage.settings.engine == "vllm"


def _without_evaluation(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield a job without held-out rows, if their measurement does not fit."""
    measuring = [stage for stage in job.plan.stages if isinstance(stage.settings, EvaluateSettings)]
    if {stage.name for stage in measuring} & {stage.stage for stage in found.too_large}:
        rest = [stage for stage in job.plan.stages if stage not in measuring]
        tried = replace(job, plan=job.plan.model_copy(update={"stages": rest}))
        of = "spec" if job.plan.job.kind == "FineTuneJob" else "spec.sft"
        needing = []  # what the API refuses without held-out rows
        if any(loop.early_stopping for stage in rest if (loop := loop_of(stage))):
            needing.append(f" and {of}.training.earlyStopping")
        if any(getattr(stage.settings, "gates", None) for stage in measuring):
            needing.append(" and spec.evaluate.gates")
        if any(getattr(stage.settings, "suites", None) for stage in measuring):
            needing.append(" and spec.evaluate.suites")
        if any(map(_evaluates_with_vllm, measuring)):
            needing.append(" and spec.evaluate.engine")
        if any(loop.suites for stage in rest if (loop := loop_of(stage))):
            needing.append(f" and {of}.training.suites")
        change = f"remove {of}.data.validation{''.join(needing)}, and so the stage evaluate"
        yield from _if_it_fits(tried, [change])


def _more_memory(job: Job, found: Fit) -> Remedy:
    """Return the memory with which the process fits."""
    wanted = -(-(found.peak + CPU_PROCESS_BYTES) // GIB)
    if job.plan.job.namespace is None:
        change = f"run it on a machine with {wanted * job.devices} GiB of memory"
    else:
        change = f"set spec.compute.memory to {wanted}Gi"
    return Remedy(change, found.peak)


def _larger_gpu(job: Job, given: Gpu) -> Iterator[Remedy]:
    """Yield the smallest described GPU that the job fits."""
    for gpu in GPUS:
        if gpu.memory > given.memory:
            larger = replace(job, device=gpu)
            remedy = next(_if_it_fits(larger, [f"run it on {gpu.name} GPUs"]), None)
            if remedy:
                yield remedy
                break


def _data_path(plan: Plan) -> str:
    """Return the field of the rows of fine-tuning in the manifest."""
    return "spec.data" if plan.job.kind == "FineTuneJob" else "spec.sft.data"


def training_path(plan: Plan, stage: PlannedStage) -> str:
    """Return the field of a stage's training loop in the manifest."""
    if plan.job.kind == "FineTuneJob":
        return "spec.training"
    kind = stage.name.partition("-")[0]
    places = {
        "sft": "spec.sft.training",
        "revise": "spec.constitution.training",
        "reward": "spec.rewardModel.train.training",
    }
    return places.get(kind, f"spec.optimize.{kind}.training")
