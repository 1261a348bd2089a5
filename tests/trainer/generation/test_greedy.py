"""Continuations do not depend on what else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuneyard.api.adapters import Adapter
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters, base, layers

PROMPTS = ["A lamp", "Who wrote the handbook of the harbour?", "red", "A short sentence, and a"]

SCALE = {"lora": 0.3, "prefix": 0.3, "prompt": 0.3, "ia3": 0.3, "bottleneck": 0.05}
"""Noise on the adapter's weights: enough to matter, too little to drown the prompt."""


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[str, ...]:
    return continuations(model, tokenizer, prompts, max_new_tokens=6, add_special_tokens=False)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt", "ia3", "bottleneck"])
def test_a_prompt_is_continued_alike_alone_and_among_others(
    adapter: str | None, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model: Any = base.load_base(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))
    if adapter:
        chosen = Adapter.model_validate({adapter: {}})
        model = adapters.attach(model, chosen, seed=0, tokenizer=tiny_tokenizer)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layers.trainable(model).values():
                parameter.add_(SCALE[adapter] * torch.randn(parameter.shape, generator=generator))
    together = answers(model, tiny_tokenizer, PROMPTS)
    alone = tuple(answers(model, tiny_tokenizer, [prompt])[0] for prompt in PROMPTS)
    assert together == alone
    assert len(set(together)) > 1


def test_no_prompts_have_no_continuations(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    model = base.load_base(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))
    assert answers(model, tiny_tokenizer, []) == ()
