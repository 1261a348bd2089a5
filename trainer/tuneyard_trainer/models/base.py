"""Base models: loading what may be loaded, freezing, saving, and asking what a model can do.

Weights come from safetensors or GGUF only; no code and no pickle of a model is ever run.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tuneyard.api.adapters import Qlora
from tuneyard.api.stage_settings import LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.models.files import (
    TOKENIZER_FILES,
    config_of,
    first_line,
    not_causal,
)
from tuneyard_trainer.models.probes import is_causal
from tuneyard_trainer.worker import Worker

DROPOUT = re.compile(r"(^|_)(dropout|pdrop)(_|$)")
NOT_IN_A_CAUSAL_MODEL = re.compile(r"classifier|summary")


# ---- loading and saving -------------------------------------------------------------------------


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token that is always one of its own tokens,
    so the embeddings never grow. Reads no weights."""
    if not _has_tokenizer(path):
        raise StageError(
            "TokenizerMissing",
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:4])}...).",
            advice="Set model.uri to a folder that holds the model's tokenizer too.",
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # each tokenizer class fails in its own way
        raise StageError(
            "TokenizerBroken",
            f"the tokenizer in {path} cannot be read: {first_line(error)}.",
            advice="Fetch the model again, or set model.uri to a model with a tokenizer.json.",
        ) from error
    if tokenizer.pad_token is None:  # padding is masked everywhere, so any token will do
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in TOKENIZER_FILES)


def load_base(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Qlora | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, every weight of it from its files.

    `quantize`: its linear layers as 4-bit NormalFloat, computing in `dtype`. `dropout`: the
    probability for all of the architecture's own dropout (`dropout_fields`). Raises StageError.
    """
    config = config_of(path)
    if dropout is not None:
        set_dropout(path, config, dropout)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if device.type != "cpu":
        settings["device_map"] = {"": device}
    if quantize:
        settings["quantization_config"] = nf4(quantize, dtype)
    with explained(path), quiet():
        model, info = _from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in `info`, with both shapes
            **settings,
        )
        require_complete(path, info)
    if quantize:
        keep_nf4_layout(model)
    # Encoders that can be decoders (BERT, RoBERTa) are told apart by what they do.
    if getattr(config, "is_decoder", None) is False and not is_causal(model):
        raise not_causal(path, f"{type(model).__name__}, whose tokens see the ones after them")
    return model


_from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # annotated for one of its results


def nf4(qlora: Qlora, dtype: torch.dtype, skipped: list[str] | None = None) -> BitsAndBytesConfig:
    """4-bit NormalFloat for all linear layers but `skipped`; None: but the head."""
    extras.require_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=qlora.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def keep_nf4_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX-512 BF16.

    It repacks each layer at its first forward pass in evaluation mode. That rounds the layer's
    scales to bfloat16, so measuring a model would change it, and fails where a width is not a
    multiple of 64.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_complete(path: Path, info: dict[str, Any]) -> None:
    """transformers only warns of these, and trains on random weights."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise StageError(
            "WeightsMissing",
            f"{path} lacks {len(missing)} of the tensors that its config asks for: "
            f"{', '.join(missing[:5])}.",
            advice="Fetch the model again; its config.json and weights do not belong together.",
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        raise StageError(
            "ModelBroken",
            f"{path}: {len(mismatched)} tensors have another shape than its config asks for: "
            f"{name} has {tuple(found)}, not {tuple(wanted)}.",
            advice="Fetch the model again; its config.json and weights do not belong together.",
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what loading raises into one message."""
    try:
        yield
    except StageError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(path) from error
    except Exception as error:  # each architecture fails in its own way on a config of nonsense
        if "can't allocate memory" in str(error):  # torch's CPU allocator raises RuntimeError
            raise _out_of_memory(path) from error
        cause = "its weights are broken or cut off: " if isinstance(error, SafetensorError) else ""
        raise StageError(
            "ModelBroken",
            f"{path} cannot be loaded: {cause}{first_line(error)}.",
            advice="Fetch the model again, or set model.uri to another one.",
        ) from error


def _out_of_memory(path: Path) -> StageError:
    return StageError(
        "OutOfMemory",
        f"there is not enough memory to load {path}.",
        advice="Use adapter.qlora (a 4-bit base), a smaller model.uri, or a compute.profile with "
        "more memory.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers: what matters is checked and raised."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def dropout_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """The config's dropout probabilities, by name: the ones that `load_base(dropout=...)` sets."""
    values = config.get_text_config().to_dict().items()
    return tuple(
        sorted(
            name
            for name, value in values
            if DROPOUT.search(name)
            and not NOT_IN_A_CAUSAL_MODEL.search(name)
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        )
    )


def set_dropout(path: Path, config: PreTrainedConfig, probability: float) -> None:
    """Sets all of the architecture's own dropout. Raises StageError where it has none."""
    fields = dropout_fields(config)
    if not fields:
        raise StageError(
            "NoDropout",
            f"training.dropout is {probability}, and a {config.model_type} model ({path}) has no "
            "dropout of its own.",
            advice="Remove training.dropout; an adapter's dropout is adapter.*.dropout.",
        )
    for name in fields:
        setattr(config.get_text_config(), name, probability)


def save_model(model: nn.Module, folder: Path) -> None:
    """A whole model as config, generation config and safetensors, so that `load_base` takes it."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no plain model: save its adapter, or merge it")
    with quiet():
        model.save_pretrained(folder)


# ---- parts --------------------------------------------------------------------------------------


def differing(written: nn.Module, read: nn.Module) -> str | None:
    """The name of a weight of the first model that the second lacks or has otherwise, to the bit;
    None: there is none. Their results would not do: equal weights elsewhere in memory gave float32
    scores that differ by 4e-9."""
    found = read.state_dict()
    for name, weight in written.state_dict().items():
        if name not in found or not torch.equal(weight, found[name]):
            return name
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_back_otherwise(reason: str, message: str) -> StageError:
    """What was written is not what was in memory."""
    advice = "This is a fault of Tuneyard or of the disk: run it again, and report it."
    return StageError(reason, message, advice=advice, retryable=True)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision below float32; nothing at float32."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def precision_of(settings: LoopSettings, worker: Worker) -> torch.dtype:
    """Arithmetic of the forward and backward pass."""
    if settings.precision == "auto":
        return torch.bfloat16 if worker.device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.precision]
