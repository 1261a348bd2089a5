"""The memory of every stage of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tuneyard.api.adapters import Adapter
from tuneyard.api.compute import MIN_SHARDS
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage, SourceInput
from tuneyard.api.preserving import PreserveTerms
from tuneyard.api.stage_settings import (
    AugmentSettings,
    CritiqueSettings,
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    ExportSettings,
    FeedbackSettings,
    GrpoSettings,
    LoopSettings,
    PpoSettings,
    RewardSettings,
    RewardTerm,
    SuiteSettings,
    TrainSettings,
    scoring_terms,
)
from tuneyard.planning.memory import host
from tuneyard.planning.memory.activations import Computation, Loss, MicroBatch
from tuneyard.planning.memory.inference import (
    CPU_BATCH,
    GPU_BATCH,
    GREEDY_BATCH,
    generation_parts,
    measured_parts,
    sampled_batch,
)
from tuneyard.planning.memory.lengths import Lengths, default_tokens, micro_batch, packed_bins
from tuneyard.planning.memory.parameters import TRAINED_BYTES, classifier, trained
from tuneyard.planning.memory.parts import Moment, Settings, Sharding, StageMemory
from tuneyard.planning.memory.training import Step, gathered_for_inference

JUDGED_PROMPTS = 128
"""Prompts of which both models of an evaluation sample completions, at most."""
GPU_REQUESTS, CPU_REQUESTS = 32, 8
"""Requests that a model replies to at a time, as in the trainer's `judging.local_model`."""
GPU_TASK_BATCH, CPU_TASK_BATCH = 32, 8
"""Requests that lm-evaluation-harness measures at a time, as in `evaluation.suites.harness`."""
REFUSAL_TOKENS = 64
"""Tokens of an answer in which a refusal is searched, as in `evaluation.suites.parts`."""
GPU_SHARE, FULL_TUNING_BYTES = 0.5, 16
"""`compute.sharding: auto` shards what would take more than this share of a GPU, full fine-tuning
counted with these bytes for each parameter; as in the trainer's `models.policies`."""
UNPLANNED = frozenset({"gpt2"})
"""The described architectures whose layers have no FSDP plan in transformers."""
RENAMED = frozenset({"gpt_neox", "mixtral", "qwen3_moe"})
"""Those whose files have other tensors than their layers, so that the workers cannot share them
under full fine-tuning."""
SUITE_PROMPT, SUITE_ANSWER = 256, 64
"""Tokens of a prompt of a suite of refusals, and of its answer, as in the trainer's
`evaluation.suites.parts`. Prompts of XSTest have less than 100 with their template."""
SAME_SIZE = "{what} is assumed to be as large as the model"


@dataclass(frozen=True)
class Machine:
    """The hardware of a worker."""

    memory: int | None
    """Bytes of its GPU. None: it has none, and computes in float32 on the CPU."""
    devices: int
    """Devices that train together, one for each worker."""

    @property
    def gpu(self) -> bool:
        return self.memory is not None

    @property
    def inference_precision(self) -> int:
        """Bytes of a weight that is loaded to sample or to measure."""
        return 2 if self.gpu else 4

    def precision(self, loop: LoopSettings) -> int:
        """Return the bytes of the type of a loop's forward pass."""
        if loop.precision == "auto":
            return self.inference_precision
        return 4 if loop.precision == "float32" else 2


def job_memory(
    plan: Plan,
    facts: ModelFacts,
    machine: Machine,
    lengths: Lengths,
    chosen: Mapping[str, Settings] | None = None,
    models: Mapping[str, int] | None = None,
    *,
    least: bool = False,
) -> list[StageMemory]:
    """Return the memory of a job's stages on one worker, in their order.

    `chosen`: settings of training stages, by name, in the place of those of the plan. `models`: the
    parameters of models from outside the job, by STAGE/ROLE. `least`: count only what is certain.
    What is assumed then takes as little as it can: a row has one token and a batch one row, unless
    a stage trains on every row and the longest one was measured.
    """
    job = _Job(plan, facts, machine, lengths, chosen or {}, models or {}, least)
    found = (job.memory(stage) for stage in plan.stages)
    return [memory for memory in found if memory is not None]


