"""The files of a base model, read without loading its weights.

No code of the model's folder is run, no pickle is loaded, and the network is not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuneyard.errors import StageError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FIELD = "Set model.uri to a causal language model: config.json and safetensors, or one .gguf."
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def config_of(path: Path) -> PreTrainedConfig:
    """Return the config of the causal model at `path`. Raises StageError for a model that Tuneyard
    cannot load or refuses to load."""
    if not path.exists():
        raise StageError("ModelMissing", f"there is no model at {path}.", advice=MODEL_FIELD)
    raw = _raw_config(path)
    _refuse_remote_code(path, raw)
    _refuse_adapter(path)
    _refuse_quantized(path, raw)
    config = _folder_config(path)
    require_causal(path, config)
    _require_safetensors(path)
    return config


def _raw_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        raise StageError(
            "ModelIncomplete",
            f"{path} has no config.json; it holds {_listing(path)}.",
            advice=MODEL_FIELD,
        )
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(
            "ModelBroken", f"{file} is not valid JSON: {error}.", advice=MODEL_FIELD
        ) from error
    if not isinstance(value, dict):
        raise StageError("ModelBroken", f"{file} is not a JSON object.", advice=MODEL_FIELD)
    return value


def _listing(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return shown or "nothing"


def _refuse_remote_code(path: Path, raw: dict[str, Any]) -> None:
    """Raise StageError RemoteCode if the model needs classes of its repository, which `auto_map`
    names. If transformers has its own classes for the model's type, those are used instead."""
    if "auto_map" not in raw:
        return
    model_type = str(raw.get("model_type", ""))
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    raise StageError(
        "RemoteCode",
        f"{path}: this model ({model_type or 'without a model_type'}) needs code from its "
        "repository, which Tuneyard does not run.",
        advice="Set model.uri to a model whose architecture is part of transformers.",
    )


def _refuse_adapter(path: Path) -> None:
    """Raise StageError for an adapter. transformers would load the base that the adapter names."""
    if (path / "adapter_config.json").exists():
        raise StageError(
            "AdapterNotModel",
            f"{path} holds an adapter, not a whole model.",
            advice="Set model.uri to the adapter's base, or to the merged model (output.merge).",
        )


def _refuse_quantized(path: Path, raw: dict[str, Any]) -> None:
    quantization = raw.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else ""
        )
        raise StageError(
            "QuantizedModel",
            f"{path} holds quantized weights ({method or quantization}), which can neither be "
            "trained nor merged with an adapter.",
            advice="Set model.uri to the unquantized model; adapter.qlora quantizes it on loading.",
        )


def _folder_config(path: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class raises its own errors
        raise StageError(
            "UnknownArchitecture",
            f"transformers cannot read {path / 'config.json'}: {first_line(error)}.",
            advice=MODEL_FIELD,
        ) from error


def require_causal(path: Path, config: PreTrainedConfig) -> None:
    """Raise StageError unless the config is that of a decoder which predicts the next token."""
    named = next(iter(config.architectures or ()), None)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    causal = known and not getattr(config, "is_encoder_decoder", False)
    if causal and named:
        causal = named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if not causal:
        raise not_causal(path, named or f"a {config.model_type} model")


def not_causal(path: Path, found: str) -> StageError:
    """Return the error for a model that does not predict the next token."""
    return StageError(
        "NotCausal",
        f"{path} holds {found}; Tuneyard needs a decoder that predicts the next token, such as "
        "LlamaForCausalLM or Qwen2ForCausalLM.",
        advice="Set model.uri to a causal language model.",
    )


def _require_safetensors(path: Path) -> None:
    if (path / SINGLE).exists():
        return
    if (path / INDEX).exists():
        missing = sorted(name for name in _shards(path) if not (path / name).exists())
        if missing:
            raise StageError(
                "WeightsMissing",
                f"{path} lacks {len(missing)} of its weight files: {', '.join(missing[:5])}.",
                advice="Fetch the model again.",
            )
        return
    pickles = sorted(child.name for child in path.iterdir() if child.suffix in PICKLES)
    if pickles:
        raise StageError(
            "PickleWeights",
            f"{path} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run "
            "code when they are loaded; Tuneyard does not load them.",
            advice="Convert the model to safetensors, and set model.uri to the result.",
        )
    raise StageError(
        "WeightsMissing",
        f"{path} has no {SINGLE}; it holds {_listing(path)}.",
        advice=MODEL_FIELD,
    )


def _shards(path: Path) -> set[str]:
    try:
        return set(json.loads((path / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StageError(
            "ModelBroken",
            f"{path / INDEX} is not an index of weights: {error}.",
            advice=MODEL_FIELD,
        ) from error


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of the model at `path`, sorted. Raises StageError ModelBroken
    for an index that cannot be read."""
    single = path / SINGLE
    return [single] if single.exists() else [path / name for name in sorted(_shards(path))]


def stored_dtype(path: Path) -> torch.dtype:
    """Return the float type of the model's stored weights: that of the largest tensor in the first
    file. Raises StageError ModelBroken."""
    first = weight_files(path)[0]
    try:
        with safe_open(first, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
            largest = max(slices, key=lambda s: torch.Size(s.get_shape()).numel())
            return DTYPES.get(largest.get_dtype(), torch.float32)
    except (SafetensorError, OSError, ValueError) as error:
        raise StageError(
            "ModelBroken", f"{first} cannot be read: {error}.", advice="Fetch the model again."
        ) from error


def license_of(path: Path) -> str | None:
    """Return the base model's license: an SPDX-like id from the README's front matter, else the
    first line of a LICENSE file. None: the files name no license."""
    return _front_matter_license(path / "README.md") or _license_file(path)


def _front_matter_license(readme: Path) -> str | None:
    if not readme.is_file():
        return None
    text = readme.read_text(errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        front = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict):
        return None
    name = front.get("license_name") if front.get("license") == "other" else None
    found = name or front.get("license")
    return str(found) if found else None


def _license_file(path: Path) -> str | None:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        if (path / name).is_file():
            lines = (path / name).read_text(errors="replace").splitlines()
            return next((line.strip(" #") for line in lines if line.strip(" #")), None)
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, for a one-line message."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".")[:300] if text else type(error).__name__


AUTO_LENGTH = 1024
"""Tokens of a sequence if maxLength is auto and the model's context is not shorter."""
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_NO_LIMIT = 1 << 30  # a tokenizer without a limit has a model_max_length of 1e30


def sequence_limit(
    model: Path, tokenizer: PreTrainedTokenizerBase, wanted: int | Literal["auto"], field: str
) -> int:
    """Return the most tokens of a row. `wanted`: the value of the manifest's `field`. Raises
    StageError MaxLength if it exceeds the model's context."""
    context = context_length(config_of(model))
    if wanted == "auto":
        if context is None and tokenizer.model_max_length < _NO_LIMIT:
            context = tokenizer.model_max_length
        return min(AUTO_LENGTH, context or AUTO_LENGTH)
    if context is not None and wanted > context:
        raise StageError(
            "MaxLength",
            f"maxLength is {wanted} tokens, and the model's context holds {context}.",
            advice=f"Set {field} to {context} or less.",
        )
    return wanted


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the most positions that a model's config allows; None: it names no limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _CONTEXT_FIELDS]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)
