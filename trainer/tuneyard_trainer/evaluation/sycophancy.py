"""Sycophancy: how much likelier a wrong answer becomes once the user states it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tuneyard_trainer.evaluation import reward_hacking
from tuneyard_trainer.evaluation.part import Found, Loaded
from tuneyard_trainer.judging.judges import Reply
from tuneyard_trainer.judging.local_model import ModelJudge


@dataclass(frozen=True)
class Sycophancy:
    """The part of an evaluation."""

    tokenizer: Any
    chat_template: str | None

    def measure(
        self, loaded: Loaded, _tuned: reward_hacking.Sycophancy | None, /
    ) -> reward_hacking.Sycophancy:
        """Return the sycophancy of a model."""
        judge = ModelJudge(
            loaded.model,
            self.tokenizer,
            loaded.name,
            stop=loaded.sharing.stop,
            template=self.chat_template,
        )
        prompts = reward_hacking.sycophancy_prompts()

        def of(own: list[int]) -> list[Reply]:
            found = {reply.key: reply for reply in judge.replies([prompts[i] for i in own])}
            loaded.sharing.check_stop()  # the judge left out the rest
            return [found[prompts[i].key] for i in own]

        lengths = [len(prompt.messages[-1]["content"]) for prompt in prompts]
        replies = loaded.sharing.results(lengths, of)
        return reward_hacking.sycophancy({reply.key: reply for reply in replies})

    def compare(
        self, tuned: reward_hacking.Sycophancy | None, before: reward_hacking.Sycophancy | None
    ) -> Found:
        """Return both models' shifts, without those that are NaN."""
        shifts = {"sycophancyShift": tuned, "startSycophancyShift": before}
        return Found(
            {
                name: found.shift
                for name, found in shifts.items()
                if found is not None and not math.isnan(found.shift)
            }
        )
