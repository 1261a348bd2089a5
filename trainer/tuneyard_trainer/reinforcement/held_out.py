"""Held-out prompts: the split, and the measurement of the policy on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneyard.api.evaluation import prefixed
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector, Rollouts
from tuneyard_trainer.training.seeds import MEASUREMENT, derive_seed, generator

HELD_OUT_SHARE, MAX_HELD_OUT = 0.1, 64
"""The share of the prompts that are held out, and the most of them. The mean reward of 64
completions has a standard error of an eighth of the rewards' deviation. The difference of two
measurements has a smaller error, since both sample with the same keys."""
MIN_COMPLETIONS = 32
"""The fewest completions of a measurement. A few prompts get several completions each, since the
mean of four rewards is too noisy to compare."""

SAMPLES_SHOWN = 3

SHOWN_METRICS = (
    *("reward", "independentReward", "rewardLengthCorrelation"),
    *("kl", "completionLength", "endedShare"),
)


def held_out_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics under names that differ from an update's: `heldOutReward`."""
    return {prefixed("heldOut", name): value for name, value in metrics.items()}


def split(
    prompts: Sequence[TokenizedPrompt],
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    """Return the prompts to train on, and the held-out prompts without copies.

    Copies of a prompt are on the same side. The seed is fixed, so that runs with different seeds
    are measured on the same prompts.
    """
    distinct = sorted({prompt.ids for prompt in prompts})
    count = min(MAX_HELD_OUT, int(len(distinct) * HELD_OUT_SHARE))
    chosen = generator(0).permutation(len(distinct))[:count]
    held_out = {distinct[i] for i in chosen}
    by_ids = {prompt.ids: prompt for prompt in prompts if prompt.ids in held_out}
    return [prompt for prompt in prompts if prompt.ids not in held_out], list(by_ids.values())


def default_interval(steps_per_epoch: int, total: int) -> int:
    """Return the updates between two measurements if the job does not set them: an epoch, or more,
    so that there are at most ten measurements in a run."""
    return max(steps_per_epoch, math.ceil(total / 10))


@dataclass
class HeldOut:
    """Measures the policy on the held-out prompts."""

    prompts: Sequence[TokenizedPrompt]
    trained_on: bool
    """Whether these prompts are trained on too, since there are too few to hold any out."""
    collector: Collector
    method: Method
    seed: int
    check_stop: Callable[[], None]

    @classmethod
    def of(
        cls,
        held_out: Sequence[TokenizedPrompt],
        prompts: Sequence[TokenizedPrompt],
        collector: Collector,
        method: Method,
        seed: int,
        check_stop: Callable[[], None],
    ) -> HeldOut:
        """Measure on `held_out`, or if `held_out` is empty on some of the training `prompts`."""
        return cls(
            held_out or prompts[:MAX_HELD_OUT], not held_out, collector, method, seed, check_stop
        )

    def measure(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics of sampled completions, `objective` among them, and SAMPLES_SHOWN of
        the completions. Every measurement samples with the same keys. Raises Interrupted."""
        prompts = [prompt for prompt in self.prompts for _ in range(self._copies)]
        keys = [derive_seed(self.seed, MEASUREMENT, i) for i in range(len(prompts))]
        rollouts = self.collector.collect(prompts, keys, self.check_stop)
        metrics = rollouts.metrics()
        independent_R = self.collector.independent_scores(prompts, rollouts)
        if independent_R is not None:
            metrics |= {"independentReward": float(independent_R.mean())}
        shown = {name: metrics[name] for name in SHOWN_METRICS if name in metrics}
        found = {"objective": self.method.objective(metrics), **shown}
        return found, self._samples(step, rollouts)

    @property
    def _copies(self) -> int:
        """Completions of each prompt."""
        return math.ceil(MIN_COMPLETIONS / len(self.prompts))

    def _samples(self, step: int, rollouts: Rollouts) -> list[dict[str, Any]]:
        """Return a few completions for the record, one for a prompt."""
        completions = zip(rollouts.owned, rollouts.completions, strict=True)
        first = [(index, text) for index, text in completions if index % self._copies == 0]
        return [
            {
                "step": step,
                "prompt": self.prompts[index // self._copies].prompt.question,
                "answer": text,
                "reward": float(rollouts.scores_R[index]),
            }
            for index, text in first[:SAMPLES_SHOWN]
        ]
