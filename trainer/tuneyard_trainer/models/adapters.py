"""Adapters of every kind: attach, save, load and disable; `merging` merges saved ones.

LoRA, QLoRA, (IA)^3, prefix and prompt tuning come from PEFT; `bottleneck` adds bottleneck adapters.
An adapter is saved as `adapter_model.safetensors` and `adapter_config.json` in PEFT's layout, so
other tools that read PEFT adapters can read those of PEFT's kinds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneyard.api.adapters import Adapter, PrefixTuning, PromptTuning
from tuneyard.errors import StageError
from tuneyard_trainer.models import bottleneck
from tuneyard_trainer.models.files import first_line
from tuneyard_trainer.models.layers import require_names
from tuneyard_trainer.models.probes import base_of, probing
from tuneyard_trainer.models.sharding import is_sharded
from tuneyard_trainer.models.targets import TASK, ia3_config, lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOTTLENECK = "BOTTLENECK"
MERGEABLE = frozenset({"LORA", "IA3"})


def attach(
    model: PreTrainedModel, adapter: Adapter, *, seed: int, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """Freeze `model` and attach a new adapter in place; the trained parameters are float32.

    The adapter's initial weights depend on `seed` (and, for prefix and prompt tuning, on the base).
    The global random state does not change. Raises StageError if the architecture does not support
    the adapter.
    """
    with seeded(seed, model.device):
        if adapter.bottleneck:
            return bottleneck.attach(model, adapter.bottleneck)
        if adapter.lora:
            return _wrap(model, lora_config(model, adapter.lora, "adapter.lora"))
        if adapter.qlora:
            if not getattr(model, "is_loaded_in_4bit", False):
                raise ValueError("QLoRA needs a 4-bit base: load_base(..., quantize=...)")
            return _wrap(model, lora_config(model, adapter.qlora, "adapter.qlora"))
        if adapter.ia3:
            return _wrap(model, ia3_config(model))
        if adapter.prefix:
            return _prefix(model, adapter.prefix)
        if adapter.prompt:
            return _prompt(model, adapter.prompt, tokenizer)
    raise ValueError(f"no adapter kind is set in {adapter!r}")


def attach_to_reward_model(model: PreTrainedModel, adapter: Adapter, *, seed: int) -> nn.Module:
    """Freeze a sequence classifier and attach LoRA to its layers. Its whole head `score` is trained
    and saved with the adapter."""
    settings = adapter.lora or adapter.qlora
    if settings is None:
        raise ValueError(f"a reward model takes lora or qlora, not {adapter.kind}")
    config = lora_config(model, settings, f"rewardModel.train.adapter.{adapter.kind}")
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    with seeded(seed, model.device):
        return _wrap(model, config)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While active, torch's random numbers depend on `seed`. The end restores the old state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings that Tuneyard chose on purpose
        return get_peft_model(model, config)  # the adapter is float32, whatever the base is


# ---- prefix and prompt tuning: initial weights ---------------------------------------------------


def _random_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Return (1, count) token ids, drawn on the CPU so that they are the same on every device."""
    return torch.randint(model.config.get_text_config().vocab_size, (1, count)).to(model.device)


def _prefix(model: PreTrainedModel, settings: PrefixTuning) -> PeftModel:
    """Attach prefix tuning, initialized with the keys and values of random vocabulary tokens.

    The activations of real words work far better than random numbers (Li and Liang 2021,
    arXiv:2101.00190, section 7.4), and they have the right scale.
    """
    cached_CHLD = _keys_and_values(model, _random_tokens(model, settings.length))
    num_tensors, heads, length, head_width = cached_CHLD.shape
    config = PrefixTuningConfig(
        task_type=TASK,
        num_virtual_tokens=length,
        num_layers=num_tensors // 2,
        num_attention_heads=heads,
        token_dim=heads * head_width,
    )
    wrapped = _wrap(model, config)
    _set_prompt(wrapped, cached_CHLD.permute(2, 0, 1, 3).reshape(length, -1))
    return wrapped


