"""The safetensors files of a model, read and written one tensor at a time.

Memory never holds more of a model than the tensor at hand. safetensors' own writer takes all
tensors of a file at once, so `write` writes the format itself: the length of the header in 8 bytes,
the header in JSON, the tensors' bytes (https://github.com/huggingface/safetensors#format). Its
files equal those of safetensors to the byte. Everything is read by safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuneyard.errors import StageError
from tuneyard_trainer.models.base import read_back_mismatch
from tuneyard_trainer.models.files import INDEX, SINGLE, first_line, weight_files

SHARD_BYTES = 5_000_000_000
"""Largest size of a file with more than one tensor: the size that the Hugging Face Hub recommended
for years, so every loader and object store takes it."""

CODES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of types, in the order in which it writes the tensors of a file."""
DTYPES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}


_AT_A_TIME = 1 << 22  # values that are cast or checked at a time: 16 MiB in float32


@dataclass(frozen=True)
class TensorSpec:
    """The shape and the type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The tensor's size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> TensorSpec:
        """Return the spec after a cast to `dtype`, which keeps integers and booleans."""
        return TensorSpec(self.shape, dtype) if self.dtype.is_floating_point else self


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    name: str
    spec: TensorSpec

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the whole tensor, cast to `dtype` (None: its own) a part at a time. Raises
        StageError ModelBroken."""
        if dtype in (None, self.spec.dtype) or not self.spec.shape:
            with _opened(self.file) as file:
                whole: Tensor = file.get_tensor(self.name).to(dtype)
                return whole
        rows = self.spec.shape[0]
        result = torch.empty(self.spec.shape, dtype=dtype)
        step = max(1, _AT_A_TIME * rows // max(1, result.numel()))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            result[start:stop] = self.read_part(start, stop)
        return result

    def read_part(self, start: int, stop: int, dim: int = 0) -> Tensor:
        """Read the indices from `start` to `stop` of dimension 0 or 1, and nothing else of the
        tensor if `dim` is 0. Raises StageError ModelBroken.

        From a memory-mapped file: safetensors' `pread` reads a whole tensor for each of its parts.
        The part is copied, so that nothing stays mapped.
        """
        with _opened(self.file, mapped=True) as file:
            whole = file.get_slice(self.name)
            part: Tensor = whole[start:stop] if dim == 0 else whole[:, start:stop]
            return part.clone(memory_format=torch.contiguous_format)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a model's weight files by name, from the files' headers alone. If two
    files hold a tensor, the index decides. Raises StageError ModelBroken."""
    paths, places = weight_files(folder), _places(folder)
    return {
        tensor.name: tensor
        for path in paths
        for tensor in tensors_in(path)
        if places.get(tensor.name, path.name) == path.name
    }


def _places(folder: Path) -> dict[str, str]:
    """Return the file of each tensor according to the index; {}: there is no index."""
    if (folder / SINGLE).exists():
        return {}
    places: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return places


def tensors_in(path: Path) -> list[StoredTensor]:
    """Return the tensors of one file, by name in order. Raises StageError ModelBroken."""
    tensors = []
    with _opened(path) as file:
        for name in sorted(file.keys()):
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise _broken(path, f"{name} has the unknown type {header.get_dtype()}")
            spec = TensorSpec(tuple(header.get_shape()), DTYPES[header.get_dtype()])
            tensors.append(StoredTensor(path, name, spec))
    return tensors


@contextmanager
def _opened(path: Path, *, mapped: bool = False) -> Iterator[Any]:
    """Open a safetensors file, whose errors become StageErrors.

    `mapped`: map the file into memory. Its pages count as memory of the process while they are
    mapped, and a file of the base may hold the whole model; without it, what is asked for is
    copied.
    """
    how = {} if mapped else {"backend": "pread"}
    try:
        with safe_open(path, framework="pt", **how) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _broken(path, first_line(error)) from error


def _broken(path: Path, what: str) -> StageError:
    return StageError(
        "ModelBroken", f"{path} cannot be read: {what}.", advice="Fetch the model again."
    )


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise StageError WeightsNotFinite for NaN and infinite values."""
    if not tensor.is_floating_point():
        return
    for part in tensor.reshape(-1).split(_AT_A_TIME):
        if not bool(part.isfinite().all()):
            wrong = part[~part.isfinite()][0]
            raise StageError(
                "WeightsNotFinite",
                f"the trained {name} holds {float(wrong)} in {str(tensor.dtype)[6:]}.",
                advice="Lower training.learningRate. If the base is in float16, whose largest "
                "number is 65,504, set model.uri to a base in bfloat16.",
            )


# ---- writing ------------------------------------------------------------------------------------


def write(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write the tensors into `folder` as `model.safetensors`, or as several files of at most
    `shard_bytes` and an index. Return each tensor's SHA-256 by name.

    `tensor_of`: returns a tensor by its name; it is called once for each name, and its result is
    written before the next call. A tensor above `shard_bytes` has a file of its own. Raises
    ValueError for a tensor that differs from its spec.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = _split(specs, shard_bytes)
    digests: dict[str, str] = {}
    for name, names in split.filename_to_tensors.items():
        digests |= write_file(folder / name, {n: specs[n] for n in names}, tensor_of)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _split(specs: Mapping[str, TensorSpec], shard_bytes: int) -> StateDictSplit:
    return split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=shard_bytes,
    )


def writing_order(specs: Mapping[str, TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Return the names in the order in which `write` asks for the tensors."""
    files = _split(specs, shard_bytes).filename_to_tensors.values()
    return [name for names in files for name in order_in_file({n: specs[n] for n in names})]


def order_in_file(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names in the order in which `write_file` asks for the tensors."""
    order = list(CODES)
    return sorted(specs, key=lambda name: (order.index(specs[name].dtype), name))


def write_file(
    path: Path, specs: Mapping[str, TensorSpec], tensor_of: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write the tensors into one file, as `write` does. Return each tensor's SHA-256 by name."""
    names, digests = order_in_file(specs), {}
    with path.open("wb") as file:
        file.write(_header({name: specs[name] for name in names}))
        for name in names:
            tensor = tensor_of(name)
            if TensorSpec(tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: {specs[name]}")
            data = _bytes(tensor)
            digests[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
    return digests


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the start of a file whose tensors follow in the order of `specs`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        header[name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes in row-major order; a contiguous tensor is not copied."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def write_checked(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Do what `write` does, read the files back and compare every bit.

    Raises StageError ExportMismatch if anything differs.
    """
    digests = write(folder, specs, tensor_of, shard_bytes=shard_bytes)
    if mismatch := written_mismatch(folder, specs, digests):
        raise read_back_mismatch(
            "ExportMismatch", f"the model read back differs from the one in memory: {mismatch}."
        )


def written_mismatch(
    folder: Path, specs: Mapping[str, TensorSpec], digests: Mapping[str, str]
) -> str | None:
    """Read the tensors in `folder` one at a time. Return what differs from the written ones: a name
    that is missing or that nobody wrote, a shape, a type or any bit. None: nothing differs.

    `digests`: the result of `write`.
    """
    try:
        found = stored_tensors(folder)
        if odd := sorted(specs.keys() ^ found.keys()):
            return f"{len(odd)} tensors are missing or were never written: {', '.join(odd[:3])}"
        for name, tensor in found.items():
            if tensor.spec != specs[name]:
                return f"{name} has another shape or type: {tensor.spec}, not {specs[name]}"
            if hashlib.sha256(_bytes(tensor.read())).hexdigest() != digests[name]:
                return f"{name} differs"
        if (places := _places(folder)) and places.keys() != specs.keys():
            return "the index names other tensors"
    except StageError as error:
        return str(error)
    return None
