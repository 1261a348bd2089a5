"""The arithmetic of merges against straight loops over the papers' formulas, and its laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tuneyard_trainer.merging import arithmetic
from tuneyard_trainer.merging.arithmetic import Block, Blocks, Merger

VALUES = 60


def tensors(seed: int, models: int = 3) -> tuple[Tensor, Tensor]:
    """Return the values of models, (M, B), and of their base."""
    generator = torch.Generator().manual_seed(seed)
    base_B = torch.randn(VALUES, generator=generator)
    return base_B + 0.1 * torch.randn((models, VALUES), generator=generator), base_B


def in_blocks(models_MB: Tensor, base_B: Tensor | None = None, size: int = 7) -> Blocks:
    def blocks() -> Iterator[Block]:
        for number, start in enumerate(range(0, models_MB.shape[1], size)):
            some = slice(start, start + size)
            yield Block(number, models_MB[:, some], None if base_B is None else base_B[some])

    return blocks


def merged(merger: Merger, blocks: Blocks) -> Tensor:
    return torch.cat([merger(block) for block in blocks()])


def draws(models: int, tensor: str = "t") -> list[Callable[[int], torch.Generator]]:
    return [arithmetic.draw(0, f"model {model}", tensor) for model in range(models)]


def trimmed(change_B: Sequence[float], density: float) -> list[float]:
    """Keep the largest changes: TIES, section 3.2, step 1."""
    kept = sorted(map(abs, change_B), reverse=True)[: max(1, int(density * len(change_B)))]
    return [value if abs(value) >= kept[-1] else 0.0 for value in change_B]


def ties_by_the_paper(
    models_MB: Tensor, base_B: Tensor, weights: Sequence[float], density: float, scale: float
) -> list[float]:
    """TIES, algorithm 1, with a weight for each model, one value after the other."""
    changes = [trimmed((model - base_B).tolist(), density) for model in models_MB]
    result = []
    for index, base in enumerate(base_B.tolist()):
        column = [(w, change[index]) for w, change in zip(weights, changes, strict=True)]
        sign = 1.0 if sum(w * c for w, c in column) >= 0 else -1.0
        kept = [(w, c) for w, c in column if w * c != 0 and math.copysign(1.0, c) == sign]
        mean = sum(w * c for w, c in kept) / sum(w for w, _ in kept) if kept else 0.0
        result.append(base + scale * mean)
    return result


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.4)])
def test_ties_is_the_algorithm_of_its_paper(density: float, weights: Sequence[float]) -> None:
    models_MB, base_B = tensors(1)
    blocks = in_blocks(models_MB, base_B)
    found_B = merged(arithmetic.ties(weights, [density] * 3, 0.8, blocks), blocks)
    expected = ties_by_the_paper(models_MB, base_B, weights, density, 0.8)
    assert torch.allclose(found_B, torch.tensor(expected), atol=1e-6)


def test_slerp_is_the_formula_over_the_whole_tensor() -> None:
    models_MB, _ = tensors(2, models=2)
    blocks = in_blocks(models_MB)
    first, second = models_MB.double()
    angle = math.acos(float(first @ second / (first.norm() * second.norm())))
    expected = (math.sin(0.7 * angle) * first + math.sin(0.3 * angle) * second) / math.sin(angle)
    found_B = merged(arithmetic.slerp(0.3, blocks), blocks)
    assert torch.allclose(found_B.double(), expected, atol=1e-6)


def test_dare_keeps_what_it_draws_and_divides_it_by_its_density() -> None:
    models_MB, base_B = tensors(3)
    blocks, weights = in_blocks(models_MB, base_B, VALUES), [0.5, 0.3, 1.0]
    found_B = merged(
        arithmetic.dare(weights, [0.4] * 3, 0.9, draws=draws(3), elect_sign=False), blocks
    )
    expected_B = base_B.clone()
    for weight, model_B, draw in zip(weights, models_MB, draws(3), strict=True):
        kept_B = torch.rand(VALUES, generator=draw(0)) < 0.4
        expected_B += 0.9 * weight * kept_B * (model_B - base_B) / 0.4
    assert torch.allclose(found_B, expected_B, atol=1e-6)


def test_the_expectation_of_dare_is_task_arithmetic() -> None:
    models_MB, base_B = tensors(4)
    blocks = in_blocks(models_MB, base_B)
    exact_B = merged(arithmetic.task_arithmetic([0.5] * 3, 1.0), blocks)
    sums_B = torch.zeros(VALUES)
    for seed in range(2000):
        sources = [arithmetic.draw(seed, str(model), "t") for model in range(3)]
        dare = arithmetic.dare([0.5] * 3, [0.5] * 3, 1.0, draws=sources, elect_sign=False)
        sums_B += merged(dare, blocks)
    # A change is kept half of the time and doubled: its standard deviation is its size.
    spread_B = 0.5 * (models_MB - base_B).norm(dim=0) / math.sqrt(2000)
    assert bool(((sums_B / 2000 - exact_B).abs() < 5 * spread_B).all())


def test_dare_ties_leaves_out_what_disagrees_with_the_sum() -> None:
    base_B = torch.zeros(1)
    models_MB = torch.tensor([[3.0], [-1.0], [1.0]])
    blocks = in_blocks(models_MB, base_B)
    merger = arithmetic.dare([1.0] * 3, [1.0] * 3, 1.0, draws=draws(3), elect_sign=True)
    assert merged(merger, blocks).tolist() == [4.0]


METHODS: dict[str, Callable[[Sequence[float], Blocks], Merger]] = {
    "linear": lambda weights, _: arithmetic.linear(weights),
    "slerp": lambda weights, blocks: arithmetic.slerp(weights[1] / sum(weights), blocks),
    "taskArithmetic": lambda weights, _: arithmetic.task_arithmetic(weights, 1.0),
    "ties": lambda weights, blocks: arithmetic.ties(weights, [1.0] * len(weights), 1.0, blocks),
    "dareLinear": lambda weights, _: arithmetic.dare(
        weights, [1.0] * len(weights), 1.0, draws=draws(len(weights)), elect_sign=False
    ),
    "dareTies": lambda weights, _: arithmetic.dare(
        weights, [1.0] * len(weights), 1.0, draws=draws(len(weights)), elect_sign=True
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_one_and_zero_give_a_model_back(method: str) -> None:
    models_MB, base_B = tensors(5, models=2)
    blocks = in_blocks(models_MB, base_B)
    for chosen, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        found_B = merged(METHODS[method](weights, blocks), blocks)
        assert torch.allclose(found_B, models_MB[chosen], atol=1e-6)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "slerp"])
def test_the_order_of_the_models_does_not_matter(method: str) -> None:
    models_MB, base_B = tensors(6)
    weights = [0.2, 0.5, 0.3]
    found = []
    for order in itertools.permutations(range(3)):
        blocks = in_blocks(models_MB[list(order)], base_B)
        found.append(merged(METHODS[method]([weights[i] for i in order], blocks), blocks))
    assert all(torch.allclose(found[0], other, atol=1e-6) for other in found)


def test_slerp_is_the_same_way_from_either_end() -> None:
    models_MB, _ = tensors(7, models=2)
    there, back = in_blocks(models_MB), in_blocks(models_MB.flip(0))
    found_B = merged(arithmetic.slerp(0.3, there), there)
    assert torch.allclose(found_B, merged(arithmetic.slerp(0.7, back), back), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_slerp_of_equal_models_is_the_model(share: float) -> None:
    models_MB = torch.stack([tensors(8)[1]] * 2)
    blocks = in_blocks(models_MB)
    assert torch.allclose(merged(arithmetic.slerp(share, blocks), blocks), models_MB[0], atol=1e-6)


@pytest.mark.parametrize("second", [torch.zeros(VALUES), torch.ones(VALUES)])
def test_slerp_of_tensors_without_an_angle_is_a_straight_line(second: Tensor) -> None:
    models_MB = torch.stack([torch.zeros(VALUES), second])
    blocks = in_blocks(models_MB)
    assert torch.allclose(merged(arithmetic.slerp(0.25, blocks), blocks), second / 4)


def test_chance_depends_on_the_seed_the_model_and_the_tensor_alone() -> None:
    def first(*names: str, seed: int = 0, number: int = 0) -> float:
        return float(torch.rand(1, generator=arithmetic.draw(seed, *names)(number)))

    values = {
        first("a", "t"),
        first("b", "t"),
        first("a", "u"),
        first("a", "t", seed=1),
        first("a", "t", number=1),
    }
    assert len(values) == 5
    assert first("a", "t") == first("a", "t")


@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.integers(1, 11),
)
def test_the_least_kept_size_is_that_of_a_sorted_list(
    values: list[float], density: float, size: int
) -> None:
    values_MB = torch.tensor([values], dtype=torch.float32)
    (found,) = arithmetic.smallest_kept([density], lambda: iter(values_MB.split(size, 1)))
    if density == 1:
        assert float(found) == 0
    else:
        sizes = values_MB[0].abs().sort(descending=True).values
        assert float(found) == float(sizes[max(1, int(density * len(values))) - 1])


def test_each_model_has_its_own_density() -> None:
    values_MB = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [5.0, 6.0, 7.0, 8.0]])
    found_M = arithmetic.smallest_kept([0.25, 0.5, 1.0], lambda: iter([values_MB]))
    assert found_M.tolist() == [4.0, 3.0, 0.0]
