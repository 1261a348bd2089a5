"""Whether a job fits its GPUs, what `auto` would choose to make it fit, and what else would.

The choice is runtime of an attempt: it is no part of a plan's bytes or of an identity (ADR 0003).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tuneyard.api.adapters import Adapter, Lora, Qlora
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage
from tuneyard.api.stage_settings import EvaluateSettings, RewardSettings
from tuneyard.planning.hardware import Gpu, smallest
from tuneyard.planning.memory.lengths import FEWEST_TOKENS, Lengths
from tuneyard.planning.memory.parts import Settings, Sharding, StageMemory
from tuneyard.planning.memory.stages import Machine, job_memory, loop_of, settings_of

LENGTH_STEP = 128
"""Row lengths are searched in steps of this many tokens."""


class Remedy(NamedTuple):
    """A change of the manifest after which the job fits."""

    change: str
    """The fields and their values, as an instruction."""
    peak: int
    """The most bytes on a GPU after it."""


@dataclass(frozen=True)
class Fit:
    """A job on its GPUs."""

    memory: list[StageMemory]
    """The memory with the settings of the manifest, or with those chosen for `auto`."""
    limit: int
    """Bytes that a GPU offers."""
    chosen: Mapping[str, Settings]
    """What `auto` chooses for each stage that trains."""
    remedies: tuple[Remedy, ...] = ()
    """Ways to make a job fit that does not."""

    @property
    def peak(self) -> int:
        """The most bytes on a GPU."""
        return max((stage.peak.total for stage in self.memory), default=0)

    @property
    def too_large(self) -> list[StageMemory]:
        """The stages that do not fit."""
        return [stage for stage in self.memory if stage.peak.total > self.limit]

    @property
    def fits(self) -> bool:
        return not self.too_large


@dataclass(frozen=True)
class Job:
    """A job, its model and its GPUs."""

    plan: Plan
    facts: ModelFacts
    gpu: Gpu
    devices: int
    """GPUs that train together."""
    lengths: Lengths
    shardings: Sequence[Sharding] = ("none",)
    """What the engine can do, the cheapest first."""

    @property
    def machine(self) -> Machine:
        return Machine(self.gpu.memory, self.devices)

    @property
    def training(self) -> list[PlannedStage]:
        """The stages that train."""
        return [stage for stage in self.plan.stages if loop_of(stage)]

    def memory(self, chosen: Mapping[str, Settings]) -> list[StageMemory]:
        """Return the memory of all stages with some settings."""
        return job_memory(self.plan, self.facts, self.machine, self.lengths, chosen)

    def peak(self, stage: PlannedStage, settings: Settings) -> int:
        """Return the most bytes on a GPU in one stage with some settings."""
        alone = self.plan.model_copy(update={"stages": [stage]})
        chosen = {stage.name: settings}
        found = job_memory(alone, self.facts, self.machine, self.lengths, chosen)
        return max(memory.peak.total for memory in found)


def fit(job: Job) -> Fit:
    """Return how a job fits its GPUs, with ways to make it fit if it does not."""
    chosen = {stage.name: choose(job, stage) for stage in job.training}
    found = Fit(job.memory(chosen), job.gpu.usable, chosen)
    if found.fits:
        return found
    return replace(found, remedies=tuple(_remedies(job, found)))


# ---- what `auto` chooses ------------------------------------------------------------------------


def choose(job: Job, stage: PlannedStage) -> Settings:
    """Return the settings of a stage: the first that fit, of those that the manifest leaves open.

    Smaller micro-batches come first, down to a quarter: they hardly cost time. Then activations are
    recomputed, which costs a third of the time, and at last the model is sharded. If nothing fits,
    the settings that take least are returned.
    """
    candidates = list(_candidates(job, stage))
    for settings in candidates:
        if job.peak(stage, settings) <= job.gpu.usable:
            return settings
    return min(candidates, key=lambda settings: job.peak(stage, settings))


def _candidates(job: Job, stage: PlannedStage) -> Iterator[Settings]:
    given = settings_of(stage, job.facts, job.machine)
    auto = stage.runtime.micro_batch_tokens == "auto"
    most = given.micro_batch_tokens
    sizes = list(_halved(most)) if auto else [most]
    large = [size for size in sizes if 4 * size >= most]
    for sharding in job.shardings:
        if not given.gradient_checkpointing:
            for size in large:
                yield Settings(size, False, sharding)
        for size in sizes:
            yield Settings(size, True, sharding)


def _halved(size: int) -> Iterator[int]:
    while size >= FEWEST_TOKENS:
        yield size
        size //= 2


# ---- what would make it fit ---------------------------------------------------------------------


def _remedies(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield changes after which every stage fits, as far as they exist."""
    yield from _other_settings(job)
    yield from _shorter_rows(job, found)
    yield from _other_adapter(job)
    yield from _without_evaluation(job, found)
    gpu = smallest(found.peak)
    if gpu:
        yield Remedy(f"run it on GPUs with more memory, such as {gpu.name}", found.peak)
    else:
        yield Remedy(
            "set spec.model.uri to a smaller model: no described GPU holds this job", found.peak
        )


