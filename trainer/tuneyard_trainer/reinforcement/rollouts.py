"""Answers of the policy in training, scored: what an update of reinforcement learning looks at.

An update has R answers over all workers; each worker samples and scores its own B of them, and then
tells the others a few numbers of each, so that every worker knows the whole update's statistics.
Shapes: B answers of this worker, R of all workers, T tokens, K numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt
from tuneyard_trainer.generation.sampling import Sampled, Sampler
from tuneyard_trainer.reinforcement import arithmetic
from tuneyard_trainer.reinforcement.actor import Actor, Texts
from tuneyard_trainer.reinforcement.arithmetic import Reduce
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward, finite

Result = TypeVar("Result")

MAX_SAMPLER_LOGPROB_GAP = 0.25
"""Nats of the mean token. bfloat16's 8 bits round a logit of 10 by hundredths; a head that kept its
first weights gave about one."""


@dataclass(frozen=True)
class ProcessGroup:
    """The workers that share a batch; alone where there is one."""

    rank: int
    world_size: int
    device: torch.device

    def mine(self, count: int) -> list[int]:
        """Which of `count` things this worker takes."""
        return list(range(self.rank, count, self.world_size))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, on each of them."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, values_BK: Tensor, owned: Sequence[int], count: int) -> Tensor:
        """(R, K) everybody's values from each worker's own; R = `count`."""
        whole_RK = torch.zeros(count, values_BK.shape[1], device=self.device)
        whole_RK[torch.tensor(owned, device=self.device, dtype=torch.long)] = values_BK
        return self.sum(whole_RK)

    def together(self, work: Callable[[], Result]) -> Result:
        """The work's result. If it fails on any worker, it fails on all of them with that reason:
        the others would wait for the failed one until a limit that tells nothing."""
        failure: StageError | None = None
        result: Result | None = None
        try:
            result = work()
        except StageError as error:
            failure = error
        if self.world_size > 1:
            everyone: list[StageError | None] = [None] * self.world_size
            dist.all_gather_object(everyone, failure)
            failure = next((error for error in everyone if error is not None), None)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]  # nobody failed, so it is there


@dataclass(frozen=True)
class Rollouts:
    """One update's answers."""

    owned: Sequence[int]
    """Which of the R answers are this worker's."""
    texts: Texts
    mask_BT: Tensor
    logprobs_BT: Tensor
    """When they were sampled."""
    values_BT: Tensor
    reference_BT: Tensor
    """What the model at the start gave them; as `logprobs_BT` where nobody asks."""
    scores_R: Tensor
    """What each answer is worth, before any penalty."""
    ended_R: Tensor
    """True where it came to a stop token."""
    lengths_R: Tensor
    """Tokens, as floats."""
    kl_R: Tensor | None
    """Nats of the whole answer: the sum of log pi - log pi_ref over its tokens; None: nobody asked
    for the reference."""
    entropy_R: Tensor
    """The sum of its tokens' entropies, in nats."""
    gap_R: Tensor
    """How far another engine's log-probabilities of its tokens are from the policy's: the sum of
    the distances, in nats. 0 where the policy's own code answered."""
    seconds: dict[str, float]
    """How long generation and scoring took."""
    answers: Sequence[str]
    """This worker's, as text."""
    reduce: Reduce = arithmetic.alone
    """Sums a tensor over the workers."""

    @property
    def num_tokens(self) -> int:
        """Of all answers, prompts not counted."""
        return int(self.lengths_R.sum())

    def own(self, x_R: Tensor) -> Tensor:
        """(B,) this worker's part of what everybody knows."""
        return x_R[torch.tensor(self.owned, device=x_R.device, dtype=torch.long)]

    @property
    def sampler_logprob_gap(self) -> float:
        """`gap_R` of the mean token."""
        return float(self.gap_R.sum() / self.lengths_R.sum())

    def watched(self) -> dict[str, float]:
        """What is watched of an update's answers; `kl` only where there is a reference."""
        return {
            "reward": float(self.scores_R.mean()),
            "rewardDeviation": float(self.scores_R.std(correction=0)),
            **({} if self.kl_R is None else {"kl": float(self.kl_R.mean())}),
            "entropy": float(self.entropy_R.sum() / self.lengths_R.sum()),
            **({"samplerLogprobGap": self.sampler_logprob_gap} if self.gap_R.any() else {}),
            "answerLength": float(self.lengths_R.mean()),
            "endedShare": float(self.ended_R.mean(dtype=torch.float32)),
        }


