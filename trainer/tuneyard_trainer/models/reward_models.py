"""Reward models: a causal model's layers with one linear head, `score`, on the last token.

On disk each is a plain sequence classifier with one output and its tokenizer beside it, whatever it
was trained with, so that anything which reads classifiers reads it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuneyard.api.adapters import Adapter, Qlora
from tuneyard.api.stage_settings import LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, policies
from tuneyard_trainer.models.base import keep_nf4_layout, nf4, quiet, save_model, set_dropout
from tuneyard_trainer.models.files import config_of, first_line, stored_dtype
from tuneyard_trainer.models.layers import freeze
from tuneyard_trainer.storage.files import disk_error

HEAD = "score.weight"


def start(inputs: Mapping[str, Path], spare: Path) -> Path:
    """The folder of the causal model that a reward model starts from: `model`, or what `tuned` made
    of it, merged into `spare` where that is an adapter."""
    tuned = inputs["tuned"] / policies.WEIGHTS if "tuned" in inputs else None
    if tuned is None:
        return inputs["model"]
    if not (tuned / adapters.CONFIG).exists():
        return tuned
    shutil.rmtree(spare, ignore_errors=True)
    merged = policies.merged(inputs, torch.float32, torch.device("cpu"))
    nn.Module.to(merged, stored_dtype(inputs["model"]))  # in place
    save_model(merged, spare)
    return spare


def fresh(
    folder: Path,
    adapter: Adapter | None,
    loop: LoopSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
) -> nn.Module:
    """A reward model to train, its head as `loop.seed` has it. Trained parameters are float32."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(loop.seed)
        config = config_of(folder)
        if loop.dropout is not None:
            set_dropout(folder, config, loop.dropout)
        model, missing = _load(
            folder,
            config,
            dtype=precision if adapter else torch.float32,
            device=device,
            quantize=adapter.qlora if adapter else None,
        )
    if missing - {HEAD}:
        raise _incomplete(folder, missing - {HEAD})
    model.config.pad_token_id = padding(tokenizer)
    if adapter:
        trained = adapters.attach_scorer(model, adapter, seed=loop.seed)
        nn.Module.float(trained.get_submodule("base_model.model.score"))
        return trained
    model.requires_grad_(True)
    if loop.freeze:
        freeze(model, loop.freeze)
    return model


def is_scorer(folder: Path) -> bool:
    """Whether a folder of weights is a sequence classifier's."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    named = config.get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in named)


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A whole reward model, in evaluation mode. Raises StageError RewardHeadMissing where it was
    never trained as one."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model, missing = _load(folder, config, dtype=dtype, device=device)
    if HEAD in missing:
        raise StageError(
            "RewardHeadMissing",
            f"{folder} has no trained head, and its scores would be random.",
            advice="Set rewardModel.model.uri to a trained sequence classifier with one output.",
        )
    if missing:
        raise _incomplete(folder, missing)
    return model.eval().requires_grad_(False)


def save(model: nn.Module, start: Path, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Writes a trained reward model whole, in `dtype`; returns what was written, in memory.

    An adapter is merged into the layers that it was trained on, in their original precision: under
    QLoRA they were a 4-bit copy."""
    whole: Any = model
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / "adapter"))
            trained: Any = model.get_base_model()
            base, _ = _load(
                start, config_of(start), dtype=torch.float32, device=torch.device("cpu")
            )
            base.config.pad_token_id = trained.config.pad_token_id
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                on_base: Any = PeftModel.from_pretrained(base, folder / "adapter")
            whole = on_base.merge_and_unload(safe_merge=True)
        shutil.rmtree(folder, ignore_errors=True)
        nn.Module.to(whole, dtype)  # in place
        save_model(whole, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    written: PreTrainedModel = whole
    return written.eval().requires_grad_(False)


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A padding token that never ends an answer: transformers' classifiers take the last token that
    is none for the last of a row."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    wanted = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    return int(next(token for token in wanted if token is not None and token not in ends))


def _load(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Qlora | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """The classifier, and which of its tensors the files lack."""
    config.num_labels = 1
    settings: dict[str, Any] = {"config": config, "dtype": dtype}
    if device.type != "cpu":
        settings["device_map"] = {"": device}
    if quantize:
        settings["quantization_config"] = nf4(quantize, dtype, skipped=["score"])
    load: Any = AutoModelForSequenceClassification.from_pretrained
    try:
        with quiet():
            model, info = load(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # each architecture fails in its own way
        raise StageError(
            "RewardModelBroken",
            f"{folder} cannot be loaded as a sequence classifier: {first_line(error)}.",
            advice="Choose a model of an architecture that transformers has a sequence classifier "
            "for, such as Llama, Qwen or Mistral.",
        ) from error
    if quantize:
        keep_nf4_layout(model)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise StageError(
            "RewardModelBroken",
            f"{type(model).__name__} has no linear head named score.",
            advice="Choose a decoder such as Llama, Qwen or Mistral for model.uri.",
        )
    return model, set(info["missing_keys"])


def _incomplete(folder: Path, missing: set[str]) -> StageError:
    return StageError(
        "WeightsMissing",
        f"{folder} lacks {len(missing)} of the tensors that its config asks for: "
        f"{', '.join(sorted(missing)[:5])}.",
        advice="Fetch the model again; its config.json and weights do not belong together.",
    )
