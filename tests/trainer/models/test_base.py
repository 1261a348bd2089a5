"""Base models: loading, refused models, tokenizers, dropout, freezing and packing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tuneyard.api.adapters import Adapter, Bottleneck, Ia3, Lora, PrefixTuning, Qlora
from tuneyard.api.training import Freeze
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, base, files, layers, probes
from tuneyard_trainer.models.gguf_unpack import unpacked

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 42, 99, 100, 7, 301, 12]])


def load(path: Path, **settings: Any) -> PreTrainedModel:
    return base.load_base(path, **({"dtype": torch.float32, "device": CPU} | settings))


def refusal(path: Path, **settings: Any) -> StageError:
    with pytest.raises(StageError) as caught:
        load(path, **settings)
    assert caught.value.advice
    assert not caught.value.retryable
    return caught.value


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors, or remove them (None); `__` stands for a dot in a name."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


# ---- loading ------------------------------------------------------------------------------------


def test_a_saved_model_loads_to_the_same_weights_in_the_requested_dtype(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = load(tiny_model_dir)
    assert not model.training
    base.save_model(model, tmp_path)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    assert str(tiny_model_dir) not in (tmp_path / "config.json").read_text()
    assert load(tiny_model_dir, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert files.stored_dtype(tiny_model_dir) is torch.float32
    base.save_model(model.bfloat16(), tmp_path / "half")
    assert files.stored_dtype(tmp_path / "half") is torch.bfloat16


def test_a_model_in_several_files_loads_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_model_dir)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    assert files.stored_dtype(tmp_path) is torch.float32
    min(tmp_path.glob("*.safetensors")).unlink()
    error = refusal(tmp_path)
    assert error.reason == "WeightsMissing"
    assert "lacks 1 of its weight files: model-00001" in error.message


def test_four_bit_weights_are_close_and_the_head_does_not_change(tiny_model_dir: Path) -> None:
    plain, quantized = load(tiny_model_dir), load(tiny_model_dir, quantize=Qlora())
    assert quantized.is_loaded_in_4bit
    assert torch.equal(quantized.lm_head.weight, plain.lm_head.weight)
    difference = (quantized(IDS).logits - plain(IDS).logits).abs().max()
    assert 0 < difference < 0.5 * plain(IDS).logits.abs().max()
    assert layers.count_parameters(quantized) == layers.count_parameters(plain)


def test_four_bits_without_bitsandbytes_name_the_missing_extra(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    error = refusal(tiny_model_dir, quantize=Qlora())
    assert error.reason == "MissingExtra"
    assert "tuneyard[qlora]" in error.advice


# ---- GGUF ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as llama.cpp writes it, the projections in 4-bit blocks."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    merges = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([1] * len(tokens))
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(name, np.abs(values) + 1)
            return
        blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for name, rows, columns in [
        ("attn_q", 32, 32),
        ("attn_k", 16, 32),
        ("attn_v", 16, 32),
        ("attn_output", 32, 32),
        ("ffn_gate", 64, 32),
        ("ffn_up", 64, 32),
        ("ffn_down", 32, 64),
    ]:
        add(f"blk.0.{name}.weight", rows, columns)
    add("blk.0.attn_norm.weight", 32)
    add("blk.0.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_model_is_unpacked_as_a_dequantized_plain_one(
    gguf_file: Path, tmp_path: Path
) -> None:
    folder = unpacked(gguf_file, tmp_path)
    model = load(folder)
    reader = gguf.GGUFReader(gguf_file)
    (embeddings,) = [t for t in reader.tensors if t.name == "token_embd.weight"]
    expected = gguf.dequantize(embeddings.data, embeddings.tensor_type)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), expected)
    assert model.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_an_unpacked_gguf_model_is_the_one_that_transformers_reads(
    gguf_file: Path, tmp_path: Path
) -> None:
    read = LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    model = load(unpacked(gguf_file, tmp_path))
    for name, tensor in read.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    fields = read.config.to_dict()
    for changed in ("quantization_config", "architectures", "_name_or_path"):
        del fields[changed]
    assert fields.items() <= model.config.to_dict().items()


def test_a_gguf_file_is_unpacked_once(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(gguf_file, tmp_path)
    monkeypatch.setattr(gguf, "GGUFReader", None)  # a second reading would fail
    assert unpacked(gguf_file, tmp_path) == folder


def test_an_unpacked_gguf_model_keeps_its_tokenizer_and_license(
    gguf_file: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = unpacked(gguf_file, tmp_path)
    tokenizer = base.load_tokenizer(folder)
    text = "Ask the support desk."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id is not None
    assert len(tokenizer) == len(tiny_tokenizer)
    assert files.license_of(folder) == "apache-2.0"
    assert files.stored_dtype(folder) is torch.float32


def test_a_gguf_file_that_is_cut_off_or_none_at_all_is_an_error(
    gguf_file: Path, tmp_path: Path
) -> None:
    content = gguf_file.read_bytes()
    for number, broken in enumerate((b"", b"not a model", content[:200], content[:-5000])):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(broken)
        with pytest.raises(StageError) as caught:
            unpacked(path, tmp_path / "cache")
        assert caught.value.reason == "ModelBroken"
        assert str(path) in caught.value.message
    left = [path.name for path in (tmp_path / "cache" / "gguf").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


# ---- refused models -----------------------------------------------------------------------------


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").reason == "ModelMissing"


def test_a_folder_without_a_config_is_an_error_that_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    error = refusal(tmp_path)
    assert error.reason == "ModelIncomplete"
    assert "it holds notes.txt" in error.message


def test_pickled_weights_are_refused_without_loading_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    error = refusal(folder)
    assert error.reason == "PickleWeights"
    assert "safetensors" in error.advice


def test_safetensors_are_loaded_even_beside_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load(folder)


def test_a_model_with_its_own_code_is_refused_and_the_code_is_not_run(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    edit_config(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    )
    error = refusal(folder)
    assert error.reason == "RemoteCode"
    assert "code from its repository, which Tuneyard does not run" in error.message


def test_code_beside_a_native_architecture_is_ignored(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.M"})
    assert type(load(folder)) is LlamaForCausalLM


def not_causal_models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    bert = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    return {
        "T5ForConditionalGeneration": T5ForConditionalGeneration(t5),
        "LlamaForSequenceClassification": LlamaForSequenceClassification(llama),
        "BertLMHeadModel": BertLMHeadModel(bert),
    }


@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "LlamaForSequenceClassification", "BertLMHeadModel"]
)
def test_a_model_that_is_not_causal_is_named_in_the_error(name: str, tmp_path: Path) -> None:
    not_causal_models()[name].save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert error.reason == "NotCausal"
    assert name in error.message
    assert "predicts the next token" in error.message


def test_bert_as_a_decoder_is_causal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = not_causal_models()["BertLMHeadModel"].config
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path)
    load(tmp_path)


def test_gpt_neox_is_causal_although_its_config_says_it_is_no_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    neox().save_pretrained(tmp_path)
    load(tmp_path)


def test_missing_tensors_are_an_error(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None)
    error = refusal(folder)
    assert error.reason == "WeightsMissing"
    assert "lacks 1 of the tensors" in error.message
    assert "model.layers.1.mlp.up_proj.weight" in error.message


def test_tensors_of_the_wrong_shape_are_an_error(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.zeros(3))
    error = refusal(folder)
    assert error.reason == "ModelBroken"
    assert "model.norm.weight has (3,), not (32,)" in error.message


@pytest.mark.parametrize("keep", [0, 20, 5000])
def test_incomplete_weight_files_are_an_error(keep: int, folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content[:keep])
    error = refusal(folder)
    assert error.reason == "ModelBroken"
    assert "damaged or incomplete" in error.message
    with pytest.raises(StageError, match="cannot be read"):
        files.stored_dtype(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "nonesuch"}', "{}"])
def test_a_broken_config_is_an_error(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).reason in ("ModelBroken", "UnknownArchitecture")


def test_a_config_with_invalid_values_is_an_error(folder: Path) -> None:
    edit_config(folder, num_attention_heads=0)
    assert refusal(folder).reason in ("ModelBroken", "UnknownArchitecture")


def test_an_adapter_in_place_of_a_model_is_refused_without_fetching_its_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "else/where"}')
    assert refusal(folder).reason == "AdapterNotModel"


def test_quantized_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    error = refusal(folder)
    assert error.reason == "QuantizedModel"
    assert "gptq" in error.message


def test_too_little_memory_is_reported_with_advice(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(base, "_from_pretrained", full)
    error = refusal(tiny_model_dir)
    assert error.reason == "OutOfMemory"
    assert "adapter.qlora" in error.advice


# ---- tokenizers ---------------------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token_pads_with_one_of_its_tokens(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for special in ({"eos_token": "<|im_end|>"}, {"unk_token": "<|endoftext|>"}, {}):
        bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, **special)
        assert bare.pad_token is None
        bare.save_pretrained(tmp_path)
        tokenizer = base.load_tokenizer(tmp_path)
        assert tokenizer.pad_token_id is not None
        assert len(tokenizer) == len(tiny_tokenizer)
        if special:
            assert tokenizer.pad_token == next(iter(special.values()))


def test_a_tokenizers_own_padding_token_is_kept(tiny_model_dir: Path) -> None:
    assert base.load_tokenizer(tiny_model_dir).pad_token == "<|pad|>"


def test_a_folder_without_a_tokenizer_is_an_error(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(StageError) as caught:
        base.load_tokenizer(folder)
    assert caught.value.reason == "TokenizerMissing"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(StageError) as caught:
        base.load_tokenizer(folder)
    assert caught.value.reason == "TokenizerBroken"


# ---- dropout ------------------------------------------------------------------------------------


def test_dropout_is_set_in_every_field_of_the_architecture(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400)).save_pretrained(
        tmp_path
    )
    model = load(tmp_path, dropout=0.25)
    assert base.dropout_fields(model.config) == ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    found = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found
    assert set(found) == {0.25}
    torch.manual_seed(0)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_dropout_that_an_architecture_does_not_have_is_an_error(tmp_path: Path) -> None:
    mamba().save_pretrained(tmp_path)
    error = refusal(tmp_path, dropout=0.1)
    assert error.reason == "NoDropout"
    assert "training.dropout" in error.advice


# ---- freezing -----------------------------------------------------------------------------------


def test_freezing_freezes_exactly_the_named_parts(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    every = set(layers.trainable(model))
    layers.freeze(model, Freeze(layers="1", embeddings=True))
    frozen = every - set(layers.trainable(model))
    assert frozen == {n for n in every if ".layers.1." in n or "embed_tokens" in n}


def test_an_untied_head_can_be_frozen_without_the_embeddings(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    every = set(layers.trainable(model))
    layers.freeze(model, Freeze(head=True))
    assert every - set(layers.trainable(model)) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("freeze", "reason"),
    [
        (Freeze(layers="0-2"), "LayerOutOfRange"),
        (Freeze(head=True), "TiedHead"),
    ],
)
def test_freezing_a_missing_layer_or_a_tied_head_is_an_error(
    freeze: Freeze, reason: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(StageError) as caught:
        layers.freeze(load(tiny_model_dir), freeze)
    assert caught.value.reason == reason
    assert "training.freeze" in caught.value.advice


def test_freezing_everything_is_an_error(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    model.model.norm.requires_grad_(False)
    with pytest.raises(StageError) as caught:
        layers.freeze(model, Freeze(layers="0-1", embeddings=True, head=True))
    assert caught.value.reason == "NothingToTrain"


def test_layer_ranges_are_parsed_to_sorted_indices() -> None:
    assert layers.layer_indices("0-2,5,2-3", 6, "field") == [0, 1, 2, 3, 5]
    assert layers.layer_indices(None, 3, "field") == [0, 1, 2]


def test_tied_parameters_are_counted_once(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32
    vocabulary = model.config.vocab_size
    assert layers.count_parameters(model) == 2 * layer + 32 + vocabulary * 32


def test_peak_memory_is_in_bytes() -> None:
    assert 50 << 20 < base.peak_memory_bytes(CPU) < 1 << 40


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_the_peak_of_a_stage_is_not_that_of_an_earlier_one() -> None:
    """In a process of its own: the peak of other tests is none of ours."""
    code = """