@dataclass(frozen=True)
class Collector:
    """Samples and scores."""

    actor: Actor
    sampler: Sampler
    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]
    sampling: Sampling
    peers: ProcessGroup

    def collect(self, questions: Sequence[TokenizedPrompt], keys: Sequence[int]) -> Rollouts:
        """One answer to each question; `keys` name the answers. Raises StageError, on every worker,
        where any answer cannot be scored."""
        owned = self.peers.mine(len(questions))
        began = time.perf_counter()
        asked = [questions[i] for i in owned]
        answered = self.sampler([q.ids for q in asked], [keys[i] for i in owned]) if asked else []
        sampled = time.perf_counter()
        tokens = [answer.tokens for answer in answered]
        answers = [self._text(answer) for answer in tokens]
        texts = Texts(
            [[*q.ids, *answer] for q, answer in zip(asked, tokens, strict=True)],
            [len(q.ids) for q in asked],
        )
        scores_B = self.peers.together(lambda: self._worth(asked, answers))
        now = self.actor.scores(texts)
        reference_BT = self._reference(texts, now.logprobs_BT)
        mask_BT = texts.mask(self.actor.device)
        kl_B = arithmetic.kl_k1(now.logprobs_BT, reference_BT).sum(1)
        each = [
            scores_B,
            self._ended(tokens),
            mask_BT.sum(1).float(),
            kl_B,
            now.entropy_BT.sum(1),
            self._gap(answered, now.logprobs_BT),
        ]
        told_RK = self.peers.gather(torch.stack(each, dim=1), owned, len(questions))
        scores_R, ended_R, lengths_R, kl_R, entropy_R, gap_R = told_RK.unbind(1)
        finite(scores_R, prompts_of(questions))
        rollouts = Rollouts(
            owned=owned,
            texts=texts,
            mask_BT=mask_BT,
            logprobs_BT=now.logprobs_BT,
            values_BT=now.values_BT,
            reference_BT=reference_BT,
            scores_R=scores_R,
            ended_R=ended_R > 0,
            lengths_R=lengths_R,
            kl_R=None if self.actor.reference is None else kl_R,
            entropy_R=entropy_R,
            gap_R=gap_R,
            seconds={
                "generationSeconds": sampled - began,
                "scoringSeconds": time.perf_counter() - sampled,
            },
            answers=answers,
            reduce=self.peers.sum,
        )
        self._refuse_stranger(rollouts.sampler_logprob_gap)
        return rollouts

    def _refuse_stranger(self, gap: float) -> None:
        """Raises StageError where what answered was another model than the one that learns."""
        allowed = MAX_SAMPLER_LOGPROB_GAP - math.log(
            self.sampling.top_p
        )  # the engine's is of the nucleus
        if gap > allowed:
            raise StageError(
                "SamplerMismatch",
                f"sampling.engine {self.sampling.engine} gives the tokens of its answers "
                f"log-probabilities that are {gap:.2f} nats from the policy's in the mean, and "
                f"{allowed:.2f} are allowed: it runs this model otherwise than it is trained, and "
                "nothing could be learnt from its answers.",
                advice="Remove sampling.engine: transformers samples then.",
            )

    def _worth(self, asked: Sequence[TokenizedPrompt], answers: Sequence[str]) -> Tensor:
        attempts = [Attempt(q.prompt, answer) for q, answer in zip(asked, answers, strict=True)]
        return self.reward(attempts).to(self.actor.device, torch.float32)

    def _ended(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """(B,) 1 where an answer came to a stop token."""
        last_B = torch.tensor([answer[-1] for answer in tokens], dtype=torch.long)
        return arithmetic.ended(last_B, torch.tensor(self.stop)).float().to(self.actor.device)

    def _gap(self, answered: Sequence[Sampled], logprobs_BT: Tensor) -> Tensor:
        """(B,) the sum over each answer's tokens of how far the engine's word is from ours."""
        gap_B = torch.zeros(len(answered), device=self.actor.device)
        for row, answer in enumerate(answered):
            if answer.logprobs is not None:
                engine_T = torch.tensor(answer.logprobs, device=self.actor.device)
                gap_B[row] = (logprobs_BT[row, : len(engine_T)] - engine_T).abs().sum()
        return gap_B

    def _reference(self, texts: Texts, logprobs_BT: Tensor) -> Tensor:
        if self.actor.reference is None:
            return logprobs_BT
        return self.actor.reference_logprobs(texts)

    def _text(self, answer: Sequence[int]) -> str:
        """What was said, without the token that ended it."""
        spoken = answer[:-1] if answer[-1] in self.stop else answer
        return str(self.tokenizer.decode(list(spoken), skip_special_tokens=True))


def prompts_of(questions: Sequence[TokenizedPrompt]) -> list[Prompt]:
    """What was asked, without how the policy reads it."""
    return [question.prompt for question in questions]