def _keys_and_values(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the cached keys and values of `ids` (1, L) as (C, H, L, D).

    C: keys and values of the first layer, then of the second, and so on; H: heads; D: head width.
    Raises StageError PrefixUnsupported.
    """
    with probing(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cached = [
        tensor for layer in getattr(cache, "layers", []) for tensor in (layer.keys, layer.values)
    ]
    shapes = {tuple(tensor.shape) for tensor in cached}
    if len(shapes) != 1 or next(iter(shapes))[2] != ids.shape[1]:
        raise StageError(
            "PrefixUnsupported",
            f"{type(model).__name__} does not cache keys and values of the same shape in every "
            "layer, which prefix tuning needs.",
            advice="Use adapter.lora or adapter.prompt.",
        )
    return torch.cat(cached)


def _prompt(
    model: PreTrainedModel, settings: PromptTuning, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Attach prompt tuning, initialized with the embeddings of a text (repeated or cut to length)
    or of random tokens."""
    ids = _random_tokens(model, settings.length)
    if settings.initial_text:
        text = tokenizer(settings.initial_text, add_special_tokens=False)["input_ids"]
        repeated = (text * settings.length)[: settings.length]
        ids = torch.tensor([repeated], device=model.device)
    embed: Any = model.get_input_embeddings()
    embedded = embed(ids)[0].detach()
    wrapped = _wrap(model, PromptTuningConfig(task_type=TASK, num_virtual_tokens=settings.length))
    _set_prompt(wrapped, embedded)
    return wrapped


def _set_prompt(model: PeftModel, weights: Tensor) -> None:
    encoder: Any = model.prompt_encoder[model.active_adapter]
    with torch.no_grad():
        encoder.embedding.weight.copy_(weights)


# ---- files ---------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path, *, base: str | None = None) -> None:
    """Write the adapter without its base. Equal adapters give equal bytes.

    `base`: the base's public name for `base_model_name_or_path`. Local paths are never written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        config = model.active_peft_config.to_dict() | {"revision": None, "inference_mode": True}
        weights = _peft_weights(model)
    elif isinstance(model, PreTrainedModel) and bottleneck.attached(model):
        config = {"peft_type": BOTTLENECK, "task_type": TASK} | bottleneck.config_of(model)
        weights = bottleneck.weights_of(model)
    else:
        raise TypeError(f"{type(model).__name__} has no adapter")
    config["base_model_name_or_path"] = base
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets have no order
    (folder / CONFIG).write_text(text + "\n")


def _peft_weights(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors. PEFT would gather a sharded base on every worker to find them,
    so it is shown the whole tensors alone."""
    tensors = {name: t for name, t in model.state_dict().items() if not is_sharded(t)}
    return get_peft_model_state_dict(model, tensors, save_embedding_layers=False)


def load(base: PreTrainedModel, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Attach a saved adapter to `base` in place; return the model in evaluation mode.

    Raises StageError AdapterIncomplete or AdapterBroken.
    """
    config, weights = _read(folder)
    with seeded(0, base.device), _adapter_errors(folder):
        if config["peft_type"] == BOTTLENECK:
            model: nn.Module = bottleneck.attach(base, bottleneck.settings_of(config))
            bottleneck.assign(model, weights)
        else:
            model = _load_peft(base, folder, weights, trainable)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and trainable)
    return model.eval()


def _load_peft(
    base: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor], trainable: bool
) -> PeftModel:
    config: Any = PeftConfig.from_pretrained(str(folder))
    prompt_learning = config.is_prompt_learning
    if prompt_learning:
        _check_width(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing tensors, which are checked below
        model = PeftModel.from_pretrained(  # refuses is_trainable for prompt learning
            base, folder, is_trainable=trainable and not prompt_learning, local_files_only=True
        )
    require_names(_peft_weights(model), weights)
    if trainable and prompt_learning:
        model.active_peft_config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    return model


def _check_width(base: PreTrainedModel, config: Any) -> None:
    """Raise ValueError if the virtual tokens do not have the base's shape. PEFT takes their shape
    from the adapter's config, so a wrong base would fail only in the first forward pass."""
    if config.peft_type == "PREFIX_TUNING":
        cached = _keys_and_values(base, torch.zeros((1, 1), dtype=torch.long, device=base.device))
        needed: Any = (cached.shape[0] // 2, cached.shape[1], cached.shape[1] * cached.shape[3])
        found = (config.num_layers, config.num_attention_heads, config.token_dim)
    else:
        embeddings: Any = base.get_input_embeddings()
        needed, found = embeddings.weight.shape[1], config.token_dim
    if needed != found:
        raise ValueError(f"its virtual tokens have the shape {found}, and the base needs {needed}")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config of a saved adapter. Raises StageError AdapterIncomplete, AdapterBroken."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise StageError(
            "AdapterIncomplete",
            f"{folder} has no {' and no '.join(missing)}.",
            advice="Write both files of the adapter again.",
        )
    with _adapter_errors(folder):
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise ValueError(f"{CONFIG} names no peft_type")
        return config, load_file(folder / WEIGHTS)


@contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of an adapter that does not fit its base to StageError AdapterBroken."""
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            "AdapterBroken",
            f"the adapter in {folder} cannot be loaded onto this base: {first_line(error)}.",
            advice="Use the base model that the adapter was trained on.",
        ) from error


# ---- use -----------------------------------------------------------------------------------------


def attached(model: nn.Module) -> bool:
    """Return whether a model has an adapter of any kind."""
    return isinstance(model, PeftModel) or bottleneck.attached(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While active, the model computes what its base computes, for every kind of adapter."""
    if not isinstance(model, PeftModel):
        if not bottleneck.attached(model):
            raise TypeError(f"{type(model).__name__} has no adapter")
        with bottleneck.disabled(model):
            yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:  # PEFT makes every adapter trainable again, also one loaded as not trainable
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and no whole model."""
    return (folder / CONFIG).exists()


def require_mergeable(folder: Path) -> None:
    """Raise StageError NotMergeable for a saved adapter of a kind other than LoRA and (IA)^3."""
    kind = config_of(folder)["peft_type"]
    if kind not in MERGEABLE:
        raise StageError(
            "NotMergeable",
            f"a {kind.lower()} adapter cannot be merged: the base's weights cannot express it.",
            advice="Set output.merge to false, or use adapter.lora, adapter.qlora or adapter.ia3.",
        )


def merged_weights(model: nn.Module, *, with_tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the merged model by their names there, one layer at a time.

    The adapter is merged into a copy of each layer, and the model stays unchanged to the bit:
    merging in place and unmerging would round the base a little each time. The planner refuses the
    kinds that cannot be merged. An adapter that is off is left out.

    `with_tied`: a head that is tied to the embeddings is yielded too.
    """
    yielded: set[int] = set()
    for name, tensor in _plain(base_of(model), ""):
        if with_tied or id(tensor) not in yielded:
            yield name, tensor.detach()
        yielded.add(id(tensor))


def _plain(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and persistent buffers, adapted layers in their merged form."""
    if isinstance(module, BaseTunerLayer):
        yield from ((f"{prefix}{name}", tensor) for name, tensor in _merged(module))
        return
    yield from ((f"{prefix}{name}", p) for name, p in module.named_parameters(recurse=False))
    if buffers := dict(module.named_buffers(recurse=False)):
        saved = module.state_dict()  # without the buffers that are not persistent
        yield from ((f"{prefix}{name}", b) for name, b in buffers.items() if name in saved)
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.")


def _merged(layer: Any) -> list[tuple[str, Tensor]]:
    """Return a layer's merged weights. `safe_merge` replaces the layer's tensors by new ones; the
    layer gets its own tensors back."""
    parameters = dict(layer.get_base_layer().named_parameters())
    if layer.disable_adapters:
        return [*parameters.items()]
    own = {name: parameter.data for name, parameter in parameters.items()}
    layer.merge(safe_merge=True)
    try:
        return [(name, parameter.data) for name, parameter in parameters.items()]
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
        layer.merged_adapters.clear()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Make the model recompute activations in the backward pass. Raises StageError if the model or
    the adapter does not support it."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    base = base_of(model)
    if kind == "PREFIX_TUNING" or not getattr(base, "supports_gradient_checkpointing", False):
        what = "prefix tuning" if kind == "PREFIX_TUNING" else type(base).__name__
        raise StageError(
            "CheckpointingUnsupported",
            f"training.gradientCheckpointing is set, and {what} does not support it.",
            advice="Set training.gradientCheckpointing to false. To save memory, lower "
            "training.microBatchTokens instead.",
        )
    # transformers 5.19, which the image with vLLM has, has only the older name.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