import torch
from tuneyard_trainer.models.base import peak_memory_bytes, reset_peak_memory
cpu = torch.device("cpu")
large = torch.ones(100 << 20)  # 400 MiB
before = peak_memory_bytes(cpu)
del large
reset_peak_memory(cpu)
print(before - peak_memory_bytes(cpu))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 300 << 20


def test_where_the_peak_cannot_be_reset_that_of_the_process_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PROC", tmp_path / "absent")
    base.reset_peak_memory(CPU)
    assert 50 << 20 < base.peak_memory_bytes(CPU) < 1 << 40


# ---- licenses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: own-1\n---\n", "own-1"),
        ("README.md", "---\nlicense: [\n---\n", None),
        ("README.md", "# license: mit\n", None),
        ("LICENSE", "\n   Apache License\n  Version 2.0\n", "Apache License"),
        ("notes.txt", "license: mit", None),
    ],
)
def test_the_license_is_read_from_the_files(
    name: str, text: str, expected: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert files.license_of(tmp_path) == expected


# ---- context length -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=96), 96),
        (GPT2Config(n_positions=48), 48),
        (MambaConfig(), None),
    ],
)
def test_the_context_length_is_read_from_the_config(
    config: PreTrainedConfig, expected: int | None
) -> None:
    assert files.context_length(config) == expected


