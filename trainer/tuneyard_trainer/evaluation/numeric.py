"""Numeric answers: is the final answer of a text equal to a target, as a number or an expression?

math-verify finds the final answers and compares them. It runs in a process of its own, since its
time limits work in the main thread of a process alone, and an answer such as 9**9**9**9 ends no
computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuneyard_trainer.evaluation.bounded import BoundedProcess

ANSWER_SECONDS = 5.0
"""The longest comparison of one answer, which then counts as wrong. Most take milliseconds."""
MAX_CHARACTERS = 4000
"""The part of an answer that is read, from its end, where the final answer is."""
CHILD = "tuneyard_trainer.evaluation.numeric_child"


@dataclass(frozen=True)
class Compared:
    """The comparison of one answer with its targets."""

    equal: bool
    readable: bool = True
    """Whether each target has a number or an expression."""
    ended: bool = True
    """Whether the comparison came to an end within its time and memory."""


def verifier() -> BoundedProcess:
    """Return the process that compares. It is not started yet."""
    return BoundedProcess(CHILD, "compares numeric answers by math-verify")


def compare(process: BoundedProcess, answer: str, targets: Sequence[str]) -> Compared:
    """Return whether the final answer equals any target. Raises StageError WorkerDied if the
    process cannot be started."""
    request = {
        "answer": answer[-MAX_CHARACTERS:],
        "targets": [target[-MAX_CHARACTERS:] for target in targets],
    }
    found = process.ask(request, ANSWER_SECONDS)
    if found is None:
        return Compared(equal=False, ended=False)
    if "error" in found:  # of sympy, such as a MemoryError
        return Compared(equal=False)
    return Compared(equal=found["equal"], readable=found["readable"])


def compared(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[float], dict[str, int]]:
    """Return whether each answer equals one of its references, as 1 or 0, and the number of answers
    whose comparison did not end (`notCompared`) and of those with a reference that has no number
    and no expression (`withoutNumber`).

    Equal comparisons are made once.
    """
    found: dict[tuple[str, tuple[str, ...]], Compared] = {}
    pairs = [(a, tuple(texts)) for a, texts in zip(answers, references, strict=True)]
    with verifier() as process:
        for pair in pairs:
            if pair not in found:
                found[pair] = compare(process, *pair)
    each = [found[pair] for pair in pairs]
    counts = {
        "notCompared": sum(not one.ended for one in each),
        "withoutNumber": sum(not one.readable for one in each),
    }
    return [float(one.equal) for one in each], counts
