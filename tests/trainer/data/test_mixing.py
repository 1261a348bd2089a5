"""Data sets of unequal size and general data, in the parts of an epoch that the job asks for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.test_prepare import DATASET, Job, Row, chat
from tuneyard.api.cleaning import Clean
from tuneyard.api.stage_settings import ReplaySettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.mixing import mixed_weights
from tuneyard_trainer.training.batches import Order

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def lamps(name: str, count: int) -> list[Row]:
    return [chat(f"Which {name} lamp has number {i}?", f"The lamp {i}.") for i in range(count)]


def rows_of_an_epoch(job: Job) -> list[int]:
    """The rows of an epoch by data set, as the training loop counts them."""
    data = job.data
    order = Order.of(data.train.source, data.weights, batch_size=4, seed=0)
    return [int((data.train.source[order.rows] == i).sum()) for i in range(len(data.weights))]


def test_a_temperature_of_two_gives_parts_like_the_square_roots(job: Job) -> None:
    outcome = job.run(
        {"train.0": lamps("red", 90), "train.1": lamps("blue", 10)},
        train=[DATASET, DATASET],
        temperature=2.0,
    )
    assert rows_of_an_epoch(job) == [75, 25]  # 3 to 1, the square root of 9 to 1
    assert [part["share"] for part in outcome.details["mixture"]] == pytest.approx([0.75, 0.25])


def test_replay_has_its_share_and_leaves_the_jobs_own_rows_alone(job: Job) -> None:
    job.run(
        {"train.0": lamps("red", 90), "train.1": lamps("blue", 40)},
        train=[DATASET, DATASET],
        replay=ReplaySettings(datasets=1, share=0.1),
    )
    assert rows_of_an_epoch(job) == [90, 10]


def test_no_row_of_replay_is_held_out(job: Job) -> None:
    job.run(
        {"train.0": lamps("red", 40), "train.1": lamps("blue", 40)},
        train=[DATASET, DATASET],
        replay=ReplaySettings(datasets=1, share=0.5),
        validation_fraction=0.5,
    )
    assert job.data.validation is not None
    assert set(job.data.validation.source.tolist()) == {0}
    assert len(job.data.validation) == 20
    assert rows_of_an_epoch(job) == [20, 20]


def test_a_replay_of_a_few_rows_is_refused_instead_of_repeated_thousands_of_times(job: Job) -> None:
    with pytest.raises(StageError, match="repeated 9,000 times") as error:
        mixed_weights([1000, 1], [1.0, 1.0], replayed=1, share=0.9)
    assert "lower spec.data.replay.share" in str(error.value)


def test_without_either_the_weights_are_those_of_the_manifest() -> None:
    assert mixed_weights([3, 5], [0.5, 2.0]) == [0.5, 2.0]
    assert mixed_weights([3, 5], [0.5, 2.0], temperature=1.0) == pytest.approx([0.5, 2.0])


@given(counts=sizes, temperature=st.floats(0.2, 50))
def test_a_temperature_keeps_the_length_of_an_epoch_and_the_order_of_the_parts(
    counts: list[int], temperature: float
) -> None:
    weights = mixed_weights(counts, [1.0] * len(counts), temperature=temperature)
    parts = [weight * count for weight, count in zip(weights, counts, strict=True)]
    assert sum(parts) == pytest.approx(sum(counts))
    by_count = [part for _, part in sorted(zip(counts, parts, strict=True))]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(by_count))


@given(own=sizes, general=sizes, share=st.floats(0.01, 0.9))
def test_replay_is_its_share_of_the_epoch(own: list[int], general: list[int], share: float) -> None:
    counts = [*own, *general]
    try:
        weights = mixed_weights(counts, [1.0] * len(counts), replayed=len(general), share=share)
    except StageError:
        assert sum(own) / sum(general) > 100
        return
    parts = [weight * count for weight, count in zip(weights, counts, strict=True)]
    assert weights[: len(own)] == [1.0] * len(own)
    assert sum(parts[len(own) :]) == pytest.approx(share * sum(parts))


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_replayed_rows_alone_are_no_training_data(job: Job, temperature: float | None) -> None:
    """The weights were not numbers, or the stage ended with a division by zero."""
    with pytest.raises(StageError, match=r"no row of spec\.data\.train is left") as caught:
        job.run(
            {"train.0": [chat("a", "b")] * 3, "train.1": lamps("blue", 9)},
            train=[DATASET, DATASET],
            replay=ReplaySettings(datasets=1, share=0.1),
            clean=Clean(min_words=5),
            temperature=temperature,
        )
    assert caught.value.reason == "EmptyData"


def test_an_epoch_without_a_sequence_is_refused(job: Job) -> None:
    with pytest.raises(StageError, match=r"an epoch has no sequence: .* are 0\.3 of 1\."):
        job.run({"train.0": lamps("red", 1)}, train=[DATASET.model_copy(update={"weight": 0.3})])


def test_the_lowest_temperature_leaves_the_largest_data_set() -> None:
    assert mixed_weights([30, 10], [1.0, 1.0], temperature=1e-9) == pytest.approx([4 / 3, 0.0])
