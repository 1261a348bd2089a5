"""The memory of every stage of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tuneyard.api.adapters import Adapter
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage, SourceInput
from tuneyard.api.stage_settings import (
    AssessSettings,
    CritiqueSettings,
    DpoSettings,
    EvaluateSettings,
    ExportSettings,
    FeedbackSettings,
    GrpoSettings,
    LoopSettings,
    PpoSettings,
    RewardSettings,
    RewardTerm,
    TrainSettings,
)
from tuneyard.planning.memory import host
from tuneyard.planning.memory.activations import Computation, MicroBatch
from tuneyard.planning.memory.inference import (
    GREEDY_BATCH,
    generation_parts,
    measured_parts,
    sampled_batch,
)
from tuneyard.planning.memory.lengths import Lengths, default_tokens, micro_batch, packed_bins
from tuneyard.planning.memory.parameters import TRAINED_BYTES, classifier, trained
from tuneyard.planning.memory.parts import Moment, Settings, StageMemory
from tuneyard.planning.memory.training import Step

JUDGED_PROMPTS = 128
"""Prompts that `assess` completes at most."""
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


def job_memory(
    plan: Plan,
    facts: ModelFacts,
    machine: Machine,
    lengths: Lengths,
    chosen: Mapping[str, Settings] | None = None,
) -> list[StageMemory]:
    """Return the memory of a job's stages on one worker, in their order.

    `chosen`: settings of training stages, by name, in the place of those of the plan.
    """
    job = _Job(plan, facts, machine, lengths, chosen or {})
    found = (job.memory(stage) for stage in plan.stages)
    return [memory for memory in found if memory is not None]


def settings_of(stage: PlannedStage, facts: ModelFacts, machine: Machine) -> Settings:
    """Return the settings with which the trainer runs a stage that trains."""
    tokens = stage.runtime.micro_batch_tokens
    if tokens == "auto":
        logits = not isinstance(stage.settings, RewardSettings)
        tokens = default_tokens(facts, gpu=machine.gpu, logits=logits)
    return Settings(tokens, stage.runtime.gradient_checkpointing)


def loop_of(stage: PlannedStage) -> LoopSettings | None:
    """Return the training loop of a stage. None: it does not train."""
    settings = stage.settings
    if isinstance(settings, TrainSettings):
        return settings
    if isinstance(settings, RewardSettings | DpoSettings | PpoSettings | GrpoSettings):
        return settings.training
    return None


@dataclass(frozen=True)
class _Job:
    """The inputs of the calculation."""

    plan: Plan
    facts: ModelFacts
    machine: Machine
    lengths: Lengths
    chosen: Mapping[str, Settings]

    def memory(self, stage: PlannedStage) -> StageMemory | None:
        """Return the memory of a stage. None: it loads no model."""
        settings = stage.settings
        if isinstance(settings, TrainSettings | DpoSettings | RewardSettings):
            return self._supervised(stage, settings)
        if isinstance(settings, PpoSettings | GrpoSettings):
            return self._reinforcement(stage, settings)
        if isinstance(settings, EvaluateSettings):
            return self._evaluate(stage, settings)
        if isinstance(settings, AssessSettings):
            return self._assess(stage, settings)
        if isinstance(settings, FeedbackSettings | CritiqueSettings):
            return self._judged(stage, settings)
        if isinstance(settings, ExportSettings):
            return self._export(stage, settings)
        return None

    # ---- training -------------------------------------------------------------------------------

    def _supervised(
        self, stage: PlannedStage, settings: TrainSettings | DpoSettings | RewardSettings
    ) -> StageMemory:
        """Return the memory of fine-tuning, of DPO or KTO, or of a reward model."""
        loop = settings if isinstance(settings, TrainSettings) else settings.training
        reward = isinstance(settings, RewardSettings)
        unpaired = isinstance(settings, DpoSettings) and settings.loss == "kto"
        group = 1 if isinstance(settings, TrainSettings) or unpaired else 2
        rows = isinstance(settings, TrainSettings)
        length = self.lengths.rows if rows else self.lengths.pairs
        capacity = self.lengths.row_bins if rows else self.lengths.pair_bins
        tokens, share = self._settings(stage).micro_batch_tokens, self._share(loop.batch_size)
        packed = not reward and not (
            isinstance(settings, TrainSettings) and settings.packing == "never"
        )
        if packed and length < capacity:
            length, share = packed_bins(length, capacity, tokens, share * group)
            group = 1
        batch = micro_batch(length, tokens, share=share, group=group)
        step = self._step(stage, loop, settings.adapter, batch, masked=packed or batch.rows > 1)
        moments = tuple(step.moments())
        hosts = [host.checkpoint(step.trained)]
        if reward:
            moments += (self._written_reward_model(step),)
            hosts.append(host.merged_model(step.facts))
        return StageMemory(stage.name, moments, tuple(hosts))

    def _written_reward_model(self, step: Step) -> Moment:
        """Return the moment at which the reward model is compared with its files: the trainer still
        holds the trained model, and loads the written one whole."""
        whole = (TRAINED_BYTES + self.facts.stored_bytes) * step.facts.parameters
        return Moment.of("comparing the written model", *step.state, ("written model", whole))

    def _reinforcement(
        self, stage: PlannedStage, settings: PpoSettings | GrpoSettings
    ) -> StageMemory:
        """Return the memory of PPO, GRPO or RLOO: sampling and training hold one model."""
        loop, new = settings.training, settings.sampling.max_new_tokens
        length = self.lengths.prompts + new
        ppo = isinstance(settings, PpoSettings)
        completions = settings.rollouts if isinstance(settings, PpoSettings) else loop.batch_size
        batch = micro_batch(
            length,
            self._settings(stage).micro_batch_tokens,
            share=self._share(loop.batch_size),
            row_targets=new,
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
        rewards = self._reward_models(settings.reward)
        moments = [
            *step.moments(("reward models", rewards)),
            self._sampling(step, self._share(completions), new, rewards),
        ]
        if settings.sampling.engine == "vllm":
            moments = [self._with_engine(moment, completions, new) for moment in moments]
        return StageMemory(
            stage.name,
            tuple(moments),
            (host.checkpoint(step.trained),),
            (self._assumed_prompts, *self._assumed(stage, settings.reward)),
        )

    def _sampling(self, step: Step, completions: int, new: int, rewards: int) -> Moment:
        """Return the moment at which completions are sampled. Gradients are freed before."""
        kept = [part for part in step.state if part[0] != "gradients"]
        copies = step.copies_while_sampling
        parts = self._generation(completions, new, step.how)
        return Moment.of(
            "sampling", *kept, ("reward models", rewards), ("bfloat16 copies", copies), *parts
        )

    def _with_engine(self, moment: Moment, completions: int, new: int) -> Moment:
        """Return a moment with vLLM's own copy of the weights and its cache."""
        precision = self.machine.inference_precision
        rows = self._sampled(self._share(completions), new)
        cache = rows * (self.lengths.prompts + new)
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
        sampled = isinstance(stage.settings, PpoSettings | GrpoSettings)
        facts = classifier(self.facts) if reward else self.facts
        chosen = self._settings(stage)
        learned = trained(facts, adapter, loop.freeze)
        precision = self._precision(loop)
        return Step(
            facts=facts,
            trained=learned,
            batch=batch,
            how=Computation.of(learned, precision, chosen.sharding, masked=masked),
            loss="score" if reward else "tokenLogprobs" if sampled else "crossEntropy",
            devices=self.machine.devices,
            sharding=chosen.sharding,
            checkpointing=chosen.gradient_checkpointing,
            reference=reference,
            added_parameters=facts.hidden_size if reward else added_parameters,
            in_place_updates=not self.machine.gpu,
        )

    def _settings(self, stage: PlannedStage) -> Settings:
        return self.chosen.get(stage.name) or settings_of(stage, self.facts, self.machine)

    def _share(self, count: int) -> int:
        """Return one worker's share of rows or completions."""
        return -(-count // self.machine.devices)

    def _precision(self, loop: LoopSettings) -> int:
        """Return the bytes of the type of the forward pass."""
        if loop.precision == "auto":
            return self.machine.inference_precision
        return 4 if loop.precision == "float32" else 2

    # ---- sampling and measuring -----------------------------------------------------------------

    def _sampled(self, completions: int, new: int) -> int:
        return sampled_batch(
            self.facts,
            completions=completions,
            length=self.lengths.prompts + new,
            memory=self.machine.memory,
            precision=self.machine.inference_precision,
        )

    def _generation(
        self, completions: int, new: int, how: Computation
    ) -> tuple[tuple[str, int], ...]:
        rows = self._sampled(completions, new)
        return generation_parts(self.facts, MicroBatch(rows, self.lengths.prompts), new, how)

    def _loaded(self, adapter: Adapter | None) -> int:
        """Return the bytes of the policy that is loaded to sample or to measure. QLoRA's base is
        not quantized here."""
        base = self.machine.inference_precision * self.facts.parameters
        return base + self._added_bytes(adapter)

    def _added_bytes(self, adapter: Adapter | None) -> int:
        """Return the bytes of an adapter. None: there is none."""
        return TRAINED_BYTES * trained(self.facts, adapter, None).parameters if adapter else 0

    @property
    def _plainly(self) -> Computation:
        precision = self.machine.inference_precision
        return Computation(precision, precision, casts=False, masked=True)

    def _evaluate(self, stage: PlannedStage, settings: EvaluateSettings) -> StageMemory:
        adapter = self._adapter()
        models = 2 if adapter is None and settings.compare_with_base else 1
        weights = (
            "weights in bfloat16" if self.machine.gpu else "weights",
            models * self._loaded(adapter),
        )
        tokens = default_tokens(self.facts, gpu=self.machine.gpu)
        batch = micro_batch(self.lengths.rows, tokens, share=tokens)
        prompts = MicroBatch(GREEDY_BATCH, self.lengths.rows)
        how = self._plainly
        new = settings.max_new_tokens
        moments = (
            Moment.of("loss of held-out rows", weights, *measured_parts(self.facts, batch, how)),
            Moment.of(
                "answers to held-out prompts",
                weights,
                *generation_parts(self.facts, prompts, new, how),
            ),
        )
        return StageMemory(stage.name, moments, ())

    def _assess(self, stage: PlannedStage, settings: AssessSettings) -> StageMemory | None:
        if "tuned" not in stage.inputs:
            return None
        judge = self._judge(stage)
        weights = ("weights", self._loaded(self._adapter()))
        others = ("reward models", self._reward_models(settings.reward))
        new = settings.sampling.max_new_tokens
        parts = self._generation(self._share(JUDGED_PROMPTS), new, self._plainly)
        moments = [Moment.of("sampling", weights, others, *parts)]
        if judge:
            moments.append(Moment.of("judging", others, ("judge", judge)))
        assumed = (self._assumed_prompts, *self._assumed(stage, settings.reward))
        return StageMemory(stage.name, tuple(moments), (), assumed)

    def _judged(
        self, stage: PlannedStage, settings: FeedbackSettings | CritiqueSettings
    ) -> StageMemory:
        weights = ("weights", self._loaded(self._adapter()))
        count = JUDGED_PROMPTS * 2
        parts = self._generation(count, settings.max_new_tokens, self._plainly)
        moment = Moment.of("sampling", weights, ("judge", self._judge(stage)), *parts)
        return StageMemory(
            stage.name, (moment,), (), (self._assumed_prompts, *self._assumed(stage, []))
        )

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
            if isinstance(stage.settings, TrainSettings | DpoSettings | PpoSettings | GrpoSettings)
        ]
        return adapters[-1] if adapters else None

    def _reward_models(self, terms: list[RewardTerm]) -> int:
        size = self.machine.inference_precision * classifier(self.facts).parameters
        return size * sum(term.role is not None for term in terms)

    def _judge(self, stage: PlannedStage) -> int:
        precision = self.machine.inference_precision
        return precision * self.facts.parameters if "judge" in stage.inputs else 0

    def _assumed(self, stage: PlannedStage, terms: list[RewardTerm]) -> list[str]:
        """Return the assumptions about the models whose facts are not known."""
        given = [term.role for term in terms if term.role]
        foreign = [role for role in given if isinstance(stage.inputs.get(role), SourceInput)]
        found = [SAME_SIZE.format(what="each reward model")] if foreign else []
        if "judge" in stage.inputs:
            found.append(SAME_SIZE.format(what="the judge"))
        return found

    @property
    def _assumed_prompts(self) -> str:
        return f"prompts are assumed to have up to {self.lengths.prompts} tokens"
