"""Unpacks a GGUF file into an ordinary model folder, once.

Reading a GGUF's tokenizer and dequantizing its tensors takes many seconds, and every stage would
pay them; the unpacked folder (float32 safetensors, tokenizer, config) loads in under one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch

from tuneyard_trainer.models import base, files
from tuneyard_trainer.storage import sources


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The folder of a `.gguf` file, made if it is not there yet. It is named by the file's content
    digest, so a changed file is unpacked anew."""
    digest = sources.digest_of([path], cache_dir=cache_dir)
    final = cache_dir / "gguf" / digest.removeprefix("sha256:")[:32]
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=".partial-"))
    try:
        model = base.load_base(path, dtype=torch.float32, device=torch.device("cpu"))
        base.save_model(model, partial)
        base.load_tokenizer(path).save_pretrained(partial)
        if licence := files.license_of(path):  # which nothing else in the folder would name
            (partial / "README.md").write_text(f"---\nlicense: {json.dumps(licence)}\n---\n")
        try:
            partial.rename(final)
        except OSError:  # another process was faster
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
