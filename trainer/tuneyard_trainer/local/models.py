"""Models that a command names."""

from __future__ import annotations

from pathlib import Path

from tuneyard.api.plan import SourceInput
from tuneyard_trainer.local.run import cache_folder
from tuneyard_trainer.models.gguf_unpack import unpacked
from tuneyard_trainer.storage import sources


def model_folder(model: str, option: str = "--model") -> Path:
    """Return the folder of a model. `model`: a folder or a URI, which is fetched. `option`: of the
    command, for messages. Raises StageError."""
    if "://" not in model:
        return Path(model)
    cache = cache_folder()
    source = SourceInput(uri=model, path=option)
    path = sources.fetch(source, base_dir=Path.cwd(), cache_dir=cache, kind="model")
    return unpacked(path, cache) if path.suffix.lower() == ".gguf" else path
