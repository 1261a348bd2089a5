"""Whole models are merged as mergekit does it, from their files, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuneyard.api.merging import MergeException, MergeMethod, MergePart, MergeRecipe
from tuneyard.errors import StageError
from tuneyard_trainer.merging import merge as merging
from tuneyard_trainer.merging.merge import Merge, fits
from tuneyard_trainer.merging.sources import WholeModel
from tuneyard_trainer.models.weight_files import tensors_in

ORACLE = Path(__file__).parent / "mergekit"
"""Of `scripts/merge_oracle.py`, with its weights, densities and scale."""
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.4}


def source(path: Path, key: str = "") -> WholeModel:
    tensors = {tensor.name: tensor for tensor in tensors_in(path)}
    return WholeModel(path.stem, key or path.stem, tensors)


def merge_of(
    method: MergeMethod, folder: Path = ORACLE, weights: Mapping[str, float] = WEIGHTS, **more: Any
) -> Merge:
    models = [
        (source(folder / f"{name}.safetensors"), MergePart(weight=weight))
        for name, weight in weights.items()
    ]
    base = source(folder / "base.safetensors")
    recipe = MergeRecipe.model_validate({"method": method, "density": 1.0} | more)
    return Merge(recipe, models, base, base.specs)


def merged(merge: Merge) -> dict[str, Tensor]:
    return {name: merge.tensor(name) for name in merge.specs}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", {}),
        ("slerp", {"weights": {"a": 0.7, "b": 0.3}}),
        ("taskArithmetic", {"scale": 0.8}),
        ("ties", {"scale": 0.8, "density": 0.35}),
        ("dareLinear", {"scale": 0.8}),
        ("dareTies", {"scale": 0.8}),
    ],
)
@pytest.mark.parametrize("block", [16, merging.BLOCK_VALUES])
def test_a_merge_equals_that_of_mergekit(
    method: MergeMethod, more: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK_VALUES", block)
    expected = load_file(ORACLE / f"{method}.safetensors")
    found = merged(merge_of(method, **more))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name


def test_a_merge_writes_what_it_computes_in_the_type_of_the_result(tmp_path: Path) -> None:
    merge = merge_of("ties", density=0.5)
    half = {name: spec.cast(torch.bfloat16) for name, spec in merge.specs.items()}
    told: list[str] = []
    written = replace(merge, specs=half)
    written.write(tmp_path, told.append)
    found = load_file(tmp_path / "model.safetensors")
    assert sorted(told) == sorted(found)
    for name, tensor in merged(merge).items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_exceptions_give_layers_and_modules_weights_of_their_own() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    merge = merge_of("linear", weights={"a": 1.0, "b": 1.0})
    other = MergePart(
        weight=1.0, exceptions=[MergeException(layers="0", modules=["mlp"], weight=0)]
    )
    changed = replace(merge, models=[merge.models[0], (merge.models[1][0], other)])
    a, b = (load_file(ORACLE / f"{name}.safetensors") for name in ("a", "b"))
    assert torch.equal(changed.tensor(names[0]), a[names[0]])
    assert torch.allclose(changed.tensor(names[1]), (a[names[1]] + b[names[1]]) / 2)


@pytest.mark.parametrize(
    ("exception", "tensor", "expected"),
    [
        ({"layers": "0-3,8"}, "model.layers.8.mlp.up_proj.weight", True),
        ({"layers": "0-3,8"}, "model.layers.4.mlp.up_proj.weight", False),
        ({"layers": "0-3"}, "model.embed_tokens.weight", False),
        ({"modules": ["embed_tokens"]}, "model.embed_tokens.weight", True),
        ({"modules": ["self_attn.q_proj"]}, "model.layers.1.self_attn.q_proj.weight", True),
        ({"modules": ["proj"]}, "model.layers.1.self_attn.q_proj.weight", False),
        ({"layers": "1", "modules": ["mlp"]}, "model.layers.1.self_attn.q_proj.weight", False),
    ],
)
def test_an_exception_fits_tensors_by_layer_and_module(
    exception: dict[str, Any], tensor: str, expected: bool
) -> None:
    assert fits(MergeException.model_validate(exception), tensor) is expected


def test_the_draws_of_dare_depend_neither_on_the_order_of_models_nor_on_files() -> None:
    there = merged(merge_of("dareTies", density=0.5))
    back = merged(merge_of("dareTies", density=0.5, weights=dict(reversed(WEIGHTS.items()))))
    assert all(torch.allclose(there[name], back[name], atol=1e-6) for name in there)
    other = merged(merge_of("dareTies", density=0.5, seed=1))
    assert not torch.allclose(there["lm_head.weight"], other["lm_head.weight"], atol=1e-6)


def test_a_weight_that_is_no_number_is_named_with_its_model(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        tensors = load_file(ORACLE / f"{name}.safetensors")
        if name == "b":
            tensors["lm_head.weight"][3, 2] = float("nan")
        save_file(tensors, tmp_path / f"{name}.safetensors")
    merge = merge_of("ties", tmp_path, {"a": 1.0, "b": 1.0})
    with pytest.raises(StageError, match=r"b: lm_head\.weight holds nan") as raised:
        merge.tensor("lm_head.weight")
    assert raised.value.reason == "WeightsNotFinite"


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_weights_that_add_up_to_nothing_are_refused(method: MergeMethod) -> None:
    merge = merge_of(method, weights={"a": 1.0, "b": -1.0})
    with pytest.raises(StageError, match="add up to 0"):
        merge.tensor("lm_head.weight")


def test_integers_are_kept_where_all_models_agree_and_refused_elsewhere(tmp_path: Path) -> None:
    for name, value in (("base", 1), ("a", 1), ("b", 1), ("c", 2)):
        save_file({"position_ids": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    agreed = merge_of("linear", tmp_path, {"a": 1.0, "b": 1.0}).tensor("position_ids")
    assert torch.equal(agreed, torch.tensor([1]))
    with pytest.raises(StageError, match="c: position_ids has no fractions"):
        merge_of("linear", tmp_path, {"a": 1.0, "c": 1.0}).tensor("position_ids")
