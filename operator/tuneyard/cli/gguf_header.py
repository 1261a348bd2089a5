"""The header of a GGUF file, as the fields of a config.json.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Only the names
of tensors and the numbers of the metadata are kept.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, Final

from tuneyard.api.model_config import UnknownModelError

NUMBERS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""The types of numbers in metadata, for `struct`."""
STRING, ARRAY = 8, 9
LONGEST = 1 << 26
"""Bytes of a string, or items of an array, beyond which a header counts as damaged."""
FIELDS: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Metadata of models of Llama's family, and their fields in config.json."""


def config_of(path: Path) -> dict[str, Any]:
    """Return the config of the model in a GGUF file. Raises UnknownModelError and OSError.

    The trainer unpacks the weights to float32, whatever the file holds.
    """
    try:
        with path.open("rb") as file:
            metadata, tensors = _header(file)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, RecursionError) as error:
        raise UnknownModelError(f"{path.name} is no GGUF file that can be read") from error
    kind = str(metadata.get("general.architecture"))
    config = {
        name: metadata[f"{kind}.{key}"]
        for key, name in FIELDS.items()
        if f"{kind}.{key}" in metadata
    }
    if "vocab_size" not in config and "tokenizer.ggml.tokens" in metadata:
        config["vocab_size"] = metadata["tokenizer.ggml.tokens"]
    tied = "output.weight" not in tensors
    return {"model_type": kind, "dtype": "float32", "tie_word_embeddings": tied, **config}


def _header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Return the metadata, arrays by their length, and the names of the tensors."""
    if file.read(4) != b"GGUF":
        raise ValueError("no magic number")
    version, num_tensors, num_fields = _number(file, "<I"), _number(file, "<Q"), _number(file, "<Q")
    if version not in (2, 3) or num_tensors > LONGEST or num_fields > LONGEST:
        raise ValueError("not a version that is known")
    metadata = {_string(file): _value(file, _number(file, "<I")) for _ in range(num_fields)}
    names = set()
    for _ in range(num_tensors):
        names.add(_string(file))
        file.read(8 * _number(file, "<I") + 12)  # the sizes, the type and the place
    return metadata, names


def _number(file: BinaryIO, kind: str) -> Any:
    (number,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return number


def _string(file: BinaryIO) -> str:
    size = _number(file, "<Q")
    if size > LONGEST:
        raise ValueError("a string of this size")
    return file.read(size).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, NUMBERS[kind])
    item, count = _number(file, "<I"), _number(file, "<Q")
    if count > LONGEST:
        raise ValueError("an array of this size")
    if item in NUMBERS:
        file.read(count * struct.calcsize(NUMBERS[item]))
        return count
    for _ in range(count):
        _value(file, item)
    return count
