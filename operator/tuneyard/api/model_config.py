"""The facts of a model from its config.json, or from the header of a GGUF file.

Each architecture has a function of its own below. The tests compare their counts with those of the
models that transformers builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from tuneyard.api.model_facts import Experts, LinearInput, LinearShape, ModelFacts

Config = Mapping[str, Any]
"""The JSON object of a config.json."""


class UnknownModelError(ValueError):
    """A config.json whose numbers Tuneyard cannot read; the message says why."""


def facts_of(config: Config) -> ModelFacts:
    """Return the facts of a causal language model. Raises UnknownModelError.

    The text part of a model with several modalities is read (`text_config`).
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        shared = ("tie_word_embeddings", "dtype", "torch_dtype")
        config = {name: config[name] for name in shared if name in config} | dict(text)
    kind = str(config.get("model_type"))
    read = READERS.get(kind)
    if read is None:
        known = ", ".join(sorted(READERS))
        raise UnknownModelError(f"the architecture {kind} is not described; described are {known}")
    try:
        return read(config)
    except KeyError as error:
        raise UnknownModelError(f"the config of this {kind} model lacks {error}") from error
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(str(part) for part in found["loc"])
        first = f"{field} is {found['input']}: {found['msg']}"
        raise UnknownModelError(f"the config of this {kind} model is invalid: {first}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        first = str(error).splitlines()[0]
        raise UnknownModelError(f"the config of this {kind} model is invalid: {first}") from error


def _value(config: Config, name: str, default: Any) -> Any:
    """Return a field's value; the default if it is absent or null."""
    found = config.get(name)
    return default if found is None else found


def _linear(
    name: str, inputs: int, outputs: int, reads: LinearInput, *, bias: bool = False
) -> LinearShape:
    return LinearShape(name=name, inputs=inputs, outputs=outputs, reads=reads, bias=bias)


def _stored_bytes(config: Config) -> int:
    """Return the bytes of a stored weight: 4 only if the config says float32, or nothing."""
    name = _value(config, "dtype", _value(config, "torch_dtype", "float32"))
    return 4 if "float32" in str(name) else 2


# ---- the family of Llama ------------------------------------------------------------------------


def _llama(
    config: Config,
    *,
    query_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
    **differences: Any,
) -> ModelFacts:
    """Return the facts of a model with RMS norms, rotary positions and a gated MLP.

    `tied`: whether the head is tied where the config does not say it. `differences`: facts that
    are not Llama's.
    """
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(_value(config, "num_key_value_heads", heads))
    width = int(_value(config, "head_dim", hidden // heads))
    queries, keys = heads * width, kv_heads * width
    linears = [
        _linear("q_proj", hidden, queries, "attentionInput", bias=query_bias),
        _linear("k_proj", hidden, keys, "attentionInput", bias=query_bias),
        _linear("v_proj", hidden, keys, "attentionInput", bias=query_bias),
        _linear("o_proj", queries, hidden, "attentionOutput", bias=output_bias),
        _linear("gate_proj", hidden, inner, "mlpInput", bias=mlp_bias),
        _linear("up_proj", hidden, inner, "mlpInput", bias=mlp_bias),
        _linear("down_proj", inner, hidden, "mlpHidden", bias=mlp_bias),
    ]
    facts = {
        "architecture": config["model_type"],
        "layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "attention_heads": heads,
        "key_value_heads": kv_heads,
        "head_dim": width,
        "vocabulary_size": int(config["vocab_size"]),
        "embedding_size": hidden,
        "context_length": config.get("max_position_embeddings"),
        "tied_embeddings": bool(_value(config, "tie_word_embeddings", tied)),
        "linears": linears,
        "norm": "rms",
        "norms": 2,
        "activation_tensors": 3,
        "stored_bytes": _stored_bytes(config),
    }
    return ModelFacts(**{**facts, **differences})


def _biased(config: Config, **differences: Any) -> ModelFacts:
    """Return the facts of a model whose config says whether its attention has biases."""
    bias = bool(_value(config, "attention_bias", False))
    return _llama(config, query_bias=bias, output_bias=bias, **differences)


def _biased_llama(config: Config, **differences: Any) -> ModelFacts:
    """Return the facts of Llama and of models that have its config with the same biases."""
    mlp_bias = bool(_value(config, "mlp_bias", False))
    return _biased(config, mlp_bias=mlp_bias, **differences)


def _gemma(config: Config, **differences: Any) -> ModelFacts:
    config = {"head_dim": 256, **config}
    return _biased(config, tied=True, norm="rmsFloat32", **differences)


def _phi3(config: Config) -> ModelFacts:
    """Return the facts of Phi-3, which computes queries, keys and values in one layer."""
    facts = _llama(config)
    hidden, inner = facts.hidden_size, facts.intermediate_size
    joint = facts.query_size + 2 * facts.key_value_size
    linears = [
        _linear("qkv_proj", hidden, joint, "attentionInput"),
        _linear("o_proj", facts.query_size, hidden, "attentionOutput"),
        _linear("gate_up_proj", hidden, 2 * inner, "mlpInput"),
        _linear("down_proj", inner, hidden, "mlpHidden"),
    ]
    return facts.model_copy(update={"linears": linears})


def _mixture(facts: ModelFacts, experts: Experts) -> ModelFacts:
    """Return the facts with experts in the place of the MLP."""
    attention = [linear for linear in facts.linears if linear.in_attention]
    return facts.model_copy(update={"linears": attention, "experts": experts})


def _mixtral(config: Config) -> ModelFacts:
    experts = Experts(
        count=int(config["num_local_experts"]),
        per_token=int(config["num_experts_per_tok"]),
        intermediate_size=int(config["intermediate_size"]),
    )
    return _mixture(_llama(config), experts)


def _qwen3_moe(config: Config) -> ModelFacts:
    """Return the facts of a Qwen3 mixture. Raises UnknownModelError if some layers are dense."""
    if config.get("mlp_only_layers") or _value(config, "decoder_sparse_step", 1) != 1:
        raise UnknownModelError("some layers of this qwen3_moe model have no experts")
    # transformers writes `num_local_experts`; the files of Qwen's own models have `num_experts`.
    count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    experts = Experts(
        count=int(count),
        per_token=int(config["num_experts_per_tok"]),
        intermediate_size=int(config["moe_intermediate_size"]),
    )
    config = {"intermediate_size": experts.intermediate_size, **config}
    return _mixture(_biased(config, query_key_norm="head"), experts)


# ---- models with LayerNorm and a plain MLP --------------------------------------------------


def _plain(
    config: Config,
    *,
    hidden: int,
    inner: int,
    heads: int,
    layers: int,
    linears: list[LinearShape],
    tied: bool,
    **differences: Any,
) -> ModelFacts:
    """Return the facts of a model with LayerNorm, as many key heads as query heads, and an MLP of
    two linear layers."""
    facts = {
        "architecture": config["model_type"],
        "layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "attention_heads": heads,
        "key_value_heads": heads,
        "head_dim": hidden // heads,
        "vocabulary_size": int(config["vocab_size"]),
        "embedding_size": hidden,
        "tied_embeddings": bool(_value(config, "tie_word_embeddings", tied)),
        "linears": linears,
        "norm": "layer",
        "norms": 2,
        "activation_tensors": 1,
        "stored_bytes": _stored_bytes(config),
    }
    return ModelFacts(**{**facts, **differences})


def _gpt2(config: Config) -> ModelFacts:
    hidden, positions = int(config["n_embd"]), int(config["n_positions"])
    inner = int(_value(config, "n_inner", 4 * hidden))
    in_steps = _value(config, "activation_function", "gelu_new") == "gelu_new"
    return _plain(
        config,
        hidden=hidden,
        inner=inner,
        heads=int(config["n_head"]),
        layers=int(config["n_layer"]),
        linears=[
            _linear("attn.c_attn", hidden, 3 * hidden, "attentionInput", bias=True),
            _linear("attn.c_proj", hidden, hidden, "attentionOutput", bias=True),
            _linear("mlp.c_fc", hidden, inner, "mlpInput", bias=True),
            _linear("mlp.c_proj", inner, hidden, "mlpHidden", bias=True),
        ],
        tied=True,
        positions=positions,
        context_length=positions,
        activation_tensors=4 if in_steps else 1,
    )


def _opt(config: Config) -> ModelFacts:
    hidden, inner = int(config["hidden_size"]), int(config["ffn_dim"])
    bias = bool(_value(config, "enable_bias", True))
    positions = int(config["max_position_embeddings"])
    before = bool(_value(config, "do_layer_norm_before", True))
    attention = [
        _linear(name, hidden, hidden, "attentionInput", bias=bias)
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    return _plain(
        config,
        hidden=hidden,
        inner=inner,
        heads=int(config["num_attention_heads"]),
        layers=int(config["num_hidden_layers"]),
        linears=[
            *attention,
            _linear("out_proj", hidden, hidden, "attentionOutput", bias=bias),
            _linear("fc1", hidden, inner, "mlpInput", bias=bias),
            _linear("fc2", inner, hidden, "mlpHidden", bias=bias),
        ],
        tied=True,
        positions=positions + 2,  # the first two rows are those of padding
        context_length=positions,
        embedding_size=int(_value(config, "word_embed_proj_dim", hidden)),
        final_norm=before and not config.get("_remove_final_layer_norm", False),
    )


def _gpt_neox(config: Config) -> ModelFacts:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    bias = bool(_value(config, "attention_bias", True))
    return _plain(
        config,
        hidden=hidden,
        inner=inner,
        heads=int(config["num_attention_heads"]),
        layers=int(config["num_hidden_layers"]),
        linears=[
            _linear("query_key_value", hidden, 3 * hidden, "attentionInput", bias=bias),
            _linear("dense", hidden, hidden, "attentionOutput", bias=bias),
            _linear("dense_h_to_4h", hidden, inner, "mlpInput", bias=True),
            _linear("dense_4h_to_h", inner, hidden, "mlpHidden", bias=True),
        ],
        tied=False,
        context_length=config.get("max_position_embeddings"),
    )


GEMMA3: Final = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208}
"""What transformers takes where the files of Gemma 3 leave it out, as those of the 4B model do."""

READERS: Final[Mapping[str, Callable[[Config], ModelFacts]]] = {
    "llama": _biased_llama,
    "mistral": lambda config: _llama(config),
    "ministral3": lambda config: _llama(config),
    "qwen2": lambda config: _llama(config, query_bias=True),
    "qwen3": lambda config: _biased({"head_dim": 128, **config}, query_key_norm="head"),
    "granite": _biased_llama,
    "smollm3": lambda config: _biased_llama(config, tied=True),
    "olmo2": lambda config: _biased(config, norm="rmsFloat32", query_key_norm="whole"),
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma3_text": lambda config: _gemma({**GEMMA3, **config}, norms=4, query_key_norm="head"),
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
"""The described architectures, by the `model_type` of their config.json."""
