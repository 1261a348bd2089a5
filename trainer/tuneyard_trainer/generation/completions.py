"""Completions of a prompt set by a policy. A journal keeps them, so that a stage that is killed and
restarted samples no prompt twice."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import ChatSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import TokenizedPrompt, read_prompts, tokenize
from tuneyard_trainer.data.sharing import SharedJournal, SharedStage
from tuneyard_trainer.generation.sampling import (
    CPU_BATCH,
    GPU_BATCH,
    TransformersSampler,
    stop_tokens,
)
from tuneyard_trainer.models import base, policies
from tuneyard_trainer.models.files import config_of, context_length
from tuneyard_trainer.worker import Worker


@dataclass(frozen=True)
class Completion:
    """One completion as text, without its stop token."""

    text: str
    complete: bool
    """Whether the model wrote a stop token before the limit."""


@dataclass
class Policy:
    """The model that completes prompts. Its weights are loaded on first use."""

    inputs: Mapping[str, Path]
    chat: ChatSettings
    worker: Worker
    tokenizer: PreTrainedTokenizerBase
    _model: Any = None

    @classmethod
    def of(cls, inputs: Mapping[str, Path], chat: ChatSettings, worker: Worker) -> Policy:
        """Return the policy with its tokenizer loaded."""
        return cls(inputs, chat, worker, base.load_tokenizer(inputs["model"]))

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are rendered by a chat template. False: prompts are plain text."""
        return bool(self.chat.chat_template or self.tokenizer.chat_template)

    @property
    def model(self) -> Any:
        """The model in evaluation mode. Raises StageError if it cannot be loaded."""
        if self._model is None:
            self._model = policies.load_for_inference(self.inputs, self.worker.device)
        return self._model

    def release(self) -> None:
        """Free the memory of the weights."""
        self._model = None
        gc.collect()
        if self.worker.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(
        self, settings: PromptSettings, max_new_tokens: int, name: str
    ) -> list[TokenizedPrompt]:
        """Return the set's prompts that leave room for a completion in the model's context.

        `name`: the set's field in the manifest. Raises StageError NoPrompts if no prompt does.
        """
        rows = read_prompts(self.inputs["prompts"], settings, self.chat, name=name)
        tokenized = [tokenize(row, self.tokenizer, self.chat) for row in rows]
        limit = self._max_prompt_tokens(max_new_tokens)
        prompts = [
            prompt
            for prompt in tokenized
            if prompt and prompt.ids and (limit is None or len(prompt.ids) <= limit)
        ]
        if not prompts:
            refused = tokenized.count(None)
            raise StageError(
                "NoPrompts",
                f"none of the {len(rows)} prompts of {name} can be used: the chat template "
                f"refuses {refused}, and {len(rows) - refused} leave no room for {max_new_tokens} "
                "new tokens in the model's context.",
                advice=f"Lower maxNewTokens, or change {name}.",
            )
        self.worker.report(message=f"{len(prompts)} of {len(rows)} prompts of {name} can be used")
        return prompts

    def _max_prompt_tokens(self, max_new_tokens: int) -> int | None:
        """Return the most tokens that a prompt may have. None: the model states no context."""
        context = context_length(config_of(self.inputs["model"]))
        return None if context is None else max(1, context - max_new_tokens)


def sample_completions(
    shared: SharedStage,
    policy: Policy,
    prompts: Sequence[TokenizedPrompt],
    journal: SharedJournal,
    *,
    count: int,
    sampling: Sampling,
    seed: int,
) -> list[tuple[Completion, ...]]:
    """Return `count` completions of each prompt. Those of earlier attempts come from the journal,
    and the workers share the others.

    Raises Interrupted when the stage is asked to stop.
    """
    known = {
        int(entry["prompt"]): tuple(Completion(**fields) for fields in entry["completions"])
        for entry in journal.entries
        if "completions" in entry
    }
    missing = [index for index in range(len(prompts)) if index not in known]
    own = [missing[i] for i in shared.share([len(prompts[index].ids) for index in missing])]

    def batches() -> Iterator[list[tuple[int, tuple[Completion, ...]]]]:
        for batch in _batches(own, count, policy.worker):
            if shared.stop():
                return
            sampled = _sample(policy, [prompts[i] for i in batch], batch, count, sampling, seed)
            yield list(zip(batch, sampled, strict=True))

    for fresh in shared.rounds(batches()):
        known |= dict(fresh)
        journal.append(
            {"prompt": index, "completions": [vars(completion) for completion in group]}
            for index, group in fresh
        )
        policy.worker.report(
            step=len(known), total_steps=len(prompts), message="sampling completions"
        )
    shared.raise_if_stopped(len(known))
    return [known[index] for index in range(len(prompts))]


def _batches(indices: Sequence[int], count: int, worker: Worker) -> Iterator[Sequence[int]]:
    """Yield batches of prompt indices, each one sampler batch in size."""
    size = GPU_BATCH if worker.device.type == "cuda" else CPU_BATCH
    step = max(1, size // count)
    for start in range(0, len(indices), step):
        yield indices[start : start + step]


def _sample(
    policy: Policy,
    prompts: Sequence[TokenizedPrompt],
    indices: Sequence[int],
    count: int,
    sampling: Sampling,
    seed: int,
) -> list[tuple[Completion, ...]]:
    tokenizer = policy.tokenizer
    stop = stop_tokens(policy.model, tokenizer, policy.chat.chat_template)
    sampler = TransformersSampler(policy.model, int(tokenizer.pad_token_id), stop, sampling)
    ids = [prompt.ids for prompt in prompts for _ in range(count)]
    keys = [_key(seed, index, number) for index in indices for number in range(count)]
    completions = [decode(tokenizer, stop, sampled.tokens) for sampled in sampler(ids, keys)]
    return [tuple(completions[at : at + count]) for at in range(0, len(completions), count)]


def decode(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], tokens: Sequence[int]
) -> Completion:
    """Return the completion of sampled tokens, up to and with a stop token if there is one."""
    complete = bool(tokens) and tokens[-1] in stop
    kept = list(tokens[:-1] if complete else tokens)
    return Completion(str(tokenizer.decode(kept, skip_special_tokens=True)).strip(), complete)


def _key(seed: int, prompt: int, number: int) -> int:
    """Return the 63-bit key of one completion of one prompt."""
    value = hashlib.sha256(f"{seed}/{prompt}/{number}".encode()).digest()
    return int.from_bytes(value[:8], "big") >> 1
