"""assess: what an alignment gained, and what it cost.

The aligned model beside the model that it was aligned from: on held-out preferences, on its own
answers to held-out prompts as the reward scores them, and by the signs of a reward being gamed
(length, repetition, KL, agreement with whoever asks, a second judge's verdict). Leaves
`evaluation.json`; then the gates.

Shapes: R rows of held-out preferences, N answers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tuneyard.api.stage_settings import AssessSettings, RewardTerm, WinRateSettings
from tuneyard_trainer.data.chat import Message
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, as_text, read_prompts, tokenize
from tuneyard_trainer.evaluation import reward_hacking, win_rate
from tuneyard_trainer.evaluation.gates import check_gates
from tuneyard_trainer.generation.sampling import TransformersSampler, stop_tokens
from tuneyard_trainer.judging.local_model import ModelJudge
from tuneyard_trainer.judging.session import Asking, judge_name
from tuneyard_trainer.models import base, policies, probes
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.metrics import correlation, pair_metrics, unpaired_metrics
from tuneyard_trainer.preference.micro_batches import evaluate_rows, logprobs
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome

EVALUATION = "evaluation.json"
MAX_PROMPTS = 128
"""Prompts that are answered: a mean reward's standard error is then a tenth of its spread."""
ANSWERED = 4096
"""The longest row of prompt and answer that is measured, in tokens."""


@dataclass(frozen=True)
class Behaviour:
    """What one model does."""

    answers: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each answer, with its stop token where it came to one."""
    complete: float
    """Share of answers that came to their end."""
    pairs_R: NDArray[np.float64] | None
    """The log-probability of each held-out answer; None: none are held out."""
    own_N: NDArray[np.float64]
    """The log-probability of the aligned model's answers."""
    sycophancy: reward_hacking.Sycophancy


def run(context: StageContext) -> StageOutcome:
    """Measures, writes `evaluation.json`, then checks the gates (StageError GateFailed)."""
    settings = context.settings(AssessSettings)
    measuring = Measuring.of(context, settings)
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    if "tuned" in context.inputs:
        found, samples = measuring.aligned()
        metrics |= found
    metrics |= measuring.reward_on_pairs()
    result = {"metrics": metrics, "samples": samples}
    (context.workdir / EVALUATION).write_text(json.dumps(result, indent=2, ensure_ascii=False))
    context.worker.report(step=1, total_steps=1, metrics=metrics)
    check_gates(settings.gates, metrics)
    details = {"samples": samples, "promptsHeldOut": measuring.asks_held_out}
    if settings.win_rate:
        details["judge"] = judge_name(context.stage, settings.win_rate.judge)
    return StageOutcome(metrics, details, contents=(EVALUATION,))


