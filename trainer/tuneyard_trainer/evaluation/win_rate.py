"""A second judge, who knows nothing of the reward, on what an alignment changed.

The reward that is optimised rises further than what it stands for (Gao et al. 2022,
arXiv:2210.10760); a judge of its own compares the aligned model's answers with those of the model
before, each pair in both orders.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneyard.api.plan import PlannedStage, digest
from tuneyard.api.stage_settings import WinRateSettings
from tuneyard_trainer.judging.judges import MODEL_LABEL_TOKENS, Pair, Verdict, verdict
from tuneyard_trainer.judging.session import Asking


def pairs(
    answered: Sequence[tuple[str, str, str]], principles: Sequence[str], seed: int
) -> list[Pair]:
    """What is asked. `answered`: conversation, the aligned model's answer, the one before; where
    both are the same there is no question. A pair's key holds its answers: another attempt may
    sample others, and then asks anew."""
    return [
        Pair(
            key=f"{index}/{digest([after, before])}",
            conversation=conversation,
            answers=(after, before),
            principle=random.Random(f"{seed}/{index}").choice(principles),
        )
        for index, (conversation, after, before) in enumerate(answered)
        if after != before
    ]


def ask(
    asking: Asking,
    stage: PlannedStage,
    inputs: Mapping[str, Path],
    settings: WinRateSettings,
    pairs: Sequence[Pair],
) -> list[Verdict]:
    """Asks what was not replied to yet. Raises StageError and Interrupted as `Asking.ask` does."""
    limit = settings.judge.label_tokens if settings.judge else MODEL_LABEL_TOKENS
    asks = [pair.asks(settings.question, limit) for pair in pairs]
    flat = [one for both in asks for one in both]
    if any(one.key not in asking.known for one in flat):
        asking.ask(asking.open(stage, inputs), flat, "asking the second judge")
    return [
        verdict(asking.known.get(straight.key), asking.known.get(swapped.key), "drop")
        for straight, swapped in asks
    ]


def decided(verdicts: Sequence[Verdict], identical: int) -> dict[str, float]:
    """The figures. `identical`: prompts that both models answer alike.

    winRate: share of the prompts whose answer by the aligned model is the better one; what is
    undecided or identical counts half. judgeAgreement: share of the judged pairs that were decided
    alike in both orders; low, and the judge tells little. judgedPairs: those answered in both
    orders. Without any of these, and with pairs that differ, there is no winRate.
    """
    judged = [found for found in verdicts if found.outcome != "unlabelled"]
    figures = {"judgedPairs": float(len(judged))}
    worth = {"first": 1.0, "second": 0.0}
    wins = sum(worth.get(found.outcome, 0.5) for found in judged) + identical / 2
    if judged or (identical and not verdicts):
        figures["winRate"] = wins / (len(judged) + identical)
    if judged:
        figures["judgeAgreement"] = sum(found.agreed for found in judged) / len(judged)
    return figures
