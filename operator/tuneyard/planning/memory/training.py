"""The moments of a training step on one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tuneyard.api.model_facts import ModelFacts
from tuneyard.planning.memory.activations import (
    Computation,
    Loss,
    MicroBatch,
    forward_logits_bytes,
    head_input_bytes,
    layer_bytes,
    logits_bytes,
    temporary_bytes,
    tile_bytes,
)
from tuneyard.planning.memory.parameters import TRAINED_BYTES, Trained, base_bytes
from tuneyard.planning.memory.parts import Moment, Sharding

MOMENTS_BYTES = 8
"""AdamW's two moments, in float32. Counted by arithmetic: torch's tracker misses them."""
UPDATE_BYTES = 4
"""AdamW's square roots of the second moment, of all parameters at once on a GPU."""
PULL_BYTES = 16
"""L2-SP and EWC hold the distance, the slope, a scaled slope and a product, of one parameter at a
time, in float32."""
GENERAL_LOGIT_BYTES = 12
"""The log-probabilities under the reference, their exponentials and a product, in float32, beside
what the cross-entropy of as many targets takes."""


@dataclass(frozen=True)
class Step:
    """A training step: a model, what is trained, a micro-batch, and how it is computed."""

    facts: ModelFacts
    trained: Trained
    batch: MicroBatch
    how: Computation
    loss: Loss
    devices: int
    """Devices that train the model together."""
    sharding: Sharding = "none"
    checkpointing: bool = False
    reference: bool = False
    """Whether a copy of the trained parameters is kept as the reference, as PPO and GRPO do, and
    terms against forgetting. DPO computes the reference's log-probabilities before its first step,
    with the model itself."""
    pulls: bool = False
    """Whether the trained parameters are pulled toward the reference, by L2-SP or EWC."""
    fisher: bool = False
    """Whether the Fisher information of the trained parameters is kept, for EWC."""
    general_targets: int = 0
    """Targets of a general micro-batch, whose distribution under the reference is kept. 0: there is
    no divergence among the terms of the loss."""
    added_parameters: int = 0
    """Trained parameters beside the model's: a value head, or the head of a reward model."""

    in_place_updates: bool = False
    """Whether AdamW updates one parameter after another, as it does on a CPU."""
    file_backed: bool = False
    """Whether weights that are not trained take no memory of their own."""

    # ---- what is in memory all the time ---------------------------------------------------------

    @property
    def shards(self) -> int:
        """Number of devices that share one copy of the model."""
        return self.devices if self.sharding == "fsdp" else 1

    @property
    def trained_parameters(self) -> int:
        """Trained parameters on one device, which holds all of an adapter's."""
        shards = 1 if self.trained.adapter else self.shards
        return -(-self.trained.parameters // shards) + self.added_parameters

    @property
    def state(self) -> tuple[tuple[str, int], ...]:
        """The parts that stay from step to step."""
        count, trained = self.trained_parameters, self.trained
        base = base_bytes(self.facts, trained.adapter, self.how.precision) // self.shards
        if self.file_backed:
            base = 0 if trained.adapter else TRAINED_BYTES * trained.parameters
        adapter = TRAINED_BYTES * (count if trained.adapter else self.added_parameters)
        return (
            ("weights", base + adapter),
            ("gradients", TRAINED_BYTES * count),
            ("optimizer", MOMENTS_BYTES * count),
            ("reference", TRAINED_BYTES * count if self.reference else 0),
            ("Fisher information", TRAINED_BYTES * count if self.fisher else 0),
        )

    # ---- the moments ----------------------------------------------------------------------------

    def moments(self, *others: tuple[str, int]) -> Iterator[Moment]:
        """Yield the moments at which the most can be in memory. `others`: parts of other models."""
        kept = (*self.state, *others)
        copies, gathered = self._copies, self._gathered
        end = head_input_bytes(self.facts, self.trained, self.batch, self.how)
        tile = self._tile
        logits = tile or logits_bytes(self.facts, self.loss, self.batch)
        logits += GENERAL_LOGIT_BYTES * self.facts.vocabulary_size * self.general_targets
        layers = self._kept_layers
        if self.checkpointing:
            forward = tile or forward_logits_bytes(self.facts, self.loss, self.batch, self.how)
            yield Moment.of(
                "end of the forward pass",
                *kept,
                ("activations", self._boundaries + end),
                ("logits", forward),
                ("bfloat16 copies", copies),
                ("gathered weights", gathered.loss),
            )
        yield Moment.of(
            "gradient of the loss",
            *kept,
            ("activations", (self._boundaries if self.checkpointing else layers) + end),
            ("logits", logits),
            ("bfloat16 copies", self._head_copies if self.checkpointing else copies),
            ("gathered weights", gathered.loss),
        )
        temporary = temporary_bytes(self.facts, self.trained, self.batch, self.how)
        one = self._layer if self.checkpointing else 0
        yield Moment.of(
            "backward pass of a layer",
            *kept,
            ("activations", (self._boundaries if self.checkpointing else layers) + one + temporary),
            ("bfloat16 copies", self._layer_copies if self.checkpointing else copies),
            ("gathered weights", gathered.layer),
        )
        if gathered.end:
            yield Moment.of("end of the backward pass", *kept, ("gathered weights", gathered.end))
        if self.devices > 1 and (self.sharding == "none" or self.trained.adapter):
            size = TRAINED_BYTES * self.trained_parameters
            yield Moment.of("sum of the gradients", *kept, ("buffer of the gradients", size))
        if self.pulls:
            temporary = PULL_BYTES * self.facts.largest_tensor
            yield Moment.of("pull toward the start", *kept, ("temporary tensors", temporary))
        update = 0 if self.in_place_updates else UPDATE_BYTES * self.trained_parameters
        yield Moment.of("optimizer step", *kept, ("temporary tensors", update))

    @property
    def _tile(self) -> int:
        """TRL's loss, which gathers a sharded head once more. 0: another loss."""
        if self.loss != "tiled":
            return 0
        facts, on_gpu = self.facts, not self.in_place_updates
        stored = TRAINED_BYTES if self.trained.adapter is None else self.how.precision
        head = stored * facts.vocabulary_size * facts.embedding_size
        tile = tile_bytes(facts, self.trained, self.batch, self.how, on_gpu=on_gpu)
        return tile + (head if self.sharding == "fsdp" else 0)

    @property
    def _layer(self) -> int:
        return layer_bytes(self.facts, self.trained, self.batch, self.how)

    @property
    def _kept_layers(self) -> int:
        return (self.facts.layers - self.trained.first_layer) * self._layer

    @property
    def _boundaries(self) -> int:
        """The inputs of the layers, which checkpointing keeps."""
        layers = self.facts.layers - self.trained.first_layer
        return layers * self.how.stream * self.facts.hidden_size * self.batch.tokens

    # ---- copies of weights ----------------------------------------------------------------------

    @property
    def _casts_weights(self) -> bool:
        return self.how.casts and self.trained.adapter is None

    @property
    def _layer_copies(self) -> int:
        """The bfloat16 copies of one layer's trained weights."""
        return self.how.precision * self.facts.linear_parameters if self._casts_weights else 0

    @property
    def _head_copies(self) -> int:
        head = self.facts.vocabulary_size * self.facts.embedding_size
        trained = self._casts_weights and self.loss != "score" and self.trained.head
        return self.how.precision * head if trained else 0

    @property
    def copies_while_sampling(self) -> int:
        """The bfloat16 copies that autocast keeps while completions are sampled."""
        return self._copies

    @property
    def _copies(self) -> int:
        """The bfloat16 copies that autocast keeps of all trained weights."""
        layers = self.trained.layers * self._layer_copies
        return layers + self._head_copies

    @property
    def _gathered(self) -> Gathered:
        if self.sharding == "none":
            return Gathered(0, 0, 0)
        return Gathered.of(
            self.facts, self.trained, self.how.precision, checkpointing=self.checkpointing
        )


@dataclass(frozen=True)
class Gathered:
    """The parameters and gradients that FSDP2 holds whole, beside the shards."""

    loss: int
    """At the gradient of the loss: the parameters outside of the layers, which stay gathered."""
    layer: int
    """In the backward pass of a layer: also its parameters and those of the next one, the gradients
    of the layer before while they are reduced, and those of the head. Its own gradients come as its
    temporary tensors go."""
    end: int
    """At the end, when the gradients of the parameters outside of the layers are reduced."""

    @classmethod
    def of(
        cls, facts: ModelFacts, trained: Trained, precision: int, *, checkpointing: bool
    ) -> Gathered:
        """Return the bytes of a model. `precision`: bytes of a gathered parameter.

        With `checkpointing` all layers take the same. Without it the last layer takes the most,
        since it is the first whose activations are freed, and no other layer's gradients are being
        reduced by then.
        """
        outside = facts.parameters - facts.layers * facts.layer_parameters
        layer = precision * facts.layer_parameters
        whole = precision * outside
        if trained.adapter:  # frozen layers are gathered one by one, and have no gradients
            return cls(loss=whole, layer=whole + layer, end=0)
        head = facts.vocabulary_size * facts.embedding_size if trained.head else 0
        reduced = 4 * trained.per_layer if checkpointing else 0
        return cls(
            loss=whole,
            layer=whole + 2 * layer + reduced + precision * head,
            end=whole + (precision + 4) * trained.outside,
        )


def gathered_for_inference(facts: ModelFacts, precision: int) -> int:
    """Return the bytes that FSDP2 holds whole in a forward pass without gradients: the parameters
    outside of the layers, a layer, and the next one. `precision`: bytes of a parameter."""
    outside = facts.parameters - facts.layers * facts.layer_parameters
    return precision * (outside + 2 * facts.layer_parameters)
