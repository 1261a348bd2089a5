"""assess: compare the aligned model with the model that the alignment started from.

Measures both models on held-out preferences, their completions of held-out prompts by the reward
and by a second judge, and signs of reward hacking: length, repetition, KL divergence and
sycophancy. Writes `evaluation.json` and checks the gates.

Shapes: R rows of held-out preferences, N completions.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tuneyard.api.stage_settings import AssessSettings, RewardTerm
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, as_text, read_prompts, tokenize
from tuneyard_trainer.data.sharing import InStep, SharedStage
from tuneyard_trainer.evaluation import reward_hacking, win_rate
from tuneyard_trainer.evaluation.result import finish, spread
from tuneyard_trainer.generation.completions import Completion, decode
from tuneyard_trainer.generation.sampling import TransformersSampler, stop_tokens
from tuneyard_trainer.judging.judges import Reply, turn, verdict
from tuneyard_trainer.judging.local_model import ModelJudge
from tuneyard_trainer.judging.session import JudgeSession, judge_name, open_journal
from tuneyard_trainer.models import base, policies, probes
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.metrics import correlation, pair_metrics, unpaired_metrics
from tuneyard_trainer.preference.micro_batches import logprobs, row_values
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import StageContext, StageOutcome

MAX_PROMPTS = 128
"""Prompts to complete: the standard error of a mean reward is then 9 % of its deviation."""
MAX_ROW_TOKENS = 4096
"""The longest row of prompt and completion that is measured."""


def run(context: StageContext) -> StageOutcome:
    """Measure both models, write `evaluation.json` and check the gates. All workers share the work,
    or the models, and rank 0 writes.

    Raises StageError GateFailed and the errors of the judge.
    """
    with SharedStage(context.worker) as shared:
        return _run(context, shared)


def _run(context: StageContext, shared: SharedStage) -> StageOutcome:
    settings = context.settings(AssessSettings)
    assessment = Assessment.of(context, shared, settings)
    metrics: dict[str, float] = {}
    samples: list[Sample] = []
    if "tuned" in context.inputs:
        prompts = shared.from_main(assessment.prompts)
        reward = assessment.load_reward(settings.reward, [prompt.prompt for prompt in prompts])
        models = assessment.measure_both(prompts)
        metrics |= assessment.metrics(models, reward)
        samples = _samples(models, settings.samples)
    metrics |= assessment.reward_on_pairs()
    if not context.worker.is_main:
        return StageOutcome()
    details: dict[str, Any] = {"promptsHeldOut": assessment.prompts_held_out}
    if settings.win_rate:
        details["judge"] = judge_name(context.stage, settings.win_rate.judge)
    return finish(context, settings.gates, metrics, samples, details)


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model."""

    completions: tuple[Completion, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each completion, with its stop token if it has one."""
    pairs_R: NDArray[np.float64] | None
    """The log-probability of each held-out completion. None: no preferences are held out."""
    aligned_N: NDArray[np.float64]
    """The log-probability of each completion by the aligned model."""
    sycophancy: reward_hacking.Sycophancy

    @property
    def texts(self) -> list[str]:
        """The completions as text."""
        return [completion.text for completion in self.completions]

    @property
    def complete(self) -> float:
        """Share of completions with a stop token."""
        return float(np.mean([completion.complete for completion in self.completions]))


@dataclass(frozen=True)
class BothModels:
    """The measurements of the model before and after the alignment, on the same prompts."""

    prompts: Sequence[TokenizedPrompt]
    before: Measurements
    after: Measurements


@dataclass(frozen=True)
class Assessment:
    """The inputs of the stage."""

    context: StageContext
    shared: SharedStage
    settings: AssessSettings
    tokenizer: PreTrainedTokenizerBase
    data: Preferences | None
    held_out: tuple[tuple[Prompt, tuple[str, ...]], ...]
    """The held-out prompts with their completions, as text; empty: no preferences are held out."""

    @classmethod
    def of(cls, context: StageContext, shared: SharedStage, settings: AssessSettings) -> Assessment:
        """Load the tokenizer and the preferences."""
        tokenizer = base.load_tokenizer(context.inputs["model"])
        if settings.chat.chat_template is not None:
            tokenizer.chat_template = settings.chat.chat_template
        data = Preferences.open(context.inputs["data"]) if "data" in context.inputs else None
        held_out = _held_out(context.inputs["data"], settings) if data and data.validation else ()
        return cls(context, shared, settings, tokenizer, data, held_out)

    def metrics(self, models: BothModels, reward: Reward | None) -> dict[str, float]:
        """Return all metrics that compare the two models."""
        return {
            **_reward_hacking_metrics(models),
            **self._preference_metrics(models),
            **self._reward_metrics(models, reward),
            **self._win_rate_metrics(models),
        }

    # ---- prompts ------------------------------------------------------------------------------

    @property
    def prompts_held_out(self) -> bool:
        """Whether the models complete held-out prompts. False: they complete the prompts of the
        training, because no prompts are held out or because a rule needs fields of these rows."""
        trained_on = self.settings.prompts is not None and "prompts" in self.context.inputs
        has_rule = any(term.rule for term in self.settings.reward)
        return not trained_on or (bool(self.held_out) and not has_rule)

    def prompts(self) -> list[TokenizedPrompt]:
        """Return at most MAX_PROMPTS distinct prompts that leave room for a completion."""
        prompts = [prompt for prompt, _ in self.held_out]
        if not self.prompts_held_out and self.settings.prompts is not None:
            path = self.context.inputs["prompts"]
            prompts = read_prompts(
                path, self.settings.prompts, self.settings.chat, name="the prompts"
            )
        distinct = {json.dumps(prompt.messages): prompt for prompt in prompts}
        tokenized = [
            tokenize(prompt, self.tokenizer, self.settings.chat)
            for prompt in list(distinct.values())[:MAX_PROMPTS]
        ]
        limit = MAX_ROW_TOKENS - self.settings.sampling.max_new_tokens
        return [prompt for prompt in tokenized if prompt and 0 < len(prompt.ids) <= limit]

    # ---- one model ----------------------------------------------------------------------------

    def measure_both(self, prompts: Sequence[TokenizedPrompt]) -> BothModels:
        """Measure the aligned model, then the model before alignment. Only one is in memory."""
        inputs = self.context.inputs
        after = self._measure(prompts, inputs, None, "the aligned model")
        gc.collect()  # modules are in cycles
        start = {role: path for role, path in inputs.items() if role != "tuned"}
        if "start" in inputs:
            start["tuned"] = inputs["start"]
        before = self._measure(prompts, start, after.tokens, "the model before alignment")
        gc.collect()
        return BothModels(prompts, before, after)

    def _measure(
        self,
        prompts: Sequence[TokenizedPrompt],
        inputs: Mapping[str, Path],
        aligned: tuple[tuple[int, ...], ...] | None,
        name: str,
    ) -> Measurements:
        """Return the measurements of one model.

        `aligned`: the completions of the aligned model. None: this is the aligned model.
        """
        self._begin(f"measuring {name}")
        worker = self.context.worker
        shards = policies.shards(self.context, policies.inference_type(worker.device).itemsize)
        with self.shared.in_step() if shards > 1 else nullcontext(self.shared) as sharing:
            model: Any = policies.load_for_inference(inputs, worker.device, shards)
            return self._measurements(model, sharing, prompts, aligned, name)

    def _measurements(
        self,
        model: Any,
        sharing: SharedStage | InStep,
        prompts: Sequence[TokenizedPrompt],
        aligned: tuple[tuple[int, ...], ...] | None,
        name: str,
    ) -> Measurements:
        """Return the measurements of a loaded model."""
        stop = stop_tokens(model, self.tokenizer, self.settings.chat.chat_template)
        pad = int(self.tokenizer.pad_token_id)
        sampler = TransformersSampler(model, pad, stop, self.settings.sampling)
        tokens = self._sample(sharing, sampler, prompts)
        forward = Forward(
            device=self.context.worker.device,
            precision=torch.float32,
            pad=pad,
            # The workers of a sharded model must agree, and the probe measures.
            pack=sharing is self.shared and probes.isolates_documents(model),
            capacity=512,
            max_tokens=16384 if self.context.worker.device.type == "cuda" else 2048,
        )
        completed = _rows(prompts, tokens if aligned is None else aligned)
        pairs = self.data.validation.rows if self.data and self.data.validation else None
        return Measurements(
            completions=tuple(decode(self.tokenizer, stop, row) for row in tokens),
            tokens=tokens,
            pairs_R=_logprobs(sharing, model, pairs, forward) if pairs else None,
            aligned_N=_logprobs(sharing, model, completed, forward) if completed else np.zeros(0),
            sycophancy=self._sycophancy(sharing, model, name),
        )

    def _sample(
        self,
        sharing: SharedStage | InStep,
        sampler: TransformersSampler,
        prompts: Sequence[TokenizedPrompt],
    ) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of one completion of each prompt."""

        def of(own: list[int]) -> list[tuple[int, ...]]:
            ids = [prompts[index].ids for index in own]
            keys = [derive_seed(self.settings.seed, index) for index in own]
            return [sampled.tokens for sampled in sampler(ids, keys, sharing.check_stop)]

        return tuple(sharing.results([len(prompt.ids) for prompt in prompts], of))

    def _sycophancy(
        self, sharing: SharedStage | InStep, model: Any, name: str
    ) -> reward_hacking.Sycophancy:
        template = self.settings.chat.chat_template
        judge = ModelJudge(model, self.tokenizer, name, stop=sharing.stop, template=template)
        prompts = reward_hacking.sycophancy_prompts()

        def of(own: list[int]) -> list[Reply]:
            found = {reply.key: reply for reply in judge.replies([prompts[i] for i in own])}
            sharing.check_stop()  # the judge left out the rest
            return [found[prompts[i].key] for i in own]

        replies = sharing.results([len(prompt.messages[-1]["content"]) for prompt in prompts], of)
        return reward_hacking.sycophancy({reply.key: reply for reply in replies})

    def _begin(self, message: str) -> None:
        """Report the next measurement. Raises Interrupted on all workers if any was asked to stop:
        one alone would leave the others waiting for it while they load a model that they share."""
        self.shared.stop_together()
        self.context.worker.report(total_steps=1, message=message)

    # ---- metrics ------------------------------------------------------------------------------

    def _preference_metrics(self, models: BothModels) -> dict[str, float]:
        """Return metrics of the implicit rewards of held-out completions: beta times the log-ratio
        of the models (Rafailov et al. 2023, section 4)."""
        groups = self.data.validation if self.data else None
        before_R, after_R = models.before.pairs_R, models.after.pairs_R
        if groups is None or before_R is None or after_R is None:
            return {}
        implicit_R = self.settings.beta * (after_R - before_R)
        if self.data and self.data.labeled:
            return unpaired_metrics("preference", implicit_R, groups)
        return pair_metrics("preference", implicit_R, groups)

    def _win_rate_metrics(self, models: BothModels) -> dict[str, float]:
        """Return metrics of the second judge's verdicts. {}: there is no second judge."""
        settings = self.settings.win_rate
        if settings is None:
            return {}
        conversations = [as_text(prompt.prompt.messages) for prompt in models.prompts]
        completed = zip(conversations, models.after.texts, models.before.texts, strict=True)
        pairs = win_rate.make_pairs(list(completed), settings.principles, self.settings.seed)
        with open_journal(self.context, self.shared) as journal:
            session = JudgeSession.of(self.context, self.shared, settings.judge, journal)
            replies = session.compare(pairs, settings.question, "requesting the second judge")
        verdicts = [verdict(straight, swapped, "drop") for straight, swapped in replies]
        identical = len(models.prompts) - len(pairs)
        return {**win_rate.win_rate_metrics(verdicts, identical), **session.tally.metrics()}

    def reward_on_pairs(self) -> dict[str, float]:
        """Return metrics of the reward models, without rules, on the held-out preferences. {}: no
        reward model, or no held-out pairs."""
        learned = [term for term in self.settings.reward if term.role]
        groups = self.data.validation if self.data else None
        if not learned or groups is None or (self.data and self.data.labeled):
            return {}
        self._begin("measuring the reward model")
        reward = self.load_reward(learned, [prompt for prompt, _ in self.held_out])
        if reward is None:
            return {}
        prompts = [prompt for prompt, completions in self.held_out for _ in completions]
        completions = [one for _, completions in self.held_out for one in completions]
        return pair_metrics("reward", self._scores(reward, prompts, completions), groups)

    def load_reward(self, terms: Sequence[RewardTerm], prompts: Sequence[Prompt]) -> Reward | None:
        """Load the reward. None: there are no terms, or no prompts."""
        if not terms or not prompts:
            return None
        chat, device = self.settings.chat, self.context.worker.device
        check_stop = self.shared.check_stop
        return rewards.load(terms, self.context.inputs, chat, prompts, device, check_stop)

    def _reward_metrics(self, models: BothModels, reward: Reward | None) -> dict[str, float]:
        """Return metrics of the reward of both models' completions. {}: there is no reward."""
        if reward is None:
            return {}
        prompts = [prompt.prompt for prompt in models.prompts]
        before_N = self._scores(reward, prompts, models.before.texts)
        after_N = self._scores(reward, prompts, models.after.texts)
        gains_N = after_N - before_N
        lengths_N = np.array([float(len(tokens)) for tokens in models.after.tokens])
        return {
            "reward": float(np.mean(after_N)),
            "startReward": float(np.mean(before_N)),
            "rewardGain": float(np.mean(gains_N)),
            "rewardGainError": float(np.std(gains_N) / np.sqrt(len(gains_N))),
            "rewardLengthCorrelation": correlation(after_N, lengths_N),
        }

    def _scores(
        self, reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> NDArray[np.float64]:
        """Return (N,) the reward of each completion. Raises StageError if one is not finite."""
        attempts = [Attempt(*pair) for pair in zip(prompts, completions, strict=True)]
        scores = self.shared.results(
            [len(attempt.completion) for attempt in attempts],
            lambda own: reward([attempts[i] for i in own]).tolist(),
        )
        scores_N = rewards.finite(torch.tensor(scores), prompts)
        return np.array(scores_N.tolist())


def _logprobs(
    sharing: SharedStage | InStep, model: Any, rows: Rows, forward: Forward
) -> NDArray[np.float64]:
    """Return (R,) the log-probability of each row's targets."""

    def of(own: list[int]) -> list[float]:
        chosen = np.array(own, dtype=np.int64)
        return row_values(logprobs, model, rows, chosen, forward, sharing.check_stop).tolist()

    return np.array(sharing.results(rows.lengths.tolist(), of))


def _reward_hacking_metrics(models: BothModels) -> dict[str, float]:
    """Return the signs of reward hacking, without those that are NaN."""
    before, after = models.before, models.after
    metrics = {
        "sycophancyShift": after.sycophancy.shift,
        "startSycophancyShift": before.sycophancy.shift,
    }
    if models.prompts:
        lengths, start_lengths = (
            [len(tokens) for tokens in measured.tokens] for measured in (after, before)
        )
        distinct = reward_hacking.distinct(after.texts)
        start_distinct = reward_hacking.distinct(before.texts)
        metrics |= {
            "completions": float(len(models.prompts)),
            "kl": float(np.mean(after.aligned_N - before.aligned_N)),
            "length": float(np.mean(lengths)),
            "lengthRatio": reward_hacking.length_ratio(lengths, start_lengths),
            "repetition": reward_hacking.repetition(after.texts),
            "startRepetition": reward_hacking.repetition(before.texts),
            "distinct": distinct,
            "startDistinct": start_distinct,
            "distinctRatio": distinct / start_distinct,
            "complete": after.complete,
            "startComplete": before.complete,
        }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _samples(models: BothModels, count: int) -> list[Sample]:
    """Return `count` prompts, evenly spaced, with both models' completions."""
    return [
        Sample(
            prompt=models.prompts[i].prompt.question,
            reference="",
            base=models.before.completions[i].text,
            tuned=models.after.completions[i].text,
        )
        for i in spread(len(models.prompts), count)
    ]


def _rows(
    prompts: Sequence[TokenizedPrompt], completions: Sequence[tuple[int, ...]]
) -> Rows | None:
    """Return the prompts with their completions, whose tokens are the targets. None: there are no
    prompts."""
    if not prompts:
        return None
    rows = [
        (*prompt.ids, *completion) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    masks = [
        np.arange(len(row)) >= len(prompt.ids) for prompt, row in zip(prompts, rows, strict=True)
    ]
    return Rows(
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        flat_mask=np.concatenate(masks).astype(np.uint8),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        source=np.zeros(len(rows), dtype=np.int16),
    )


def _held_out(folder: Path, settings: AssessSettings) -> tuple[tuple[Prompt, tuple[str, ...]], ...]:
    """Return the held-out prompts and their completions, in the order of the rows."""
    held_out = []
    with (folder / "validation.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            turns = list(row["prompt"])
            system = settings.chat.system_prompt
            if system is not None and turns[0]["role"] != "system":
                turns = [turn("system", system), *turns]
            tools = tuple(row.get("tools", ()))
            prompt = Prompt(tuple(turns), f"held-out row {number}", row, tools)
            held_out.append((prompt, tuple(row["answers"])))
    return tuple(held_out)
