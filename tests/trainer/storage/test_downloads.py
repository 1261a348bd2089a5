"""Folders that appear whole or not at all, and the ones that killed processes leave."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tuneyard_trainer.storage.downloads import ABANDONED_SECONDS, keep, partial_folder


def put(path: Path, text: str, *, age: float = 0.0) -> Path:
    """Write a file. `age`: how long ago it and its folders below the parent were changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    at = time.time() - age
    for each in (path, path.parent):
        os.utime(each, (at, at))
    return path


def test_a_complete_folder_gets_its_name(tmp_path: Path) -> None:
    with partial_folder(tmp_path) as partial:
        put(partial / "a.txt", "whole")
        assert partial.name.startswith("."), "files of a folder that is not complete are hidden"
        keep(partial, tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final/a.txt").read_text() == "whole"


def test_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    def download() -> None:
        with partial_folder(tmp_path) as partial:
            put(partial / "a.txt", "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        download()
    assert [*tmp_path.iterdir()] == []


def test_the_folder_of_a_faster_process_stays(tmp_path: Path) -> None:
    put(tmp_path / "final/a.txt", "theirs")
    with partial_folder(tmp_path) as partial:
        put(partial / "a.txt", "mine")
        keep(partial, tmp_path / "final")
    assert (tmp_path / "final/a.txt").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("name", [".partial-1", "0123456789ab/.partial"])
def test_what_a_killed_process_left_is_removed_by_the_next_download(
    tmp_path: Path, name: str
) -> None:
    old = put(tmp_path / name / "a.txt", "half", age=2 * ABANDONED_SECONDS).parent
    whole = put(tmp_path / "final/a.txt", "whole", age=2 * ABANDONED_SECONDS)
    with partial_folder(tmp_path):
        assert not old.exists()
        assert whole.exists()


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    folder = put(tmp_path / ".partial-1/a.txt", "half", age=2 * ABANDONED_SECONDS).parent
    put(folder / "deep/b.txt", "now")
    os.utime(folder, (0, 0))
    with partial_folder(tmp_path):
        assert (folder / "a.txt").exists()


def test_a_process_whose_folder_was_removed_keeps_no_part_of_it(tmp_path: Path) -> None:
    with partial_folder(tmp_path) as mine:
        put(mine / "a.txt", "whole", age=2 * ABANDONED_SECONDS)  # it was suspended for long
        with partial_folder(tmp_path):
            pass
        with pytest.raises(FileNotFoundError):
            keep(mine, tmp_path / "final")
    assert [*tmp_path.iterdir()] == []
