"""The processors that a machine or pod grants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuneyard_trainer import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 processors, and the folder of its cgroups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "MOUNT", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


def write(groups: Path, own: str, files: dict[str, str]) -> None:
    (groups / "own").write_text(own)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)


@pytest.mark.parametrize(
    ("quota", "granted"),
    [("max 100000", 8), ("400000 100000", 4), ("150000 100000", 2), ("20000 100000", 1)],
)
def test_a_quota_limits_the_processors_and_is_rounded_up(
    groups: Path, quota: str, granted: int
) -> None:
    write(groups, "0::/pods/one", {"pods/one/cpu.max": quota})
    assert machine.cpu_limit() == granted


def test_the_quota_of_a_group_around_the_own_one_counts(groups: Path) -> None:
    files = {"pods/one/cpu.max": "max 100000", "pods/cpu.max": "300000 100000"}
    write(groups, "0::/pods/one", files)
    assert machine.cpu_limit() == 3


@pytest.mark.parametrize(("quota", "granted"), [("-1", 8), ("250000", 3)])
def test_a_quota_in_version_1_counts_too(groups: Path, quota: str, granted: int) -> None:
    folder = "cpu/pods/one"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    write(groups, "4:cpu:/pods/one", files)
    assert machine.cpu_limit() == granted


def test_without_cgroups_all_processors_of_the_process_count(groups: Path) -> None:
    assert machine.cpu_limit() == 8
    assert not (groups / "own").exists()
