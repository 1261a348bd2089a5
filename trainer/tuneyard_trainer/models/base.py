"""Base models and their tokenizers: loading, comparing and saving.

Weights are read from safetensors or GGUF only. No code of a model is run and no pickle is loaded.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
from tuneyard_trainer.models import sharding
from tuneyard_trainer.models.environment import described
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
META = torch.device("meta")
"""torch's device without memory: a model that is loaded there has shapes and no weights."""
FETCH_AGAIN = "Fetch the model again; its config.json and its weights do not match."


# ---- loading and saving -------------------------------------------------------------------------


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, without reading weights. Its padding token is always
    one of its own tokens, so the embeddings never grow. Raises StageError."""
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
    shards: int = 1,
    computes: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, with every weight from its files.

    `quantize`: the linear layers become 4-bit NormalFloat, computing in `dtype`. `dropout`: the
    probability of all of the architecture's own dropout (`dropout_fields`). `device` META: no
    weight is read, and the files are checked by their headers. `shards`: the workers that each keep
    a part of the model; 1: this one keeps all of it. `computes`: the type in which a sharded model
    computes; None: `dtype`. Raises StageError.
    """
    config = config_of(path)
    if dropout is not None:
        set_dropout(path, config, dropout)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if shards > 1:
        bfloat16 = (computes or dtype) is torch.bfloat16
        settings["distributed_config"] = sharding.over(shards, bfloat16=bfloat16)
    elif device.type != "cpu":
        settings["device_map"] = {"": device}
    if quantize:
        settings["quantization_config"] = nf4(quantize, dtype)
    with explained(path), quiet(), described(device):
        model, info = _from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in `info`, with both shapes
            **settings,
        )
        require_complete(path, info)
    if shards > 1:
        sharding.require_sharded(model, shards)
    if quantize:
        keep_nf4_layout(model)
    # Some architectures can be encoders or decoders (BERT, RoBERTa): running the model decides.
    may_be_encoder = getattr(config, "is_decoder", None) is False and device != META
    if may_be_encoder and not is_causal(model):
        raise not_causal(path, f"{type(model).__name__}, whose tokens attend to later tokens")
    return model


_from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # annotated for one of its results


def nf4(qlora: Qlora, dtype: torch.dtype, skipped: list[str] | None = None) -> BitsAndBytesConfig:
    """Return the config of 4-bit NormalFloat for all linear layers except `skipped` (None: except
    the head)."""
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

    Otherwise it repacks each layer at its first forward pass in evaluation mode. Repacking rounds
    the layer's scales to bfloat16, so that measuring a model changes it, and fails if a width is
    not a multiple of 64.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_complete(path: Path, info: dict[str, Any]) -> None:
    """Raise StageError if tensors are missing or have another shape than the config says.
    transformers only warns of such tensors and gives them random weights."""
    mismatched = sorted(info["mismatched_keys"])
    if info["missing_keys"]:
        raise weights_missing(path, info["missing_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise StageError(
            "ModelBroken",
            f"{path}: the shapes of {len(mismatched)} tensors do not match its config: {name} has "
            f"{tuple(found)}, not {tuple(wanted)}.",
            advice=FETCH_AGAIN,
        )


def weights_missing(path: Path, names: Collection[str]) -> StageError:
    """Return the error for a model whose files lack tensors."""
    return StageError(
        "WeightsMissing",
        f"{path} lacks {len(names)} of the tensors that its config specifies: "
        f"{', '.join(sorted(names)[:5])}.",
        advice=FETCH_AGAIN,
    )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert the errors of loading to StageErrors."""
    try:
        yield
    except StageError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(path) from error
    except Exception as error:  # an invalid config raises other errors in each architecture
        if "can't allocate memory" in str(error):  # torch's CPU allocator raises RuntimeError
            raise _out_of_memory(path) from error
        cause = (
            "its weights are damaged or incomplete: " if isinstance(error, SafetensorError) else ""
        )
        raise StageError(
            "ModelBroken",
            f"{path} cannot be loaded: {cause}{first_line(error)}.",
            advice="Fetch the model again, or set model.uri to another model.",
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
    """While active, transformers shows no progress bars and no warnings: important conditions are
    checked and raised."""
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
    """Return the names of the dropout probabilities that `load_base(dropout=...)` sets."""
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
    """Set all of the architecture's own dropout. Raises StageError NoDropout if it has none."""
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
    """Write a whole model as config, generation config and safetensors, for `load_base`."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} has an adapter: save the adapter, or merge it")
    with quiet():
        model.save_pretrained(folder)


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write the config and the generation config as `save_model` does, without weights."""
    config: Any = model.config
    config.dtype, config.architectures = model.dtype, [sharding.architecture(model)]
    with quiet():
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


# ---- checks and precision -----------------------------------------------------------------------


def differing_weight(written: nn.Module, read: nn.Module) -> str | None:
    """Return the name of a weight that differs between the models; None: all are bit for bit equal.

    Weights are compared, not outputs: float32 scores of two models with equal weights differed by
    4e-9.
    """
    found = read.state_dict()
    for name, weight in written.state_dict().items():
        if name not in found or not torch.equal(weight, found[name]):
            return name
    return None


PROC = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> None:
    """Measure the peak memory from now on. Where Linux does not allow it for the memory on the CPU,
    the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROC / "clear_refs").write_text("5")  # proc(5): the peak of the resident memory


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        peak = re.search(r"^VmHWM:\s*(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
        if peak is not None:
            return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_back_mismatch(reason: str, message: str) -> StageError:
    """Return the error for written files that differ from the model in memory."""
    advice = "This is a defect of Tuneyard or of the disk: run the job again, and report the error."
    return StageError(reason, message, advice=advice, retryable=True)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context of mixed precision; for float32, a context without effect."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def precision_of(settings: LoopSettings, worker: Worker) -> torch.dtype:
    """Return the precision of the forward and backward pass."""
    if settings.precision == "auto":
        return torch.bfloat16 if worker.device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.precision]