@dataclass(frozen=True)
class Measuring:
    """What it takes to measure a model."""

    context: StageContext
    settings: AssessSettings
    tokenizer: PreTrainedTokenizerBase
    data: Preferences | None
    held_out: tuple[tuple[Prompt, tuple[str, ...]], ...]
    """The held-out prompts with their answers, as text; empty: none are held out."""

    @classmethod
    def of(cls, context: StageContext, settings: AssessSettings) -> Measuring:
        tokenizer = base.load_tokenizer(context.inputs["model"])
        if settings.chat.chat_template is not None:
            tokenizer.chat_template = settings.chat.chat_template
        data = Preferences.open(context.inputs["data"]) if "data" in context.inputs else None
        held_out = _texts(context.inputs["data"], settings) if data and data.validation else ()
        return cls(context, settings, tokenizer, data, held_out)

    # ---- the aligned model --------------------------------------------------------------------

    def aligned(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The aligned model against its start, one of them in memory at a time."""
        asked = self._asked()
        reward = self._reward(self.settings.reward, [one.prompt for one in asked])
        after = self._behaviour(asked, {**self.context.inputs}, None, "the aligned model")
        start = {role: path for role, path in self.context.inputs.items() if role != "tuned"}
        if "start" in self.context.inputs:
            start["tuned"] = self.context.inputs["start"]
        before = self._behaviour(asked, start, after.tokens, "the model before alignment")
        metrics = {**_form(asked, before, after), **self._on_pairs(before, after)}
        metrics |= self._scored(reward, asked, before, after)
        if self.settings.win_rate:
            metrics |= self._judged_win_rate(self.settings.win_rate, asked, before, after)
        return metrics, self._samples(asked, before, after)

    @property
    def asks_held_out(self) -> bool:
        """Whether it is held-out prompts that are answered; False where none are held out, or where
        a rule needs the row's own fields: then it is those that the policy was trained on."""
        trained_on = self.settings.prompts is not None and "prompts" in self.context.inputs
        ruled = any(term.rule for term in self.settings.reward)
        return not trained_on or (bool(self.held_out) and not ruled)

    def _asked(self) -> list[TokenizedPrompt]:
        prompts = [prompt for prompt, _ in self.held_out]
        if not self.asks_held_out and self.settings.prompts is not None:
            place, chosen, chat = (
                self.context.inputs["prompts"],
                self.settings.prompts,
                self.settings.chat,
            )
            prompts = read_prompts(place, chosen, chat, name="the prompts")
        distinct = {json.dumps(prompt.messages): prompt for prompt in prompts}
        rendered = [
            tokenize(prompt, self.tokenizer, self.settings.chat)
            for prompt in list(distinct.values())[:MAX_PROMPTS]
        ]
        room = ANSWERED - self.settings.sampling.max_new_tokens
        return [prompt for prompt in rendered if prompt and 0 < len(prompt.ids) <= room]

    def _reward(self, terms: Sequence[RewardTerm], prompts: Sequence[Prompt]) -> Reward | None:
        if not terms or not prompts:
            return None
        chat, device = self.settings.chat, self.context.worker.device
        return rewards.load(terms, self.context.inputs, chat, prompts, device)

    def _behaviour(
        self,
        asked: Sequence[TokenizedPrompt],
        inputs: Mapping[str, Path],
        answered: tuple[tuple[int, ...], ...] | None,
        name: str,
    ) -> Behaviour:
        """`answered`: the aligned model's answers; None: this is the aligned model."""
        self._pause(f"measuring {name}")
        model: Any = policies.load_for_inference(inputs, self.context.worker.device)
        stop = stop_tokens(model, self.tokenizer, self.settings.chat.chat_template)
        pad = int(self.tokenizer.pad_token_id)
        sampler = TransformersSampler(model, pad, stop, self.settings.sampling)
        keys = [derive_seed(self.settings.seed, index) for index in range(len(asked))]
        sampled = sampler([one.ids for one in asked], keys) if asked else []
        tokens = tuple(answer.tokens for answer in sampled)
        forward = Forward(
            device=self.context.worker.device,
            precision=torch.float32,
            pad=pad,
            pack=probes.isolates_documents(model),
            capacity=512,
            max_tokens=16384 if self.context.worker.device.type == "cuda" else 2048,
        )
        own = _rows(asked, tokens if answered is None else answered)
        pairs = self.data.validation.rows if self.data and self.data.validation else None
        behaviour = Behaviour(
            answers=tuple(self._text(answer, stop) for answer in tokens),
            tokens=tokens,
            complete=float(np.mean([a[-1:] and a[-1] in stop for a in tokens])) if tokens else 1.0,
            pairs_R=evaluate_rows(logprobs, model, pairs, forward, self.context.worker)
            if pairs
            else None,
            own_N=evaluate_rows(logprobs, model, own, forward, self.context.worker)
            if own
            else np.zeros(0),
            sycophancy=self._sycophancy(model, name),
        )
        del model, sampler
        gc.collect()
        return behaviour

    def _sycophancy(self, model: Any, name: str) -> reward_hacking.Sycophancy:
        template = self.settings.chat.chat_template
        judge = ModelJudge(
            model, self.tokenizer, name, stop=self.context.worker.stop, template=template
        )
        replies = {reply.key: reply for reply in judge.replies(reward_hacking.sycophancy_asks())}
        return reward_hacking.sycophancy(replies)

    def _text(self, answer: Sequence[int], stop: Sequence[int]) -> str:
        spoken = list(answer[:-1] if answer and answer[-1] in stop else answer)
        return str(self.tokenizer.decode(spoken, skip_special_tokens=True)).strip()

    def _pause(self, message: str) -> None:
        if self.context.worker.stop():
            raise Interrupted(self.context.stage.name, 0)
        self.context.worker.report(total_steps=1, message=message)

    # ---- figures ------------------------------------------------------------------------------

    def _on_pairs(self, before: Behaviour, after: Behaviour) -> dict[str, float]:
        """By the implicit rewards, beta times the log-ratio (Rafailov et al. 2023, section 4)."""
        groups = self.data.validation if self.data else None
        if groups is None or before.pairs_R is None or after.pairs_R is None:
            return {}
        implicit_R = self.settings.beta * (after.pairs_R - before.pairs_R)
        if self.data and self.data.labeled:
            return unpaired_metrics("preference", implicit_R, groups)
        return pair_metrics("preference", implicit_R, groups)

    def _scored(
        self,
        reward: Reward | None,
        asked: Sequence[TokenizedPrompt],
        before: Behaviour,
        after: Behaviour,
    ) -> dict[str, float]:
        """What the reward says of both models' answers to the same prompts."""
        if reward is None:
            return {}
        prompts = [one.prompt for one in asked]
        found = []
        for behaviour in (before, after):
            pairs = zip(prompts, behaviour.answers, strict=True)
            attempts = [Attempt(prompt, answer) for prompt, answer in pairs]
            found.append(rewards.finite(reward(attempts), prompts).double().numpy())
        gains = found[1] - found[0]
        lengths = np.array([float(len(tokens)) for tokens in after.tokens])
        return {
            "reward": float(np.mean(found[1])),
            "startReward": float(np.mean(found[0])),
            "rewardGain": float(np.mean(gains)),
            "rewardGainError": float(np.std(gains) / np.sqrt(len(gains))),
            "rewardLengthCorrelation": correlation(found[1], lengths),
        }

    def _judged_win_rate(
        self,
        settings: WinRateSettings,
        asked: Sequence[TokenizedPrompt],
        before: Behaviour,
        after: Behaviour,
    ) -> dict[str, float]:
        """What a second judge says of both models' answers to the same prompts."""
        conversations = [as_text(one.prompt.messages) for one in asked]
        answered = zip(conversations, after.answers, before.answers, strict=True)
        pairs = win_rate.pairs(list(answered), settings.principles, self.settings.seed)
        kept = self.context.workdir / "checkpoints"
        with Journal(kept, self.context.worker.identity, self.context.worker.persist) as journal:
            asking = Asking.of(self.context.stage, settings.judge, journal, self.context.worker)
            verdicts = win_rate.ask(
                asking, self.context.stage, self.context.inputs, settings, pairs
            )
        found = win_rate.decided(verdicts, identical=len(asked) - len(pairs))
        return {**found, **asking.tally.metrics()}

    def reward_on_pairs(self) -> dict[str, float]:
        """Of the reward's models, its rules aside, on the held-out preferences; {} without models
        or without any held out."""
        learnt = [term for term in self.settings.reward if term.role]
        groups = self.data.validation if self.data else None
        if not learnt or groups is None or (self.data and self.data.labeled):
            return {}
        self._pause("measuring the reward model")
        reward = self._reward(learnt, [prompt for prompt, _ in self.held_out])
        if reward is None:
            return {}
        attempts = [
            Attempt(prompt, answer) for prompt, answers in self.held_out for answer in answers
        ]
        prompts = [attempt.prompt for attempt in attempts]
        scores = rewards.finite(reward(attempts), prompts).double().numpy()
        return pair_metrics("reward", scores, groups)

    def _samples(
        self, asked: Sequence[TokenizedPrompt], before: Behaviour, after: Behaviour
    ) -> list[dict[str, Any]]:
        """Prompts spread evenly, with what each model answered."""
        count = self.settings.samples
        if not asked or not count:
            return []
        every = max(1, len(asked) // count)
        return [
            {
                "prompt": asked[i].prompt.question,
                "reference": "",
                "expected": [],
                "base": before.answers[i],
                "tuned": after.answers[i],
            }
            for i in list(range(0, len(asked), every))[:count]
        ]


def _form(
    asked: Sequence[TokenizedPrompt], before: Behaviour, after: Behaviour
) -> dict[str, float]:
    """The signs of a reward being gamed."""
    figures = {
        "sycophancyShift": after.sycophancy.shift,
        "startSycophancyShift": before.sycophancy.shift,
    }
    if asked:
        lengths = [[len(answer) for answer in b.tokens] for b in (after, before)]
        distinct = [reward_hacking.distinct(b.answers) for b in (after, before)]
        figures |= {
            "answers": float(len(asked)),
            "kl": float(np.mean(after.own_N - before.own_N)),
            "length": float(np.mean(lengths[0])),
            "lengthRatio": reward_hacking.length_ratio(lengths[0], lengths[1]),
            "repetition": reward_hacking.repetition(after.answers),
            "startRepetition": reward_hacking.repetition(before.answers),
            "distinct": distinct[0],
            "startDistinct": distinct[1],
            "distinctRatio": distinct[0] / distinct[1],
            "complete": after.complete,
            "startComplete": before.complete,
        }
    return {name: value for name, value in figures.items() if value == value}


def _rows(asked: Sequence[TokenizedPrompt], answers: Sequence[tuple[int, ...]]) -> Rows | None:
    """Prompts with answers, the answers' tokens as targets; None where there are none."""
    if not asked:
        return None
    rows = [(*one.ids, *answer) for one, answer in zip(asked, answers, strict=True)]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    masks = [np.arange(len(row)) >= len(one.ids) for one, row in zip(asked, rows, strict=True)]
    return Rows(
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        flat_mask=np.concatenate(masks).astype(np.uint8),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        source=np.zeros(len(rows), dtype=np.int16),
    )


def _texts(folder: Path, settings: AssessSettings) -> tuple[tuple[Prompt, tuple[str, ...]], ...]:
    """The held-out prompts and their answers, in the order of the rows."""
    found = []
    with (folder / "validation.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            turns: list[Message] = list(row["prompt"])
            system = settings.chat.system_prompt
            if system is not None and turns[0]["role"] != "system":
                turns = [{"role": "system", "content": system}, *turns]
            prompt = Prompt(tuple(turns), f"held-out row {number}", row)
            found.append((prompt, tuple(row["answers"])))
    return tuple(found)
