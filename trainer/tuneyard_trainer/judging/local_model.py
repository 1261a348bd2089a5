"""A judge that runs in the stage: a causal language model that replies in batches.

A label comes from the probabilities of the token after the prompt, so the model writes no text for
it. A reply that is text is the model's greedy completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.encoding.template_style import MisfitError
from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    next_token_logits,
    prompt_tuned,
)
from tuneyard_trainer.generation.prefixes import Prefix
from tuneyard_trainer.generation.sampling import stop_tokens
from tuneyard_trainer.judging.judges import LABELS, JudgePrompt, Reply, normalize
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import context_length

GPU_BATCH, CPU_BATCH = 32, 8
"""Prompts in a batch: with 2k-token prompts the cache of a 1B model takes 2 GiB for 32."""
PLAIN_LABEL = "\n\nThe better answer is"
"""Appended to a prompt that wants a label, for a model without a chat template."""


class ModelJudge:
    """A `Judge` with its model in memory."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        stop: Callable[[], bool],
        template: str | None = None,
    ) -> None:
        """`model`: plain or with an adapter. `template`: replaces the tokenizer's chat template.
        Raises StageError NoStopToken."""
        self.name = name
        self._model, self._tokenizer, self._stop = model, tokenizer, stop
        self._template = template or tokenizer.chat_template
        self._stop_tokens = stop_tokens(model, tokenizer, template)
        self._context = context_length(model.config)

    def replies(self, prompts: Sequence[JudgePrompt]) -> Iterator[Reply]:
        """Yield the replies batch by batch, those to the shortest prompts first. Raises StageError
        JudgeUnusable."""
        tokenized = [self._tokenize(prompt) for prompt in prompts]
        fitting = []
        for prompt, ids in zip(prompts, tokenized, strict=True):
            problem = self._problem(prompt, ids)
            if ids is None or problem is not None:
                yield Reply(prompt.key, problem=problem)
            else:
                fitting.append((prompt, ids))
        for wants_label in (True, False):
            yield from self._batches([one for one in fitting if one[0].wants_label is wants_label])

    def _batches(self, prompts: Sequence[tuple[JudgePrompt, list[int]]]) -> Iterator[Reply]:
        """Yield replies to tokenized prompts, all of which want a label, or none."""
        size = GPU_BATCH if self._device.type == "cuda" else CPU_BATCH
        lengths = [len(ids) for _, ids in prompts]
        prefix = Prefix.of(self._model, [ids for _, ids in prompts])  # the judge's instructions
        for indices in length_batches(lengths, size, padded=not prompt_tuned(self._model)):
            if self._stop():
                return
            batch = [prompts[i] for i in indices]
            reply = self._label if batch[0][0].wants_label else self._write
            yield from reply([prompt for prompt, _ in batch], [ids for _, ids in batch], prefix)

    # ---- one batch ------------------------------------------------------------------------------

    def _label(
        self,
        prompts: Sequence[JudgePrompt],
        tokenized: Sequence[list[int]],
        prefix: Prefix | None,
    ) -> Iterator[Reply]:
        logits_NV = next_token_logits(
            self._model, tokenized, pad=self._tokenizer.pad_token_id, prefix=prefix
        )
        labels = label_tokens(self._tokenizer)
        probabilities_NV = logits_NV.float().softmax(-1)
        for row, (prompt, ids) in enumerate(zip(prompts, tokenized, strict=True)):
            a, b = (float(probabilities_NV[row, list(tokens)].sum()) for tokens in labels)
            probability, mass = normalize(a, b)
            text = str(self._tokenizer.decode(int(probabilities_NV[row].argmax())))
            yield Reply(prompt.key, text, probability, mass, tokens=len(ids) + 1)

    def _write(
        self,
        prompts: Sequence[JudgePrompt],
        tokenized: Sequence[list[int]],
        prefix: Prefix | None,
    ) -> Iterator[Reply]:
        completions = generate(
            self._model,
            tokenized,
            pad=self._tokenizer.pad_token_id,
            stop=self._stop_tokens,
            max_new_tokens=max(prompt.max_tokens for prompt in prompts),
            prefix=prefix,
        )
        for prompt, ids, completion in zip(prompts, tokenized, completions, strict=True):
            kept = completion[: prompt.max_tokens]
            tokens = [token for token in kept if token not in self._stop_tokens]
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            yield Reply(prompt.key, text.strip(), tokens=len(ids) + len(tokens))

    # ---- one prompt -----------------------------------------------------------------------------

    def _tokenize(self, prompt: JudgePrompt) -> list[int] | None:
        """Return the prompt's tokens. None: the chat template refuses it."""
        if not self._template:
            text = "\n\n".join(turn["content"] for turn in prompt.messages)
            text += PLAIN_LABEL if prompt.wants_label else ""
            return list(self._tokenizer(text, verbose=False)["input_ids"])
        try:
            text = rendered(self._tokenizer, prompt.messages, template=self._template)
        except MisfitError:
            return None
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _problem(self, prompt: JudgePrompt, ids: list[int] | None) -> str | None:
        """Return the reason why a prompt gets no reply. None: the prompt gets a reply."""
        if ids is None:
            return "the judge's chat template refuses the prompt"
        room = 1 if prompt.wants_label else prompt.max_tokens
        if self._context is not None and len(ids) + room > self._context:
            return (
                f"a prompt of {len(ids)} tokens and a reply of {room} exceed the judge's context "
                f"of {self._context}"
            )
        return None

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def load_judge(
    folder: Path, device: torch.device, name: str, stop: Callable[[], bool]
) -> ModelJudge:
    """Return a judge from a model folder. Raises StageError."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = base.load_base(folder, dtype=dtype, device=device)
    return ModelJudge(model, base.load_tokenizer(folder), name, stop=stop)


def label_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that spell A and those that spell B, with and without a space before them.
    Raises StageError JudgeUnusable if the tokenizer splits a letter."""
    found = []
    for label in LABELS:
        spellings = [
            tokenizer.encode(text, add_special_tokens=False) for text in (label, f" {label}")
        ]
        tokens = {
            ids[0]
            for ids in spellings
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
