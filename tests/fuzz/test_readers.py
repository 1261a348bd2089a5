"""The inputs that fuzzing kept: each reaches lines of the readers that no other one reaches, or
failed once (`failed-*`). They need no atheris."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import readers

CORPUS = sorted((Path(__file__).parent / "corpus" / "readers").iterdir())
FAILED = [path for path in CORPUS if path.name.startswith("failed-")]


@pytest.mark.parametrize("path", FAILED, ids=lambda p: p.stem.removeprefix("failed-"))
def test_an_input_that_once_broke_a_reader_is_read_or_refused(path: Path) -> None:
    assert readers.problem(path.read_bytes()) is None


def test_every_kept_input_is_read_or_refused_within_its_time_and_memory() -> None:
    problems = {path.name: readers.problem(path.read_bytes()) for path in CORPUS}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_the_kept_inputs_have_every_target_and_stay_small() -> None:
    targets = Counter(path.read_bytes()[:1] for path in CORPUS)
    assert targets.keys() >= readers.TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS) < 300 << 10


def test_a_fault_of_each_sort_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves: an error of Python, a slow input, and a message that no log holds."""

    def fails(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setitem(readers.TARGETS, b"r", fails)
    assert readers.problem(b"r\x00") == "KeyError: 'x'"
    monkeypatch.setitem(readers.TARGETS, b"r", lambda *_: readers._check_message("\ud800"))
    assert "half of a character" in str(readers.problem(b"r\x00"))
    monkeypatch.setitem(readers.TARGETS, b"r", lambda *_: None)
    monkeypatch.setattr(readers, "SECONDS", -1.0)
    assert "processor seconds" in str(readers.problem(b"r\x00"))
