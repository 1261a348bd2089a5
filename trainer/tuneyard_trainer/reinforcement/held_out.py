"""Held-out prompts: which they are, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneyard_trainer.generation.answering import TokenizedPrompt
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector, Rollouts
from tuneyard_trainer.training.seeds import MEASUREMENT, derive_seed, generator

HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 64
"""Prompts that are never trained on: the reward of 64 answers is known to an eighth of its
deviation, and less, as every measurement draws them with the same keys."""
FEWEST_ANSWERS = 32
"""Of a measurement: few prompts are answered several times each, as four answers tell nothing."""

SAMPLES_SHOWN = 3

MEASURED = ("reward", "kl", "answerLength", "endedShare")


def held_out_metrics(measured: Mapping[str, float]) -> dict[str, float]:
    """The same under names that tell it from an update's own."""
    return {f"heldOut{name[0].upper()}{name[1:]}": value for name, value in measured.items()}


def split(
    questions: Sequence[TokenizedPrompt],
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    """What is trained on and what is held out; copies of a prompt are on the same side. The seed is
    fixed: runs that differ in theirs are measured on the same prompts."""
    different = sorted({question.ids for question in questions})
    count = min(MOST_HELD_OUT, int(len(different) * HELD_OUT_SHARE))
    chosen = generator(0).permutation(len(different))[:count]
    held_out = {different[i] for i in chosen}
    by_ids = {question.ids: question for question in questions if question.ids in held_out}
    return [q for q in questions if q.ids not in held_out], list(by_ids.values())


def default_interval(steps_per_epoch: int, total: int) -> int:
    """Return the updates between two measurements if the job does not set them: an epoch, or more,
    so that there are at most ten measurements in a run."""
    return max(steps_per_epoch, math.ceil(total / 10))


@dataclass
class HeldOut:
    """Measures the policy on the held-out prompts."""

    prompts: Sequence[TokenizedPrompt]
    trained_on: bool
    """There were too few prompts to hold any out: these are trained on too."""
    collector: Collector
    method: Method
    seed: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    """SAMPLES_SHOWN completions of each measurement."""

    @classmethod
    def of(
        cls,
        held_out: Sequence[TokenizedPrompt],
        questions: Sequence[TokenizedPrompt],
        collector: Collector,
        method: Method,
        seed: int,
    ) -> HeldOut:
        """Measure on `held_out`, or if it is empty on some of the `questions` trained on."""
        prompts = held_out or questions[:MOST_HELD_OUT]
        return cls(prompts, not held_out, collector, method, seed)

    def measure(self, step: int) -> dict[str, float]:
        """Return the metrics of sampled completions, `objective` among them. The keys are the same
        at each measurement."""
        prompts = [prompt for prompt in self.prompts for _ in range(self._copies)]
        keys = [derive_seed(self.seed, MEASUREMENT, i) for i in range(len(prompts))]
        rollouts = self.collector.collect(prompts, keys)
        self._keep_samples(step, rollouts)
        watched = rollouts.watched()
        shown = {name: watched[name] for name in MEASURED if name in watched}
        return {"objective": self.method.objective(watched), **shown}

    def first_and_last_samples(self) -> list[dict[str, Any]]:
        """Return the samples of the first measurement and of the last."""
        return self.samples[:SAMPLES_SHOWN] + self.samples[SAMPLES_SHOWN:][-SAMPLES_SHOWN:]

    @property
    def _copies(self) -> int:
        """Completions of each prompt."""
        return math.ceil(FEWEST_ANSWERS / len(self.prompts))

    def _keep_samples(self, step: int, rollouts: Rollouts) -> None:
        """Keep a few completions for the record, each of another prompt."""
        every = zip(rollouts.owned, rollouts.answers, strict=True)
        firsts = [(index, answer) for index, answer in every if index % self._copies == 0]
        for index, answer in firsts[:SAMPLES_SHOWN]:
            self.samples.append(
                {
                    "step": step,
                    "prompt": self.prompts[index // self._copies].prompt.question,
                    "answer": answer,
                    "reward": float(rollouts.scores_R[index]),
                }
            )
