"""The stages of an AlignmentJob, in the order of its fields; rounds repeat the last ones.

The inputs `model` and `tuned` describe the policy. Each stage that trains the policy continues from
the one before, so the export needs only the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tuneyard.api.adapters import MERGEABLE
from tuneyard.api.alignment import (
    AiFeedback,
    Constitution,
    Distill,
    Dpo,
    GroupRelative,
    Ppo,
    Preferences,
    RewardModel,
    Sampling,
)
from tuneyard.api.alignmentjob import AlignmentSpec
from tuneyard.api.plan import Input, SourceInput, StageInput
from tuneyard.api.sources import PromptSet
from tuneyard.api.stage_settings import (
    PREPARING_KINDS,
    ChatSettings,
    CompletionsSettings,
    CritiqueSettings,
    DatasetSettings,
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    ExportSettings,
    FeedbackSettings,
    GrpoSettings,
    LoopSettings,
    PairsSettings,
    PpoSettings,
    PreferencesSettings,
    PrepareSettings,
    RewardSettings,
    RewardTerm,
)
from tuneyard.api.training import Training
from tuneyard.errors import PlanError
from tuneyard.planning import defaults
from tuneyard.planning.augmentation import augmentation
from tuneyard.planning.drafts import (
    Draft,
    Sharding,
    data_inputs,
    dataset_inputs,
    dataset_settings,
    default_notes,
    evaluate,
    evaluation_engine,
    general_inputs,
    generated,
    judge_input,
    judge_settings,
    leaks,
    loop,
    prepare,
    prompt_settings,
    runtime,
    source_input,
    train,
    win_rate_settings,
    with_suites,
)
from tuneyard.planning.limits import alignment_faults, alignment_sharding
from tuneyard.planning.principles import COMPARISON, CRITIQUE, PRINCIPLES, REVISION
from tuneyard.planning.suites import suite_inputs, suite_settings

Packing = Literal["auto", "always", "never"]

REVISIONS, LABELS = "revisions.jsonl", "preferences.jsonl"
"""The output files of the critique and the feedback stage that later stages read."""
INDEPENDENT = "reward.independent"
"""The role of the reward model that nothing is trained on."""


def alignment_stages(spec: AlignmentSpec) -> tuple[list[Draft], list[str]]:
    """Return the stages of an AlignmentJob and the notes for the user. Raises PlanError."""
    faults = alignment_faults(spec)
    if faults:
        raise PlanError(faults)
    builder = _Builder.of(spec)
    builder.add_sft()
    builder.add_constitution()
    for number in range(1, spec.rounds + 1):
        builder.add_round(number)
    builder.add_leaks()
    builder.add_evaluation_and_export()
    return builder.drafts, builder.notes


@dataclass
class _Builder:
    """The stages added so far, and their outputs that later stages read."""

    spec: AlignmentSpec
    model: SourceInput
    chat: ChatSettings
    tuning: str
    """`full`, or the adapter's name."""
    drafts: list[Draft] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tuned: StageInput | None = None
    """The last stage that trained the policy. None: no stage did."""
    start: StageInput | None = None
    """The last stage that trained the policy before the first round. None: no stage did."""
    rows: StageInput | None = None
    """The stage that prepared the last data set of fine-tuning. None: no stage did."""
    pairs: StageInput | None = None
    """The last pairs stage. None: there are no preferences."""
    reward: StageInput | None = None
    """The stage that trained the last reward model. None: the job trains none."""
    searched: bool = False
    """Whether the items of suites are searched in the training data."""

    @classmethod
    def of(cls, spec: AlignmentSpec) -> _Builder:
        data = spec.sft.data if spec.sft else None
        chat = ChatSettings(
            system_prompt=data.system_prompt if data else None,
            chat_template=data.chat_template if data else None,
        )
        tuning = spec.adapter.kind if spec.adapter else "full"
        return cls(spec, source_input(spec.model, "spec.model"), chat, tuning)

    @property
    def policy(self) -> dict[str, Input]:
        """The inputs that describe the policy after the stages so far."""
        return {"model": self.model, **({"tuned": self.tuned} if self.tuned else {})}

    @property
    def sharding(self) -> Sharding:
        """The sharding of the stages that run the policy."""
        return alignment_sharding(self.spec)

    # ---- fine-tuning --------------------------------------------------------------------------

    def add_sft(self) -> None:
        """Add the stages of `spec.sft`."""
        step = self.spec.sft
        if step is None:
            return
        augmented, rows = augmentation(step.data, "spec.sft.data", self.model)
        inputs = {
            "model": self.model,
            **data_inputs(step.data, "spec.sft.data"),
            **rows,
            **general_inputs(step.training, "spec.sft.training"),
        }
        prepared = prepare(step.data, "sft", step.training)
        self.drafts += [*augmented, Draft("prepare", prepared, inputs)]
        self._sft("sft", StageInput(stage="prepare"), step.training, step.data.packing, "sft")

    def add_constitution(self) -> None:
        """Add the stages of `spec.constitution`."""
        step = self.spec.constitution
        if step is None:
            return
        judge, judge_runtime = judge_input(step.judge, "spec.constitution.judge")
        prompts = {"prompts": source_input(step.prompts, "spec.constitution.prompts")}
        self.drafts.append(
            Draft(
                "critique", self._critique(step), {**self.policy, **prompts, **judge}, judge_runtime
            )
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
        self.notes += default_notes(f"{field}.training", training, rule, defaults.EPOCHS)
        settings = train("sft", self.spec.adapter, packing, training, rule)
        inputs = {**self.policy, "data": data}
        draft = Draft(name, settings, inputs, runtime(training, self.sharding))
        self.drafts.append(self._measured(draft, training))
        self.tuned, self.rows = StageInput(stage=name), data

    def _critique(self, step: Constitution) -> CritiqueSettings:
        return CritiqueSettings(
            prompts=prompt_settings(step.prompts),
            chat=self.chat,
            judge=judge_settings(step.judge),
            principles=list(step.principles or PRINCIPLES),
            critique_request=step.critique_request or CRITIQUE,
            revision_request=step.revision_request or REVISION,
            revisions=step.revisions,
            max_new_tokens=step.max_new_tokens,
            seed=defaults.SAMPLING_SEED,
        )

    def _revisions(self) -> PrepareSettings:
        """Return the settings of the stage that prepares revisions. Its rows are the model's own
        completions: long rows are truncated, and an empty row does not fail the job."""
        return PrepareSettings(
            method="sft",
            train=[generated()],
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

    def add_round(self, number: int) -> None:
        """Add the stages that sample, label and optimize.

        Preferences of people do not change between rounds: only the first round prepares them.
        """
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
        elif optimize and optimize.distill:
            self._distill(optimize.distill, suffix)

    def _collect(self, preferences: Preferences, suffix: str) -> None:
        if preferences.ai_feedback:
            self._feedback(preferences.ai_feedback, suffix)
            labels = StageInput(stage=f"feedback{suffix}", file=LABELS)
            inputs: dict[str, Input] = {"preferences.0": labels}
            datasets = [generated()]
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
        judge, judge_runtime = judge_input(step.judge, f"{path}.judge")
        settings = FeedbackSettings(
            prompts=prompt_settings(step.prompts),
            chat=self.chat,
            judge=judge_settings(step.judge),
            principles=list(step.principles or PRINCIPLES),
            question=step.question or COMPARISON,
            responses_per_prompt=step.responses_per_prompt,
            temperature=step.temperature,
            max_new_tokens=step.max_new_tokens,
            disagreement=step.disagreement,
            seed=defaults.SAMPLING_SEED,
        )
        prompts = {"prompts": source_input(step.prompts, f"{path}.prompts")}
        self.drafts.append(
            Draft(f"feedback{suffix}", settings, {**self.policy, **prompts, **judge}, judge_runtime)
        )

    def _pairs(
        self, preferences: Preferences, datasets: Sequence[DatasetSettings]
    ) -> PairsSettings:
        """Return the settings of a pairs stage. Rows that a judge labeled hold the model's own
        completions: an invalid or a long row is left out and counted."""
        judged = preferences.ai_feedback is not None
        optimize = self.spec.optimize
        return PairsSettings(
            preferences=list(datasets),
            labeled=bool(optimize and optimize.dpo and optimize.dpo.loss == "kto"),
            held_out=preferences.held_out,
            max_length=preferences.max_length,
            on_overlength="drop" if judged else preferences.on_overlength,
            on_invalid_row="skip" if judged else preferences.on_invalid_row,
            reasoning="drop" if preferences.reasoning == "drop" else None,
            chat=self.chat,
            seed=defaults.SPLIT_SEED,
        )

    def _train_reward(self, reward: RewardModel, suffix: str) -> None:
        step = reward.train
        if step is None or self.pairs is None:
            raise TypeError("rewardModel.train without preferences")
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
            raise TypeError("optimize.dpo without preferences")
        settings = DpoSettings(
            adapter=self.spec.adapter,
            loss=step.loss,
            beta=step.beta,
            label_smoothing=step.label_smoothing,
            training=self._loop("optimize.dpo", step.training, "dpo", self.tuning, suffix),
        )
        name = f"dpo{suffix}"
        inputs = {**self.policy, "data": self.pairs}
        draft = Draft(name, settings, inputs, runtime(step.training, self.sharding))
        self.drafts.append(self._measured(draft, step.training))
        self.tuned = StageInput(stage=name)

    def _ppo(self, step: Ppo, suffix: str) -> None:
        same = step.model_dump(exclude={"prompts", "sampling", "training", "stop_on"})
        settings = PpoSettings(
            adapter=self.spec.adapter,
            prompts=prompt_settings(step.prompts),
            chat=self.chat,
            sampling=step.sampling,
            reward=self._terms(),
            independent_reward=self._independent_term(),
            stop_on=step.stop_on,
            training=self._loop("optimize.ppo", step.training, "ppo", self.tuning, suffix),
            **same,
        )
        name = f"ppo{suffix}"
        prompts = {"prompts": source_input(step.prompts, "spec.optimize.ppo.prompts")}
        inputs = {**self.policy, **prompts, **self._reward_input()}
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training)))
        self.tuned = StageInput(stage=name)

    def _group_relative(
        self, step: GroupRelative, method: Literal["grpo", "rloo"], suffix: str
    ) -> None:
        path = f"optimize.{method}"
        settings = GrpoSettings(
            estimator=method,
            adapter=self.spec.adapter,
            prompts=prompt_settings(step.prompts),
            chat=self.chat,
            sampling=step.sampling,
            reward=self._terms(),
            independent_reward=self._independent_term(),
            group_size=step.group_size,
            kl_coefficient=step.kl_coefficient,
            clip_range=step.clip_range,
            stop_on=step.stop_on,
            training=self._loop(path, step.training, method, self.tuning, suffix),
        )
        prompts = {"prompts": source_input(step.prompts, f"spec.{path}.prompts")}
        inputs = {**self.policy, **prompts, **self._reward_input()}
        name = f"{method}{suffix}"
        self.drafts.append(Draft(name, settings, inputs, runtime(step.training, self.sharding)))
        self.tuned = StageInput(stage=name)

    def _distill(self, step: Distill, suffix: str) -> None:
        path = "optimize.distill"
        settings = DistillSettings(
            adapter=self.spec.adapter,
            prompts=prompt_settings(step.prompts),
            chat=self.chat,
            sampling=step.sampling,
            beta=step.beta,
            training=self._loop(path, step.training, "distill", self.tuning, suffix),
        )
        sources: dict[str, Input] = {
            "teacher": source_input(step.teacher, f"spec.{path}.teacher"),
            "prompts": source_input(step.prompts, f"spec.{path}.prompts"),
        }
        name = f"distill{suffix}"
        draft = Draft(name, settings, {**self.policy, **sources}, runtime(step.training))
        self.drafts.append(self._measured(draft, step.training))
        self.tuned = StageInput(stage=name)

    # ---- leaks ---------------------------------------------------------------------------------

    def add_leaks(self) -> None:
        """Add the stage that searches the items of suites in the training data, after those at the
        beginning that read it: neither needs a GPU."""
        spec = self.spec
        data = spec.sft.data if spec.sft else None
        distinct: dict[str, tuple[PromptSet, str]] = {}
        for prompts, path in self._prompts():
            distinct.setdefault(prompts.model_dump_json(), (prompts, path))
        searched = leaks(
            spec.evaluate,
            spec.leaks or (data.leaks if data else "warn"),
            data=data,
            data_path="spec.sft.data",
            preferences=(spec.preferences and spec.preferences.data) or [],
            prompts=list(distinct.values()),
        )
        kinds = [draft.settings.kind in PREPARING_KINDS for draft in self.drafts]
        place = kinds.index(False) if False in kinds else len(kinds)
        self.drafts[place:place] = searched
        self.searched = bool(searched)

    def _prompts(self) -> Iterator[tuple[PromptSet, str]]:
        """Yield the prompts that the model is trained on, or on completions of them, and their
        fields in the manifest."""
        spec = self.spec
        if spec.constitution:
            yield spec.constitution.prompts, "spec.constitution.prompts"
        if spec.preferences and spec.preferences.ai_feedback:
            yield spec.preferences.ai_feedback.prompts, "spec.preferences.aiFeedback.prompts"
        if spec.optimize and (method := spec.optimize.on_policy):
            yield method.prompts, f"spec.optimize.{spec.optimize.kind}.prompts"

    # ---- evaluation and export ----------------------------------------------------------------

    def add_evaluation_and_export(self) -> None:
        """Add a stage that measures the result, if something can be measured, and the export."""
        data = self.pairs or self.rows
        result = self.tuned if self.spec.optimize else self.reward or self.tuned
        if result is None:
            raise TypeError("a job without a training step")
        inputs: dict[str, Input] = {"model": self.model, "tuned": result}
        if data:
            inputs["data"] = data
        if self.spec.optimize or self.reward:
            win_rate = self.spec.evaluate.win_rate
            judge, judge_runtime = judge_input(
                win_rate.judge if win_rate else None, "spec.evaluate.winRate.judge"
            )
            measured = {**self._evaluation_inputs(), **judge}
            shared = judge_runtime.model_copy(update={"sharding": self.sharding})
            self.drafts.append(Draft("evaluate", self._evaluate(), measured, shared))
            inputs["evaluation"] = StageInput(stage="evaluate")
        elif self._has_held_out_rows() or self.spec.evaluate.suites:
            measured = {**inputs, **suite_inputs(self.spec.evaluate)}
            settings = evaluate(self.spec.evaluate)
            if not self._has_held_out_rows():
                measured.pop("data", None)
                settings = settings.model_copy(update={"chat": self.chat})
            self.drafts.append(Draft("evaluate", settings, measured))
            inputs["evaluation"] = StageInput(stage="evaluate")
        if self.searched:
            inputs["leaks"] = StageInput(stage="leaks")
        self.drafts.append(Draft("export", ExportSettings(merge=self.spec.output.merge), inputs))

    def _has_held_out_rows(self) -> bool:
        sft = self.spec.sft
        return self.spec.constitution is not None or bool(sft and sft.data.validation)

    def _evaluation_inputs(self) -> dict[str, Input]:
        inputs: dict[str, Input] = {"model": self.model}
        if self.spec.optimize and self.tuned:
            inputs["tuned"] = self.tuned
            if self.start:
                inputs["start"] = self.start
        if self.pairs:
            inputs["pairs"] = self.pairs
        if prompts := self._evaluation_prompts():
            inputs["prompts"] = source_input(*prompts)
        return {**inputs, **self._reward_input(), **suite_inputs(self.spec.evaluate)}

    def _evaluate(self) -> EvaluateSettings:
        spec, prompts = self.spec, self._evaluation_prompts()
        optimize = spec.optimize
        method = optimize and optimize.on_policy
        sampling = method.sampling if method else Sampling()
        limit = {"max_new_tokens": spec.evaluate.max_new_tokens, "engine": "transformers"}
        beta = optimize.dpo.beta if optimize and optimize.dpo else Dpo().beta
        return EvaluateSettings(
            compare_with_base=True,
            samples=spec.evaluate.samples,
            max_new_tokens=spec.evaluate.max_new_tokens,
            gates=spec.evaluate.gates,
            engine=evaluation_engine(spec.evaluate),
            chat=self.chat,
            completions=CompletionsSettings(
                prompts=prompt_settings(prompts[0]) if prompts else None,
                sampling=sampling.model_copy(update=limit),
            ),
            preferences=PreferencesSettings(beta=beta),
            reward=self._terms() if spec.reward_model else None,
            independent_reward=self._independent_term(),
            win_rate=win_rate_settings(spec.evaluate.win_rate),
            suites=suite_settings(spec.evaluate),
            seed=defaults.SAMPLING_SEED,
        )

    def _evaluation_prompts(self) -> tuple[PromptSet, str] | None:
        """Return the prompts for the evaluation without held-out pairs, and their field in the
        manifest. None: the job has no prompts."""
        optimize, preferences = self.spec.optimize, self.spec.preferences
        if optimize is None:
            return None
        if method := optimize.on_policy:
            return method.prompts, f"spec.optimize.{optimize.kind}.prompts"
        if preferences and preferences.ai_feedback:
            return preferences.ai_feedback.prompts, "spec.preferences.aiFeedback.prompts"
        return None

    # ---- parts --------------------------------------------------------------------------------

    def _measured(self, draft: Draft, training: Training) -> Draft:
        """Return a draft with the suites that it measures as the evaluation does."""
        aligned = bool(self.spec.optimize or self.spec.reward_model)
        chat = self.chat if aligned or not self._has_held_out_rows() else None
        return with_suites(draft, training, self.spec.evaluate, chat)

    def _terms(self) -> list[RewardTerm]:
        reward = self.spec.reward_model
        if reward is None:
            raise TypeError("reward terms without rewardModel")
        terms = [RewardTerm(rule=reward.rule) if reward.rule else RewardTerm(role="reward")]
        for index, term in enumerate(self.spec.reward_terms):
            role = None if term.rule else f"reward.{index}"
            terms.append(RewardTerm(weight=term.weight, role=role, rule=term.rule))
        return terms

    def _independent_term(self) -> RewardTerm | None:
        independent = self.spec.independent_reward
        if independent is None:
            return None
        role = None if independent.rule else INDEPENDENT
        return RewardTerm(role=role, rule=independent.rule)

    def _reward_input(self) -> dict[str, Input]:
        """Return the reward models as inputs; rules need none."""
        inputs: dict[str, Input] = {}
        reward = self.spec.reward_model
        if self.reward:
            inputs["reward"] = self.reward
        elif reward and reward.model:
            inputs["reward"] = source_input(reward.model, "spec.rewardModel.model")
        for index, term in enumerate(self.spec.reward_terms):
            if term.model:
                path = f"spec.rewardTerms[{index}].model"
                inputs[f"reward.{index}"] = source_input(term.model, path)
        independent = self.spec.independent_reward
        if independent and independent.model:
            inputs[INDEPENDENT] = source_input(independent.model, "spec.independentReward.model")
        return inputs

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
            epochs = defaults.ALIGNMENT_EPOCHS
            self.notes += default_notes(f"{path}.training", training, rule, epochs)
        return loop(training, rule, epochs=defaults.ALIGNMENT_EPOCHS)
