"""Every kind of adapter: its initial weights, training, saving and its errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.adapters import Adapter, Bottleneck, Ia3, Lora, PrefixTuning, PromptTuning, Qlora
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base
from tuneyard_trainer.models.layers import count_parameters, trainable

CPU = torch.device("cpu")
ADAPTERS = {
    "lora": Adapter(lora=Lora(rank=4, alpha=8)),
    "dora": Adapter(lora=Lora(rank=4, alpha=8, decomposed=True)),
    "rslora": Adapter(lora=Lora(rank=4, alpha=8, rank_stabilized=True, targets="attention")),
    "ia3": Adapter(ia3=Ia3()),
    "prefix": Adapter(prefix=PrefixTuning(length=3)),
    "prompt": Adapter(prompt=PromptTuning(length=3)),
    "bottleneck": Adapter(bottleneck=Bottleneck(size=6)),
}
NEUTRAL = ("lora", "dora", "rslora", "ia3", "bottleneck")
MERGEABLE = ("lora", "dora", "rslora", "ia3")
EVERY = pytest.mark.parametrize("kind", ADAPTERS)

Base = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> PreTrainedModel:
    return load_base(tiny_model_dir, dtype=torch.float32, device=CPU)


@pytest.fixture
def base(tiny_model_dir: Path, loaded: PreTrainedModel) -> Base:
    """Return a new copy of the base in every call, loaded again if settings are given."""

    def new(**settings: Any) -> PreTrainedModel:
        if not settings:
            return copy.deepcopy(loaded)
        return load_base(tiny_model_dir, **({"dtype": torch.float32, "device": CPU} | settings))

    return new


@pytest.fixture
def attach(base: Base, tiny_tokenizer: Any) -> Callable[..., nn.Module]:
    def attached(
        adapter: Adapter, seed: int = 0, model: PreTrainedModel | None = None
    ) -> nn.Module:
        return adapters.attach(model or base(), adapter, seed=seed, tokenizer=tiny_tokenizer)

    return attached


IDS = torch.tensor([[5, 17, 42, 99, 100, 7, 301, 12], [9, 8, 7, 6, 5, 4, 20, 250]])


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Return (2, 8, V) logits, without those of virtual tokens."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -8:]


def train_step(model: nn.Module, rate: float = 0.05) -> None:
    """Take one large step of AdamW on the trainable parameters."""
    model.train()
    optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=rate)
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    out.loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", NEUTRAL)
def test_a_new_adapter_changes_no_logit(kind: str, base: Base, attach: Any) -> None:
    assert (logits(attach(ADAPTERS[kind])) - logits(base())).abs().max() < 1e-6
    if kind in ("lora", "ia3", "bottleneck"):
        assert torch.equal(logits(attach(ADAPTERS[kind])), logits(base()))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_new_virtual_tokens_change_the_logits(kind: str, base: Base, attach: Any) -> None:
    assert (logits(attach(ADAPTERS[kind])) - logits(base())).abs().max() > 1e-4


@EVERY
def test_a_training_step_changes_the_adapter_and_no_byte_of_the_base(
    kind: str, base: Base, attach: Any
) -> None:
    untouched, model = base(), attach(ADAPTERS[kind])
    before = logits(model)
    own = {id(p) for p in trainable(model).values()}
    train_step(model)
    assert not torch.equal(logits(model), before)
    frozen = [p for p in model.parameters() if id(p) not in own]
    originals = list(untouched.parameters())
    assert len(frozen) == len(originals)
    assert all(torch.equal(p, o) for p, o in zip(frozen, originals, strict=True))
    assert all(p.grad is None for p in frozen)


@EVERY
def test_a_saved_adapter_loads_to_the_same_logits_bit_for_bit(
    kind: str, base: Base, attach: Any, tmp_path: Path
) -> None:
    model = attach(ADAPTERS[kind])
    train_step(model)
    adapters.save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    loaded = adapters.load(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not trainable(loaded)
    assert set(trainable(adapters.load(base(), tmp_path, trainable=True))) == set(trainable(model))


@EVERY
def test_the_same_adapter_is_saved_as_the_same_bytes_without_local_paths(
    kind: str, base: Base, attach: Any, tmp_path: Path, tiny_model_dir: Path
) -> None:
    for name in "ab":
        adapters.save(attach(ADAPTERS[kind], seed=3), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert one == two
        assert str(tiny_model_dir).encode() not in one
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for names in (config.get("target_modules") or [], config.get("feedforward_modules") or []):
        assert names == sorted(names)  # the order of a set differs between processes
    # Loading an adapter and saving it again gives the same bytes.
    adapters.save(adapters.load(base(), tmp_path / "a"), tmp_path / "c")
    assert (tmp_path / "c" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a" / "adapter_model.safetensors"
    ).read_bytes()


@EVERY
def test_a_disabled_adapter_gives_the_base_and_is_active_again_afterwards(
    kind: str, base: Base, attach: Any
) -> None:
    model = attach(ADAPTERS[kind])
    train_step(model)
    tuned, parameters = logits(model), trainable(model).keys()
    with adapters.disabled(model):
        assert torch.equal(logits(model), logits(base()))
        assert generated(model) == generated(base())
    assert torch.equal(logits(model), tuned)
    assert trainable(model).keys() == parameters


@EVERY
def test_disabling_a_loaded_adapter_does_not_make_it_trainable(
    kind: str, base: Base, attach: Any, tmp_path: Path
) -> None:
    adapters.save(attach(ADAPTERS[kind]), tmp_path)
    loaded = adapters.load(base(), tmp_path)
    with adapters.disabled(loaded):
        pass
    assert not trainable(loaded)


def generated(model: nn.Module) -> list[int]:
    ids = IDS[:1]
    mask = torch.ones_like(ids)
    out: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=-1
    )
    return out[0, ids.shape[1] :].tolist()


@EVERY
def test_generation_agrees_with_a_forward_pass_for_each_token(kind: str, attach: Any) -> None:
    model = attach(ADAPTERS[kind])
    train_step(model)
    ids = IDS[:1]
    for _ in range(5):
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat((ids, scores[:, -1:].argmax(-1)), 1)
    assert generated(model) == ids[0, IDS.shape[1] :].tolist()


@EVERY
def test_a_copied_model_has_its_own_adapter(kind: str, attach: Any) -> None:
    model = attach(ADAPTERS[kind])
    copied = copy.deepcopy(model)
    before = logits(model)
    train_step(copied)
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)


@EVERY
def test_only_the_seed_determines_the_initial_weights(kind: str, attach: Any) -> None:
    torch.manual_seed(1)
    first = trainable(attach(ADAPTERS[kind], seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same = trainable(attach(ADAPTERS[kind], seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    other = trainable(attach(ADAPTERS[kind], seed=6))
    assert all(torch.equal(first[name], same[name]) for name in first)
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    assert differs == (kind != "ia3")  # (IA)^3 starts with ones


@EVERY
def test_the_adapter_of_a_bfloat16_base_is_float32_and_trains(
    kind: str, base: Base, attach: Any
) -> None:
    model = attach(ADAPTERS[kind], model=base(dtype=torch.bfloat16))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(model)
    assert torch.isfinite(logits(model)).all()


# ---- sizes --------------------------------------------------------------------------------------


def test_parameter_counts_equal_the_closed_forms(base: Base, attach: Any) -> None:
    width, inner, kv, layers = 32, 64, 16, 2

    def trained(adapter: Adapter) -> int:
        return sum(p.numel() for p in trainable(attach(adapter)).values())

    projections = 2 * (width + width) + 2 * (width + kv) + 3 * (width + inner)
    assert trained(ADAPTERS["lora"]) == layers * 4 * projections
    assert trained(ADAPTERS["ia3"]) == layers * (kv + kv + inner)
    assert trained(ADAPTERS["prefix"]) == 3 * layers * 2 * kv
    assert trained(ADAPTERS["prompt"]) == 3 * width
    assert trained(ADAPTERS["bottleneck"]) == layers * 2 * (2 * width * 6 + 6 + width)


# ---- target layers ------------------------------------------------------------------------------


def adapted(model: nn.Module) -> set[str]:
    names = (name.partition("base_model.model.model.")[2] for name in trainable(model))
    return {name.split(".lora_")[0] for name in names}


def test_a_layer_range_adapts_only_those_layers(attach: Any) -> None:
    lora = Adapter(lora=Lora(rank=2, layers="1", targets=["q_proj", "up_proj"]))
    assert adapted(attach(lora)) == {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}
    bottleneck = attach(Adapter(bottleneck=Bottleneck(size=2, layers="1")))
    assert all(".layers.1." in name for name in trainable(bottleneck))


def test_attention_targets_only_the_attention_projections(attach: Any) -> None:
    names = adapted(attach(ADAPTERS["rslora"]))
    assert {name.split(".", 2)[2] for name in names} == {
        f"self_attn.{x}_proj" for x in ("q", "k", "v", "o")
    }


def test_attention_excludes_an_mlp_projection_of_the_same_name(attach: Any) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=400))
    lora = attach(Adapter(lora=Lora(rank=2, targets="attention")), model=model)
    assert {name.split(".h.")[1].split(".lora_")[0][2:] for name in trainable(lora)} == {
        "attn.c_attn",
        "attn.c_proj",
    }


def test_all_linear_excludes_the_head(attach: Any) -> None:
    assert all(name.startswith("layers.") for name in adapted(attach(ADAPTERS["lora"])))


@pytest.mark.parametrize(
    ("settings", "reason", "words"),
    [
        ({"targets": ["q_proj", "quer"]}, "TargetNotFound", "names quer; .*down_proj.*q_proj"),
        ({"targets": ["lm_head"]}, "TiedHead", "head"),
        ({"layers": "0-2"}, "LayerOutOfRange", "names layer 2, and the model has 2 layers"),
        ({"layers": "1-0"}, "LayerOutOfRange", "is descending"),
    ],
)
def test_a_target_or_layer_that_does_not_exist_is_an_error(
    settings: dict[str, Any], reason: str, words: str, attach: Any
) -> None:
    with pytest.raises(StageError, match=words) as caught:
        attach(Adapter(lora=Lora(**settings)))
    assert caught.value.reason == reason
    assert "adapter.lora." in caught.value.advice


# ---- other architectures ------------------------------------------------------------------------


def other_models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    small = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2}
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=400)),
        "gpt_neox": GPTNeoXForCausalLM(
            GPTNeoXConfig(**small, num_attention_heads=2, intermediate_size=32)
        ),
        # The head width is not hidden_size / heads, and the keys are grouped.
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(
                **small,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=32,
            )
        ),
    }


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt", "bottleneck"])
def test_the_common_decoder_families_support_every_kind(
    architecture: str, kind: str, attach: Any, tmp_path: Path
) -> None:
    plain = other_models()[architecture].eval()
    model = attach(ADAPTERS[kind], model=copy.deepcopy(plain))
    train_step(model)
    adapters.save(model, tmp_path)
    assert torch.equal(logits(adapters.load(copy.deepcopy(plain), tmp_path)), logits(model))
    with adapters.disabled(model):
        assert torch.equal(logits(model), logits(plain))


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merged_weights_equal_those_of_the_merged_model(
    kind: str, base: Base, attach: Any, tmp_path: Path
) -> None:
    """The model itself does not change."""
    model = attach(ADAPTERS[kind])
    train_step(model)
    adapters.save(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted: Any = adapters.load(base(), tmp_path)
    expected = adapted.merge_and_unload()
    plain = dict(adapters.merged_weights(model, with_tied=True))
    assert plain.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(plain[name], tensor, rtol=0, atol=1e-7)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train_step(model)  # no layer is left merged
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merged_weights_are_the_bases_while_the_adapter_is_off(
    kind: str, base: Base, attach: Any
) -> None:
    model = attach(ADAPTERS[kind])
    train_step(model)
    with adapters.disabled(model):
        off = {
            name: tensor.clone() for name, tensor in adapters.merged_weights(model, with_tied=True)
        }
    expected = base().state_dict()
    assert off.keys() == expected.keys()
    assert all(torch.equal(off[name], tensor) for name, tensor in expected.items())
    on = dict(adapters.merged_weights(model, with_tied=True))
    assert any(not torch.equal(off[name], on[name]) for name in off)


@pytest.mark.parametrize("with_tied", [True, False])
def test_a_head_tied_to_the_embeddings_is_yielded_only_on_request(
    with_tied: bool,
) -> None:
    model = tiny_llama(VOCABULARY)
    names = [name for name, _ in adapters.merged_weights(model, with_tied=with_tied)]
    assert ("lm_head.weight" in names) == with_tied
    assert sorted({*names, "lm_head.weight"}) == sorted(model.state_dict())


def test_merged_weights_hold_the_buffers_that_a_saved_model_holds() -> None:
    model = tiny_llama(VOCABULARY)
    model.model.register_buffer("saved", torch.ones(1))
    model.model.register_buffer("scratch", torch.ones(1), persistent=False)
    names = [name for name, _ in adapters.merged_weights(model, with_tied=True)]
    assert sorted(names) == sorted(model.state_dict())
    assert "model.saved" in names


# ---- QLoRA --------------------------------------------------------------------------------------


def test_qlora_trains_over_a_4_bit_base(base: Base, attach: Any, tmp_path: Path) -> None:
    qlora = Qlora(rank=4, alpha=8)
    quantized = base(quantize=qlora)
    assert count_parameters(quantized) == count_parameters(base())
    assert not torch.equal(logits(quantized), logits(base()))
    model = attach(Adapter(qlora=qlora), model=quantized)
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train_step(model)
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    adapters.save(model, tmp_path)
    assert torch.equal(logits(adapters.load(base(quantize=qlora), tmp_path)), logits(model))


def test_measuring_a_4_bit_model_changes_neither_its_weights_nor_their_scales(base: Base) -> None:
    """bitsandbytes would repack the weights on a CPU with AVX-512 BF16."""
    model = base(quantize=Qlora())

    def packed() -> list[torch.Tensor]:
        weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
        assert weights
        return [t.clone() for p in weights for t in (p.data, p.quant_state.absmax)]

    before = packed()
    logits(model)
    assert all(torch.equal(a, b) for a, b in zip(before, packed(), strict=True))
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)


def test_qlora_needs_a_4_bit_base(attach: Any) -> None:
    with pytest.raises(ValueError, match="4-bit"):
        attach(Adapter(qlora=Qlora()))


# ---- initial weights of virtual tokens ----------------------------------------------------------


def test_a_prompt_starts_from_the_embeddings_of_its_text(
    base: Base, attach: Any, tiny_tokenizer: Any
) -> None:
    text = "Ask the support desk"
    ids = tiny_tokenizer(text)["input_ids"]
    table = base().get_input_embeddings().weight
    for length in (2, 3 * len(ids) - 1):
        prompt = PromptTuning(length=length, initial_text=text)
        (weights,) = trainable(attach(Adapter(prompt=prompt))).values()
        assert torch.equal(weights, table[torch.tensor((ids * 3)[:length])])


def test_a_new_prefix_equals_random_tokens_before_the_text(base: Base, attach: Any) -> None:
    model = attach(ADAPTERS["prefix"], seed=4)
    torch.manual_seed(4)
    before = torch.randint(len(base().get_input_embeddings().weight), (1, 3))
    whole = torch.cat((before.repeat(2, 1), IDS), 1)
    assert torch.allclose(logits(model), logits(base(), whole), atol=1e-5)


# ---- broken files -------------------------------------------------------------------------------


def test_an_adapter_folder_without_its_files_is_an_error(base: Base, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no adapter_config.json and no adapter_model"):
        adapters.load(base(), tmp_path)


def _drop_a_tensor(folder: Path) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / adapters.WEIGHTS).items()}
    tensors.pop(min(tensors))
    (folder / adapters.WEIGHTS).unlink()
    save_file(tensors, folder / adapters.WEIGHTS)


def _cut_off(folder: Path) -> None:
    content = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).unlink()
    (folder / adapters.WEIGHTS).write_bytes(content[: len(content) // 2])


def _no_type(folder: Path) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    del config["peft_type"]
    (folder / adapters.CONFIG).write_text(json.dumps(config))


@EVERY
@pytest.mark.parametrize("damage", [_drop_a_tensor, _cut_off, _no_type])
def test_a_damaged_adapter_is_an_error(
    kind: str, damage: Callable[[Path], None], base: Base, attach: Any, tmp_path: Path
) -> None:
    adapters.save(attach(ADAPTERS[kind]), tmp_path)
    damage(tmp_path)
    with pytest.raises(StageError, match="cannot be loaded onto this base") as caught:
        adapters.load(base(), tmp_path)
    assert caught.value.reason == "AdapterBroken"


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt", "bottleneck"])
def test_an_adapter_of_another_base_is_an_error(kind: str, attach: Any, tmp_path: Path) -> None:
    adapters.save(attach(ADAPTERS[kind]), tmp_path)
    with pytest.raises(StageError, match="cannot be loaded onto this base"):
        adapters.load(other_models()["gpt2"], tmp_path)


# ---- gradient checkpointing ---------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    model.train()
    model.zero_grad()
    model(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False
    ).loss.backward()
    return [p.grad for p in trainable(model).values() if p.grad is not None]


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "prefix"])
def test_recomputing_activations_gives_the_same_gradients(kind: str, attach: Any) -> None:
    model = attach(ADAPTERS[kind])
    train_step(model)
    plain = gradients(model)
    adapters.enable_gradient_checkpointing(model)
    again = gradients(model)
    assert len(plain) == len(again) == len(trainable(model))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, again, strict=True))


def test_prefix_tuning_refuses_gradient_checkpointing(attach: Any) -> None:
    with pytest.raises(StageError, match="prefix tuning does not support it") as caught:
        adapters.enable_gradient_checkpointing(attach(ADAPTERS["prefix"]))
    assert "training.gradientCheckpointing" in caught.value.advice
