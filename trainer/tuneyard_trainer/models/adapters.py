"""Adapters of every kind behind five verbs: attach, save, load, disabled, merge.

LoRA, QLoRA, (IA)^3, prefix and prompt tuning are PEFT's; bottleneck adapters are ours. On disk each
is `adapter_model.safetensors` and `adapter_config.json`, the former in PEFT's own layout, so that
anything which reads PEFT adapters reads them.
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
from tuneyard_trainer.models.probes import base_of, probing
from tuneyard_trainer.models.targets import TASK, ia3_config, lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOTTLENECK = "BOTTLENECK"
MERGEABLE = frozenset({"LORA", "IA3"})
QLORA = "adapter.qlora"


def attach(
    model: PreTrainedModel, adapter: Adapter, *, seed: int, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """Freezes `model` and puts a new adapter on it, in place; trained parameters are float32.

    The adapter's first weights depend on `seed` (and, for prefix and prompt tuning, on the base);
    the global random state is left as it was.
    """
    with _seeded(seed, model.device):
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


def attach_scorer(model: PreTrainedModel, adapter: Adapter, *, seed: int) -> nn.Module:
    """Freezes a sequence classifier and puts LoRA on its layers; its head `score` is trained whole
    and saved with the adapter."""
    field, settings = ("adapter.lora", adapter.lora) if adapter.lora else (QLORA, adapter.qlora)
    if settings is None:
        raise ValueError(f"a reward model takes lora or qlora, not {adapter.kind}")
    config = lora_config(model, settings, f"rewardModel.train.{field}")
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    with _seeded(seed, model.device):
        return _wrap(model, config)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on settings that Tuneyard chose knowingly
        return get_peft_model(model, config)  # its weights are float32 over any base


# ---- LoRA and (IA)^3: which layers ---------------------------------------------------------------


# ---- prefix and prompt: first weights ------------------------------------------------------------


def _random_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """(1, count) token ids, drawn on the CPU so that every device starts alike."""
    return torch.randint(model.config.get_text_config().vocab_size, (1, count)).to(model.device)


def _prefix(model: PreTrainedModel, settings: PrefixTuning) -> PeftModel:
    """Starts from the keys and values of random vocabulary tokens: the paper found activations of
    real words far better than random numbers (section 7.4), and they have the right scale."""
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
    """What the layers keep of `ids` (1, L): (C, H, L, D), C the keys and values of the first layer,
    of the second, and so on, H their heads, D a head's width. Raises StageError."""
    with probing(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cached = [kept for layer in getattr(cache, "layers", []) for kept in (layer.keys, layer.values)]
    shapes = {tuple(kept.shape) for kept in cached}
    if len(shapes) != 1 or next(iter(shapes))[2] != ids.shape[1]:
        raise StageError(
            "PrefixUnsupported",
            f"{type(model).__name__} does not keep keys and values of one shape in every layer, "
            "which prefix tuning needs.",
            advice="Use adapter.lora or adapter.prompt.",
        )
    return torch.cat(cached)


def _prompt(
    model: PreTrainedModel, settings: PromptTuning, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Starts from the embeddings of a text, repeated or cut to length, or of random tokens."""
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
    """Writes the adapter alone; the same adapter gives the same bytes. `base`: the public name of
    its base, for readers that look for one; local paths are never written."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        config = model.active_peft_config.to_dict() | {"revision": None, "inference_mode": True}
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
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


def load(base: PreTrainedModel, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Puts a saved adapter on `base`, in place, in evaluation mode. Raises StageError."""
    config, weights = _read(folder)
    with _seeded(0, base.device), _fitting(folder):
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
    prompts = config.is_prompt_learning
    if prompts:
        _check_width(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing tensors, which are checked here
        model = PeftModel.from_pretrained(  # which refuses to go on training a prompt
            base, folder, is_trainable=trainable and not prompts, local_files_only=True
        )
    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if own != weights.keys():
        odd = sorted(own ^ weights.keys())
        raise ValueError(f"{len(odd)} tensors are missing or not known: {', '.join(odd[:5])}")
    if trainable and prompts:
        model.active_peft_config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    return model


def _check_width(base: PreTrainedModel, config: Any) -> None:
    """PEFT shapes virtual tokens by the adapter's own config: a wrong base shows up in use only."""
    if config.peft_type == "PREFIX_TUNING":
        cached = _keys_and_values(base, torch.zeros((1, 1), dtype=torch.long, device=base.device))
        own: Any = (cached.shape[0] // 2, cached.shape[1], cached.shape[1] * cached.shape[3])
        found = (config.num_layers, config.num_attention_heads, config.token_dim)
    else:
        embeddings: Any = base.get_input_embeddings()
        own, found = embeddings.weight.shape[1], config.token_dim
    if own != found:
        raise ValueError(f"it has the shape {found}, and the base needs {own}")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise StageError("AdapterIncomplete", f"{folder} has no {' and no '.join(missing)}.")
    with _fitting(folder):
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise ValueError(f"{CONFIG} names no peft_type")
        return config, load_file(folder / WEIGHTS)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            "AdapterBroken",
            f"the adapter in {folder} cannot be loaded onto this base: {first_line(error)}.",
            advice="Use the base model that the adapter was trained on.",
        ) from error


# ---- use -----------------------------------------------------------------------------------------


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While active, the model is its base, for every kind of adapter."""
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
    finally:  # PEFT makes every adapter trainable again, loaded ones too
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` itself, with the saved adapter worked into its weights and nothing of PEFT left.

    `base` must be in its original precision, also for QLoRA: the 4-bit copy has lost what merging
    would build on. Raises StageError for kinds that no weight can express.
    """
    config, _ = _read(folder)
    if config["peft_type"] not in MERGEABLE:
        raise StageError(
            "NotMergeable",
            f"a {config['peft_type'].lower()} adapter cannot be merged: no weights of the base "
            "alone do what it does.",
            advice="Set output.merge to false, or use adapter.lora, adapter.qlora or adapter.ia3.",
        )
    if getattr(base, "is_quantized", False):
        raise ValueError("merge needs the base in its original precision, not a quantized copy")
    merging: Any = load(base, folder)
    with _fitting(folder):  # safe_merge raises ValueError for weights that are not finite
        merged = merging.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)


def merged_weights(model: nn.Module, *, with_tied: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the one plain model that `model` is, by their names there: the adapter worked
    into a copy of each layer that it changes, one layer at a time. The model stays as it is, to the
    bit: merging in place and taking it back would round the base a little each time.

    `with_tied`: a head that is the embeddings comes too. Kinds that cannot be merged are refused by
    the planner.
    """
    told: set[int] = set()
    for name, tensor in _plain(base_of(model), ""):
        if with_tied or id(tensor) not in told:
            yield name, tensor.detach()
        told.add(id(tensor))


def _plain(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
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
    """A layer's weights with the adapter in them. `safe_merge` puts new tensors in the place of the
    layer's own, which then take it back."""
    parameters = dict(layer.get_base_layer().named_parameters())
    own = {name: parameter.data for name, parameter in parameters.items()}
    layer.merge(safe_merge=True)
    try:
        return [(name, parameter.data) for name, parameter in parameters.items()]
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
        layer.merged_adapters.clear()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises StageError where the model or adapter
    cannot."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    base = base_of(model)
    if kind == "PREFIX_TUNING" or not getattr(base, "supports_gradient_checkpointing", False):
        what = "prefix tuning" if kind == "PREFIX_TUNING" else type(base).__name__
        raise StageError(
            "CheckpointingUnsupported",
            f"training.gradientCheckpointing is set, and {what} does not work with it.",
            advice="Set training.gradientCheckpointing to false, and lower "
            "training.microBatchTokens instead to save memory.",
        )
    # transformers 5.19, which the image with vLLM has, knows the older name alone.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
