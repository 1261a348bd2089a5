"""The win rate of the aligned model against the model before alignment, by a second judge.

Optimization raises the reward further than the quality that it stands for (Gao et al. 2022,
arXiv:2210.10760). A judge that is no part of the reward therefore compares the completions of both
models, each pair in both orders.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tuneyard.api.plan import digest
from tuneyard_trainer.judging.judges import Pair, Verdict


def make_pairs(
    completed: Sequence[tuple[str, str, str]], principles: Sequence[str], seed: int
) -> list[Pair]:
    """Return the pairs to compare; equal completions give no pair.

    `completed`: conversation, completion of the aligned model, completion of the model before. The
    key of a pair includes a digest of its completions: a later attempt may sample other
    completions, and must not use the journal's replies for them.
    """
    return [
        Pair(
            key=f"{index}/{digest([after, before])}",
            conversation=conversation,
            completions=(after, before),
            principle=random.Random(f"{seed}/{index}").choice(principles),
        )
        for index, (conversation, after, before) in enumerate(completed)
        if after != before
    ]


def win_rate_metrics(verdicts: Sequence[Verdict], identical: int) -> dict[str, float]:
    """Return the metrics of the verdicts. `identical`: the prompts with equal completions.

    winRate: share of prompts whose completion by the aligned model is better; undecided pairs and
    identical completions count half. Missing if pairs exist and none was judged.
    judgeAgreement: share of judged pairs with the same verdict in both orders; missing if no pair
    was judged. judgedPairs: pairs with a reply in both orders.
    """
    judged = [found for found in verdicts if found.outcome != "unlabeled"]
    metrics = {"judgedPairs": float(len(judged))}
    points = {"first": 1.0, "second": 0.0}
    wins = sum(points.get(found.outcome, 0.5) for found in judged) + identical / 2
    if judged or (identical and not verdicts):
        metrics["winRate"] = wins / (len(judged) + identical)
    if judged:
        metrics["judgeAgreement"] = sum(found.agreed for found in judged) / len(judged)
    return metrics
