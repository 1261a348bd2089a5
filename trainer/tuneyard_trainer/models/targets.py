"""The layers that LoRA and (IA)^3 adapt, such as those of `targets: all-linear`."""

from __future__ import annotations

from peft import IA3Config, LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuneyard.api.adapters import Lora
from tuneyard.errors import StageError
from tuneyard_trainer.models.bottleneck import attention_of
from tuneyard_trainer.models.layers import decoder_layers, layer_indices

TASK = "CAUSAL_LM"


# (IA)^3 rescales the outputs of the key and value projections and the input of the MLP's output
# projection. If one layer computes queries, keys and values, all of its outputs are rescaled.
IA3_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj")

IA3_MLP = ("down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h", "mlp.c_proj")


def lora_config(model: PreTrainedModel, settings: Lora, field: str) -> LoraConfig:
    """Return PEFT's config for LoRA or QLoRA. `field`: the manifest field of the settings, for
    messages. Raises StageError TargetNotFound, TiedHead or LayerOutOfRange."""
    name, layers = decoder_layers(model)
    chosen = layer_indices(settings.layers, len(layers), f"{field}.layers")
    return LoraConfig(
        task_type=TASK,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets, chosen, field),
        layers_to_transform=chosen if settings.layers else None,
        layers_pattern=name.rsplit(".", 1)[-1] if settings.layers else None,
        use_rslora=settings.rank_stabilized,
        use_dora=settings.decomposed,
    )


def _targets(
    model: PreTrainedModel, targets: str | list[str], chosen: list[int], field: str
) -> list[str]:
    """Return module names as PEFT matches them: a module's whole name, or a suffix after a dot."""
    inside, outside = _linear_layers(model, chosen)
    if isinstance(targets, list):
        _check_targets(model, targets, inside | outside, field)
        return sorted(targets)
    if targets == "attention":
        wanted = {name for name in inside if name.startswith(_attention_prefixes(model, chosen))}
    else:
        wanted = inside
    return _shortest(wanted, inside | outside)


def _linear_layers(model: PreTrainedModel, chosen: list[int]) -> tuple[set[str], set[str]]:
    """Return the names of linear layers (4-bit layers and GPT-2's Conv1D included): those inside
    the chosen decoder layers, and those outside of all decoder layers."""
    prefix = decoder_layers(model)[0] + "."
    inside, outside = set(), set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if not name.startswith(prefix):
            outside.add(name)
        elif int(name.removeprefix(prefix).split(".")[0]) in chosen:
            inside.add(name)
    return inside, outside


def _attention_prefixes(model: PreTrainedModel, chosen: list[int]) -> tuple[str, ...]:
    list_name, layers = decoder_layers(model)
    return tuple(f"{list_name}.{i}.{attention_of(layers[i])[0]}." for i in chosen)


def _shortest(wanted: set[str], names: set[str]) -> list[str]:
    """Return the shortest suffixes that match all wanted names and no other names."""
    found: set[str] = set()
    for name in sorted(wanted):
        parts = name.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        if found.isdisjoint(ends):
            found.add(next(end for end in ends if _matching(end, names) <= wanted))
    return sorted(found)


def _matching(end: str, names: set[str]) -> set[str]:
    return {name for name in names if name == end or name.endswith(f".{end}")}


def _check_targets(model: PreTrainedModel, targets: list[str], names: set[str], field: str) -> None:
    unknown = [target for target in targets if not _matching(target, names)]
    if unknown:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise StageError(
            "TargetNotFound",
            f"{field}.targets names {', '.join(unknown)}; the model's linear layers are {known}.",
            advice=f"Set {field}.targets to some of these layers, to all-linear or to attention.",
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    matched = {model.get_submodule(name) for t in targets for name in _matching(t, names)}
    if head in matched and head.weight is embeddings.weight:
        raise StageError(
            "TiedHead",
            f"{field}.targets names the head, which in this model is tied to the embeddings.",
            advice=f"Remove the head from {field}.targets.",
        )


def ia3_config(model: PreTrainedModel) -> IA3Config:
    """Return PEFT's config for (IA)^3. Raises StageError UnknownLayout."""
    _, layers = decoder_layers(model)
    names, _ = _linear_layers(model, list(range(len(layers))))
    key_value = [name for name in IA3_KEY_VALUE if _matching(name, names)]
    mlp = [name for name in IA3_MLP if _matching(name, names)]
    if not key_value or not mlp:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise StageError(
            "UnknownLayout",
            f"{type(model).__name__} has no {'MLP output' if key_value else 'key and value'} "
            f"projection of a known name for (IA)^3: its linear layers are {known}.",
            advice="Use adapter.lora with targets: all-linear.",
        )
    return IA3Config(task_type=TASK, target_modules=key_value + mlp, feedforward_modules=mlp)
