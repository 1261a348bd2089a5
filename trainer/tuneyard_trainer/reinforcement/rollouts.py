"""Rollouts: sampled and scored completions of the policy, the data of an update.

An update has R completions over all workers. Each worker samples and scores its own B of them and
gathers a few numbers of each from the others, so that every worker knows the whole update's
statistics. Shapes: B completions of this worker, R of all workers, T tokens, K numbers.
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
from tuneyard_trainer.generation.sampling import MAX_SAMPLER_LOGPROB_GAP, Sampled, Sampler
from tuneyard_trainer.models.sharding import is_shared
from tuneyard_trainer.reinforcement import arithmetic
from tuneyard_trainer.reinforcement.actor import Actor, Sequences
from tuneyard_trainer.reinforcement.arithmetic import Reduce
from tuneyard_trainer.reinforcement.independent import IndependentReward
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward, finite, reward_failed
from tuneyard_trainer.worker import Interrupted

Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessGroup:
    """The workers that share a batch; with one worker every method is local."""

    rank: int
    world_size: int
    device: torch.device

    def share(self, count: int) -> list[int]:
        """Return the indices of this worker's share of `count` items."""
        return list(range(self.rank, count, self.world_size))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers, on each of them."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, values_BK: Tensor, owned: Sequence[int], count: int) -> Tensor:
        """Return all workers' values (R, K), R = `count`. `owned`: this worker's indices in R."""
        whole_RK = torch.zeros(count, values_BK.shape[1], device=self.device)
        whole_RK[torch.tensor(owned, device=self.device, dtype=torch.long)] = values_BK
        return self.sum(whole_RK)

    def run(self, work: Callable[[], Result]) -> Result:
        """Return the work's result. A StageError or Interrupted on one worker is raised on all of
        them: otherwise the other workers would wait for that one until a timeout without a
        cause."""
        failure: StageError | Interrupted | None = None
        result: Result | None = None
        try:
            result = work()
        except (StageError, Interrupted) as error:
            failure = error
        if self.world_size > 1:
            failures: list[StageError | Interrupted | None] = [None] * self.world_size
            dist.all_gather_object(failures, failure)
            failure = next((error for error in failures if error is not None), None)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]  # no worker failed, so there is a result


@dataclass(frozen=True)
class Rollouts:
    """The completions of one update."""

    owned: Sequence[int]
    """Indices of this worker's completions among the R."""
    sequences: Sequences
    mask_BT: Tensor
    logprobs_BT: Tensor
    """By the policy at the time of sampling."""
    values_BT: Tensor
    reference_BT: Tensor
    """Log-probabilities by the reference model; `logprobs_BT` without a reference."""
    scores_R: Tensor
    """The reward of each completion, before any penalty."""
    ended_R: Tensor
    """True if the completion ends with a stop token."""
    lengths_R: Tensor
    """Tokens, as floats."""
    kl_R: Tensor | None
    """Nats of the whole completion: the sum of log pi - log pi_ref over its tokens; None: no
    reference."""
    entropy_R: Tensor
    """Sum of the tokens' entropies, in nats."""
    gap_R: Tensor
    """Sum over tokens of the distance between the sampling engine's log-probability and the
    policy's, in nats; 0 if the policy's own code sampled."""
    seconds: dict[str, float]
    """Time for generation and for scoring."""
    completions: Sequence[str]
    """This worker's completions, as text."""
    reduce: Reduce = arithmetic.single_worker
    """Sums a tensor over the workers."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, without the prompts."""
        return int(self.lengths_R.sum())

    def own(self, x_R: Tensor) -> Tensor:
        """Return this worker's part (B,)."""
        return x_R[torch.tensor(self.owned, device=x_R.device, dtype=torch.long)]

    @property
    def sampler_logprob_gap(self) -> float:
        """`gap_R`, mean over tokens."""
        return float(self.gap_R.sum() / self.lengths_R.sum())

    def metrics(self) -> dict[str, float]:
        """Return the metrics of an update's completions; `kl` only with a reference, and
        `rewardLengthCorrelation` only if rewards and lengths differ."""
        correlation = arithmetic.correlation(self.scores_R, self.lengths_R)
        return {
            "reward": float(self.scores_R.mean()),
            "rewardDeviation": float(self.scores_R.std(correction=0)),
            **({} if correlation is None else {"rewardLengthCorrelation": correlation}),
            **({} if self.kl_R is None else {"kl": float(self.kl_R.mean())}),
            "entropy": float(self.entropy_R.sum() / self.lengths_R.sum()),
            **({"samplerLogprobGap": self.sampler_logprob_gap} if self.gap_R.any() else {}),
            "completionLength": float(self.lengths_R.mean()),
            "endedShare": float(self.ended_R.mean(dtype=torch.float32)),
        }


