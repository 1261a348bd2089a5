"""Held-out prompts: which they are, and what is measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.training.seeds import generator

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
