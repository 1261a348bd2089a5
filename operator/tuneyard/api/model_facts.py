"""Numbers about a model that decide how much memory it takes, without its weights.

`api.model_config` reads them from a config.json, and `planning.memory` calculates with them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneyard.api.meta import Report

Count = Annotated[int, Field(ge=0, le=1 << 32)]
Positive = Annotated[int, Field(ge=1, le=1 << 32)]

MOST_LAYERS = 4096
"""Layers of a model; a few hundred is the most that exists. It bounds the time of a decision."""

LinearInput = Literal["attentionInput", "attentionOutput", "mlpInput", "mlpHidden"]
"""The tensor that a linear layer reads. Layers that read the same tensor can share it."""


class LinearShape(Report):
    """One linear layer of a decoder layer."""

    name: str = Field(max_length=64)
    """Name of the module, e.g. `q_proj`."""
    inputs: Positive
    """Width of its input."""
    outputs: Positive
    """Width of its output."""
    bias: bool = False
    """Whether it has a bias."""
    reads: LinearInput
    """The tensor that it reads."""

    @property
    def weights(self) -> int:
        """Number of elements of the weight matrix."""
        return self.inputs * self.outputs

    @property
    def in_attention(self) -> bool:
        """Whether it belongs to the attention, and not to the MLP."""
        return self.reads.startswith("attention")


class Experts(Report):
    """The experts of a layer whose MLP is a mixture. They are not linear layers: each matrix of all
    experts is one tensor, which LoRA with `all-linear` does not adapt and QLoRA does not quantize.
    """

    count: Positive
    """Number of experts."""
    per_token: Positive
    """Number of experts that compute each token."""
    intermediate_size: Positive
    """Width of an expert's hidden layer."""


class ModelFacts(Report):
    """A causal language model, as far as its memory depends on it. All layers are alike."""

    architecture: str = Field(max_length=64)
    """The `model_type` of config.json."""
    layers: int = Field(ge=1, le=MOST_LAYERS)
    """Number of decoder layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    intermediate_size: Positive
    """Width of the hidden layer of an MLP."""
    attention_heads: Positive
    """Query heads."""
    key_value_heads: Positive
    """Key and value heads."""
    head_dim: Positive
    """Width of a head."""
    vocabulary_size: Positive
    """Rows of the embedding matrix."""
    embedding_size: Positive
    """Width of the embedding matrix: `hidden_size`, unless the model projects the embeddings."""
    positions: Count = 0
    """Rows of the matrix of learned positions. 0: the positions are computed."""
    context_length: Positive | None = None
    """Most positions of a sequence. None: the config names no limit."""
    tied_embeddings: bool
    """Whether the head is the embedding matrix."""
    linears: list[LinearShape] = Field(max_length=64)
    """Linear layers of one decoder layer."""
    experts: Experts | None = None
    """The mixture in the place of the MLP's linear layers. None: the MLP is dense."""
    norm: Literal["rms", "rmsFloat32", "layer"]
    """rms: scaled in the precision of the stream. rmsFloat32: scaled in float32 (Gemma, OLMo 2).
    layer: LayerNorm, which has a bias."""
    norms: Positive
    """Norms of a decoder layer that are as wide as the stream."""
    query_key_norm: Literal["none", "head", "whole"] = "none"
    """Norms of queries and keys: over each head, or over all heads together."""
    final_norm: bool = True
    """Whether a norm precedes the head."""
    activation_tensors: Positive
    """Tensors as wide as the MLP's hidden layer that a backward pass needs, apart from the input of
    its last linear layer: 3 in a gated MLP, 1 after a GELU or ReLU, 4 where GELU is computed in
    steps (GPT-2)."""
    stored_bytes: Literal[2, 4]
    """Bytes of a weight in the model's files."""

    # ---- numbers of parameters --------------------------------------------------------------

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token and position embeddings, with projections of the embeddings."""
        projection = 0
        if self.embedding_size != self.hidden_size:
            projection = 2 * self.embedding_size * self.hidden_size
        tokens = self.vocabulary_size * self.embedding_size
        return tokens + self.positions * self.hidden_size + projection

    @property
    def head_parameters(self) -> int:
        """Parameters of the head that are not those of the embeddings."""
        return 0 if self.tied_embeddings else self.vocabulary_size * self.embedding_size

    @property
    def linear_parameters(self) -> int:
        """Parameters of the weight matrices of a decoder layer's linear layers."""
        return sum(linear.weights for linear in self.linears)

    @property
    def bias_parameters(self) -> int:
        """Parameters of the biases of a decoder layer's linear layers."""
        return sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def norm_parameters(self) -> int:
        """Parameters of a decoder layer's norms."""
        values = 2 if self.norm == "layer" else 1
        whole = (self.attention_heads + self.key_value_heads) * self.head_dim
        own = {"none": 0, "head": 2 * self.head_dim, "whole": whole}[self.query_key_norm]
        return values * self.norms * self.hidden_size + own

    @property
    def expert_parameters(self) -> int:
        """Parameters of a decoder layer's experts and of their router."""
        if self.experts is None:
            return 0
        matrices = 3 * self.experts.intermediate_size * self.hidden_size
        return self.experts.count * (matrices + self.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        dense = self.linear_parameters + self.bias_parameters
        return dense + self.norm_parameters + self.expert_parameters

    @property
    def final_norm_parameters(self) -> int:
        """Parameters of the norm before the head."""
        values = 2 if self.norm == "layer" else 1
        return values * self.hidden_size if self.final_norm else 0

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        outside = self.embedding_parameters + self.final_norm_parameters + self.head_parameters
        return outside + self.layers * self.layer_parameters

    @property
    def largest_tensor(self) -> int:
        """Parameters of the largest tensor. All matrices of a layer's experts count as one, since
        some files join them."""
        embedding = self.vocabulary_size * self.embedding_size
        return max(embedding, self.expert_parameters, *(linear.weights for linear in self.linears))

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, which is that of the value heads too."""
        return self.key_value_heads * self.head_dim
