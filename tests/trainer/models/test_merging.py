"""A merge one layer at a time gives the weights of PEFT's merge of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.adapters import Adapter, Bottleneck, Ia3, Lora, PrefixTuning, PromptTuning, Qlora
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, merging
from tuneyard_trainer.models.base import load_base
from tuneyard_trainer.models.files import SINGLE
from tuneyard_trainer.models.merging import write_merged

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama with a tied head": lambda: tiny_llama(VOCABULARY),
    "llama with its own head": lambda: tiny_llama(VOCABULARY, tie_word_embeddings=False),
    "qwen2 with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "gpt2 with transposed weights": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=64, vocab_size=96)
    ),
    "neox with fused projections": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "mixtral with experts": lambda: MixtralForCausalLM(
        MixtralConfig(**GROUPED, num_local_experts=2)
    ),
}
ADAPTERS = {
    "lora": Adapter(lora=Lora(rank=4, alpha=8)),
    "rslora": Adapter(lora=Lora(rank=4, alpha=8, rank_stabilized=True, targets="attention")),
    "dora": Adapter(lora=Lora(rank=4, alpha=8, decomposed=True)),
    "ia3": Adapter(ia3=Ia3()),
}
PEFT_PREFIX = "base_model.model."


def write_base(folder: Path, name: str, dtype: torch.dtype) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.Module.to(MODELS[name](), dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return load_base(folder, dtype=torch.float32, device=CPU)


def write_adapter(folder: Path, model: nn.Module) -> Path:
    """Save an adapter none of whose tensors has its initial value."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * 0.1
    adapters.save(model, folder)
    return folder


