"""Completions that both models sample of the same prompts with the same seeds, and the signs of
reward hacking in them: length, repetition and the divergence from the model before.

Shapes: N completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import ChatSettings
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, completed_rows, tokenize
from tuneyard_trainer.evaluation import reward_hacking
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Answered, Found, Loaded, Rater
from tuneyard_trainer.evaluation.result import spread
from tuneyard_trainer.generation.completions import Completion, decode
from tuneyard_trainer.generation.sampling import stop_tokens
from tuneyard_trainer.reporting.results import Sample
from tuneyard_trainer.training.seeds import derive_seed

MAX_PROMPTS = 128
"""Prompts to complete: the standard error of a mean reward is then 9 % of its deviation."""
MAX_ROW_TOKENS = 4096
"""The longest row of prompt and completion that is measured."""


def usable_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, chat: ChatSettings, max_new_tokens: int
) -> list[TokenizedPrompt]:
    """Return at most MAX_PROMPTS distinct prompts that leave room for a completion."""
    distinct = {json.dumps(prompt.messages): prompt for prompt in prompts}
    chosen = list(distinct.values())[:MAX_PROMPTS]
    tokenized = [tokenize(prompt, tokenizer, chat) for prompt in chosen]
    limit = MAX_ROW_TOKENS - max_new_tokens
    return [prompt for prompt in tokenized if prompt and 0 < len(prompt.ids) <= limit]


@dataclass(frozen=True)
class Measured:
    """The completions of one model."""

    completions: tuple[Completion, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each completion, with its stop token if it has one."""
    tuned_N: NDArray[np.float64]
    """The model's log-probability of each completion by the tuned model."""

    @property
    def texts(self) -> list[str]:
        """The completions as text."""
        return [completion.text for completion in self.completions]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each completion."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def ended(self) -> NDArray[np.float64]:
        """(N,) whether each completion has a stop token, as 1 or 0."""
        return np.array([float(completion.complete) for completion in self.completions])


@dataclass(frozen=True)
class SampledCompletions:
    """The part of an evaluation."""

    tokenizer: Any
    chat_template: str | None
    sampling: Sampling
    seed: int
    prompts: Sequence[TokenizedPrompt]
    held_out: bool
    """Whether nothing was trained on the prompts."""
    samples: int
    raters: Sequence[Rater]

    def measure(self, loaded: Loaded, tuned: Measured | None) -> Measured:
        """Sample a completion of each prompt, and measure those of the tuned model."""
        stop = stop_tokens(loaded.model, self.tokenizer, self.chat_template)
        pad = int(self.tokenizer.pad_token_id)
        tokens = self._sample(loaded, stop)
        tuned_N = np.zeros(0)
        if self.prompts:
            completed = completed_rows(self.prompts, tuned.tokens if tuned else tokens)
            tuned_N = loaded.row_logprobs(completed, loaded.forward(pad))
        completions = tuple(decode(self.tokenizer, stop, row) for row in tokens)
        return Measured(completions, tokens, tuned_N)

    def _sample(self, loaded: Loaded, stop: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of one completion of each prompt."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        if lengths:
            loaded.engine.prepare(max(lengths) + self.sampling.max_new_tokens)

        def of(own: list[int]) -> list[tuple[int, ...]]:
            return loaded.engine.sample(
                [self.prompts[index].ids for index in own],
                [derive_seed(self.seed, index) for index in own],
                stop=stop,
                settings=self.sampling,
                before_batch=loaded.sharing.check_stop,
            )

        return tuple(loaded.sharing.results(lengths, of))

    def compare(self, tuned: Measured | None, before: Measured | None) -> Found:
        """Return the signs of reward hacking, samples, and what the raters find."""
        if tuned is None or before is None:
            return Found()
        answered = Answered(
            [prompt.prompt for prompt in self.prompts],
            tuned.texts,
            before.texts,
            np.array(tuned.lengths, dtype=np.float64),
        )
        found = self._answers(answered)
        own = Found(
            _signs(tuned, before) if self.prompts else {},
            [found[i] for i in spread(len(found), self.samples)],
            self._items(tuned, before) if self.prompts else {},
            {"promptsHeldOut": self.held_out},
            found,
        )
        return Found.merged([own, *(rater.rate(answered) for rater in self.raters)])

    def _items(self, tuned: Measured, before: Measured) -> dict[str, Items]:
        """Return whether each completion ended, and its repetition if both models wrote enough
        words."""
        ids = tuple(prompt.prompt.where for prompt in self.prompts)
        both_N = np.array(
            [
                [reward_hacking.repeated_share(text) for text in found.texts]
                for found in (tuned, before)
            ]
        )
        is_known_N = np.isfinite(both_N).all(axis=0)
        known = tuple(where for where, known in zip(ids, is_known_N, strict=True) if known)
        return {
            "complete": Items(ids, tuned.ended, before.ended, higher_is_better=True),
            "repetition": Items(
                known, both_N[0, is_known_N], both_N[1, is_known_N], higher_is_better=False
            ),
        }

    def _answers(self, answered: Answered) -> list[Sample]:
        """Return the prompts with both models' completions."""
        texts = zip(answered.prompts, answered.before, answered.tuned, strict=True)
        return [
            Sample(
                prompt=prompt.question, reference="", base=before, tuned=tuned, where=prompt.where
            )
            for prompt, before, tuned in texts
        ]


def _signs(tuned: Measured, before: Measured) -> dict[str, float]:
    """Return the signs of reward hacking, without those that are NaN."""
    distinct = reward_hacking.distinct(tuned.texts)
    start_distinct = reward_hacking.distinct(before.texts)
    metrics = {
        "completions": float(len(tuned.completions)),
        "kl": float(np.mean(tuned.tuned_N - before.tuned_N)),
        "length": float(np.mean(tuned.lengths)),
        "lengthRatio": reward_hacking.length_ratio(tuned.lengths, before.lengths),
        "repetition": reward_hacking.repetition(tuned.texts),
        "startRepetition": reward_hacking.repetition(before.texts),
        "distinct": distinct,
        "startDistinct": start_distinct,
        "distinctRatio": distinct / start_distinct,
        "complete": float(np.mean(tuned.ended)),
        "startComplete": float(np.mean(before.ended)),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
