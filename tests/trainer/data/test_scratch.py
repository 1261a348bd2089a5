"""Arrays on disk, and the files of a stage that is killed or has no space left."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data.test_prepare import Job, chats
from tuneyard.api.cleaning import Clean
from tuneyard_trainer.data.scratch import ScratchArray


@pytest.mark.parametrize("dtype", [np.int64, np.dtype((np.uint32, 14)), np.dtype("u8,i2")])
def test_an_array_has_all_elements_in_order(tmp_path: Path, dtype: Any) -> None:
    expected = np.zeros(70_000, dtype)
    expected.view(np.uint8)[:] = np.random.default_rng(0).integers(
        0, 256, expected.view(np.uint8).shape
    )
    array = ScratchArray(tmp_path, dtype)
    for part in np.array_split(expected, [0, 1, 5_000, 5_000, 69_999]):
        array.extend(part)
    assert len(array) == len(expected)
    found = array.close()
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = expected[0]


def test_an_array_without_elements_is_empty(tmp_path: Path) -> None:
    assert ScratchArray(tmp_path, np.int64).close().shape == (0,)


def test_an_array_has_no_file_in_its_folder(tmp_path: Path) -> None:
    array = ScratchArray(tmp_path, np.int64)
    array.extend(np.arange(100_000))
    assert not list(tmp_path.iterdir())
    found = array.close()
    assert not list(tmp_path.iterdir())
    assert found[-1] == 99_999


def test_a_named_file_of_a_killed_run_is_removed(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Some file systems give a file without a name one for a moment."""
    job = Job(tmp_path, tiny_model_dir)
    job.train(chats(5))
    files = job.files()
    (job.workdir / ".scratch-abc").write_bytes(b"half")
    job.train(chats(5))
    assert job.files() == files


@pytest.mark.parametrize("written", [0, 3])
def test_no_file_is_left_where_an_array_has_no_space(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    extend, calls = ScratchArray.extend, iter(range(1000))

    def full(self: ScratchArray, values: Any) -> None:
        if next(calls) >= written:
            raise OSError(errno.ENOSPC, "No space left on device")
        extend(self, values)

    monkeypatch.setattr(ScratchArray, "extend", full)
    job = Job(tmp_path, tiny_model_dir)
    with pytest.raises(OSError, match="No space left"):
        job.train(chats(20), validation_fraction=0.2, clean=Clean(duplicates="near"))
    assert not job.files()