@pytest.fixture
def adapted(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a base and an adapter for it, and returns their folders."""

    def write(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        base = write_base(tmp_path / "base", name, dtype)
        adapter = ADAPTERS[kind]
        model = adapters.attach(loaded(base), adapter, seed=0, tokenizer=tiny_tokenizer)
        return base, write_adapter(tmp_path / "adapter", model)

    return write


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype, folder: Path) -> Path:
    """Merge whole models in float32, and write the result in `dtype` as transformers does."""
    model: Any = PeftModel.from_pretrained(loaded(base), adapter)
    merged = model.merge_and_unload(safe_merge=True)
    nn.Module.to(merged, dtype).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SINGLE)


def adapted_names(adapter: Path) -> set[str]:
    """Return the names of the layers that the files of an adapter name."""
    parts = (".lora_", ".ia3_")
    names = (name.removeprefix(PEFT_PREFIX) for name in load_file(adapter / adapters.WEIGHTS))
    return {name.split(part)[0] for name in names for part in parts if part in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in MODELS
        for kind in ADAPTERS
        if (name, kind) != ("mixtral with experts", "ia3")  # it has no linear layer in its MLP
    ],
)
def test_the_merged_files_equal_those_of_a_merge_of_the_whole_model(
    name: str, kind: str, dtype: torch.dtype, adapted: Any, tmp_path: Path
) -> None:
    base, adapter = adapted(name, kind, dtype)
    difference = write_merged(base, adapter, tmp_path / "merged")
    expected = merged_by_peft(base, adapter, dtype, tmp_path / "expected")
    for file in (SINGLE, "config.json", "generation_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (expected / file).read_bytes(), file
    assert 0 <= difference < merging.TOLERANCE
    before, after = tensors(base), tensors(tmp_path / "merged")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n.rpartition(".")[0] for n in changed} == adapted_names(adapter)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_model_computes_what_the_base_with_its_adapter_computes(
    kind: str, adapted: Any, tmp_path: Path
) -> None:
    base, adapter = adapted("llama with a tied head", kind)
    write_merged(base, adapter, tmp_path / "merged")
    ids = torch.tensor([[5, 17, 42, 99, 100, 7, 301, 12]])
    with torch.no_grad():
        found, plain = loaded(tmp_path / "merged")(ids).logits, loaded(base)(ids).logits
        expected = adapters.load(loaded(base), adapter)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [1, 100])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["qwen2 with biases", "gpt2 with transposed weights"])
def test_a_layer_that_is_merged_in_blocks_has_the_same_weights(
    name: str,
    kind: str,
    weights: int,
    adapted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merging, "BLOCK_WEIGHTS", weights)
    base, adapter = adapted(name, kind)
    write_merged(base, adapter, tmp_path / "merged")
    expected = tensors(merged_by_peft(base, adapter, torch.float32, tmp_path / "expected"))
    for tensor_name, found in tensors(tmp_path / "merged").items():
        torch.testing.assert_close(found, expected[tensor_name], rtol=1e-6, atol=1e-7)


def test_ranks_and_scales_of_single_layers_are_respected(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama with its own head", torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 32, "lm_head": 1},
    )
    adapter = write_adapter(tmp_path / "adapter", get_peft_model(loaded(base), config))
    write_merged(base, adapter, tmp_path / "merged")
    expected = merged_by_peft(base, adapter, torch.float32, tmp_path / "expected")
    assert (tmp_path / "merged" / SINGLE).read_bytes() == (expected / SINGLE).read_bytes()


def test_a_tensor_of_another_precision_keeps_it(adapted: Any, tmp_path: Path) -> None:
    """Some models store the scores of a router in float32 among weights in bfloat16."""
    base, adapter = adapted("llama with a tied head", "lora", torch.bfloat16)
    norm, layer = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    held = tensors(base) | {norm: torch.rand(32) + 0.5}
    held[layer] = held[layer].float()
    save_file(held, base / SINGLE, metadata={"format": "pt"})
    write_merged(base, adapter, tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in held.items()}
    assert torch.equal(found[norm], held[norm])
    expected = tensors(merged_by_peft(base, adapter, torch.float32, tmp_path / "expected"))
    assert torch.equal(found[layer], expected[layer])


def test_a_base_whose_names_lack_the_models_prefix_is_merged(adapted: Any, tmp_path: Path) -> None:
    """GPT-2's own files name `h.0.attn.c_attn.weight`, without `transformer.`, and hold buffers
    that the model does not load."""
    base, adapter = adapted("gpt2 with transposed weights", "lora")
    expected = tensors(merged_by_peft(base, adapter, torch.float32, tmp_path / "expected"))
    short = {n.removeprefix("transformer."): t for n, t in tensors(base).items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(short, base / SINGLE, metadata={"format": "pt"})
    write_merged(base, adapter, tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    assert found.keys() == short.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name.removeprefix("transformer.")], tensor)


def test_qlora_merges_into_the_base_in_its_original_precision(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    base = write_base(tmp_path / "base", "llama with a tied head", torch.bfloat16)
    qlora = Qlora(rank=4, alpha=8)
    quantized = load_base(base, dtype=torch.float32, device=CPU, quantize=qlora)
    model = adapters.attach(quantized, Adapter(qlora=qlora), seed=0, tokenizer=tiny_tokenizer)
    adapter = write_adapter(tmp_path / "adapter", model)
    write_merged(base, adapter, tmp_path / "merged")
    expected = merged_by_peft(base, adapter, torch.bfloat16, tmp_path / "expected")
    assert (tmp_path / "merged" / SINGLE).read_bytes() == (expected / SINGLE).read_bytes()


# ---- refusals -----------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path, folder: Path) -> StageError:
    with pytest.raises(StageError) as caught:
        write_merged(base, adapter, folder)
    return caught.value


def test_arithmetic_that_errs_by_a_thousandth_of_the_update_is_refused(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapted("llama with a tied head", "lora")
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *given: right(*given) * 1.001)
    error = refusal(base, adapter, tmp_path / "merged")
    assert error.reason == "ExportMismatch"
    assert "differs from float64 arithmetic" in str(error)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_not_finite_is_refused(
    wrong: float, adapted: Any, tmp_path: Path
) -> None:
    base, adapter = adapted("llama with a tied head", "lora")
    held = load_file(adapter / adapters.WEIGHTS)
    held[f"{PEFT_PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"][-1, -1] = wrong
    save_file(held, adapter / adapters.WEIGHTS)
    error = refusal(base, adapter, tmp_path / "merged")
    assert error.reason == "WeightsNotFinite"
    assert "model.layers.1.mlp.up_proj.weight" in str(error)


def test_a_merged_weight_beyond_the_range_of_float16_is_refused(
    adapted: Any, tmp_path: Path
) -> None:
    base, adapter = adapted("llama with a tied head", "lora", torch.float16)
    held = load_file(adapter / adapters.WEIGHTS)
    held[f"{PEFT_PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"] *= 1e7
    save_file(held, adapter / adapters.WEIGHTS)
    error = refusal(base, adapter, tmp_path / "merged")
    assert error.reason == "WeightsNotFinite"
    assert "float16" in str(error)


def test_an_adapter_of_a_base_of_another_shape_is_refused(adapted: Any, tmp_path: Path) -> None:
    _, adapter = adapted("llama with a tied head", "lora")
    for name in ("qwen2 with biases", "gpt2 with transposed weights"):
        shutil.rmtree(tmp_path / "base")
        other = write_base(tmp_path / "base", name, torch.float32)
        assert refusal(other, adapter, tmp_path / "merged").reason == "AdapterBroken"


def test_a_tensor_of_the_adapter_that_would_not_be_merged_is_refused(tmp_path: Path) -> None:
    """`modules_to_save`: PEFT trains a whole copy of these layers."""
    base = write_base(tmp_path / "base", "llama with its own head", torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = write_adapter(tmp_path / "adapter", get_peft_model(loaded(base), config))
    error = refusal(base, adapter, tmp_path / "merged")
    assert error.reason == "NotMergeable"
    assert "lm_head.weight" in str(error)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(prefix=PrefixTuning(length=3)),
        Adapter(prompt=PromptTuning(length=3)),
        Adapter(bottleneck=Bottleneck(size=6)),
    ],
    ids=lambda adapter: adapter.kind,
)
def test_an_adapter_that_no_weight_can_express_is_not_merged(
    adapter: Adapter, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama with a tied head", torch.float32)
    model = adapters.attach(loaded(base), adapter, seed=0, tokenizer=tiny_tokenizer)
    error = refusal(base, write_adapter(tmp_path / "adapter", model), tmp_path / "merged")
    assert error.reason == "NotMergeable"
    assert "cannot be merged" in str(error)
    assert not (tmp_path / "merged").exists()


def test_a_base_that_lacks_a_tensor_is_refused(adapted: Any, tmp_path: Path) -> None:
    base, adapter = adapted("llama with a tied head", "lora")
    held = tensors(base)
    del held["model.norm.weight"]
    save_file(held, base / SINGLE, metadata={"format": "pt"})
    assert refusal(base, adapter, tmp_path / "merged").reason == "WeightsMissing"


def test_a_config_of_the_adapter_that_names_another_scale_is_used(
    adapted: Any, tmp_path: Path
) -> None:
    """The scale is read from the adapter's files, as PEFT reads it."""
    base, adapter = adapted("llama with a tied head", "lora")
    config = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"lora_alpha": 80}))
    write_merged(base, adapter, tmp_path / "merged")
    expected = merged_by_peft(base, adapter, torch.float32, tmp_path / "expected")
    assert (tmp_path / "merged" / SINGLE).read_bytes() == (expected / SINGLE).read_bytes()
