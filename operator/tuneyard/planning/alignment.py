"""The stages of an AlignmentJob, in the order of its fields; rounds repeat the last of them.

A policy is always `model` and the last `tuned`: each stage that trains it goes on from the one
before, so that what is exported needs nothing of what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tuneyard.api.adapters import MERGEABLE
from tuneyard.api.alignment import (
    AiFeedback,
    Constitution,
    Dpo,
    GroupRelative,
    Judge,
    Ppo,
    Preferences,
    RewardModel,
    Sampling,
    WinRate,
)
from tuneyard.api.alignmentjob import AlignmentSpec
from tuneyard.api.plan import Input, SourceInput, StageInput, TrainRuntime
from tuneyard.api.sources import FieldMap, PromptSet
from tuneyard.api.stage_settings import (
    AssessSettings,
    ChatSettings,
    CritiqueSettings,
    DatasetSettings,
    DpoSettings,
    ExportSettings,
    FeedbackSettings,
    GrpoSettings,
    JudgeSettings,
    LoopSettings,
    PairsSettings,
    PpoSettings,
    PrepareSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    WinRateSettings,
)
from tuneyard.api.training import Training
from tuneyard.errors import PlanError
from tuneyard.planning import defaults
from tuneyard.planning.drafts import (
    Draft,
    dataset_inputs,
    dataset_settings,
    evaluate,
    loop,
    model_input,
    prepare,
    runtime,
    train,
)
from tuneyard.planning.limits import alignment_faults
from tuneyard.planning.principles import COMPARISON, CRITIQUE, PRINCIPLES, REVISION

Packing = Literal["auto", "always", "never"]

REVISIONS, LABELS = "revisions.jsonl", "preferences.jsonl"
"""What critique and feedback leave for the stages that read it."""


def draft(spec: AlignmentSpec) -> tuple[list[Draft], list[str]]:
    """The job's stages, and what the user is told of them. Raises PlanError."""
    faults = alignment_faults(spec)
    if faults:
        raise PlanError(faults)
    line = _Line.of(spec)
    line.fine_tune()
    line.criticise()
    for number in range(1, spec.rounds + 1):
        line.round(number)
    line.finish()
    return line.drafts, line.notes


