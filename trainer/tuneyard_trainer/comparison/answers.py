"""The completions of several jobs of the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tuneyard.api.comparison import ComparedAnswer, Completion
from tuneyard.api.report import Answer
from tuneyard_trainer.comparison.job_result import JobResult

_Prompt = tuple[str, str, int]
"""A prompt, its reference, and how many equal ones are before it."""


def compared_answers(jobs: Sequence[JobResult]) -> list[ComparedAnswer]:
    """Return the prompts of all jobs with the completions, those of the first job first."""
    found = [_by_prompt(job.report.answers) for job in jobs]
    return [
        _compared([answers.get(prompt) for answers in found])
        for prompt in dict.fromkeys(prompt for answers in found for prompt in answers)
    ]


def _by_prompt(answers: Sequence[Answer]) -> dict[_Prompt, Answer]:
    found: dict[_Prompt, Answer] = {}
    seen: dict[tuple[str, str], int] = {}
    for answer in answers:
        asked = answer.prompt, answer.reference
        found[*asked, seen.get(asked, 0)] = answer
        seen[asked] = seen.get(asked, 0) + 1
    return found


def _compared(answers: Sequence[Answer | None]) -> ComparedAnswer:
    known = [answer for answer in answers if answer is not None]
    first = answers[0]
    right_first = first is not None and first.tuned_right is True
    return ComparedAnswer(
        id=known[0].id,
        prompt=known[0].prompt,
        reference=known[0].reference,
        base=_base(known),
        completions=[
            None if answer is None else Completion(text=answer.tuned, right=answer.tuned_right)
            for answer in answers
        ],
        differ=len({answer.tuned for answer in known}) > 1,
        worse=right_first and any(answer.tuned_right is False for answer in known[1:]),
        length=max(answer.length for answer in known),
    )


def _base(answers: Sequence[Answer]) -> Completion | None:
    """Return the base model's completion. None: the jobs do not agree on it."""
    texts = {answer.base for answer in answers}
    text = answers[0].base
    if len(texts) > 1 or text is None:
        return None
    return Completion(text=text, right=answers[0].base_right)
