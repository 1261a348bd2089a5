"""Reward models: sequence classifiers with one output.

A reward model that Tuneyard trains consists of a causal model's layers and one linear head,
`score`, on the last token. It is saved as a whole sequence classifier, whether an adapter was
trained or all layers, so other tools that read classifiers can read it.
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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuneyard.api.adapters import Adapter, Qlora
from tuneyard.api.stage_settings import LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, policies
from tuneyard_trainer.models.base import (
    keep_nf4_layout,
    nf4,
    save_model,
    set_dropout,
    weights_missing,
)
from tuneyard_trainer.models.classifiers import load_classifier
from tuneyard_trainer.models.files import config_of
from tuneyard_trainer.models.layers import freeze
from tuneyard_trainer.models.merging import write_merged
from tuneyard_trainer.storage.files import disk_error

HEAD = "score.weight"
TRAINED = "Set rewardModel.model.uri to a trained sequence classifier with one output."
DECODER = "Set model.uri to a decoder with a sequence classifier, such as Llama, Qwen or Mistral."


def base_weights(inputs: Mapping[str, Path], spare: Path) -> Path:
    """Return the folder of the causal model that a reward model is trained from.

    It is the input `model`, or the whole weights of the input `tuned`. If `tuned` is an adapter,
    the merged model is written to `spare`.
    """
    tuned = inputs["tuned"] / policies.WEIGHTS if "tuned" in inputs else None
    if tuned is None:
        return inputs["model"]
    if not adapters.is_adapter(tuned):
        return tuned
    shutil.rmtree(spare, ignore_errors=True)
    write_merged(inputs["model"], tuned, spare)
    return spare


def create(
    folder: Path,
    adapter: Adapter | None,
    loop: LoopSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
) -> nn.Module:
    """Return a new reward model to train, over the causal model in `folder`.

    The head's initial weights depend on `loop.seed`. Trained parameters are float32; the layers
    under an adapter are in `precision`. Raises StageError.
    """
    with adapters.seeded(loop.seed, device):
        model, missing = _load_decoder(
            folder,
            dtype=precision if adapter else torch.float32,
            device=device,
            quantize=adapter.qlora if adapter else None,
            dropout=loop.dropout,
        )
    if missing - {HEAD}:
        raise weights_missing(folder, missing - {HEAD})
    model.config.pad_token_id = padding_id(tokenizer)
    if adapter:
        trained = adapters.attach_to_reward_model(model, adapter, seed=loop.seed)
        nn.Module.float(trained.get_submodule("base_model.model.score"))
        return trained
    model.requires_grad_(True)
    if loop.freeze:
        freeze(model, loop.freeze)
    return model


def is_reward_model(folder: Path) -> bool:
    """Return whether a folder of weights holds a sequence classifier."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    names = config.get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a trained reward model, a decoder or an encoder, in evaluation mode and frozen.

    Raises StageError RewardModelBroken, RewardHeadMissing, RewardNotScalar or WeightsMissing.
    """
    model, missing = _load(folder, TRAINED, dtype=dtype, device=device)
    head = sorted(name for name in missing if not name.startswith(f"{model.base_model_prefix}."))
    if head:
        raise StageError(
            "RewardHeadMissing",
            f"{folder} lacks {', '.join(head[:3])}: it is not a trained classifier, and its scores "
            "would be random.",
            advice=TRAINED,
        )
    if missing:
        raise weights_missing(folder, missing)
    if model.config.num_labels != 1:
        raise StageError(
            "RewardNotScalar",
            f"{folder} has {model.config.num_labels} outputs, and a reward is one number.",
            advice=TRAINED,
        )
    return model.eval().requires_grad_(False)


def save(model: nn.Module, start: Path, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Write a trained reward model whole, in `dtype`, and return the model that was written.

    An adapter is merged into the layers in `start` in their original precision: under QLoRA it was
    trained over a 4-bit copy of them. Raises StageError DiskFull or WriteFailed.
    """
    whole: Any = model
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / "adapter"))
            whole = _merged(model, folder / "adapter", start)
        shutil.rmtree(folder, ignore_errors=True)
        nn.Module.to(whole, dtype)  # in place
        save_model(whole, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    written: PreTrainedModel = whole
    return written.eval().requires_grad_(False)


def _merged(model: PeftModel, adapter: Path, start: Path) -> nn.Module:
    """Return the layers in `start`, in float32 on the CPU, with the saved adapter merged."""
    trained: Any = model.get_base_model()
    base, _ = _load_decoder(start, dtype=torch.float32, device=torch.device("cpu"))
    base.config.pad_token_id = trained.config.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = PeftModel.from_pretrained(base, adapter)
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a padding token that never ends a completion: transformers' classifiers
    score the last token of a row that is not the padding token."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    return int(next(token for token in candidates if token is not None and token not in ends))


def _load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Qlora | None = None,
    dropout: float | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return a causal model's layers with a head for one output, and the names of the tensors that
    its files lack. Raises StageError RewardModelBroken without a linear head named `score`."""
    config = config_of(folder)
    config.num_labels = 1
    if dropout is not None:
        set_dropout(folder, config, dropout)
    model, missing = _load(
        folder, DECODER, dtype=dtype, device=device, config=config, quantize=quantize
    )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise StageError(
            "RewardModelBroken",
            f"{type(model).__name__} has no linear head named score.",
            advice=DECODER,
        )
    return model, missing


def _load(
    folder: Path,
    advice: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    config: PreTrainedConfig | None = None,
    quantize: Qlora | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return a sequence classifier and the names of the tensors that its files lack."""
    settings: dict[str, Any] = {"dtype": dtype}
    if config is not None:
        settings["config"] = config
    if device.type != "cpu":
        settings["device_map"] = {"": device}
    if quantize:
        settings["quantization_config"] = nf4(quantize, dtype, skipped=["score"])
    model, missing = load_classifier(folder, "RewardModelBroken", advice, **settings)
    if quantize:
        keep_nf4_layout(model)
    return model, missing
