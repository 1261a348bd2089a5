"""Continuations depend on the weights and the prompt alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tuneyard.api.adapters import Adapter
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters, base, layers
from tuneyard_trainer.models.probes import base_of

PROMPTS = ["A lamp", "Who wrote the handbook of the harbor?", "red", "A short sentence, and a"]

SCALE = {"lora": 0.3, "prefix": 0.3, "prompt": 0.3, "ia3": 0.3, "bottleneck": 0.05}
"""Noise on the adapter's weights: it changes the continuations, and they still depend on the
prompt."""


def load(adapter: str | None, folder: Path, tokenizer: Any) -> Any:
    model: Any = base.load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    if adapter is None:
        return model
    chosen = Adapter.model_validate({adapter: {}})
    model = adapters.attach(model, chosen, seed=0, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.trainable(model).values():
            parameter.add_(SCALE[adapter] * torch.randn(parameter.shape, generator=generator))
    return model


def complete(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[str, ...]:
    engine = TransformersEngine(model, tokenizer.pad_token_id)
    return continuations(engine, tokenizer, prompts, max_new_tokens=6, add_special_tokens=False)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt", "ia3", "bottleneck"])
def test_a_continuation_does_not_depend_on_the_batch(
    adapter: str | None, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(adapter, tiny_model_dir, tiny_tokenizer)
    together = complete(model, tiny_tokenizer, PROMPTS)
    alone = tuple(complete(model, tiny_tokenizer, [prompt])[0] for prompt in PROMPTS)
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_the_models_own_generation_settings_change_nothing_but_the_stop_tokens(
    adapter: str | None, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(adapter, tiny_model_dir, tiny_tokenizer)
    plain = complete(model, tiny_tokenizer, PROMPTS)
    own = base_of(model).generation_config = GenerationConfig(
        eos_token_id=base_of(model).generation_config.eos_token_id,
        repetition_penalty=50.0,
        suppress_tokens=list(range(4, 40)),
    )
    assert complete(model, tiny_tokenizer, PROMPTS) == plain
    assert base_of(model).generation_config is own
    first = tiny_tokenizer.encode(PROMPTS[0] + plain[0], add_special_tokens=False)
    own.eos_token_id = first[len(tiny_tokenizer.encode(PROMPTS[0], add_special_tokens=False)) :]
    assert len(complete(model, tiny_tokenizer, PROMPTS[:1])[0]) < len(plain[0])


def test_no_prompts_have_no_continuations(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    assert complete(load(None, tiny_model_dir, tiny_tokenizer), tiny_tokenizer, []) == ()
