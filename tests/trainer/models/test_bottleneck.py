"""Bottleneck adapters have the position and the formula of Houlsby et al."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tuneyard.api.adapters import Bottleneck
from tuneyard.errors import StageError
from tuneyard_trainer.models import bottleneck
from tuneyard_trainer.models.layers import trainable

WIDTH, SIZE, LAYERS = 16, 5, 3
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 40,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def randomize(model: nn.Module) -> None:
    """Give the adapters weights that change the logits."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": torch.relu, "silu": nn.functional.silu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_adapted_model_equals_a_forward_pass_written_by_hand(activation: Any) -> None:
    model = llama()
    plain = copy.deepcopy(model)
    bottleneck.attach(model, Bottleneck(size=SIZE, activation=activation, layers="0,2"))
    randomize(model)
    weights = {name: p.detach() for name, p in trainable(model).items()}

    def adapter(h_BLH: Tensor, place: str) -> Tensor:
        w = {part: weights[f"model.layers.{place}.bottleneck.{part}"] for part in PARTS}
        inner = ACTIVATIONS[activation](h_BLH @ w["down.weight"].T + w["down.bias"])
        return h_BLH + inner @ w["up.weight"].T + w["up.bias"]

    decoder = plain.model
    with torch.no_grad():
        h_BLH = decoder.embed_tokens(IDS)
        rotary = decoder.rotary_emb(h_BLH, torch.arange(IDS.shape[1])[None])
        for index, layer in enumerate(decoder.layers):
            branch = layer.self_attn(
                layer.input_layernorm(h_BLH), position_embeddings=rotary, attention_mask=None
            )[0]
            h_BLH = h_BLH + (adapter(branch, f"{index}.self_attn") if index != 1 else branch)
            branch = layer.mlp(layer.post_attention_layernorm(h_BLH))
            h_BLH = h_BLH + (adapter(branch, f"{index}.mlp") if index != 1 else branch)
        expected = plain.lm_head(decoder.norm(h_BLH))
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
        assert not torch.allclose(plain(IDS).logits, expected, atol=1e-2)


PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def test_the_adapted_model_starts_equal_to_the_base_to_the_bit_and_trains() -> None:
    model, plain = llama(), llama()
    bottleneck.attach(model, Bottleneck(size=SIZE))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    ups = [p for name, p in trainable(model).items() if ".up." in name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ups)


def test_only_the_chosen_layers_have_adapters_and_the_count_equals_the_closed_form() -> None:
    model = llama()
    bottleneck.attach(model, Bottleneck(size=SIZE, layers="0,2"))
    assert set(bottleneck.adapters_of(model)) == {
        f"model.layers.{index}.{block}.bottleneck" for index in (0, 2) for block in BLOCKS
    }
    per_adapter = 2 * WIDTH * SIZE + SIZE + WIDTH
    assert sum(p.numel() for p in trainable(model).values()) == 4 * per_adapter


BLOCKS = ("self_attn", "mlp")


def test_dropout_applies_to_the_adapters_input_and_not_to_its_residual() -> None:
    adapter = bottleneck.BottleneckAdapter(WIDTH, SIZE, "relu", dropout=0.5)
    nn.init.normal_(adapter.up.weight)
    hidden = torch.ones(64, WIDTH)
    adapter.eval()
    assert len(adapter(hidden).unique(dim=0)) == 1
    adapter.train()
    torch.manual_seed(0)
    delta = adapter(hidden) - hidden
    torch.manual_seed(0)
    inner = adapter.activation(adapter.down(adapter.dropout(hidden)))
    assert torch.allclose(delta, adapter.up(inner), atol=1e-6)
    assert len(delta.unique(dim=0)) > 32


def test_the_saved_config_restores_the_same_adapters() -> None:
    settings = Bottleneck(size=7, activation="silu", dropout=0.25, layers="1-2")
    model = llama()
    bottleneck.attach(model, settings)
    config = bottleneck.config_of(model)
    restored = llama()
    bottleneck.attach(restored, bottleneck.settings_of(config))
    assert bottleneck.config_of(restored) == config
    assert {n: p.shape for n, p in bottleneck.weights_of(restored).items()} == {
        n: p.shape for n, p in bottleneck.weights_of(model).items()
    }


def test_a_copied_and_converted_model_converts_its_adapters() -> None:
    model = llama()
    bottleneck.attach(model, Bottleneck(size=SIZE))
    randomize(model)
    wide = copy.deepcopy(model).double()
    assert wide(IDS).logits.dtype is torch.float64
    assert torch.allclose(wide(IDS).logits.float(), model(IDS).logits, atol=1e-5)


def test_a_second_set_of_adapters_is_refused() -> None:
    model = llama()
    bottleneck.attach(model, Bottleneck(size=SIZE))
    with pytest.raises(ValueError, match="already has"):
        bottleneck.attach(model, Bottleneck(size=SIZE))


def test_a_parallel_residual_is_adapted_in_both_branches() -> None:
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        use_parallel_residual=True,
    )
    model = GPTNeoXForCausalLM(config).eval()
    before = model(IDS).logits
    bottleneck.attach(model, Bottleneck(size=SIZE))
    assert torch.equal(model(IDS).logits, before)
    for name in ("attention", "mlp"):
        up = model.get_submodule(f"gpt_neox.layers.0.{name}.bottleneck.up")
        nn.init.ones_(up.bias)
        changed = model(IDS).logits
        assert not torch.equal(changed, before)
        before = changed


def test_an_unknown_layout_is_refused_and_the_model_does_not_change() -> None:
    opt = OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
            word_embed_proj_dim=16,
        )
    )
    with pytest.raises(StageError, match=r"no MLP block .* it holds self_attn.*fc1") as caught:
        bottleneck.attach(opt, Bottleneck(size=SIZE))
    assert caught.value.reason == "UnknownLayout"
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=40))
    with pytest.raises(StageError, match="adds the residual inside"):
        bottleneck.attach(bloom, Bottleneck(size=SIZE))
    for model in (opt, bloom):
        assert not bottleneck.attached(model)
        assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(StageError, match="names layer 3, and the model has 3 layers") as caught:
        bottleneck.attach(llama(), Bottleneck(size=SIZE, layers="1-3"))
    assert "adapter.bottleneck.layers" in caught.value.advice
