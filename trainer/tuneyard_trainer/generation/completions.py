"""A policy's answers to a prompt set, each sampled once however often the stage is killed."""

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
from tuneyard_trainer.generation.sampling import (
    CPU_ANSWERS,
    GPU_ANSWERS,
    TransformersSampler,
    stop_tokens,
)
from tuneyard_trainer.models import base, policies
from tuneyard_trainer.models.files import config_of, context_length
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.worker import Interrupted, Worker


@dataclass(frozen=True)
class Answer:
    """What the policy said."""

    text: str
    complete: bool
    """Whether it came to its end before the limit."""


@dataclass
class Policy:
    """Who answers. Its weights are loaded when they are first needed."""

    inputs: Mapping[str, Path]
    chat: ChatSettings
    worker: Worker
    tokenizer: PreTrainedTokenizerBase
    _model: Any = None

    @classmethod
    def of(cls, inputs: Mapping[str, Path], chat: ChatSettings, worker: Worker) -> Policy:
        return cls(inputs, chat, worker, base.load_tokenizer(inputs["model"]))

    @property
    def speaks(self) -> bool:
        """Whether it reads conversations; else plain text."""
        return bool(self.chat.chat_template or self.tokenizer.chat_template)

    @property
    def model(self) -> Any:
        """Raises StageError where it cannot be loaded."""
        if self._model is None:
            self._model = policies.load_for_inference(self.inputs, self.worker.device)
        return self._model

    def release(self) -> None:
        """Gives the memory back."""
        self._model = None
        gc.collect()
        if self.worker.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(
        self, settings: PromptSettings, max_new_tokens: int, name: str
    ) -> list[TokenizedPrompt]:
        """The set's prompts that leave room for an answer; `name` is its field in the manifest.
        Raises StageError, NoPrompts where none does."""
        found = read_prompts(self.inputs["prompts"], settings, self.chat, name=name)
        rendered = [tokenize(prompt, self.tokenizer, self.chat) for prompt in found]
        room = self._room(max_new_tokens)
        ready = [
            prompt
            for prompt in rendered
            if prompt and prompt.ids and (room is None or len(prompt.ids) <= room)
        ]
        if not ready:
            refused = rendered.count(None)
            raise StageError(
                "NoPrompts",
                f"none of the {len(found)} prompts of {name} can be answered: the chat template "
                f"refuses {refused}, and {len(found) - refused} leave no room for {max_new_tokens} "
                "new tokens in the model's context.",
                advice=f"Lower maxNewTokens, or change {name}.",
            )
        self.worker.report(
            message=f"{len(ready)} of {len(found)} prompts of {name} can be answered"
        )
        return ready

    def _room(self, max_new_tokens: int) -> int | None:
        """The most tokens of a prompt; None: no limit is known."""
        context = context_length(config_of(self.inputs["model"]))
        return None if context is None else max(1, context - max_new_tokens)


def answers(
    stage: str,
    policy: Policy,
    prompts: Sequence[TokenizedPrompt],
    journal: Journal,
    *,
    count: int,
    sampling: Sampling,
    seed: int,
) -> list[tuple[Answer, ...]]:
    """`count` answers to each prompt, those of earlier attempts from the journal. Raises
    Interrupted when the stage is asked to stop."""
    known = {
        int(entry["prompt"]): tuple(Answer(**answer) for answer in entry["answers"])
        for entry in journal.entries
        if "answers" in entry
    }
    missing = [index for index in range(len(prompts)) if index not in known]
    for batch in _batches(prompts, missing, count, policy.worker):
        if policy.worker.stop():
            raise Interrupted(stage, len(known))
        sampled = _sampled(policy, [prompts[i] for i in batch], batch, count, sampling, seed)
        fresh = dict(zip(batch, sampled, strict=True))
        known |= fresh
        journal.append(
            {"prompt": index, "answers": [vars(answer) for answer in found]}
            for index, found in fresh.items()
        )
        policy.worker.report(
            step=len(known), total_steps=len(prompts), message="sampling the model's answers"
        )
    return [known[index] for index in range(len(prompts))]


def _batches(
    prompts: Sequence[TokenizedPrompt], missing: Sequence[int], count: int, worker: Worker
) -> Iterator[list[int]]:
    """Prompts of like length together, as many as the sampler takes at once."""
    size = GPU_ANSWERS if worker.device.type == "cuda" else CPU_ANSWERS
    step = max(1, size // count)
    ordered = sorted(missing, key=lambda index: len(prompts[index].ids))
    for start in range(0, len(ordered), step):
        yield ordered[start : start + step]


def _sampled(
    policy: Policy,
    prompts: Sequence[TokenizedPrompt],
    indices: Sequence[int],
    count: int,
    sampling: Sampling,
    seed: int,
) -> list[tuple[Answer, ...]]:
    tokenizer = policy.tokenizer
    stop = stop_tokens(policy.model, tokenizer, policy.chat.chat_template)
    sampler = TransformersSampler(policy.model, int(tokenizer.pad_token_id), stop, sampling)
    ids = [prompt.ids for prompt in prompts for _ in range(count)]
    keys = [_key(seed, index, number) for index in indices for number in range(count)]
    texts = [_answer(tokenizer, stop, sampled.tokens) for sampled in sampler(ids, keys)]
    return [tuple(texts[at : at + count]) for at in range(0, len(texts), count)]


def _answer(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], tokens: Sequence[int]
) -> Answer:
    complete = bool(tokens) and tokens[-1] in stop
    spoken = list(tokens[:-1] if complete else tokens)
    return Answer(str(tokenizer.decode(spoken, skip_special_tokens=True)).strip(), complete)


def _key(seed: int, prompt: int, number: int) -> int:
    """63 bits that name one answer."""
    value = hashlib.sha256(f"{seed}/{prompt}/{number}".encode()).digest()
    return int.from_bytes(value[:8], "big") >> 1