def settings_of(stage: PlannedStage, facts: ModelFacts, machine: Machine) -> Settings:
    """Return the settings with which the trainer runs a stage that trains."""
    tokens = stage.runtime.micro_batch_tokens
    if tokens == "auto":
        logits = not isinstance(stage.settings, RewardSettings)
        tokens = default_tokens(facts, gpu=machine.gpu, logits=logits)
    loop = loop_of(stage)
    precision = machine.precision(loop) if loop else machine.inference_precision
    whole = loop is not None and getattr(stage.settings, "adapter", None) is None
    sharding = sharding_of(stage, facts, machine, FULL_TUNING_BYTES if whole else precision)
    return Settings(tokens, stage.runtime.gradient_checkpointing, sharding)


def sharding_of(
    stage: PlannedStage, facts: ModelFacts, machine: Machine, bytes_per_parameter: int
) -> Sharding:
    """Return whether the workers share the model of a stage, as the trainer's `policies.shards`
    decides. `bytes_per_parameter`: what a whole model takes."""
    asked = stage.runtime.sharding
    if machine.devices < MIN_SHARDS or asked == "none":
        return "none"
    if asked == "auto":
        if sharding_obstacle(stage, facts, machine.devices):
            return "none"
        size = bytes_per_parameter * facts.parameters
        return "fsdp" if machine.memory and size > GPU_SHARE * machine.memory else "none"
    return "fsdp"


def sharding_obstacle(stage: PlannedStage, facts: ModelFacts, devices: int) -> bool:
    """Return whether so many devices cannot share the model of a stage, as far as its facts tell:
    the trainer's `policies.sharding_obstacle` looks at the model itself."""
    whole = loop_of(stage) is not None and getattr(stage.settings, "adapter", None) is None
    is_uneven = facts.tied_embeddings and facts.vocabulary_size % devices != 0
    is_renamed = facts.architecture in RENAMED
    return facts.architecture in UNPLANNED or (whole and (is_uneven or is_renamed))


def loop_of(stage: PlannedStage) -> LoopSettings | None:
    """Return the training loop of a stage. None: it does not train."""
    settings = stage.settings
    if isinstance(settings, TrainSettings):
        return settings
    if isinstance(
        settings, RewardSettings | DpoSettings | PpoSettings | GrpoSettings | DistillSettings
    ):
        return settings.training
    return None


def _answer_tokens(suites: Iterable[SuiteSettings]) -> list[int]:
    """Return the longest answer of each suite that asks prompts, in tokens."""
    asked = (suite for suite in suites if suite.answers or suite.kind == "refusals")
    return [suite.answers.max_new_tokens if suite.answers else REFUSAL_TOKENS for suite in asked]


def _loss(stage: PlannedStage, loop: LoopSettings) -> Loss:
    if isinstance(stage.settings, RewardSettings):
        return "score"
    if loop.engine == "trl":
        return "tiled"
    return (
        "tokenLogprobs"
        if isinstance(stage.settings, PpoSettings | GrpoSettings)
        else ("crossEntropy")
    )


class Shape(NamedTuple):
    """The completions that are sampled at a time."""

    completions: int
    """Most completions."""
    prompt: int
    """Tokens of each prompt."""
    new: int
    """Most tokens of a completion."""

    @property
    def length(self) -> int:
        """Tokens of a prompt with its completion."""
        return self.prompt + self.new


