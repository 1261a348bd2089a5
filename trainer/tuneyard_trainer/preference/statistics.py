"""Statistics of preferences: what a policy could learn from them beside what is meant."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """The statistics of one data set.

    Memory holds 16 bytes for each preference, and 17 for each comparison; `details` needs as much
    again for a moment.

    A ranking is compared by neighbors: the best with the second, the second with the third, ...
    """

    preferences: int = 0
    rejected: int = 0
    """Single completions that are labeled bad."""
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of each preference's prompt."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Preferences by their number of completions."""
    ties: int = 0
    """Pairs of which neither completion is better."""
    tied_answers: int = 0
    """Answers left out, since another one has the same score."""
    contents: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of each preference: of its prompt, its completions in order, and its label."""
    compared: array[int] = field(default_factory=lambda: array("Q"))
    """Of each comparison: a hash of the prompt and the two completions, in any order."""
    first_wins: array[int] = field(default_factory=lambda: array("b"))
    """Of each comparison: 1 if the first completion in the order of the alphabet won, 0 if the
    other one did."""
    certainty: array[float] = field(default_factory=lambda: array("d"))
    """Probabilities of pairs that are neither certain nor ties."""
    better: array[int] = field(default_factory=lambda: array("i"))
    worse: array[int] = field(default_factory=lambda: array("i"))
    """Lengths of the better and the worse completion of each comparison, or of the good and the bad
    single completions."""
    margins: array[float] = field(default_factory=lambda: array("f"))
    """Differences of score between the best and the worst completion."""

    def add(self, preference: Preference, lengths: Sequence[int]) -> None:
        """Count a preference. `lengths`: of each completion, in tokens or in words."""
        self.preferences += 1
        turns = json.dumps(template_turns(preference.prompt), ensure_ascii=False)
        texts = [f"{each.reasoning}\0{each.text}" for each in preference.completions]
        self.prompts.append(_hash(turns))
        self.sizes[len(texts)] += 1
        self.contents.append(_hash(turns, *texts, str(preference.label)))
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
            self.compared.append(_hash(turns, first, second))
            self.first_wins.append(texts[index] == first)

    @property
    def repeated(self) -> int:
        """Preferences that are equal to an earlier one."""
        return self.preferences - _distinct(self.contents)

    @property
    def _verdicts(self) -> NDArray[np.int64]:
        """(C, 2) of each two completions that were compared several times: how often the first in
        the order of the alphabet won, and how often the other one."""
        keys, counts = np.unique(np.asarray(self.compared), return_counts=True)
        again = keys[counts > 1]
        if not len(again):
            return np.zeros((0, 2), np.int64)
        places = np.searchsorted(again, np.asarray(self.compared))
        places[places == len(again)] = 0
        mine = again[places] == np.asarray(self.compared)
        won = np.bincount(places[mine], np.asarray(self.first_wins)[mine]).astype(np.int64)
        return np.stack((won, counts[counts > 1] - won), axis=1)

    @property
    def agreement(self) -> tuple[float, int] | None:
        """The probability that two verdicts on the same completions agree, and the number of
        comparisons with several verdicts. None: none has several."""
        won, lost = self._verdicts.T
        if not len(won):
            return None
        agreeing = (won * (won - 1) + lost * (lost - 1)).sum()
        return float(agreeing / ((won + lost) * (won + lost - 1)).sum()), len(won)

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
            "prompts": _distinct(self.prompts),
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
            contradicted = int((self._verdicts.min(axis=1) > 0).sum())
            notes.append(
                f"{contradicted:,} of {agreement[1]:,} comparisons that were made again have "
                "contradicting verdicts"
            )
        if self.repeated:
            notes.append(f"{self.repeated:,} preferences are equal to earlier ones")
        return notes


def _distinct(hashes: array[int]) -> int:
    return len(np.unique(np.asarray(hashes)))


def _hash(*texts: str) -> int:
    return text_hash("\0".join(texts))
