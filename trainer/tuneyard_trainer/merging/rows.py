"""Embeddings and heads of models whose vocabularies differ: their rows in one order.

A row is a token's embedding, or its part of the head. A model that lacks a token has the base's row
of it, and so changes nothing there. For a token that the base lacks too, that row is the mean of
the rows of the models that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuneyard_trainer.merging.sources import Source
from tuneyard_trainer.models.weight_files import TensorSpec

MISSING = -1
"""The place of a row that a model does not have."""


def union(base: Mapping[str, int], others: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the base's ids by token, and the next ids for the tokens that it lacks: first those of
    the first model, in the order of their ids there."""
    ids = dict(base)
    for vocabulary in others:
        for token in sorted(vocabulary.keys() - ids.keys(), key=vocabulary.__getitem__):
            ids[token] = max(ids.values(), default=-1) + 1
    return ids


def places(ids: Mapping[str, int], vocabulary: Mapping[str, int], rows: int, own: int) -> list[int]:
    """Return the row of each row of the result in a model with this vocabulary.

    `rows`, `own`: the rows of the result's and of the model's embeddings, which may be more than
    their tokens. A row without a token is that of the same place, if it has no token there either.
    """
    taken = set(vocabulary.values())
    found = [row if row < own and row not in taken else MISSING for row in range(rows)]
    for token, row in ids.items():
        found[row] = vocabulary.get(token, MISSING)
    return found


@dataclass(frozen=True)
class Arranged:
    """A source whose embeddings and head have the rows of another vocabulary."""

    source: Source
    names: frozenset[str]
    """The tensors whose rows are tokens."""
    places: Sequence[int]
    """The source's row of each row of the result, or MISSING."""
    others: Sequence[Arranged]
    """The models from which a row comes that this one lacks: the mean of those that have it."""

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def key(self) -> str:
        return self.source.key

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        rows = len(self.places)
        return {
            name: replace(spec, shape=(rows, *spec.shape[1:])) if name in self.names else spec
            for name, spec in self.source.specs.items()
        }

    def dim(self, name: str) -> int:
        return 0 if name in self.names else self.source.dim(name)

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        if name not in self.names:
            return self.source.read(name, start, stop, dim)
        found = [
            self._missing(name, row)
            if place == MISSING
            else self.source.read(name, place, place + length, 0)
            for row, place, length in runs(self.places[start:stop], start)
        ]
        return torch.cat(found)

    def has(self, row: int) -> bool:
        """Return whether the source or one of the others has a row of the result."""
        return self.places[row] != MISSING or any(other.has(row) for other in self.others)

    def _missing(self, name: str, row: int) -> Tensor:
        having = [each for each in self.others if each.has(row)]
        found = [each.read(name, row, row + 1, 0) for each in having]
        return torch.stack(found).mean(0)


def runs(places: Sequence[int], first: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first row, its place and the length of each run of places that follow each other. A
    MISSING row is a run of its own. `first`: the row of the first place."""
    start = 0
    for end in range(1, len(places) + 1):
        follows = end < len(places) and MISSING != places[end] == places[end - 1] + 1
        if not follows or places[end - 1] == MISSING:
            yield first + start, places[start], end - start
            start = end


def arrange(
    base: Source,
    base_vocabulary: Mapping[str, int],
    models: Sequence[Source],
    vocabularies: Sequence[Mapping[str, int]],
    names: frozenset[str],
    ids: Mapping[str, int],
) -> tuple[Arranged, list[Arranged]]:
    """Return the base and the models with the rows of the result.

    `names`: the tensors whose rows are tokens. `ids`: of the result's tokens.
    """

    def own(source: Source) -> int:
        return min(source.specs[name].shape[0] for name in names)

    rows = max(len(ids), own(base))
    alone = [
        Arranged(model, names, places(ids, vocabulary, rows, own(model)), ())
        for model, vocabulary in zip(models, vocabularies, strict=True)
    ]
    in_base = Arranged(base, names, places(ids, base_vocabulary, rows, own(base)), alone)
    return in_base, [replace(model, others=[in_base]) for model in alone]
