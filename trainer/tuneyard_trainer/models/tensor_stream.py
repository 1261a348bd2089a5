"""A safetensors file that is written one tensor after the other.

`safetensors.torch.save_file` takes all tensors at once. The format needs no more than their shapes
beforehand (github.com/huggingface/safetensors, "Format"): the length of a JSON header in 8 bytes,
the header, and the tensors' bytes, little-endian, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class TensorStream:
    """The writer of one file."""

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Begin the file. `shapes`: the data type and the shape of each tensor, in the order in
        which they will be written."""
        header, end = dict[str, object](), 0
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            offsets = [start, end]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(shapes)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which is on the CPU. Raises ValueError if it is not its turn."""
        if not self._left or self._left[0] != name:
            raise ValueError(f"{name} is not the next of {self._left[:1]}")
        del self._left[0]
        flat = tensor.contiguous().reshape(-1)
        self._file.write(memoryview(flat.view(torch.uint8).numpy()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file. Raises ValueError if tensors are missing."""
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were not written: {self._left[:3]}")
