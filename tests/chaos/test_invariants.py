"""The invariants notice what they are there to notice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.chaos.invariants import Reference, of_output, of_status, reference_of
from tests.chaos.kubelet import Played
from tests.chaos.machine import Pod
from tests.controller.scene import Attempt

ROWS = (4, 2, 0, 3, 1, 5)
STATUS = {"result": {"digest": "sha256:d"}}


def attempt(folder: Path, rows: Sequence[int], uid: str = "r1") -> Played:
    """Return an attempt that read these rows."""
    pod = Pod(folder, folder)
    folder.mkdir()
    pod.rows.write_text("".join(f"{row}\n" for row in rows))
    return Played(cast("Attempt", None), "u", uid, pod, cast("Any", None))


def output(folder: Path, weights: bytes = b"w", steps: Sequence[int] = (1, 2, 3)) -> Path:
    """Return an output with these weights and this training curve."""
    adapter, stage = folder / "result" / "adapter", folder / "stages" / "sft"
    adapter.mkdir(parents=True)
    stage.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps]
    (stage / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return reference_of(STATUS, attempt(tmp_path / "calm", ROWS), output(tmp_path / "calm-output"))


@pytest.mark.parametrize(
    ("logs", "broken"),
    [
        ([ROWS], ""),
        ([ROWS[:4], ROWS[2:]], ""),
        ([ROWS[:4], [], ROWS[3:]], ""),
        ([ROWS[:4], ROWS[1:]], "attempt 2 repeated 3 rows of 2 allowed"),
        ([ROWS[:3], ROWS[4:]], "attempt 2 lost 1 rows"),
        ([ROWS[:5]], "1 rows were never read"),
        ([(4, 2, 3, 0, 1, 5)], "attempt 1 read rows in another order from row 0"),
        ([(4, 2, 2, 0, 3, 1, 5)], "attempt 1 read rows in another order from row 0"),
    ],
)
def test_a_lost_or_repeated_row_is_noticed(
    tmp_path: Path, reference: Reference, logs: Sequence[Sequence[int]], broken: str
) -> None:
    played = [attempt(tmp_path / str(i), rows) for i, rows in enumerate(logs)]
    found = [
        *of_output(STATUS, played, output(tmp_path / "out"), reference, redone_rows=2, batch=1)
    ]
    assert found[:1] == ([broken] if broken else [])


@pytest.mark.parametrize(
    ("checkpoint", "is_broken"), [(None, True), (0, False), (1, False), (2, True)]
)
def test_more_rows_are_repeated_only_where_no_newer_checkpoint_was_complete(
    tmp_path: Path, reference: Reference, checkpoint: int | None, is_broken: bool
) -> None:
    played = [attempt(tmp_path / "0", ROWS[:4]), attempt(tmp_path / "1", ROWS[1:])]
    played[0].checkpoint = checkpoint
    made = output(tmp_path / "out")
    assert bool([*of_output(STATUS, played, made, reference, redone_rows=2, batch=1)]) is is_broken


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"weights": b"x"}, "its weights differ from those of an undisturbed run"),
        ({"steps": (1, 2, 2, 3)}, "its training curve has the steps [1, 2, 2, 3]"),
        ({"steps": (1, 3)}, "its training curve has the steps [1, 3]"),
    ],
)
def test_other_weights_and_another_training_curve_are_noticed(
    tmp_path: Path, reference: Reference, change: dict[str, Any], broken: str
) -> None:
    played = [attempt(tmp_path / "0", ROWS)]
    made = output(tmp_path / "out", **change)
    assert [*of_output(STATUS, played, made, reference, redone_rows=2, batch=1)] == [broken]


def ended(*reasons: str, **changes: Any) -> dict[str, Any]:
    """Return the status of a job whose attempts ended for these reasons."""
    attempts = [
        {"reason": reason, "message": "m", "finishedAt": "t", "rayJobUid": f"r{i + 1}"}
        for i, reason in enumerate(reasons)
    ]
    stages = [{"name": "sft", "state": "Succeeded"}]
    return {"phase": "Succeeded", "attempts": attempts, "stages": stages, **changes}


@pytest.mark.parametrize(
    ("status", "broken"),
    [
        (ended("WorkerDied", "Succeeded"), ""),
        (ended("Suspended", "Succeeded"), "its attempts ended ['Suspended'], Succeeded"),
        (ended("WorkerDied"), "its attempts ended [], WorkerDied"),
        (ended("Succeeded"), "the status does not name 1 RayJobs of 1 attempts"),
        (ended("WorkerDied", "Succeeded", phase="Failed"), "it ended Failed"),
        (ended("WorkerDied", "Succeeded", stages=[{"name": "sft", "state": "Running"}]), "its sta"),
    ],
)
def test_a_status_that_does_not_tell_what_happened_is_noticed(
    tmp_path: Path, status: dict[str, Any], broken: str
) -> None:
    played = [attempt(tmp_path / uid, ROWS, uid) for uid in ("r1", "r2")]
    found = [*of_status(status, "u", played, {"WorkerDied"})]
    assert [text[: len(broken)] for text in found[:1]] == ([broken] if broken else [])
