"""Unpack a GGUF file into an ordinary model folder, once.

A stage reads the weights, config, tokenizer, license and float type of a GGUF model from the
unpacked folder, which loads in under a second. Unpacking SmolLM2-135M takes 15 s of processor time.
`gguf.GGUFReader` takes 10 s of these: it parses the header, which holds 49,152 tokens, four times:
for the license, the config, the weights and the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import require_causal
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.downloads import keep, partial_folder
from tuneyard_trainer.storage.files import cache_lock


def unpacked(path: Path, cache_dir: Path) -> Path:
    """Return the model folder of a `.gguf` file, and write it on the first call.

    The folder is named by the file's content digest, so a changed file is unpacked anew. Raises
    StageError.
    """
    digest = sources.digest_of([path], cache_dir=cache_dir)
    final = cache_dir / "gguf" / digest.removeprefix("sha256:")[:32]
    if final.is_dir():
        return final
    with cache_lock(final):
        if not final.is_dir():
            with partial_folder(final.parent) as partial:
                _unpack(path, partial)
                keep(partial, final)
    return final


def _unpack(path: Path, folder: Path) -> None:
    """Write the model as float32 safetensors, with its tokenizer and its license."""
    file: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with base.explained(path), base.quiet():
        license_name = _license(path)
        config = AutoConfig.from_pretrained(path.parent, **file)
        require_causal(path, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            dtype=torch.float32,
            # transformers neither trains nor saves a model that it takes for quantized.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **file,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **file)
    model, info = loaded
    base.require_complete(path, info)
    base.save_model(model, folder)
    tokenizer.save_pretrained(folder)
    if license_name:  # no other file of the folder names it
        (folder / "README.md").write_text(f"---\nlicense: {json.dumps(license_name)}\n---\n")


def _license(path: Path) -> str | None:
    field = gguf.GGUFReader(path).get_field("general.license")
    value = field.contents() if field else None
    return value if isinstance(value, str) and value.strip() else None