@dataclass(frozen=True)
class Collector:
    """Samples and scores completions."""

    actor: Actor
    sampler: Sampler
    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]
    sampling: Sampling
    group: ProcessGroup
    independent: IndependentReward | None = None
    """A reward that nothing is trained on. None: there is none."""

    def collect(
        self,
        prompts: Sequence[TokenizedPrompt],
        keys: Sequence[int],
        check_stop: Callable[[], None] = lambda: None,
    ) -> Rollouts:
        """Return one completion of each prompt. `keys`: one sampling seed for each completion.

        `check_stop`: called before each batch; raises Interrupted to end the call on every worker.
        Raises StageError, on every worker, if any completion cannot be scored, and SamplerMismatch.
        """
        owned = self.group.share(len(prompts))
        began = time.perf_counter()
        own = [prompts[i] for i in owned]
        sampled = self.group.run(
            lambda: (
                self.sampler([p.ids for p in own], [keys[i] for i in owned], check_stop)
                if own or is_shared(self.actor.model)
                else []
            )
        )
        return self.score(prompts, owned, sampled, time.perf_counter() - began)

    def score(
        self,
        prompts: Sequence[TokenizedPrompt],
        owned: Sequence[int],
        sampled: Sequence[Sampled],
        generation_seconds: float,
    ) -> Rollouts:
        """Return one completion of each prompt, scored. `owned`: this worker's indices among the
        prompts; `sampled`: their completions.

        Raises StageError, on every worker, if any completion cannot be scored, and SamplerMismatch.
        """
        began = time.perf_counter()
        own = [prompts[i] for i in owned]
        tokens = [completion.tokens for completion in sampled]
        completions = [self._text(ids) for ids in tokens]
        sequences = Sequences(
            [[*prompt.ids, *ids] for prompt, ids in zip(own, tokens, strict=True)],
            [len(prompt.ids) for prompt in own],
        )
        scores_B = self.group.run(lambda: self._score(own, completions))
        now = self.actor.score_all(sequences)
        reference_BT = self._reference(sequences, now.logprobs_BT)
        mask_BT = sequences.mask(self.actor.device)
        kl_B = arithmetic.kl_k1(now.logprobs_BT, reference_BT).sum(1)
        numbers = [
            scores_B,
            self._ended(tokens),
            mask_BT.sum(1).float(),
            kl_B,
            now.entropy_BT.sum(1),
            self._gap(sampled, now.logprobs_BT),
        ]
        gathered_RK = self.group.gather(torch.stack(numbers, dim=1), owned, len(prompts))
        scores_R, ended_R, lengths_R, kl_R, entropy_R, gap_R = gathered_RK.unbind(1)
        finite(scores_R, untokenized(prompts))
        rollouts = Rollouts(
            owned=owned,
            sequences=sequences,
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
                "generationSeconds": generation_seconds,
                "scoringSeconds": time.perf_counter() - began,
            },
            completions=completions,
            reduce=self.group.sum,
        )
        self._check_sampler(rollouts.sampler_logprob_gap)
        return rollouts

    def independent_scores(
        self, prompts: Sequence[TokenizedPrompt], rollouts: Rollouts
    ) -> Tensor | None:
        """Return the independent reward of each completion (R,), in float64. None: there is no such
        reward. Raises StageError and Interrupted, on every worker."""
        independent = self.independent
        if independent is None:
            return None
        owned = [prompts[i].prompt for i in rollouts.owned]
        attempts = list(map(Attempt, owned, rollouts.completions))
        scores_B = self.group.run(lambda: independent(attempts))
        scores_B1 = scores_B.to(self.actor.device, torch.float32)[:, None]
        return self.group.gather(scores_B1, rollouts.owned, len(prompts))[:, 0].double()

    def _check_sampler(self, gap: float) -> None:
        """Raise StageError SamplerMismatch if the sampling engine does not run the policy being
        trained."""
        # The engine's log-probabilities are over the nucleus, the policy's over the vocabulary.
        allowed = MAX_SAMPLER_LOGPROB_GAP - math.log(self.sampling.top_p)
        if gap > allowed:
            raise StageError(
                "SamplerMismatch",
                f"the log-probabilities that sampling.engine {self.sampling.engine} gives to the "
                f"tokens of its completions differ from the policy's by {gap:.2f} nats on average, "
                f"above {allowed:.2f}: the engine does not run the policy being trained.",
                advice="Remove sampling.engine to sample with transformers.",
            )

    def _score(self, prompts: Sequence[TokenizedPrompt], completions: Sequence[str]) -> Tensor:
        """Return the rewards (B,). Raises StageError, RewardFailed for a defect of the reward."""
        pairs = zip(prompts, completions, strict=True)
        attempts = [Attempt(prompt.prompt, completion) for prompt, completion in pairs]
        try:
            scores_B = self.reward(attempts)
        except (StageError, Interrupted, MemoryError, OSError, torch.OutOfMemoryError):
            raise  # these have reasons of their own
        except Exception as error:
            raise reward_failed(error, attempts) from error
        return scores_B.to(self.actor.device, torch.float32)

    def _ended(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return 1 for each completion that ends with a stop token, else 0 (B,)."""
        last_B = torch.tensor([ids[-1] for ids in tokens], dtype=torch.long)
        return arithmetic.ended(last_B, torch.tensor(self.stop)).float().to(self.actor.device)

    def _gap(self, sampled: Sequence[Sampled], logprobs_BT: Tensor) -> Tensor:
        """Return the sum over tokens of the distance between the engine's log-probability and the
        policy's (B,)."""
        gap_B = torch.zeros(len(sampled), device=self.actor.device)
        for row, completion in enumerate(sampled):
            if completion.logprobs is not None:
                engine_T = torch.tensor(completion.logprobs, device=self.actor.device)
                gap_B[row] = (logprobs_BT[row, : len(engine_T)] - engine_T).abs().sum()
        return gap_B

    def _reference(self, sequences: Sequences, logprobs_BT: Tensor) -> Tensor:
        if self.actor.reference is None:
            return logprobs_BT
        return self.actor.reference_logprobs(sequences)

    def _text(self, ids: Sequence[int]) -> str:
        """Return a completion's text, without the stop token."""
        kept = ids[:-1] if ids[-1] in self.stop else ids
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=True))


def untokenized(prompts: Sequence[TokenizedPrompt]) -> list[Prompt]:
    """Return the prompts without their tokens."""
    return [prompt.prompt for prompt in prompts]
