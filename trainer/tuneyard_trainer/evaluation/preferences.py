"""Held-out preferences: their implicit rewards, and the prompts that they give the other parts.

Shapes: R rows (one completion each), P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.stage_settings import ChatSettings
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Found, Loaded
from tuneyard_trainer.judging.judges import turn
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.metrics import pair_metrics, pairs_of, unpaired_metrics
from tuneyard_trainer.reinforcement.rewards import WrittenAttempt


@dataclass(frozen=True)
class HeldOutPreferences:
    """The held-out preferences of a pairs stage."""

    comparisons: Comparisons
    labeled: bool
    """Whether they are single completions labeled good or bad."""
    groups: tuple[tuple[WrittenAttempt, ...], ...]
    """The completions of each preference with its prompt, in the order of `comparisons`."""

    @classmethod
    def open(cls, folder: Path, chat: ChatSettings) -> HeldOutPreferences | None:
        """Open a pairs stage's output. None: nothing is held out."""
        data = Preferences.open(folder)
        if data.validation is None:
            return None
        return cls(data.validation, data.labeled, tuple(_groups(folder, chat)))

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, in the order of the preferences."""
        return [group[0].prompt for group in self.groups]

    @property
    def attempts(self) -> list[WrittenAttempt]:
        """The completions, in the order of the rows."""
        return [attempt for group in self.groups for attempt in group]

    def items(self, scores_R: NDArray[np.float64]) -> Items:
        """Return the accuracy of each pair, or of each labeled completion: 1, 0, or 0.5 for equal
        scores of a pair."""
        if self.labeled:
            right = ((scores_R > 0) == (self.comparisons.labels > 0.5)).astype(np.float64)
        else:
            pairs = pairs_of(self.comparisons)
            margins_P = scores_R[pairs.better] - scores_R[pairs.worse]
            right = (margins_P > 0) + 0.5 * (margins_P == 0)
        kind = "completion" if self.labeled else "pair"
        ids = tuple(f"{kind} {number + 1}" for number in range(len(right)))
        return Items(ids, right, None, higher_is_better=True)


@dataclass(frozen=True)
class ImplicitRewards:
    """The part that measures the implicit rewards of held-out completions: beta times the log-ratio
    of the models (Rafailov et al. 2023, section 4)."""

    held_out: HeldOutPreferences
    beta: float
    pad: int
    """The token that fills batches."""

    def measure(self, loaded: Loaded, _tuned: NDArray[np.float64] | None, /) -> NDArray[np.float64]:
        """Return (R,) the log-probability of each held-out completion."""
        return loaded.row_logprobs(self.held_out.comparisons.rows, loaded.forward(self.pad))

    def compare(
        self, tuned: NDArray[np.float64] | None, before: NDArray[np.float64] | None
    ) -> Found:
        """Return the accuracy, margin and calibration of the implicit rewards."""
        if tuned is None or before is None:
            return Found()
        implicit_R = self.beta * (tuned - before)
        measure = unpaired_metrics if self.held_out.labeled else pair_metrics
        metrics = measure("preference", implicit_R, self.held_out.comparisons)
        items = {"preferenceAccuracy": self.held_out.items(implicit_R)} if metrics else {}
        return Found(metrics, items=items)


def _groups(folder: Path, chat: ChatSettings) -> Iterator[tuple[WrittenAttempt, ...]]:
    """Yield the preferences of `validation.jsonl`. A line has `turns` if a text is not all of an
    answer: if one of them has reasoning or calls."""
    with (folder / "validation.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            turns = list(row["prompt"])
            if chat.system_prompt is not None and turns[0]["role"] != "system":
                turns = [turn("system", chat.system_prompt), *turns]
            tools = tuple(row.get("tools", ()))
            prompt = Prompt(tuple(turns), f"held-out row {number}", row, tools)
            answers = row["answers"]
            written = row.get("turns") or [turn("assistant", answer) for answer in answers]
            pairs = zip(answers, written, strict=True)
            yield tuple(WrittenAttempt(prompt, answer, completion) for answer, completion in pairs)
