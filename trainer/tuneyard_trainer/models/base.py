"""Base models: loading what may be loaded, freezing, saving, and asking what a model can do.

Weights come from safetensors or GGUF only; no code and no pickle of a model is ever run.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tuneyard.api.alignment import Freeze, Qlora
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.models import gguf_reader
from tuneyard_trainer.models.files import (
    TOKENIZER_FILES,
    config_of,
    first_line,
    is_gguf,
    license_of,
    not_causal,
    stored_dtype,
)
from tuneyard_trainer.models.probes import is_causal, isolates_documents

__all__ = [
    "count_parameters",
    "decoder_layers",
    "dropout_fields",
    "freeze",
    "isolates_documents",
    "layer_indices",
    "license_of",
    "load_base",
    "load_tokenizer",
    "nf4",
    "peak_memory_bytes",
    "quiet",
    "save_model",
    "set_dropout",
    "stored_dtype",
    "trainable",
]

DROPOUT = re.compile(r"(^|_)(dropout|pdrop)(_|$)")
NOT_IN_A_CAUSAL_MODEL = re.compile(r"classifier|summary")


# ---- loading and saving -------------------------------------------------------------------------


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or `.gguf` file, with a padding token that is always one of
    its own tokens, so the embeddings never grow. Reads no weights."""
    if not is_gguf(path) and not _has_tokenizer(path):
        raise StageError(
            "TokenizerMissing",
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:4])}...).",
            advice="Set model.uri to a folder that holds the model's tokenizer too.",
        )
    place = {"gguf_file": path.name} if is_gguf(path) else {}
    folder = path.parent if is_gguf(path) else path
    try:
        with gguf_reader.quick(), quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **place
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
    with _explained(path), quiet():
        if is_gguf(path):
            model = _load_gguf(path, settings, quantize)
        else:
            if quantize:
                settings["quantization_config"] = nf4(quantize, dtype)
            model = _load_folder(path, settings)
    if quantize:
        keep_nf4_layout(model)
    # Encoders that can be decoders (BERT, RoBERTa) are told apart by what they do.
    if getattr(config, "is_decoder", None) is False and not is_causal(model):
        raise not_causal(path, f"{type(model).__name__}, whose tokens see the ones after them")
    return model


_from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # annotated for one of its results


def _load_folder(path: Path, settings: dict[str, Any]) -> PreTrainedModel:
    model, info = _from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported in `info`, with both shapes
        **settings,
    )
    _require_complete(path, info)
    return model


def _load_gguf(path: Path, settings: dict[str, Any], quantize: Qlora | None) -> PreTrainedModel:
    """Dequantized, and with no trace of it: transformers neither trains nor saves what it takes for
    quantized."""
    with gguf_reader.quick():
        model, info = _from_pretrained(
            path.parent,
            gguf_file=path.name,
            local_files_only=True,
            quantization_config=GgufConfig(dequantize=True),
            **settings,
        )
    _require_complete(path, info)
    if quantize is None:
        return model
    settings = settings | {
        "config": model.config,
        "quantization_config": nf4(quantize, settings["dtype"]),
        "output_loading_info": False,
    }
    return type(model).from_pretrained(None, state_dict=model.state_dict(), **settings)


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
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _require_complete(path: Path, info: dict[str, Any]) -> None:
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
def _explained(path: Path) -> Iterator[None]:
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


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, in order, and the dotted name of their list in the model."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise StageError(
        "LayersNotFound",
        f"{type(model).__name__} has no list of {count} decoder layers.",
        advice="Remove the layer ranges, or set model.uri to another architecture.",
    )


def layer_indices(ranges: str, count: int, field: str) -> list[int]:
    """The layers named by "0-3,8", ascending. `field`: the manifest field, for messages."""
    chosen: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high or high >= count:
            wrong = "runs backwards" if low > high else f"asks for layer {high}"
            raise StageError(
                "LayerOutOfRange",
                f'{field} is "{ranges}": {part} {wrong}, and the model has {count} layers.',
                advice=f"Set {field} to ranges within 0-{count - 1}.",
            )
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def freeze(model: PreTrainedModel, settings: Freeze) -> None:
    """Takes the named parts out of training. Raises StageError where that cannot be done as asked,
    or where nothing would be left to train."""
    if settings.layers:
        _, layers = decoder_layers(model)
        for index in layer_indices(settings.layers, len(layers), "training.freeze.layers"):
            layers[index].requires_grad_(False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if settings.embeddings:
        embeddings.requires_grad_(False)
    if settings.head:
        if head.weight is embeddings.weight and not settings.embeddings:
            raise StageError(
                "TiedHead",
                "training.freeze.head is set, and this model's head is its embeddings.",
                advice="Set training.freeze.embeddings too, or remove training.freeze.head.",
            )
        head.requires_grad_(False)
    if not trainable(model):
        raise StageError(
            "NothingToTrain",
            "training.freeze leaves no parameter to train.",
            advice="Freeze less: narrow training.freeze.layers.",
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """All parameters, adapters included, tied ones once, 4-bit ones by what they stand for."""
    return sum(_size(parameter) for parameter in model.parameters())


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights to a byte
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