@dataclass(frozen=True)
class _Job:
    """The inputs of the calculation."""

    plan: Plan
    facts: ModelFacts
    machine: Machine
    lengths: Lengths
    chosen: Mapping[str, Settings]
    models: Mapping[str, int]
    least: bool

    def memory(self, stage: PlannedStage) -> StageMemory | None:
        """Return the memory of a stage. None: it loads no model."""
        settings = stage.settings
        if isinstance(settings, TrainSettings | DpoSettings | RewardSettings):
            return self._supervised(stage, settings)
        if isinstance(settings, PpoSettings | GrpoSettings):
            return self._reinforcement(stage, settings)
        if isinstance(settings, DistillSettings):
            return self._distill(stage, settings)
        if isinstance(settings, EvaluateSettings):
            return self._evaluate(stage, settings)
        if isinstance(settings, FeedbackSettings | CritiqueSettings):
            return self._judged(stage, settings)
        if isinstance(settings, AugmentSettings) and settings.kind == "rewrite":
            return self._rewriting(stage, settings)
        if isinstance(settings, ExportSettings):
            return self._export(stage, settings)
        return None

    # ---- training -------------------------------------------------------------------------------

    def _supervised(
        self, stage: PlannedStage, settings: TrainSettings | DpoSettings | RewardSettings
    ) -> StageMemory:
        """Return the memory of fine-tuning, of DPO or KTO, or of a reward model."""
        loop = settings if isinstance(settings, TrainSettings) else settings.training
        batch, masked = self._rows_at_once(stage, settings, loop)
        step = self._step(stage, loop, settings.adapter, batch, masked=masked)
        if isinstance(settings, TrainSettings) and settings.preserve:
            step = _with_terms(step, settings.preserve, batch)
        moments = (*step.moments(), *self._answered_suites(step, loop))
        gathers = step.sharding == "fsdp" and step.trained.adapter is None
        hosts = [host.gathered_checkpoint(step.facts) if gathers else host.checkpoint(step.trained)]
        if isinstance(settings, RewardSettings) and not self.least:
            moments += (self._written_reward_model(step),)
            hosts.append(host.merged_model(step.facts))
        return StageMemory(stage.name, moments, tuple(hosts), self._assumed_rows(stage))

    def _rows_at_once(
        self,
        stage: PlannedStage,
        settings: TrainSettings | DpoSettings | RewardSettings,
        loop: LoopSettings,
    ) -> tuple[MicroBatch, bool]:
        """Return the largest micro-batch, and whether its attention has a mask."""
        length, reward = self._longest(stage), isinstance(settings, RewardSettings)
        if self.least:  # the two completions of a reward model's pair are padded to one length
            return MicroBatch(2 if reward else 1, length if _is_whole_epoch(loop) else 1), False
        unpaired = isinstance(settings, DpoSettings) and settings.loss == "kto"
        rows = isinstance(settings, TrainSettings)
        group = 1 if rows or unpaired else 2
        capacity = self.lengths.row_bins if rows else self.lengths.pair_bins
        rows_of_step = loop.batch_size
        if isinstance(settings, TrainSettings) and settings.preserve and settings.preserve.kl:
            rows_of_step = max(rows_of_step, settings.preserve.kl.batch_size)
        tokens, share = self._settings(stage).micro_batch_tokens, self._share(rows_of_step)
        packed = not (reward or loop.engine) and not (
            isinstance(settings, TrainSettings) and settings.packing == "never"
        )
        if packed and length < capacity:
            length, share = packed_bins(length, capacity, tokens, share * group)
            group = 1
        batch = micro_batch(length, tokens, share=share, group=group)
        return batch, packed or batch.rows > 1

    def _longest(self, stage: PlannedStage) -> int:
        """Return the tokens of the longest row that a stage trains on."""
        measured = self.lengths.measured(stage)
        if measured is None and self.least:
            return 1
        fine_tuning = isinstance(stage.settings, TrainSettings)
        most = self.lengths.rows if fine_tuning else self.lengths.pairs
        if measured is None:
            return most
        general = 0 if self.least else measured.general or 0
        return min(most, max(measured.longest, general))

    def _assumed_rows(self, stage: PlannedStage) -> tuple[str, ...]:
        if self.lengths.measured(stage):
            return ()
        what = "rows" if isinstance(stage.settings, TrainSettings) else "preferences"
        length = self._longest(stage)
        return (f"{what} are assumed to be as long as the manifest allows: {length} tokens",)

    def _written_reward_model(self, step: Step) -> Moment:
        """Return the moment at which the reward model is compared with its files: the trainer still
        holds the trained model, and loads the written one whole."""
        whole = (TRAINED_BYTES + self.facts.stored_bytes) * step.facts.parameters
        return Moment.of("comparing the written model", *step.state, ("written model", whole))

    def _reinforcement(
        self, stage: PlannedStage, settings: PpoSettings | GrpoSettings
    ) -> StageMemory:
        """Return the memory of PPO, GRPO or RLOO: sampling and training hold one model."""
        loop, ppo = settings.training, isinstance(settings, PpoSettings)
        rollouts = settings.rollouts if isinstance(settings, PpoSettings) else loop.batch_size
        shape = self._shape(stage, self._share(rollouts), settings.sampling.max_new_tokens)
        batch = MicroBatch(1, shape.length, shape.new)
        if not self.least:
            batch = micro_batch(
                shape.length,
                self._settings(stage).micro_batch_tokens,
                share=self._share(loop.batch_size),
                row_targets=shape.new,
            )
        step = self._step(
            stage,
            loop,
            settings.adapter,
            batch,
            masked=True,
            reference=ppo or settings.kl_coefficient > 0,
            added_parameters=self.facts.hidden_size + 1 if ppo else 0,
        )
        rewards = self._reward_models(stage, scoring_terms(settings))
        moments = [
            *step.moments(("reward models", rewards)),
            self._sampling(step, shape, ("reward models", rewards)),
        ]
        if settings.sampling.engine == "vllm":
            moments = [self._with_engine(moment, shape) for moment in moments]
        return StageMemory(
            stage.name,
            tuple(moments),
            (host.checkpoint(step.trained),),
            (
                *self._assumed_shape(stage, shape),
                *self._assumed_models(stage, scoring_terms(settings)),
            ),
        )

    def _distill(self, stage: PlannedStage, settings: DistillSettings) -> StageMemory:
        """Return the memory of distillation: the teacher is beside the policy all the time."""
        loop, new = settings.training, settings.sampling.max_new_tokens
        shape = self._shape(stage, self._share(loop.batch_size), new)
        batch = MicroBatch(1, shape.length, shape.new)
        if not self.least:
            tokens, share = self._settings(stage).micro_batch_tokens, self._share(loop.batch_size)
            batch = micro_batch(shape.length, tokens, share=share, row_targets=shape.new)
        step = self._step(stage, loop, settings.adapter, batch, masked=True)
        teacher = self._base_bytes(self._size(stage, "teacher", self.facts.parameters))
        beside = ("teacher", teacher)
        moments = [*step.moments(beside), self._sampling(step, shape, beside)]
        moments += self._answered_suites(step, loop, beside)
        assumed = self._assumed_shape(stage, shape)
        if self._is_unknown(stage, "teacher"):
            assumed += (SAME_SIZE.format(what="the teacher"),)
        return StageMemory(stage.name, tuple(moments), (host.checkpoint(step.trained),), assumed)

    def _answered_suites(
        self, step: Step, loop: LoopSettings, beside: tuple[str, int] = ("teacher", 0)
    ) -> Iterator[Moment]:
        """Yield the moment at which suites of refusals are answered during training. Those of
        choices take micro-batches of training without gradients, and so less than a step."""
        if not self.least and any(suite.kind == "refusals" for suite in loop.suites or ()):
            shape = Shape(GREEDY_BATCH, SUITE_PROMPT, SUITE_ANSWER)
            yield self._sampling(step, shape, beside, "answers to suites")

    def _sampling(
        self, step: Step, shape: Shape, beside: tuple[str, int], name: str = "sampling"
    ) -> Moment:
        """Return the moment at which completions are sampled, with models beside the policy.
        Gradients are freed before."""
        kept = [part for part in step.state if part[0] != "gradients"]
        copies = step.copies_while_sampling
        parts = self._generation(shape, step.how)
        gathered = 0
        if step.sharding == "fsdp":
            gathered = gathered_for_inference(self.facts, step.how.precision)
        return Moment.of(
            name,
            *kept,
            beside,
            ("bfloat16 copies", copies),
            ("gathered weights", gathered),
            *parts,
        )

    def _with_engine(self, moment: Moment, shape: Shape) -> Moment:
        """Return a moment with vLLM's own copy of the weights and its cache."""
        precision = self.machine.inference_precision
        cache = self._sampled(shape) * shape.length
        cache *= 2 * self.facts.layers * self.facts.key_value_size * precision
        size = precision * self.facts.parameters + cache
        parts = [part for part in moment.parts if part.name != "key-value cache"]
        return Moment.of(moment.name, *parts, ("vLLM's weights and cache", size))

    def _step(
        self,
        stage: PlannedStage,
        loop: LoopSettings,
        adapter: Adapter | None,
        batch: MicroBatch,
        *,
        masked: bool,
        reference: bool = False,
        added_parameters: int = 0,
    ) -> Step:
        reward = isinstance(stage.settings, RewardSettings)
        facts = classifier(self.facts) if reward else self.facts
        chosen = self._settings(stage)
        learned = trained(facts, adapter, loop.freeze)
        precision = self.machine.precision(loop)
        return Step(
            facts=facts,
            trained=learned,
            batch=batch,
            how=Computation.of(learned, precision, chosen.sharding, masked=masked),
            loss=_loss(stage, loop),
            devices=self.machine.devices,
            sharding=chosen.sharding,
            checkpointing=chosen.gradient_checkpointing,
            reference=reference,
            added_parameters=facts.hidden_size if reward else added_parameters,
            in_place_updates=not self.machine.gpu,
            file_backed=chosen.sharding == "none"
            and self._is_file_backed(precision if adapter else TRAINED_BYTES),
        )

    def _settings(self, stage: PlannedStage) -> Settings:
        return self.chosen.get(stage.name) or settings_of(stage, self.facts, self.machine)

    def _share(self, count: int) -> int:
        """Return one worker's share of rows or completions."""
        return -(-count // self.machine.devices)

    # ---- sampling and measuring -----------------------------------------------------------------

    def _shape(self, stage: PlannedStage, completions: int, new: int) -> Shape:
        """Return what a stage samples. `completions`: the most that it samples at a time. `new`:
        most tokens of one."""
        if self.least:
            return Shape(1, 1, 1)
        measured, context = self.lengths.measured_prompts.get(stage.name), self.facts.context_length
        if measured is None:
            return Shape(completions, self.lengths.prompts, new)
        room = max(1, (context or measured.longest + new) - new)  # longer prompts are left out
        return Shape(completions, min(measured.longest, room), new)

    def _judged_shape(self, stage: PlannedStage, each: int, new: int) -> Shape:
        """Return what a worker samples, `each` completions of its share of the prompts, to judge
        them."""
        measured = self.lengths.measured_prompts.get(stage.name)
        prompts = min(JUDGED_PROMPTS, measured.count) if measured else JUDGED_PROMPTS
        return self._shape(stage, self._share(prompts * each), new)

    def _sampled(self, shape: Shape) -> int:
        return sampled_batch(
            self.facts,
            completions=shape.completions,
            length=shape.length,
            memory=self.machine.memory,
            precision=self.machine.inference_precision,
        )

    def _generation(self, shape: Shape, how: Computation) -> tuple[tuple[str, int], ...]:
        batch = MicroBatch(self._sampled(shape), shape.prompt)
        return generation_parts(self.facts, batch, shape.new, how)

    def _loaded(self, stage: PlannedStage) -> int:
        """Return the bytes of the policy that a stage loads to sample or to measure. QLoRA's base
        is not quantized here."""
        adapter = self._adapter() if "tuned" in stage.inputs else None
        return self._base_bytes(self.facts.parameters) + self._added_bytes(adapter)

    def _weights(self, stage: PlannedStage, name: str) -> list[tuple[str, int]]:
        """Return the parts of the policy that a stage loads to measure it, with their bytes.
        `name`: of the weights."""
        precision = self.machine.inference_precision
        if sharding_of(stage, self.facts, self.machine, precision) == "none":
            return [(name, self._loaded(stage))]
        share = precision * self.facts.parameters // self.machine.devices
        adapter = self._added_bytes(self._adapter())
        gathered = gathered_for_inference(self.facts, precision)
        return [(name, share + adapter), ("gathered weights", gathered)]

    def _base_bytes(self, parameters: int) -> int:
        """Return the bytes of a model that is loaded to sample, to measure or to judge."""
        precision = self.machine.inference_precision
        return 0 if self._is_file_backed(precision) else precision * parameters

    def _is_file_backed(self, precision: int) -> bool:
        """Return whether weights that are not trained may be pages of their file, which is certain
        to take no memory: on the CPU, in the type of the file. `precision`: bytes of a weight."""
        return self.least and not self.machine.gpu and precision == self.facts.stored_bytes

    def _added_bytes(self, adapter: Adapter | None) -> int:
        """Return the bytes of an adapter. None: there is none."""
        return TRAINED_BYTES * trained(self.facts, adapter, None).parameters if adapter else 0

    @property
    def _plainly(self) -> Computation:
        precision = self.machine.inference_precision
        return Computation(precision, precision, casts=False, masked=True)

    def _evaluate(self, stage: PlannedStage, settings: EvaluateSettings) -> StageMemory | None:
        """Return the memory of an evaluation. None: it measures a reward model alone."""
        if "tuned" not in stage.inputs:
            return None
        moments: list[Moment] = []
        assumed: tuple[str, ...] = ()
        if "data" in stage.inputs:
            found, assumed = self._held_out_rows(stage, settings)
            moments += found
        if settings.completions:
            found, other = self._sampled_completions(stage, settings)
            moments += found
            assumed += other
        if settings.suites:
            found, other = self._suites(stage, settings.suites)
            moments += found
            assumed += other
        if settings.engine == "vllm":
            shape = self._answered_shape(stage, settings)
            moments = [self._with_engine(moment, shape) for moment in moments]
        if judge := self._judge(stage):
            others = self._reward_models(stage, scoring_terms(settings))
            moments.append(Moment.of("judging", ("reward models", others), ("judge", judge)))
        assumed += self._assumed_models(stage, scoring_terms(settings))
        return StageMemory(stage.name, tuple(moments), (), assumed)

    def _held_out_rows(
        self, stage: PlannedStage, settings: EvaluateSettings
    ) -> tuple[list[Moment], tuple[str, ...]]:
        """Return the moments of a model on held-out rows, and what they assume."""
        name = "weights in bfloat16" if self.machine.gpu else "weights"
        weights = self._weights(stage, name)
        tokens = default_tokens(self.facts, gpu=self.machine.gpu)
        measured = self.lengths.measured(stage)
        longest = measured and measured.held_out
        held_out = self._held_out_length(stage)
        batch = micro_batch(held_out, tokens, share=tokens)
        known = self.lengths.measured_prompts.get(stage.name)
        count = min(GREEDY_BATCH, known.count) if known else GREEDY_BATCH
        prompts = MicroBatch(count, self._asked_length(stage, settings))
        new = settings.max_new_tokens
        if self.least:
            batch = prompts = MicroBatch(1, 1)
            new = 1
        how = self._plainly
        moments = [
            Moment.of("loss of held-out rows", *weights, *measured_parts(self.facts, batch, how)),
            Moment.of(
                "answers to held-out prompts",
                *weights,
                *generation_parts(self.facts, prompts, new, how),
            ),
        ]
        assumed = f"held-out rows are assumed to have up to {held_out} tokens"
        return moments, () if longest else (assumed,)

    def _held_out_length(self, stage: PlannedStage) -> int:
        """Return the tokens of the longest held-out row."""
        measured = self.lengths.measured(stage)
        longest = measured and measured.held_out
        return min(self.lengths.rows, longest or self.lengths.rows)

    def _asked_length(self, stage: PlannedStage, settings: EvaluateSettings) -> int:
        """Return the tokens of the longest held-out prompt, with its worked examples."""
        asked = self._held_out_length(stage) * (1 + (settings.few_shot or 0))
        return min(asked, self.facts.context_length or asked)

    def _answered_shape(self, stage: PlannedStage, settings: EvaluateSettings) -> Shape:
        """Return what an engine of its own completes in an evaluation: it has one cache for the
        longest of all prompts."""
        most = GPU_BATCH if self.machine.gpu else CPU_BATCH
        if self.least:
            return Shape(1, 1, 1)
        suites = settings.suites or []
        prompts, new = [1], [settings.max_new_tokens]
        if "data" in stage.inputs:
            prompts.append(self._asked_length(stage, settings))
        if settings.completions:
            prompts.append(self._judged_shape(stage, 1, settings.max_new_tokens).prompt)
        if answered := _answer_tokens(suites):
            prompts.append(self.lengths.prompts)
            new += answered
        return Shape(most, max(prompts), max(new))

    def _sampled_completions(
        self, stage: PlannedStage, settings: EvaluateSettings
    ) -> tuple[list[Moment], tuple[str, ...]]:
        """Return the moment at which a model samples completions, and what it assumes."""
        weights = self._weights(stage, "weights")
        others = ("reward models", self._reward_models(stage, scoring_terms(settings)))
        # The workers of a sharded model all complete all prompts.
        each = self.machine.devices if len(weights) > 1 else 1
        shape = self._judged_shape(stage, each, settings.max_new_tokens)
        parts = self._generation(shape, self._plainly)
        moment = Moment.of("sampling", *weights, others, *parts)
        return [moment], self._assumed_shape(stage, shape)

    def _suites(
        self, stage: PlannedStage, suites: list[SuiteSettings]
    ) -> tuple[list[Moment], tuple[str, ...]]:
        """Return the moments of a model on suites, one for each way to measure, and what they
        assume."""
        weights = self._weights(stage, "weights")
        length, gpu, how = self.lengths.prompts, self.machine.gpu, self._plainly
        tokens = default_tokens(self.facts, gpu=gpu)
        scored = micro_batch(length, tokens, share=tokens)
        tasks = MicroBatch(GPU_TASK_BATCH if gpu else CPU_TASK_BATCH, length)
        asked = MicroBatch(GREEDY_BATCH, length)
        if self.least:
            scored = tasks = asked = MicroBatch(1, 1)
        kinds = {suite.kind for suite in suites}
        moments = []
        if "choices" in kinds:
            found = measured_parts(self.facts, scored, how)
            moments.append(Moment.of("scores of suites", *weights, *found))
        if "task" in kinds:
            found = measured_parts(self.facts, tasks, how)
            moments.append(Moment.of("tasks of suites", *weights, *found))
        if new := _answer_tokens(suites):
            most = max(new)
            found = generation_parts(self.facts, asked, 1 if self.least else most, how)
            moments.append(Moment.of("answers to suites", *weights, *found))
        return moments, (f"items of suites are assumed to have up to {length} tokens",)

    def _judged(
        self, stage: PlannedStage, settings: FeedbackSettings | CritiqueSettings
    ) -> StageMemory:
        """Return the memory of sampling and judging. The policy is freed before a judge of its own
        is loaded."""
        shape = self._judged_shape(stage, 2, settings.max_new_tokens)
        parts = self._generation(shape, self._plainly)
        moments = [Moment.of("sampling", ("weights", self._loaded(stage)), *parts)]
        if judge := self._judge(stage):
            moments.append(Moment.of("judging", ("judge", judge), *parts))
        assumed = self._assumed_shape(stage, shape) + self._assumed_models(stage, [])
        return StageMemory(stage.name, tuple(moments), (), assumed)

    def _rewriting(self, stage: PlannedStage, settings: AugmentSettings) -> StageMemory:
        """Return the memory of a model that writes training rows. A request holds a question or an
        answer of a row."""
        most = GPU_REQUESTS if self.machine.gpu else CPU_REQUESTS
        shape = Shape(most, self.lengths.rows, settings.max_new_tokens)
        if self.least:
            shape = Shape(1, 1, 1)
        batch = MicroBatch(shape.completions, shape.prompt)
        parts = generation_parts(self.facts, batch, shape.new, self._plainly)
        model = ("judge", self._judge(stage)) if "judge" in stage.inputs else None
        held = model or ("weights", self._loaded(stage))
        assumed = self._assumed_models(stage, [])
        if not self.least:
            assumed += self._assumed_shape(stage, shape)
        return StageMemory(stage.name, (Moment.of("rewriting", held, *parts),), (), assumed)

    def _export(self, stage: PlannedStage, settings: ExportSettings) -> StageMemory:
        size = self._added_bytes(self._adapter())
        moment = host.export(self.facts, size, merge=settings.merge)
        return StageMemory(stage.name, (), (moment,))

    # ---- other models ---------------------------------------------------------------------------

    def _adapter(self) -> Adapter | None:
        """Return the policy's adapter. None: the policy is tuned whole."""
        adapters: list[Adapter | None] = [
            stage.settings.adapter
            for stage in self.plan.stages
            if isinstance(
                stage.settings,
                TrainSettings | DpoSettings | PpoSettings | GrpoSettings | DistillSettings,
            )
        ]
        return adapters[-1] if adapters else None

    def _reward_models(self, stage: PlannedStage, terms: list[RewardTerm]) -> int:
        """Return the bytes of the reward models that a stage loads."""
        own = classifier(self.facts).parameters
        roles = [term.role for term in terms if term.role]
        return sum(self._base_bytes(self._size(stage, role, own)) for role in roles)

    def _judge(self, stage: PlannedStage) -> int:
        """Return the bytes of the judge that a stage loads. 0: it loads none of its own."""
        if "judge" not in stage.inputs:
            return 0
        return self._base_bytes(self._size(stage, "judge", self.facts.parameters))

    def _size(self, stage: PlannedStage, role: str, own: int) -> int:
        """Return the parameters of a model that a stage loads beside the policy. `own`: those of
        such a model over the policy's base."""
        is_foreign = isinstance(stage.inputs.get(role), SourceInput)
        known = self.models.get(f"{stage.name}/{role}") if is_foreign else own
        if self.least and is_foreign and not self.machine.gpu:
            return 0  # the type of its file is not known: see _is_file_backed
        return known if known is not None else 0 if self.least else own

    def _is_unknown(self, stage: PlannedStage, role: str) -> bool:
        """Return whether a model comes from outside the job and its facts are not known."""
        is_foreign = isinstance(stage.inputs.get(role), SourceInput)
        return is_foreign and f"{stage.name}/{role}" not in self.models

    def _assumed_models(self, stage: PlannedStage, terms: list[RewardTerm]) -> tuple[str, ...]:
        """Return the assumptions about the models whose facts are not known."""
        roles = [term.role for term in terms if term.role]
        found: tuple[str, ...] = ()
        if any(self._is_unknown(stage, role) for role in roles):
            found = (SAME_SIZE.format(what="each reward model of which nothing is known"),)
        if self._is_unknown(stage, "judge"):
            found += (SAME_SIZE.format(what="the judge"),)
        return found

    def _assumed_shape(self, stage: PlannedStage, shape: Shape) -> tuple[str, ...]:
        """Return the assumptions about prompts and completions."""
        new = f"completions are assumed to reach maxNewTokens: {shape.new} tokens"
        if stage.name in self.lengths.measured_prompts:
            return (new,)
        return (f"prompts are assumed to have up to {shape.prompt} tokens", new)


def _with_terms(step: Step, terms: PreserveTerms, batch: MicroBatch) -> Step:
    """Return a training step with terms against forgetting."""
    return replace(
        step,
        reference=True,
        pulls=bool(terms.l2_sp or terms.ewc),
        fisher=terms.ewc is not None,
        general_targets=batch.targets if terms.kl else 0,
    )


def _is_whole_epoch(loop: LoopSettings) -> bool:
    """Return whether a stage is certain to train on every row, and so on the longest one."""
    may_stop = loop.early_stopping or (isinstance(loop, TrainSettings) and loop.guard)
    return loop.max_steps is None and (loop.epochs or 0) >= 1 and not may_stop
