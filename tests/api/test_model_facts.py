"""The facts of published models, and configs that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from tuneyard.api.model_config import UnknownModelError, facts_of

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
MIXTRAL = LLAMA_8B | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
PUBLISHED = {
    "Llama 3 8B": (LLAMA_8B, 8_030_261_248),
    "Mixtral 8x7B": (MIXTRAL, 46_702_792_704),
    "GPT-2": (GPT2, 124_439_808),
    "Qwen2.5 0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert facts_of(config).parameters == parameters


def test_a_weight_is_stored_in_the_type_that_the_config_names() -> None:
    assert facts_of(LLAMA_8B).stored_bytes == 2
    assert facts_of(LLAMA_8B | {"torch_dtype": "float32"}).stored_bytes == 4
    unnamed = {name: value for name, value in LLAMA_8B.items() if name != "torch_dtype"}
    assert facts_of(unnamed).stored_bytes == 4


def test_the_text_part_of_a_model_with_several_modalities_is_read() -> None:
    whole = {"model_type": "llava", "text_config": LLAMA_8B, "tie_word_embeddings": False}
    assert facts_of(whole) == facts_of(LLAMA_8B)


def test_the_text_part_is_stored_in_the_type_of_the_whole_model() -> None:
    text = {name: value for name, value in LLAMA_8B.items() if name != "torch_dtype"}
    whole = {"model_type": "llava", "text_config": text, "torch_dtype": "bfloat16"}
    assert facts_of(whole).stored_bytes == 2


def test_gemma_3_has_the_values_of_transformers_where_its_config_leaves_them_out() -> None:
    """The config.json of gemma-3-4b-it."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    found = facts_of({"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"})
    assert (found.attention_heads, found.key_value_heads, found.head_dim) == (8, 4, 256)
    assert found.parameters == 3_880_263_168
    assert found.tied_embeddings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the architecture None is not described; described are gemma, "),
        ({"model_type": "mamba"}, "the architecture mamba is not described"),
        ({"model_type": "llama"}, "the config of this llama model lacks 'hidden_size'"),
        (LLAMA_8B | {"hidden_size": "wide"}, "the config of this llama model is invalid"),
        (LLAMA_8B | {"num_attention_heads": 0}, "the config of this llama model is invalid"),
        (
            LLAMA_8B | {"num_hidden_layers": -1},
            "llama model is invalid: layers is -1: Input should",
        ),
        (LLAMA_8B | {"vocab_size": float("inf")}, "the config of this llama model is invalid"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_with_the_reason(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownModelError, match=message):
        facts_of(config)
