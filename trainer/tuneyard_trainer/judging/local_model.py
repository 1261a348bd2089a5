"""A judge that runs here: a causal language model, asked in batches.

A label is read from the probabilities of the token after the prompt, so every model gives one and
none is ever misread; a text is the model's greedy reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import Message, MisfitError, rendered
from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    next_token_logits,
    prompt_tuned,
)
from tuneyard_trainer.generation.sampling import stop_tokens
from tuneyard_trainer.judging.judges import LABELS, Ask, Reply, normalised
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import context_length

GPU_ASKS, CPU_ASKS = 32, 8
"""Questions at a time: with 2k-token questions the cache of a 1B model takes 2 GiB for 32."""
PLAIN_LABEL = "\n\nThe better answer is"
"""What follows a question to a model without a chat template."""


class ModelJudge:
    """A `Judge`."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        stop: Callable[[], bool],
        template: str | None = None,
    ) -> None:
        """`model`: plain, or with an adapter. `template`: in place of the tokenizer's. Raises
        StageError NoStopToken."""
        self.name = name
        self._model, self._tokenizer, self._stop = model, tokenizer, stop
        self._template = template or tokenizer.chat_template
        self._ends = stop_tokens(model, tokenizer, template)
        self._context = context_length(model.config)

    def replies(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        """Batch by batch, the shortest questions first. Raises StageError JudgeUnusable."""
        prompts = [self._prompt(ask) for ask in asks]
        fitting = []
        for index, (ask, ids) in enumerate(zip(asks, prompts, strict=True)):
            problem = self._problem(ask, ids)
            if problem is None:
                fitting.append(index)
            else:
                yield Reply(ask.key, problem=problem)
        for wants_label in (True, False):
            chosen = [index for index in fitting if asks[index].wants_label is wants_label]
            yield from self._batches([asks[i] for i in chosen], [prompts[i] or [] for i in chosen])

    def _batches(self, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> Iterator[Reply]:
        size = GPU_ASKS if self._device.type == "cuda" else CPU_ASKS
        lengths = [len(ids) for ids in prompts]
        for batch in length_batches(lengths, size, padded=not prompt_tuned(self._model)):
            if self._stop():
                return
            answer = self._decide if asks[batch[0]].wants_label else self._write
            yield from answer([asks[i] for i in batch], [prompts[i] for i in batch])

    # ---- one batch ------------------------------------------------------------------------------

    def _decide(self, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> Iterator[Reply]:
        logits_NV = next_token_logits(self._model, prompts, pad=self._tokenizer.pad_token_id)
        labels = label_tokens(self._tokenizer)
        probabilities_NV = logits_NV.float().softmax(-1)
        for row, (ask, ids) in enumerate(zip(asks, prompts, strict=True)):
            a, b = (float(probabilities_NV[row, list(tokens)].sum()) for tokens in labels)
            probability, mass = normalised(a, b)
            text = str(self._tokenizer.decode(int(probabilities_NV[row].argmax())))
            yield Reply(ask.key, text, probability, mass, tokens=len(ids) + 1)

    def _write(self, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> Iterator[Reply]:
        completions = generate(
            self._model,
            prompts,
            pad=self._tokenizer.pad_token_id,
            stop=self._ends,
            max_new_tokens=max(ask.max_tokens for ask in asks),
        )
        for ask, ids, completion in zip(asks, prompts, completions, strict=True):
            tokens = [token for token in completion[: ask.max_tokens] if token not in self._ends]
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            yield Reply(ask.key, text.strip(), tokens=len(ids) + len(tokens))

    # ---- one question ---------------------------------------------------------------------------

    def _prompt(self, ask: Ask) -> list[int] | None:
        """The question's tokens; None where the chat template refuses it."""
        if not self._template:
            text = _plain(ask.messages) + (PLAIN_LABEL if ask.wants_label else "")
            return list(self._tokenizer(text, verbose=False)["input_ids"])
        try:
            text = rendered(self._tokenizer, ask.messages, template=self._template)
        except MisfitError:
            return None
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _problem(self, ask: Ask, ids: list[int] | None) -> str | None:
        if ids is None:
            return "the judge's chat template refuses the question"
        room = 1 if ask.wants_label else ask.max_tokens
        if self._context is not None and len(ids) + room > self._context:
            return (
                f"a question of {len(ids)} tokens and a reply of {room} exceed the judge's context "
                f"of {self._context}"
            )
        return None

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def open_judge(
    folder: Path, device: torch.device, name: str, stop: Callable[[], bool]
) -> ModelJudge:
    """A judge from a model folder. Raises StageError."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = base.load_base(folder, dtype=dtype, device=device)
    return ModelJudge(model, base.load_tokenizer(folder), name, stop=stop)


def label_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that spell A and those that spell B, with and without a space before them. Raises
    StageError JudgeUnusable where a letter is several tokens."""
    found = []
    for label in LABELS:
        spelled = [
            tokenizer.encode(text, add_special_tokens=False) for text in (label, f" {label}")
        ]
        tokens = {
            ids[0]
            for ids in spelled
            if len(ids) == 1 and str(tokenizer.decode(ids)).strip() == label
        }
        if not tokens:
            raise StageError(
                "JudgeUnusable",
                f"the judge's tokenizer has no token for the letter {label}.",
                advice="Choose another judge.model.uri.",
            )
        found.append(tuple(sorted(tokens)))
    return found[0], found[1]


def _plain(messages: Sequence[Message]) -> str:
    return "\n\n".join(turn["content"] for turn in messages)
