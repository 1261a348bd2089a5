"""Weight files are written one tensor at a time, and every wrong byte in them is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.errors import StageError
from tuneyard_trainer.models import weight_files
from tuneyard_trainer.models.base import load_base
from tuneyard_trainer.models.files import INDEX, SINGLE
from tuneyard_trainer.models.weight_files import (
    CODES,
    TensorSpec,
    require_finite,
    stored_tensors,
    tensors_in,
    write,
    written_mismatch,
)


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def of_every_type() -> dict[str, Tensor]:
    """Return a tensor of each type, an empty one, a scalar and one that is not contiguous."""
    values = torch.arange(1, 7).reshape(2, 3)
    tensors = {f"{code} é": values.to(dtype) for dtype, code in CODES.items()}
    return tensors | {"none": torch.empty(0, 4), "one": torch.tensor(1.5), "turned": values.T}


def test_a_written_file_has_the_bytes_that_safetensors_itself_writes(tmp_path: Path) -> None:
    tensors = of_every_type()
    write(tmp_path, specs_of(tensors), tensors.__getitem__)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "expected").read_bytes()


def test_each_tensor_is_asked_for_once_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(3)}
    asked: list[str] = []

    def tensor_of(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    write(tmp_path, specs_of(tensors), tensor_of)
    assert asked == ["b", "a", "c"]


def test_a_model_in_several_files_loads_and_no_file_exceeds_the_limit(tmp_path: Path) -> None:
    model = tiny_llama(VOCABULARY, tie_word_embeddings=False)
    tensors = model.state_dict()
    limit = 20_000
    model.config.save_pretrained(tmp_path)
    write(tmp_path, specs_of(tensors), tensors.__getitem__, shard_bytes=limit)
    assert not (tmp_path / SINGLE).exists()
    for path in tmp_path.glob("*.safetensors"):
        held = load_file(path)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    read = load_base(tmp_path, dtype=torch.float32, device=torch.device("cpu")).state_dict()
    assert all(torch.equal(tensors[name], read[name]) for name in tensors)


def test_a_tensor_other_than_announced_is_not_written(tmp_path: Path) -> None:
    announced = {"a": TensorSpec((2, 3), torch.float32)}
    for wrong in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float16)):
        with pytest.raises(ValueError, match="a is"):
            write(tmp_path, announced, {"a": wrong}.__getitem__)


@pytest.mark.parametrize("values", [weight_files._AT_A_TIME, 7, 1])
def test_a_cast_in_parts_equals_a_cast_at_once(
    values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "_AT_A_TIME", values)
    tensors = {"matrix": torch.randn(5, 6), "scalar": torch.tensor(0.1), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / SINGLE)
    for name, stored in stored_tensors(tmp_path).items():
        assert torch.equal(stored.read(), tensors[name])
        assert torch.equal(stored.read(torch.bfloat16), tensors[name].bfloat16())


def test_a_part_of_rows_or_columns_is_read(tmp_path: Path) -> None:
    matrix = torch.randn(5, 6)
    save_file({"a": matrix}, tmp_path / SINGLE)
    stored = stored_tensors(tmp_path)["a"]
    assert torch.equal(stored.read_part(1, 4), matrix[1:4])
    assert torch.equal(stored.read_part(2, 6, dim=1), matrix[:, 2:6])


# ---- wrong files --------------------------------------------------------------------------------


def flip_a_bit(at: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(bytes(data))

    return flip


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return changed


WRONG = {
    "the last byte": (flip_a_bit(-1), "b differs"),
    "the first byte of the tensors": (flip_a_bit(-4 * 8 - 2 * 8), "a differs"),
    "the length of the header": (flip_a_bit(0), "cannot be read"),
    "a truncated file": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
    "no file": (lambda path: path.unlink(), "not an index"),
    "a missing tensor": (rewrite(lambda tensors: tensors.pop("a")), "missing .*: a"),
    "another tensor": (rewrite(lambda tensors: tensors.update(c=torch.ones(1))), "never .*: c"),
    "another shape": (rewrite(lambda tensors: tensors.update(a=torch.ones(8))), "a has another"),
    "another type": (
        rewrite(lambda tensors: tensors.update(a=torch.ones(2, dtype=torch.int64))),
        "a has another",
    ),
    "negative zero": (rewrite(lambda tensors: tensors.update(b=-torch.zeros(8))), "b differs"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_any_difference_in_a_written_file_is_found(wrong: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.float64), "b": torch.zeros(8)}
    digests = write(tmp_path, specs_of(tensors), tensors.__getitem__)
    assert written_mismatch(tmp_path, specs_of(tensors), digests) is None
    damage, message = WRONG[wrong]
    damage(tmp_path / SINGLE)
    mismatch = written_mismatch(tmp_path, specs_of(tensors), digests)
    assert mismatch
    assert re.search(message, mismatch)


def test_an_index_that_names_the_wrong_file_or_tensor_is_found(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    digests = write(tmp_path, specs_of(tensors), tensors.__getitem__, shard_bytes=16)
    assert written_mismatch(tmp_path, specs_of(tensors), digests) is None
    right = json.loads((tmp_path / INDEX).read_text())
    first, second = right["weight_map"]["a"], right["weight_map"]["b"]
    for places in ({"a": first}, {"a": second, "b": first}, {"a": first, "b": second, "c": first}):
        (tmp_path / INDEX).write_text(json.dumps(right | {"weight_map": places}))
        assert written_mismatch(tmp_path, specs_of(tensors), digests)


def test_a_tensor_in_two_files_is_read_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    for value, file in enumerate(("one.safetensors", "two.safetensors")):
        save_file({"a": torch.full((2,), float(value))}, tmp_path / file)
    for value, file in enumerate(("one.safetensors", "two.safetensors")):
        places = {"a": file, "b": "one.safetensors", "c": "two.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        assert torch.equal(stored_tensors(tmp_path)["a"].read(), torch.full((2,), float(value)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(StageError, match=f"the trained w holds {wrong} in bfloat16") as caught:
        require_finite("w", torch.tensor([1.0, wrong], dtype=torch.bfloat16))
    assert caught.value.reason == "WeightsNotFinite"
    require_finite("w", torch.tensor([1.0, -1e30]))
    require_finite("ids", torch.tensor([1, 2]))


def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path: Path) -> None:
    """A merge reads a tensor in hundreds of parts: each must not cost the whole tensor."""
    save_file({"a": torch.arange(1 << 20).reshape(1024, 1024)}, tmp_path / "a.safetensors")
    (stored,) = tensors_in(tmp_path / "a.safetensors")

    def characters_read() -> int:
        found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
        return int(found[1]) if found else 0

    before = characters_read()
    part = stored.read_part(3, 5)
    assert characters_read() - before < stored.spec.num_bytes / 100
    assert torch.equal(part, torch.arange(3 * 1024, 5 * 1024).reshape(2, 1024))
    assert torch.equal(stored.read_part(3, 5, 1)[7], torch.tensor([7 * 1024 + 3, 7 * 1024 + 4]))
