"""The planned activations of a decoder layer against the tensors that autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tuneyard.api.adapters import Adapter, Lora
from tuneyard.api.model_config import facts_of
from tuneyard.planning.memory.activations import Computation, MicroBatch, layer_bytes
from tuneyard.planning.memory.parameters import trained
from tuneyard_trainer.models.layers import decoder_layers
from tuneyard_trainer.models.targets import lora_config

ROWS, WIDTH = 2, 24
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "olmo2": LLAMA | {"pad_token_id": 0},
    "phi3": LLAMA | {"pad_token_id": 0},
    "gemma": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 37,
        "n_positions": WIDTH,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 37,
    },
}
NORMED_IN_FLOAT32 = ("gpt2", "gpt_neox")
"""Autocast computes LayerNorm in float32 on a GPU, and in the type of its input on a CPU."""


JOINED = ("phi3", "gpt_neox")
"""These cut queries, keys and values out of one tensor, of which a part keeps the whole, and a CPU
copies their attention's output."""


def kept_bytes(model: Any, precision: torch.dtype, *, packed: bool) -> int:
    """Return the bytes of the activations that autograd keeps of the last decoder layer."""
    _, layers = decoder_layers(getattr(model, "get_base_model", lambda: model)())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inside = False
    found: dict[int, tuple[Tensor, bool]] = {}

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters and place not in found:
            found[place] = tensor, inside
        return tensor

    layers[-1].register_forward_pre_hook(enter)
    layers[-1].register_forward_hook(leave)
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.long)
    positions = torch.arange(WIDTH).repeat(ROWS, 1)
    if packed:
        positions[:, WIDTH // 2 :] -= WIDTH // 2
    context = {"position_ids": positions} if packed else {"attention_mask": torch.ones_like(ids)}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16),
    ):
        model.train()(input_ids=ids, use_cache=False, **context)
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor, in_layer in found.values()
        if in_layer and not {WIDTH, ROWS * WIDTH}.isdisjoint(tensor.shape)  # no copy of a weight
    )


@pytest.mark.parametrize(
    ("precision", "packed"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)],
)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_kept_activations_are_those_of_autograd(
    kind: str, adapted: bool, precision: torch.dtype, packed: bool
) -> None:
    if adapted and precision is torch.bfloat16 and kind in NORMED_IN_FLOAT32:
        pytest.skip("a CPU does not compute LayerNorm in float32")
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    dtype = precision if adapted else torch.float32
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = Lora(rank=4)
    if adapted:
        model = get_peft_model(model, lora_config(model, lora, "adapter.lora"))
    facts = facts_of(config.to_dict() | CONFIGS[kind])
    learned = trained(facts, Adapter(lora=lora) if adapted else None, None)
    how = Computation.of(learned, precision.itemsize, "none", masked=packed)

    planned = layer_bytes(facts, learned, MicroBatch(ROWS, WIDTH), how)
    tolerance = 0.13 if kind in JOINED else 0.03
    kept = kept_bytes(model, precision, packed=packed)
    assert planned == pytest.approx(kept, rel=tolerance)
