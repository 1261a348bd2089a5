"""The facts of a config.json against the model that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tuneyard.api.model_config import READERS, facts_of
from tuneyard.api.model_facts import ModelFacts
from tuneyard_trainer.models.layers import decoder_layers

LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 331,
}
PLAIN = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 331,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, tied and with biases": (
        "llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, wide heads": ("llama", LLAMA | {"head_dim": 40}),
    "mistral": ("mistral", LLAMA),
    "ministral3": ("ministral3", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "granite": ("granite", LLAMA),
    "smollm3": ("smollm3", LLAMA | {"pad_token_id": 0}),
    "olmo2": ("olmo2", LLAMA | {"pad_token_id": 0}),
    "phi3": ("phi3", LLAMA | {"pad_token_id": 0}),
    "gemma": ("gemma", LLAMA),
    "gemma3": ("gemma3_text", LLAMA),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", LLAMA | {"num_experts": 4, "moe_intermediate_size": 56}),
    "gpt2": (
        "gpt2",
        {"n_embd": 96, "n_layer": 3, "n_head": 8, "vocab_size": 331, "n_positions": 64},
    ),
    "opt": ("opt", PLAIN | {"ffn_dim": 208, "word_embed_proj_dim": 96}),
    "opt, projected and normed afterwards": (
        "opt",
        PLAIN | {"ffn_dim": 208, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("gpt_neox", PLAIN | {"intermediate_size": 208}),
}


def built(kind: str, fields: dict[str, Any]) -> tuple[ModelFacts, Any]:
    """Return the facts, and the model without storage."""
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return facts_of(config.to_dict() | fields), model


def test_every_described_architecture_is_compared() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == set(READERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_of_each_group_are_those_of_transformers(name: str) -> None:
    facts, model = built(*CONFIGS[name])
    path, layers = decoder_layers(model)
    inside = sum(p.numel() for p in layers.parameters())
    vectors = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 1 and not name.startswith(path)
    }
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight

    assert facts.layers * facts.layer_parameters == inside
    assert facts.final_norm_parameters == sum(vectors.values())
    assert facts.head_parameters == (0 if tied else head.numel())
    assert facts.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_linear_layers_have_the_shapes_of_transformers(name: str) -> None:
    facts, model = built(*CONFIGS[name])
    _, layers = decoder_layers(model)
    found = {
        module_name: tuple(reversed(module.weight.shape))
        if isinstance(module, nn.Linear)
        else tuple(module.weight.shape)
        for module_name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    expected = {linear.name: (linear.inputs, linear.outputs) for linear in facts.linears}
    assert sorted(found.values()) == sorted(expected.values())
    for linear_name in expected:
        assert any(f".{module_name}".endswith(f".{linear_name}") for module_name in found)