# ---- packing ------------------------------------------------------------------------------------


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=400, state_size=4)
    )


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=400,
        )
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_keeps_packed_documents_apart(
    attention: str, dtype: torch.dtype, tiny_model_dir: Path
) -> None:
    model = load(tiny_model_dir, dtype=dtype)
    model.set_attn_implementation(attention)
    assert probes.isolates_documents(model)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(lora=Lora(rank=2)),
        Adapter(ia3=Ia3()),
        Adapter(bottleneck=Bottleneck(size=4)),
    ],
)
def test_adapters_inside_the_layers_keep_documents_apart(
    adapter: Adapter, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = adapters.attach(load(tiny_model_dir), adapter, seed=0, tokenizer=tiny_tokenizer)
    for parameter in layers.trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    assert probes.isolates_documents(model)


def test_other_decoders_with_positions_keep_documents_apart() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=400))
    assert probes.isolates_documents(gpt2)
    assert probes.isolates_documents(neox())


def test_virtual_tokens_and_state_spaces_do_not_keep_documents_apart(
    tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    prefix = Adapter(prefix=PrefixTuning(length=2))
    tuned = adapters.attach(load(tiny_model_dir), prefix, seed=0, tokenizer=tiny_tokenizer)
    assert not probes.isolates_documents(tuned)
    assert not probes.isolates_documents(mamba())


class _Leaking(LlamaForCausalLM):
    """Accepts positions like every Llama, but lets each token attend to all earlier tokens."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **settings: Any) -> Any:
        mask = torch.ones_like(input_ids)
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **settings
        )


class _Shifted(LlamaForCausalLM):
    """Keeps documents apart, but its logits depend on their position in the row."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **settings: Any) -> Any:
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **settings)
        out.logits = out.logits + torch.arange(input_ids.shape[1])[None, :, None]
        return out


class _Faint(LlamaForCausalLM):
    """Lets a row's first token change all logits, by less than bfloat16 rounds other models'."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **settings: Any) -> Any:
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **settings)
        faint = 1 + 0.03 * (input_ids[:, :1, None] % 2)
        out.logits = out.logits * faint.to(out.logits.dtype)
        return out


@pytest.mark.parametrize("kind", [_Leaking, _Shifted, _Faint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_detects_leaks_and_wrong_positions(
    kind: type[LlamaForCausalLM], dtype: torch.dtype, tiny_model_dir: Path
) -> None:
    model = kind(load(tiny_model_dir).config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert not probes.isolates_documents(model.to(dtype))


def test_the_probe_does_not_change_the_model(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    probes.isolates_documents(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())
