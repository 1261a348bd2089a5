"""The arithmetic of a merge, one block of a tensor at a time.

Each method is a function that returns the merger of one tensor. It may read the tensor before, as
SLERP needs the angle of the whole tensor and TIES its largest changes.

Shapes: M models, B values of a block, which are some of a tensor's values in a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Some values of one tensor of all models, in float32."""

    number: int
    """Counted from 0 in the tensor."""
    models_MB: Tensor
    base_B: Tensor | None
    """Of the model that the others were tuned from. None: the method needs none."""

    @property
    def changes(self) -> Tensor:
        """The change by each model's tuning, its task vector (Ilharco et al. 2023). Shape: (M,
        B)."""
        if self.base_B is None:
            raise TypeError("a block without a base has no changes")
        return self.models_MB - self.base_B


Blocks = Callable[[], Iterator[Block]]
"""Reads the tensor, from its first block on, each time it is called."""
Merger = Callable[[Block], Tensor]
"""Returns the merged values of a block. Shape: (B,)."""

NEARLY_PARALLEL = 0.9995
"""Cosine above which SLERP divides by a sine that is too small: the way is then a straight line."""
NO_WEIGHT = 1e-8
"""Sum of weights that counts as 0."""


def linear(weights_M: Sequence[float]) -> Merger:
    """Return the weighted mean of the models (Wortsman et al. 2022, "model soups",
    arXiv:2203.05482). The weights are divided by their sum, which must not be 0."""
    shares_M = torch.tensor(weights_M, dtype=torch.float64)
    shares_M = (shares_M / shares_M.sum()).float()
    return lambda block: shares_M @ block.models_MB


def slerp(share: float, blocks: Blocks) -> Merger:
    """Return the point of the arc from the first model to the second (Shoemake 1985), at `share` of
    its angle: 0 is the first model, 1 the second. Tensors that are nearly parallel, or 0, are
    merged on the straight line between them."""
    products = torch.zeros(3, dtype=torch.float64)  # of first and second: 11, 22, 12
    for block in blocks():
        first_B, second_B = block.models_MB.double()
        products += torch.stack([first_B @ first_B, second_B @ second_B, first_B @ second_B])
    lengths = float(products[0].sqrt() * products[1].sqrt())
    cosine = float(products[2]) / lengths if lengths else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return linear((1 - share, share))
    angle = math.acos(cosine)
    parts = [math.sin(part * angle) / math.sin(angle) for part in (1 - share, share)]
    parts_M = torch.tensor(parts, dtype=torch.float32)
    return lambda block: parts_M @ block.models_MB


def task_arithmetic(weights_M: Sequence[float], scale: float) -> Merger:
    """Return the base plus the weighted sum of the models' changes (Ilharco et al. 2023,
    arXiv:2212.04089). Of one model with a weight below 1 it is WiSE-FT: back toward the base
    (Wortsman et al. 2022, arXiv:2109.01903)."""
    weights = torch.tensor(weights_M, dtype=torch.float32) * scale
    return lambda block: _based(block, weights @ block.changes)


def ties(
    weights_M: Sequence[float], densities_M: Sequence[float], scale: float, blocks: Blocks
) -> Merger:
    """Return the base plus the mean of the changes that agree in sign (Yadav et al. 2023,
    arXiv:2306.01708).

    Of each model, the share `density` of the changes that are largest in size is kept. The sign of
    a value is that of the weighted sum of the kept changes. Those with this sign are averaged by
    weight and multiplied by `scale`. Changes as large as the smallest kept one are kept too.
    """
    weights = torch.tensor(weights_M, dtype=torch.float32)[:, None]
    least_M1 = smallest_kept(densities_M, lambda: (block.changes for block in blocks()))[:, None]

    def merge(block: Block) -> Tensor:
        changes_MB = block.changes
        kept_MB = torch.where(changes_MB.abs() >= least_M1, changes_MB, 0.0)
        agreeing_MB = _agreeing(weights * kept_MB, kept_MB)
        sum_B = (weights * kept_MB * agreeing_MB).sum(0)
        weight_B = (weights * agreeing_MB).sum(0)
        return _based(block, scale * sum_B / torch.where(weight_B.abs() < NO_WEIGHT, 1.0, weight_B))

    return merge


