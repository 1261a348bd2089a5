"""Batched generation: prompts of different lengths, padded on the left, in one `generate` call.

Shapes: N prompts, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftType
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tuneyard_trainer.generation.prefixes import Prefix
from tuneyard_trainer.models.probes import base_of


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    stop: Sequence[int],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    prefix: Prefix | None = None,
) -> list[tuple[int, ...]]:
    """Return the most likely completion of each prompt, up to and with its first stop token.

    `processors` change the logits before a token is chosen. The model's own generation settings
    (repetition penalties, suppressed tokens) do not apply. `prefix`: what all prompts begin with,
    as the model's present weights see it. None: the prompts are computed from their first token.
    """
    output = _generate(
        model,
        prompts,
        pad,
        processors,
        prefix,
        eos_token_id=list(stop) or None,
        max_new_tokens=max_new_tokens,
    )
    width = max(len(prompt) for prompt in prompts)
    return [_until_stop(row, stop) for row in output.sequences[:, width:].tolist()]


def next_token_logits(
    model: Any, prompts: Sequence[Sequence[int]], *, pad: int, prefix: Prefix | None = None
) -> Tensor:
    """Return (N, V) the model's logits of the token after each prompt. `prefix`: as `generate`
    takes it."""
    output = _generate(model, prompts, pad, prefix=prefix, max_new_tokens=1, output_logits=True)
    logits: Tensor = output.logits[0]
    return logits


def own_stop_tokens(model: Any) -> tuple[int, ...]:
    """Return the stop tokens that the model's generation settings name: Llama 3 has three."""
    own = base_of(model).generation_config.eos_token_id
    return tuple(own) if isinstance(own, list) else () if own is None else (own,)


def length_batches(lengths: Sequence[int], size: int, *, padded: bool) -> Iterator[list[int]]:
    """Yield prompt indices, shortest prompt first, in batches of at most `size`. Without `padded`,
    all prompts of a batch have one length."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        differs = bool(batch) and lengths[index] != lengths[batch[0]]
        if len(batch) == size or (differs and not padded):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def prompt_tuned(model: Any) -> bool:
    """Return whether PEFT puts virtual tokens into the input. PEFT puts them before the padding and
    drops the positions (peft 0.21), so rows of unlike length must not be padded together."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type == PeftType.PROMPT_TUNING


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    processors: Sequence[LogitsProcessor] = (),
    prefix: Prefix | None = None,
    **settings: Any,
) -> Any:
    device = next(model.parameters()).device
    ids_NL, mask_NL = _left_padded(prompts, pad, device, prefix.ids if prefix else ())
    cached = {} if prefix is None else {"past_key_values": prefix.cache(len(prompts))}
    config = GenerationConfig(
        do_sample=False, pad_token_id=pad, return_dict_in_generate=True, **settings
    )
    model.eval()
    with torch.no_grad(), _neutral(model):
        return model.generate(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            **cached,
        )


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device, prefix: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return (N, L) ids and attention mask, padded on the left so that completions begin in one
    column. The padding follows the prefix, which has the same columns in all rows."""
    width = max(len(prompt) for prompt in prompts)
    ids_NL = torch.full((len(prompts), width), pad)
    mask_NL = torch.zeros_like(ids_NL)
    ids_NL[:, : len(prefix)] = torch.tensor(prefix)
    mask_NL[:, : len(prefix)] = 1
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) + len(prefix)
        ids_NL[row, start:] = torch.tensor(prompt[len(prefix) :])
        mask_NL[row, start:] = 1
    return ids_NL.to(device), mask_NL.to(device)


def _until_stop(tokens: Sequence[int], stop: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens up to and with the first stop token: the rest pads the batch."""
    ends = (position + 1 for position, token in enumerate(tokens) if token in stop)
    return tuple(tokens[: next(ends, len(tokens))])


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """Switch off the model's own generation settings: `generate` uses them where its configuration
    sets nothing, and their penalties change the distribution."""
    base = base_of(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
