"""Models that do not fit together are refused by name, and tokens that were added are merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.adapters import Adapter, Lora
from tuneyard.api.merging import MergePart, MergeRecipe
from tuneyard.errors import StageError
from tuneyard_trainer.merging.merge import Merge
from tuneyard_trainer.merging.opening import Named, Opened, open_models
from tuneyard_trainer.models import adapters, base
from tuneyard_trainer.models.files import SINGLE

CPU = torch.device("cpu")


def write(folder: Path, model: Any, tokenizer: Any, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01 * seed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(base_folder: Path, *folders: Path, with_union: bool = False) -> Opened:
    named = [
        Named(f"merge.with[{i}].uri", str(i), folder, MergePart())
        for i, folder in enumerate(folders)
    ]
    return open_models(base_folder, named, with_union=with_union)


def merge_of(found: Opened, method: Any = "linear") -> Merge:
    return Merge(MergeRecipe(method=method), found.models, found.base, found.specs)


@pytest.fixture
def base_folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return write(tmp_path / "base", tiny_llama(VOCABULARY), tiny_tokenizer)


def test_models_of_one_base_fit_and_keep_its_tensors(
    base_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tuned = write(tmp_path / "tuned", tiny_llama(VOCABULARY), tiny_tokenizer, seed=1)
    found = opened(base_folder, tuned)
    merge = merge_of(found)
    merge.write(tmp_path / "merged", lambda _: None)
    expected = load_file(tuned / SINGLE)
    assert all(
        torch.allclose(tensor, expected[name])
        for name, tensor in load_file(tmp_path / "merged" / SINGLE).items()
    )
    base.save_configs(found.skeleton, tmp_path / "merged")
    base.load_base(tmp_path / "merged", dtype=torch.float32, device=CPU)


def test_every_fault_of_every_model_is_named(
    base_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    qwen = Qwen2ForCausalLM(Qwen2Config(**tiny_llama(VOCABULARY).config.to_dict()))
    other = write(tmp_path / "other", qwen, tiny_tokenizer)
    wide = write(tmp_path / "wide", tiny_llama(VOCABULARY, intermediate_size=96), tiny_tokenizer)
    broken = write(tmp_path / "broken", tiny_llama(VOCABULARY), tiny_tokenizer)
    tensors = load_file(broken / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, broken / SINGLE, {"format": "pt"})
    with pytest.raises(StageError) as raised:
        opened(base_folder, other, wide, broken)
    message = str(raised.value)
    assert raised.value.reason == "NotMergeable"
    assert "merge.with[0].uri: it is a qwen2 model, and the base a llama model" in message
    assert "merge.with[0].uri: it has model.layers.0.self_attn.k_proj.bias" in message
    assert "merge.with[1].uri: it has other shapes: model.layers.0.mlp" in message
    assert "merge.with[2].uri: it lacks model.norm.weight" in message


def test_a_head_of_its_own_is_merged_with_one_that_is_tied(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    untied = tiny_llama(VOCABULARY, tie_word_embeddings=False)
    base_folder = write(tmp_path / "base", untied, tiny_tokenizer)
    tied = write(tmp_path / "tied", tiny_llama(VOCABULARY), tiny_tokenizer)
    head = merge_of(opened(base_folder, tied)).tensor("lm_head.weight")
    assert torch.equal(head, load_file(tied / SINGLE)["model.embed_tokens.weight"])
    with pytest.raises(StageError, match=r"it has lm_head\.weight, which the base lacks"):
        opened(tied, base_folder)


def test_an_adapter_is_merged_by_what_it_changes(
    base_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Two adapters of different ranks: their sum is that of their changes, not of A and B."""
    tensors, folders = load_file(base_folder / SINGLE), []
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for rank in (2, 5):
        model: Any = adapters.attach(
            base.load_base(base_folder, dtype=torch.float32, device=CPU),
            Adapter(lora=Lora(rank=rank)),
            seed=rank,
            tokenizer=tiny_tokenizer,
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(rank))
        folders.append(tmp_path / f"rank {rank}")
        adapters.save(model, folders[-1])
        for name, tensor in model.merge_and_unload().state_dict().items():
            if name in expected:
                expected[name] += tensor - tensors[name]
    merge = merge_of(opened(base_folder, *folders), "taskArithmetic")
    changed = 0
    for name, tensor in expected.items():
        assert torch.allclose(merge.tensor(name), tensor, atol=1e-5), name
        changed += not torch.equal(tensor, tensors[name])
    assert changed == 14


def added(tokenizer: Any, *tokens: str) -> Any:
    own = copy.deepcopy(tokenizer)
    own.add_tokens(list(tokens))
    return own


@pytest.mark.parametrize("with_union", [True, False])
def test_tokens_that_a_model_added_are_kept_in_a_union_and_left_out_without(
    tmp_path: Path, tiny_tokenizer: Any, with_union: bool
) -> None:
    size = len(tiny_tokenizer)
    base_folder = write(tmp_path / "base", tiny_llama(size), tiny_tokenizer)
    one, two = added(tiny_tokenizer, "<x>", "<y>"), added(tiny_tokenizer, "<y>")
    first = write(tmp_path / "one", tiny_llama(size + 2), one, seed=1)
    second = write(tmp_path / "two", tiny_llama(size + 1), two, seed=2)
    found = opened(base_folder, first, second, with_union=with_union)
    rows = merge_of(found).tensor("model.embed_tokens.weight")
    mine, theirs = (
        load_file(each / SINGLE)["model.embed_tokens.weight"] for each in (first, second)
    )
    assert torch.allclose(rows[:size], (mine[:size] + theirs[:size]) / 2)
    assert len(rows) == found.skeleton.config.vocab_size == size + 2 * with_union
    assert len(found.tokenizer) == len(rows)
    if with_union:
        assert found.tokenizer.convert_tokens_to_ids(["<x>", "<y>"]) == [size, size + 1]
        assert torch.allclose(rows[size], mine[size])
        assert torch.allclose(rows[size + 1], (mine[size + 1] + theirs[size]) / 2)


def test_a_model_with_another_tokenizer_is_refused(
    base_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    other = copy.deepcopy(tiny_tokenizer).train_new_from_iterator(
        ["Other words are read."] * 9, 300
    )
    folder = write(tmp_path / "other", tiny_llama(VOCABULARY), other)
    with pytest.raises(StageError, match="its tokenizer is another one") as raised:
        opened(base_folder, folder, with_union=True)
    assert raised.value.reason == "NotMergeable"
