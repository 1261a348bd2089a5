"""Statistics of preferences: what a policy could learn from them beside what is meant."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuneyard_trainer.data.reading.conversations import template_turns
from tuneyard_trainer.data.texts import text_hash
from tuneyard_trainer.preference.rows import Preference

LENGTH_BIAS = 0.65
"""The share of comparisons won by the longer answer from which the log says so: about twice as many
as it loses. Policies learn length from such sets (Singhal et al. 2023, arXiv:2310.03716)."""
MIN_COMPARISONS = 50
"""Fewest comparisons for which a share is called a bias."""
QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class PreferenceStatistics:
    """The statistics of one data set. Memory holds 100 bytes for each comparison.

    A ranking is compared by neighbors: the best with the second, the second with the third, ...
    """

    preferences: int = 0
    rejected: int = 0
    """Single completions that are labeled bad."""
    prompts: set[int] = field(default_factory=set)
    sizes: Counter[int] = field(default_factory=Counter)
    """Preferences by their number of completions."""
    ties: int = 0
    """Pairs of which neither completion is better."""
    tied_answers: int = 0
    """Answers left out, since another one has the same score."""
    seen: Counter[int] = field(default_factory=Counter)
    """Preferences by their prompt, their completions in order, and their label."""
    verdicts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each two completions of a prompt: how often the first in the order of the alphabet won,
    and how often the other one."""
    certainty: list[float] = field(default_factory=list)
    """Probabilities of pairs that are neither certain nor ties."""
    better: array[int] = field(default_factory=lambda: array("l"))
    worse: array[int] = field(default_factory=lambda: array("l"))
    """Lengths of the better and the worse completion of each comparison, or of the good and the bad
    single completions."""
    margins: array[float] = field(default_factory=lambda: array("f"))
    """Differences of score between the best and the worst completion."""

    def add(self, preference: Preference, lengths: Sequence[int]) -> None:
        """Count a preference. `lengths`: of each completion, in tokens or in words."""
        self.preferences += 1
        turns = json.dumps(template_turns(preference.prompt), ensure_ascii=False)
        prompt, texts = _hash(turns), [completion.text for completion in preference.completions]
        self.prompts.add(prompt)
        self.sizes[len(texts)] += 1
        self.seen[_hash(turns, *texts, str(preference.label))] += 1
        self.tied_answers += preference.tied
        if preference.margin is not None:
            self.margins.append(preference.margin)
        if len(texts) == 1:
            self.rejected += preference.label < 0.5
            (self.better if preference.label >= 0.5 else self.worse).append(lengths[0])
            return
        if len(texts) == 2 and preference.label == 0.5:
            self.ties += 1
            return
        if preference.label < 1:
            self.certainty.append(preference.label)
        for index in range(len(texts) - 1):
            self.better.append(lengths[index])
            self.worse.append(lengths[index + 1])
            first, second = sorted(texts[index : index + 2])
            key = _hash(turns, first, second)
            won, lost = self.verdicts.get(key, (0, 0))
            is_first = texts[index] == first
            self.verdicts[key] = (won + is_first, lost + (not is_first))

    @property
    def repeated(self) -> int:
        """Preferences that are equal to an earlier one."""
        return self.preferences - len(self.seen)

    @property
    def agreement(self) -> tuple[float, int] | None:
        """The probability that two verdicts on the same completions agree, and the number of
        comparisons with several verdicts. None: none has several."""
        several = [counts for counts in self.verdicts.values() if sum(counts) > 1]
        if not several:
            return None
        agreeing = sum(a * (a - 1) + b * (b - 1) for a, b in several)
        return agreeing / sum((a + b) * (a + b - 1) for a, b in several), len(several)

    @property
    def longer_wins(self) -> tuple[float, int] | None:
        """The share of comparisons that the longer completion wins, of those of unequal length, and
        their number. Of single completions: the probability that a good one is longer than a bad
        one. None: there is nothing to compare."""
        better, worse = np.asarray(self.better), np.asarray(self.worse)
        if self.sizes[1]:
            if not len(better) or not len(worse):
                return None
            order = np.sort(worse)
            below = np.searchsorted(order, better, side="left")
            equal = np.searchsorted(order, better, side="right") - below
            wins = (below + equal / 2).sum() / (len(better) * len(worse))
            return float(wins), min(len(better), len(worse))
        unequal = better != worse
        if not unequal.any():
            return None
        return float((better > worse)[unequal].mean()), int(unequal.sum())

    def details(self) -> dict[str, Any]:
        """Return the statistics as JSON, for the record and the report. Keys without a value are
        left out."""
        found: dict[str, Any] = {
            "preferences": self.preferences,
            "prompts": len(self.prompts),
            "completions": {str(size): self.sizes[size] for size in sorted(self.sizes)},
            "repeated": self.repeated,
            "ties": self.ties,
            "tiedAnswers": self.tied_answers,
        }
        if self.sizes[1]:
            found["rejected"] = self.rejected
        if agreement := self.agreement:
            found["agreement"], found["comparedAgain"] = agreement
        if self.certainty:
            found["meanProbability"] = float(np.mean(self.certainty))
        if longer_wins := self.longer_wins:
            found["longerWins"], found["unequalLengths"] = longer_wins
            found["meanLengths"] = [float(np.mean(self.better)), float(np.mean(self.worse))]
        if self.margins:
            found["margins"] = np.quantile(self.margins, QUANTILES).tolist()
        return found

    def notes(self) -> list[str]:
        """Return what a user should know before training on them."""
        notes = []
        if longer_wins := self.longer_wins:
            share, number = longer_wins
            if share >= LENGTH_BIAS and number >= MIN_COMPARISONS:
                notes.append(
                    f"the longer answer wins {share:.0%} of {number:,} comparisons, so that a "
                    "policy may learn to write more"
                )
        if (agreement := self.agreement) and agreement[0] < 1:
            contradicted = sum(min(counts) > 0 for counts in self.verdicts.values())
            notes.append(
                f"{contradicted:,} of {agreement[1]:,} comparisons that were made again have "
                "contradicting verdicts"
            )
        if self.repeated:
            notes.append(f"{self.repeated:,} preferences are equal to earlier ones")
        return notes


def _hash(*texts: str) -> int:
    return text_hash("\0".join(texts))