@dataclass
class _Line:
    """The stages so far, and what they leave to the next ones."""

    spec: AlignmentSpec
    model: SourceInput
    chat: ChatSettings
    tuning: str
    """`full`, or the adapter's name."""
    drafts: list[Draft] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tuned: StageInput | None = None
    """Who trained the policy last; None: nobody yet."""
    start: StageInput | None = None
    """Who had trained it before the rounds."""
    rows: StageInput | None = None
    """The last prepared data set of fine-tuning."""
    pairs: StageInput | None = None
    reward: StageInput | None = None

    @classmethod
    def of(cls, spec: AlignmentSpec) -> _Line:
        data = spec.sft.data if spec.sft else None
        chat = ChatSettings(
            system_prompt=data.system_prompt if data else None,
            chat_template=data.chat_template if data else None,
        )
        tuning = spec.adapter.kind if spec.adapter else "full"
        return cls(spec, model_input(spec.model), chat, tuning)

    @property
    def policy(self) -> dict[str, Input]:
        """The model as it is now."""
        return {"model": self.model, **({"tuned": self.tuned} if self.tuned else {})}

    # ---- fine-tuning --------------------------------------------------------------------------

    def fine_tune(self) -> None:
        step = self.spec.sft
        if step is None:
            return
        held_out = step.data.validation and step.data.validation.data
        inputs: dict[str, Input] = {
            "model": self.model,
            **dataset_inputs("train", "spec.sft.data.train", step.data.train),
            **dataset_inputs("validation", "spec.sft.data.validation.data", held_out or []),
        }
        self.drafts.append(Draft("prepare", prepare(step.data, "sft"), inputs))
        self._sft("sft", StageInput(stage="prepare"), step.training, step.data.packing, "sft")

    def criticise(self) -> None:
        step = self.spec.constitution
        if step is None:
            return
        inputs, endpoint = self._judge(step.judge, "spec.constitution.judge")
        prompts = {"prompts": _prompts_input(step.prompts, "spec.constitution.prompts")}
        self.drafts.append(
            Draft("critique", self._critique(step), {**self.policy, **prompts, **inputs}, endpoint)
        )
        revisions = StageInput(stage="critique", file=REVISIONS)
        rows: dict[str, Input] = {"model": self.model, "train.0": revisions}
        self.drafts.append(Draft("revisions", self._revisions(), rows))
        data = StageInput(stage="revisions")
        self._sft("revise", data, step.training, "auto", "constitution")

    def _sft(
        self, name: str, data: StageInput, training: Training, packing: Packing, field: str
    ) -> None:
        rule = defaults.rule("sft", self.tuning)
        self._note(f"{field}.training", training, rule, defaults.EPOCHS)
        settings = train("sft", self.spec.adapter, packing, training, rule)
        self.drafts.append(Draft(name, settings, {**self.policy, "data": data}, runtime(training)))
        self.tuned, self.rows = StageInput(stage=name), data

    def _critique(self, step: Constitution) -> CritiqueSettings:
        return CritiqueSettings(
            prompts=_prompts(step.prompts),
            chat=self.chat,
            judge=_judge_settings(step.judge),
            principles=list(step.principles or PRINCIPLES),
            critique_request=step.critique_request or CRITIQUE,
            revision_request=step.revision_request or REVISION,
            revisions=step.revisions,
            max_new_tokens=step.max_new_tokens,
            seed=defaults.SAMPLING_SEED,
        )

    def _revisions(self) -> PrepareSettings:
        """The model's own answers: what is too long is cut, and a hollow one stops nothing."""
        return PrepareSettings(
            method="sft",
            train=[_generated()],
            validation=[],
            validation_fraction=defaults.REVISIONS_HELD_OUT,
            max_length="auto",
            on_overlength="truncate",
            on_invalid_row="skip",
            train_on="last-assistant",
            system_prompt=self.chat.system_prompt,
            chat_template=self.chat.chat_template,
            seed=defaults.SPLIT_SEED,
        )

    # ---- rounds -------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """Sample, label, optimise. What people prefer is the same in every round."""
        suffix = f"-{number}" if number > 1 else ""
        preferences, reward = self.spec.preferences, self.spec.reward_model
        if number == 1:
            self.start = self.tuned
        if preferences and (number == 1 or preferences.ai_feedback):
            self._collect(preferences, suffix)
            if reward and reward.train:
                self._train_reward(reward, suffix)
        optimize = self.spec.optimize
        if optimize and optimize.dpo:
            self._dpo(optimize.dpo, suffix)
        elif optimize and optimize.ppo:
            self._ppo(optimize.ppo, suffix)
        elif optimize and (grouped := optimize.grpo or optimize.rloo):
            self._group_relative(grouped, "grpo" if optimize.grpo else "rloo", suffix)

    def _collect(self, preferences: Preferences, suffix: str) -> None:
        if preferences.ai_feedback:
            self._feedback(preferences.ai_feedback, suffix)
            labels = StageInput(stage=f"feedback{suffix}", file=LABELS)
            inputs: dict[str, Input] = {"preferences.0": labels}
            datasets = [_generated()]
        else:
            data = preferences.data or []
            inputs = dict(dataset_inputs("preferences", "spec.preferences.data", data))
            datasets = dataset_settings(data)
        self.drafts.append(
            Draft(
                f"pairs{suffix}",
                self._pairs(preferences, datasets),
                {"model": self.model, **inputs},
            )
        )
        self.pairs = StageInput(stage=f"pairs{suffix}")

    def _feedback(self, step: AiFeedback, suffix: str) -> None:
        path = "spec.preferences.aiFeedback"
        inputs, endpoint = self._judge(step.judge, f"{path}.judge")
        settings = FeedbackSettings(
            prompts=_prompts(step.prompts),
            chat=self.chat,
            judge=_judge_settings(step.judge),
            principles=list(step.principles or PRINCIPLES),
            question=step.question or COMPARISON,
            responses_per_prompt=step.responses_per_prompt,
            temperature=step.temperature,
            max_new_tokens=step.max_new_tokens,
            disagreement=step.disagreement,
            seed=defaults.SAMPLING_SEED,
        )
        prompts = {"prompts": _prompts_input(step.prompts, f"{path}.prompts")}
        self.drafts.append(
            Draft(f"feedback{suffix}", settings, {**self.policy, **prompts, **inputs}, endpoint)
        )

    def _pairs(
        self, preferences: Preferences, datasets: Sequence[DatasetSettings]
    ) -> PairsSettings:
        """A judge's labels hold what a model wrote: a hollow one is skipped and counted."""
        judged = preferences.ai_feedback is not None
        optimize = self.spec.optimize
        return PairsSettings(
            preferences=list(datasets),
            labeled=bool(optimize and optimize.dpo and optimize.dpo.loss == "kto"),
            held_out=preferences.held_out,
            max_length=preferences.max_length,
            on_overlength="drop" if judged else preferences.on_overlength,
            on_invalid_row="skip" if judged else preferences.on_invalid_row,
            chat=self.chat,
            seed=defaults.SPLIT_SEED,
        )

    def _train_reward(self, reward: RewardModel, suffix: str) -> None:
        step = reward.train
        if step is None or self.pairs is None:
            raise TypeError("a reward model is trained on preferences")
        tuning = step.adapter.kind if step.adapter else "full"
        settings = RewardSettings(
            adapter=step.adapter,
            margin=step.margin,
            centering=step.centering,
            training=self._loop("rewardModel.train", step.training, "reward", tuning, suffix),
        )
        name = f"reward{suffix}"
        inputs: dict[str, Input] = {"model": self.model, "data": self.pairs}
        mergeable = self.tuning in ("full", *MERGEABLE)
        if self.start and mergeable:
            inputs["tuned"] = self.start
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training)))
        self.reward = StageInput(stage=name)

    def _dpo(self, step: Dpo, suffix: str) -> None:
        if self.pairs is None:
            raise TypeError("dpo needs preferences")
        settings = DpoSettings(
            adapter=self.spec.adapter,
            loss=step.loss,
            beta=step.beta,
            label_smoothing=step.label_smoothing,
            training=self._loop("optimize.dpo", step.training, "dpo", self.tuning, suffix),
        )
        name = f"dpo{suffix}"
        inputs = {**self.policy, "data": self.pairs}
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training)))
        self.tuned = StageInput(stage=name)

    def _ppo(self, step: Ppo, suffix: str) -> None:
        given = step.model_dump(exclude={"prompts", "sampling", "training", "stop_on"})
        settings = PpoSettings(
            adapter=self.spec.adapter,
            prompts=_prompts(step.prompts),
            chat=self.chat,
            sampling=step.sampling,
            reward=self._terms(),
            stop_on=step.stop_on,
            training=self._loop("optimize.ppo", step.training, "ppo", self.tuning, suffix),
            **given,
        )
        name = f"ppo{suffix}"
        prompts = {"prompts": _prompts_input(step.prompts, "spec.optimize.ppo.prompts")}
        inputs = {**self.policy, **prompts, **self._reward_input()}
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training)))
        self.tuned = StageInput(stage=name)

    def _group_relative(self, step: GroupRelative, method: str, suffix: str) -> None:
        path = f"optimize.{method}"
        settings = GrpoSettings(
            estimator="grpo" if method == "grpo" else "rloo",
            adapter=self.spec.adapter,
            prompts=_prompts(step.prompts),
            chat=self.chat,
            sampling=step.sampling,
            reward=self._terms(),
            group_size=step.group_size,
            kl_coefficient=step.kl_coefficient,
            clip_range=step.clip_range,
            stop_on=step.stop_on,
            training=self._loop(
                path,
                step.training,
                "grpo" if method == "grpo" else "rloo",
                self.tuning,
                suffix,
            ),
        )
        prompts = {"prompts": _prompts_input(step.prompts, f"spec.{path}.prompts")}
        inputs = {**self.policy, **prompts, **self._reward_input()}
        name = f"{method}{suffix}"
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training)))
        self.tuned = StageInput(stage=name)

    # ---- the end ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Measure, where there is anything to measure by, and export what was trained last."""
        data = self.pairs or self.rows
        result = self.tuned if self.spec.optimize else self.reward or self.tuned
        if result is None:
            raise TypeError("a job without a step that trains passed its rules")
        inputs: dict[str, Input] = {"model": self.model, "tuned": result}
        if data:
            inputs["data"] = data
        if self.spec.optimize or self.reward:
            win_rate = self.spec.evaluate.win_rate
            judge, endpoint = self._judge(
                win_rate.judge if win_rate else None, "spec.evaluate.winRate.judge"
            )
            assessed = {**self._assessed(), **judge}
            self.drafts.append(Draft("evaluate", self._assess(), assessed, endpoint))
            inputs["evaluation"] = StageInput(stage="evaluate")
        elif self._rows_held_out():
            self.drafts.append(Draft("evaluate", evaluate(self.spec.evaluate), dict(inputs)))
            inputs["evaluation"] = StageInput(stage="evaluate")
        self.drafts.append(Draft("export", ExportSettings(merge=self.spec.output.merge), inputs))

    def _rows_held_out(self) -> bool:
        sft = self.spec.sft
        return self.spec.constitution is not None or bool(sft and sft.data.validation)

    def _assessed(self) -> dict[str, Input]:
        inputs: dict[str, Input] = {"model": self.model}
        if self.spec.optimize and self.tuned:
            inputs["tuned"] = self.tuned
            if self.start:
                inputs["start"] = self.start
        if self.pairs:
            inputs["data"] = self.pairs
        if prompts := self._answered():
            inputs["prompts"] = _prompts_input(*prompts)
        return {**inputs, **self._reward_input()}

    def _assess(self) -> AssessSettings:
        spec, answered = self.spec, self._answered()
        optimize = spec.optimize
        sampled = optimize and (optimize.ppo or optimize.grpo or optimize.rloo)
        sampling = sampled.sampling if sampled else Sampling()
        beta = optimize.dpo.beta if optimize and optimize.dpo else Dpo().beta
        return AssessSettings(
            chat=self.chat,
            prompts=_prompts(answered[0]) if answered else None,
            sampling=sampling.model_copy(
                update={"max_new_tokens": spec.evaluate.max_new_tokens, "engine": "transformers"}
            ),
            reward=self._terms() if spec.reward_model else [],
            beta=beta,
            win_rate=_win_rate(spec.evaluate.win_rate),
            samples=spec.evaluate.samples,
            gates=spec.evaluate.gates,
            seed=defaults.SAMPLING_SEED,
        )

    def _answered(self) -> tuple[PromptSet, str] | None:
        """The prompts that the aligned model is measured on where no pairs are held out."""
        optimize, preferences = self.spec.optimize, self.spec.preferences
        if optimize is None:
            return None
        sampled = optimize.ppo or optimize.grpo or optimize.rloo
        if sampled:
            return sampled.prompts, f"spec.optimize.{optimize.kind}.prompts"
        if preferences and preferences.ai_feedback:
            return preferences.ai_feedback.prompts, "spec.preferences.aiFeedback.prompts"
        return None

    # ---- parts --------------------------------------------------------------------------------

    def _terms(self) -> list[RewardTerm]:
        reward = self.spec.reward_model
        if reward is None:
            raise TypeError("there is no reward")
        terms = [RewardTerm(rule=reward.rule) if reward.rule else RewardTerm(role="reward")]
        for index, term in enumerate(self.spec.reward_terms):
            role = None if term.rule else f"reward.{index}"
            terms.append(RewardTerm(weight=term.weight, role=role, rule=term.rule))
        return terms

    def _reward_input(self) -> dict[str, Input]:
        """The models that score; nothing where rules do."""
        found: dict[str, Input] = {}
        reward = self.spec.reward_model
        if self.reward:
            found["reward"] = self.reward
        elif reward and reward.model:
            found["reward"] = model_input(reward.model, "spec.rewardModel.model")
        for index, term in enumerate(self.spec.reward_terms):
            if term.model:
                path = f"spec.rewardTerms[{index}].model"
                found[f"reward.{index}"] = model_input(term.model, path)
        return found

    def _judge(self, judge: Judge | None, path: str) -> tuple[dict[str, Input], TrainRuntime]:
        """The judge as an input where it is a model, and where it answers where it is not."""
        if judge and judge.model:
            return {"judge": model_input(judge.model, f"{path}.model")}, TrainRuntime()
        return {}, TrainRuntime(endpoint=judge.endpoint if judge else None)

    def _loop(
        self,
        path: str,
        training: Training,
        method: defaults.AlignmentMethod,
        tuning: str,
        suffix: str,
    ) -> LoopSettings:
        rule = defaults.alignment_rule(method, tuning)
        if not suffix:
            self._note(f"{path}.training", training, rule, defaults.ALIGNMENT_EPOCHS)
        return loop(training, rule, epochs=defaults.ALIGNMENT_EPOCHS)

    def _note(self, path: str, training: Training, rule: defaults.Rule, epochs: float) -> None:
        """One sentence for each decision that the planner took in the user's stead."""
        source = f"{rule.title} default (docs/defaults.md)"
        if training.learning_rate == "auto":
            self.notes.append(f"{path}.learningRate {rule.learning_rate:g}: {source}.")
        if training.batch_size == "auto":
            self.notes.append(f"{path}.batchSize {rule.batch_size}: {source}.")
        if training.epochs is None and training.max_steps is None:
            self.notes.append(
                f"{path}.epochs {epochs:g}: the default, as neither epochs nor maxSteps is set."
            )


def _generated() -> DatasetSettings:
    """A file that an earlier stage wrote."""
    return DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)


def _prompts(prompts: PromptSet) -> PromptSettings:
    return PromptSettings(format=prompts.format, fields=prompts.fields, limit=prompts.limit)


def _prompts_input(prompts: PromptSet, path: str) -> SourceInput:
    return SourceInput(
        uri=prompts.uri,
        token_secret=prompts.token_secret,
        credentials=prompts.credentials,
        path=f"{path}.uri",
    )


def _win_rate(win_rate: WinRate | None) -> WinRateSettings | None:
    if win_rate is None:
        return None
    return WinRateSettings(
        judge=_judge_settings(win_rate.judge),
        principles=list(win_rate.principles or PRINCIPLES),
        question=win_rate.question or COMPARISON,
    )


def _judge_settings(judge: Judge | None) -> JudgeSettings | None:
    if judge is None or judge.endpoint is None:
        return None
    endpoint = judge.endpoint
    return JudgeSettings(
        model=endpoint.model,
        max_requests=endpoint.max_requests,
        max_tokens=endpoint.max_tokens,
        label_tokens=endpoint.label_tokens,
    )
