"""The facts of a plan's model, where its files can be read on this machine without torch."""

from __future__ import annotations

import json
from pathlib import Path

from tuneyard.api.model_config import UnknownModelError, facts_of
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.packages import packaged_file
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.cli import gguf_header

HOW = "pass its config.json with --model-config FILE"


def model_facts(plan: Plan, base_dir: Path, config: Path | None) -> ModelFacts:
    """Return the facts of the model that a plan's stages start from.

    `base_dir`: the folder of the manifest. `config`: a config.json that is read instead. Raises
    UnknownModelError with the reason and what to do.
    """
    if config is not None:
        return _read(config)
    source = next(
        (
            stage.inputs["model"]
            for stage in plan.stages
            if isinstance(stage.inputs.get("model"), SourceInput)
        ),
        None,
    )
    uri = source.uri if isinstance(source, SourceInput) else ""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        path = base_dir / rest
    elif scheme == "pkg":
        try:
            path = packaged_file(rest)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise UnknownModelError(f"{error}: {HOW}") from error
    else:
        raise UnknownModelError(f"{uri} is not on this machine: {HOW}")
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UnknownModelError(f"{uri} has no file {path.name} on this machine: {HOW}")
    return _read(path)


def _read(path: Path) -> ModelFacts:
    try:
        if path.suffix == ".gguf":
            return facts_of(gguf_header.config_of(path))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UnknownModelError):
            raise
        raise UnknownModelError(f"{path} cannot be read as JSON: {HOW}") from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"{path} is not a JSON object: {HOW}")
    return facts_of(config)