def _other_settings(job: Job) -> Iterator[Remedy]:
    """Yield smaller micro-batches, where the manifest sets large ones."""
    changed, chosen = [], {}
    for stage in job.training:
        best = choose(job, stage)
        if stage.runtime.micro_batch_tokens != "auto":
            open_stage = _opened(stage)
            best = choose(job, open_stage)
            if best.micro_batch_tokens != stage.runtime.micro_batch_tokens:
                path = training_path(job.plan, stage)
                changed.append(f"{path}.microBatchTokens to {best.micro_batch_tokens}")
                if best.gradient_checkpointing and not stage.runtime.gradient_checkpointing:
                    changed.append(f"{path}.gradientCheckpointing to true")
        chosen[stage.name] = best
    yield from _if_it_fits(job, chosen, changed)


def _opened(stage: PlannedStage) -> PlannedStage:
    runtime = stage.runtime.model_copy(update={"micro_batch_tokens": "auto"})
    return stage.model_copy(update={"runtime": runtime})


def _if_it_fits(job: Job, chosen: Mapping[str, Settings], changed: list[str]) -> Iterator[Remedy]:
    tried = Fit(job.memory(chosen), job.gpu.usable, chosen)
    if changed and tried.fits:
        yield Remedy(f"set {' and '.join(changed)}", tried.peak)


def _shorter_rows(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield the longest rows with which the job fits."""
    longest = max(job.lengths.rows, job.lengths.pairs)
    shorter = longest_row(job, below=longest)
    if shorter is None:
        return
    tried = _with_rows(job, shorter)
    chosen = {stage.name: choose(tried, stage) for stage in tried.training}
    kinds = {stage.name.partition("-")[0] for stage in job.plan.stages}
    fields = []
    if "prepare" in kinds:
        spec = "spec.data" if job.plan.job.kind == "FineTuneJob" else "spec.sft.data"
        fields.append(f"{spec}.maxLength to {shorter}")
    if "pairs" in kinds:
        fields.append(f"spec.preferences.maxLength to {shorter}")
    yield from _if_it_fits(tried, chosen, fields)
    del found


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
        tried = _with_rows(job, middle * LENGTH_STEP)
        chosen = {stage.name: choose(tried, stage) for stage in tried.training}
        if Fit(tried.memory(chosen), job.gpu.usable, chosen).fits:
            low = middle
        else:
            high = middle - 1
    return low * LENGTH_STEP or None


def _other_adapter(job: Job) -> Iterator[Remedy]:
    """Yield LoRA in the place of full fine-tuning, or QLoRA in the place of LoRA."""
    adapters = {
        stage.name: getattr(stage.settings, "adapter", None)
        for stage in job.training
        if not isinstance(stage.settings, RewardSettings)
    }
    given = next(iter(adapters.values()), None)
    lora = given.lora if given else None
    options = [Adapter(lora=Lora()), Adapter(qlora=Qlora())] if given is None else []
    if lora:
        options = [Adapter(qlora=Qlora.model_validate(lora.model_dump()))]
    for adapter in options if adapters else []:
        stages = [
            stage.model_copy(
                update={"settings": stage.settings.model_copy(update={"adapter": adapter})}
            )
            if stage.name in adapters
            else stage
            for stage in job.plan.stages
        ]
        tried = replace(job, plan=job.plan.model_copy(update={"stages": stages}))
        chosen = {stage.name: choose(tried, stage) for stage in tried.training}
        change = (
            f"spec.adapter to {adapter.kind}: {{}}" if lora is None else "spec.adapter to qlora"
        )
        yield from _if_it_fits(tried, chosen, [change])


def _without_evaluation(job: Job, found: Fit) -> Iterator[Remedy]:
    """Yield a job without held-out rows, if only their measurement does not fit."""
    measuring = {
        stage.name for stage in job.plan.stages if isinstance(stage.settings, EvaluateSettings)
    }
    if {stage.stage for stage in found.too_large} != measuring:
        return
    rest = [stage for stage in found.memory if stage.stage not in measuring]
    peak = max((stage.peak.total for stage in rest), default=0)
    yield Remedy("remove spec.data.validation, and with it the stage evaluate", peak)


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
