"""Rows of embeddings are merged by token, whatever their ids in each model."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tuneyard_trainer.merging.rows import MISSING, arrange, runs, union
from tuneyard_trainer.merging.sources import WholeModel
from tuneyard_trainer.models.weight_files import tensors_in

NAMES = frozenset({"embed"})


def model(folder: Path, name: str, rows: list[float]) -> WholeModel:
    """Write and open a model whose embeddings have one number each."""
    path = folder / f"{name}.safetensors"
    save_file({"embed": torch.tensor(rows)[:, None], "norm": torch.tensor([9.0])}, path)
    return WholeModel(name, name, {tensor.name: tensor for tensor in tensors_in(path)})


def rows_of(source: object, count: int) -> list[float]:
    read = source.read("embed", 0, count, 0)  # type: ignore[attr-defined]
    return [float(value) for value in read[:, 0]]


def test_a_union_keeps_the_ids_of_the_base_and_appends_what_others_added() -> None:
    base, one, two = {"a": 0, "b": 1}, {"a": 0, "b": 1, "x": 2}, {"b": 0, "y": 5, "x": 3}
    assert union(base, [one, two]) == {"a": 0, "b": 1, "x": 2, "y": 3}


def test_rows_follow_their_tokens_and_the_base_fills_what_a_model_lacks(tmp_path: Path) -> None:
    base = model(tmp_path, "base", [1.0, 2.0, 3.0])
    other = model(tmp_path, "other", [20.0, 10.0])  # it has b before a, and no c
    ids = {"a": 0, "b": 1, "c": 2}
    whole, (found,) = arrange(base, ids, [other], [{"b": 0, "a": 1}], NAMES, ids)
    assert rows_of(whole, 3) == [1.0, 2.0, 3.0]
    assert rows_of(found, 3) == [10.0, 20.0, 3.0]
    assert {name: spec.shape for name, spec in found.specs.items()} == {
        "embed": (3, 1),
        "norm": (1,),
    }
    assert found.read("norm", 0, 1, 0).tolist() == [9.0]


def test_a_token_that_the_base_lacks_has_the_mean_of_the_models_that_have_it(
    tmp_path: Path,
) -> None:
    base = model(tmp_path, "base", [1.0, 7.0])  # its second row belongs to no token
    models = [
        model(tmp_path, "one", [2.0, 4.0]),
        model(tmp_path, "two", [3.0, 6.0]),
        model(tmp_path, "three", [5.0]),
    ]
    vocabularies = [{"a": 0, "x": 1}, {"a": 0, "x": 1}, {"a": 0}]
    ids = union({"a": 0}, vocabularies)
    whole, found = arrange(base, {"a": 0}, models, vocabularies, NAMES, ids)
    assert rows_of(whole, 2) == [1.0, 5.0]
    assert [rows_of(each, 2) for each in found] == [[2.0, 4.0], [3.0, 6.0], [5.0, 5.0]]


def test_rows_without_a_token_are_each_model_s_own_if_it_has_no_token_there(
    tmp_path: Path,
) -> None:
    base = model(tmp_path, "base", [1.0, 7.0, 8.0])
    other = model(tmp_path, "other", [2.0, 50.0])
    added = model(tmp_path, "added", [3.0, 4.0, 60.0])
    whole, found = arrange(
        base, {"a": 0}, [other, added], [{"a": 0}, {"a": 0, "x": 1}], NAMES, {"a": 0}
    )
    assert rows_of(whole, 3) == [1.0, 7.0, 8.0]
    assert [rows_of(each, 3) for each in found] == [[2.0, 50.0, 8.0], [3.0, 7.0, 60.0]]


@given(st.lists(st.integers(-1, 6), max_size=20), st.integers(0, 5))
def test_runs_cover_all_places_in_order(places: list[int], first: int) -> None:
    seen = []
    for row, place, length in runs(places, first):
        assert row == first + len(seen)
        assert length >= 1
        seen += [MISSING] * length if place == MISSING else [*range(place, place + length)]
        assert place != MISSING or length == 1
    assert seen == places