def dare(
    weights_M: Sequence[float],
    densities_M: Sequence[float],
    scale: float,
    *,
    draws: Sequence[Callable[[int], torch.Generator]],
    elect_sign: bool,
) -> Merger:
    """Return the base plus the weighted sum of changes of which a random share `density` is kept
    and divided by `density`, so that their expectation stays (Yu et al. 2024, arXiv:2311.03099).

    `draws`: of each model, the source of chance for a block by its number. `elect_sign`: leave out
    the changes whose sign is not that of the weighted sum, as TIES does, without averaging.
    """
    weights = torch.tensor(weights_M, dtype=torch.float32)[:, None]
    densities = torch.tensor(densities_M, dtype=torch.float32)[:, None]

    def merge(block: Block) -> Tensor:
        changes_MB = block.changes
        chance_MB = torch.stack(
            [torch.rand(changes_MB.shape[1], generator=draw(block.number)) for draw in draws]
        )
        kept_MB = torch.where(chance_MB < densities, changes_MB / densities, 0.0)
        weighted_MB = weights * kept_MB
        if elect_sign:
            weighted_MB = weighted_MB * _agreeing(weighted_MB, kept_MB)
        return _based(block, scale * weighted_MB.sum(0))

    return merge


def _based(block: Block, change_B: Tensor) -> Tensor:
    if block.base_B is None:
        raise TypeError("a block without a base has no changes")
    return block.base_B + change_B


def _agreeing(weighted_MB: Tensor, kept_MB: Tensor) -> Tensor:
    """Return which changes have the sign of the weighted sum; none has the sign of a 0."""
    sign_B = torch.where(weighted_MB.sum(0) >= 0, 1.0, -1.0)
    return kept_MB.sign() == sign_B


def draw(seed: int, *names: str) -> Callable[[int], torch.Generator]:
    """Return the source of chance for the blocks of a tensor of a model. It depends on the seed,
    the names and the block's number alone: neither on the order of the models nor on how the
    tensors lie in files."""

    def generator(number: int) -> torch.Generator:
        text = "\0".join((str(seed), *names, str(number)))
        state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return torch.Generator().manual_seed(state & (2**63 - 1))

    return generator


# ---- the largest values of a tensor that is read in blocks -------------------------------------

_HIGH = 16
"""Bits of a float32 that the first reading counts; the second counts the rest."""


def smallest_kept(densities_M: Sequence[float], values: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Return, for each model, the least size of the share of its values that are largest in size.
    Shape: (M,). A share of less than one value is one value.

    `values`: reads blocks of shape (M, B) in float32, without NaN; it is called at most twice. The
    bits of sizes have the order of the sizes, so that counting their upper and then their lower
    half finds the value exactly, without sorting.
    """
    if min(densities_M) >= 1:
        return torch.zeros(len(densities_M))
    models = range(len(densities_M))
    counts_MH = torch.zeros(len(models), 1 << (31 - _HIGH + 1), dtype=torch.int64)
    total = 0
    for block_MB in values():
        total += block_MB.shape[1]
        for model in models:
            high_B = _bits(block_MB[model]) >> _HIGH
            counts_MH[model] += torch.bincount(high_B, minlength=counts_MH.shape[1])
    places = [
        _place(counts_MH[model], max(1, int(density * total)))
        for model, density in zip(models, densities_M, strict=True)
    ]
    counts_ML = torch.zeros(len(models), 1 << _HIGH, dtype=torch.int64)
    for block_MB in values():
        for model, (high, _) in zip(models, places, strict=True):
            bits_B = _bits(block_MB[model])
            low_B = bits_B[bits_B >> _HIGH == high] & ((1 << _HIGH) - 1)
            counts_ML[model] += torch.bincount(low_B, minlength=counts_ML.shape[1])
    found = [
        (high << _HIGH) | _place(counts_ML[model], rest)[0]
        for model, (high, rest) in zip(models, places, strict=True)
    ]
    least_M = torch.tensor(found, dtype=torch.int32).view(torch.float32)
    return torch.where(torch.tensor(densities_M) >= 1, 0.0, least_M)


def _bits(values: Tensor) -> Tensor:
    """Return the sizes of float32 values as integers of the same order."""
    return values.abs().contiguous().view(torch.int32).long()


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the place of the value that has this rank from above, and its rank in that place.

    `counts`: values by place. The rank counts from 1.
    """
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, rank))
    place = len(counts) - 1 - index
    return place, rank - int(above[index] - counts[place])
