"""The win rate of the tuned model against the model before, by a judge.

Optimization raises the reward further than the quality that it stands for (Gao et al. 2022,
arXiv:2210.10760). A judge that is no part of the reward therefore compares the completions of both
models, each pair in both orders.

Shapes: N prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuneyard.api.plan import digest
from tuneyard.api.stage_settings import WinRateSettings
from tuneyard_trainer.data.prompts import as_text
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.length_controlled import length_controlled
from tuneyard_trainer.evaluation.part import Answered, Found
from tuneyard_trainer.judging.judges import Pair, Verdict, verdict
from tuneyard_trainer.judging.session import JudgeSession, judge_name, open_journal
from tuneyard_trainer.worker import StageContext

POINTS = {"first": 1.0, "second": 0.0}
"""The points of the tuned model by the verdict; every other one is worth half."""
TIE = Verdict("tie")
"""The verdict on identical completions, which no judge sees."""


@dataclass(frozen=True)
class WinRate:
    """The rater by a judge."""

    context: StageContext
    shared: SharedStage
    settings: WinRateSettings
    seed: int
    """Of the drawn principles."""

    def rate(self, answered: Answered) -> Found:
        """Return the win rate of the tuned model. Raises the errors of the judge."""
        settings = self.settings
        conversations = [as_text(prompt.messages) for prompt in answered.prompts]
        completed = [*zip(conversations, answered.tuned, answered.before, strict=True)]
        pairs = make_pairs(completed, settings.principles, self.seed)
        with open_journal(self.context, self.shared) as journal:
            session = JudgeSession.of(self.context, self.shared, settings.judge, journal)
            replies = session.compare(
                list(pairs.values()), settings.question, "requesting the judge of the win rate"
            )
        found = (verdict(straight, swapped, "drop") for straight, swapped in replies)
        verdicts = dict(zip(pairs, found, strict=True))
        metrics = win_rate_metrics(list(verdicts.values()), len(completed) - len(pairs))
        if "winRate" not in metrics and session.budget.exhausted:
            raise session.budget_spent(f"any of {len(pairs)} pairs was judged")
        own = Found(
            {**metrics, **session.metrics()},
            items={"winRate": win_items(answered, verdicts)} if "winRate" in metrics else {},
            details={"judge": judge_name(self.context.stage, settings.judge)},
        )
        if "winRate" not in metrics:
            return own  # there is no judgment whose dependence on length could be told
        return Found.merged([own, at_equal_length(answered, verdicts)])


def make_pairs(
    completed: Sequence[tuple[str, str, str]], principles: Sequence[str], seed: int
) -> dict[int, Pair]:
    """Return the pairs to compare, by the number of their prompt; equal completions give no pair.

    `completed`: conversation, completion of the tuned model, completion of the model before. The
    key of a pair includes a digest of its completions: a later attempt may sample other
    completions, and must not use the journal's replies for them.
    """
    return {
        index: Pair(
            key=f"{index}/{digest([tuned, before])}",
            conversation=conversation,
            completions=(tuned, before),
            principle=random.Random(f"{seed}/{index}").choice(principles),
        )
        for index, (conversation, tuned, before) in enumerate(completed)
        if tuned != before
    }


def win_rate_metrics(verdicts: Sequence[Verdict], identical: int) -> dict[str, float]:
    """Return the metrics of the verdicts. `identical`: the prompts with equal completions.

    winRate: share of prompts whose completion by the tuned model is better; undecided pairs and
    identical completions count half. Missing if pairs exist and none was judged.
    judgeAgreement: share of judged pairs with the same verdict in both orders; missing if no pair
    was judged. judgedPairs: pairs with a reply in both orders.
    """
    judged = [found for found in verdicts if found.outcome != "unlabeled"]
    metrics = {"judgedPairs": float(len(judged))}
    wins = sum(POINTS.get(found.outcome, 0.5) for found in judged) + identical / 2
    if judged or (identical and not verdicts):
        metrics["winRate"] = wins / (len(judged) + identical)
    if judged:
        metrics["judgeAgreement"] = sum(found.agreed for found in judged) / len(judged)
    return metrics


def points(answered: Answered, verdicts: Mapping[int, Verdict]) -> dict[int, float]:
    """Return a win as 1, a loss as 0 and a tie as 0.5, by the number of the prompt; identical
    completions tie. Prompts without a verdict are left out. `verdicts`: by the number of the
    prompt."""
    return {
        number: POINTS.get(found.outcome, 0.5)
        for number in range(len(answered.prompts))
        if (found := verdicts.get(number, TIE)).outcome != "unlabeled"
    }


def win_items(answered: Answered, verdicts: Mapping[int, Verdict]) -> Items:
    """Return the points of each prompt that has a verdict."""
    found = points(answered, verdicts)
    ids = tuple(answered.prompts[number].where for number in found)
    return Items(ids, np.array([*found.values()]), None, higher_is_better=True)


def at_equal_length(answered: Answered, verdicts: Mapping[int, Verdict]) -> Found:
    """Return the length-controlled win rate, or why it cannot be told. Lengths are in characters,
    which the judge reads."""
    found = points(answered, verdicts)
    longer = [len(answered.tuned[number]) - len(answered.before[number]) for number in found]
    result = length_controlled(np.array([*found.values()]), np.array(longer, dtype=np.float64))
    name = "lengthControlledWinRate"
    if isinstance(result, str):
        return Found(details={name: result})
    return Found(
        {name: result.win_rate, "judgeLengthEffect": result.length_effect},
        estimates={name: result.evidence},
    )
