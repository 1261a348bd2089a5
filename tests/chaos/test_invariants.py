"""The invariants notice what they are there to notice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from tests.chaos.invariants import Reference, of_output, of_status, reference_of
from tests.chaos.kubelet import Kubelet, Played
from tests.chaos.machine import Machine, Pod
from tests.chaos.run import BATCH, CHECKPOINT_STEPS, STEPS
from tests.controller.scene import Attempt, Scene

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
    found = [*of_output(STATUS, played, output(tmp_path / "out"), reference, interval_rows=2)]
    assert found[:1] == ([broken] if broken else [])


@pytest.mark.parametrize("was_writing", [True, False])
def test_two_intervals_are_repeated_only_after_a_write_that_was_not_complete(
    tmp_path: Path, *, was_writing: bool
) -> None:
    rows, killed_at = range(STEPS * BATCH), 2 * CHECKPOINT_STEPS + 2
    calm = reference_of(STATUS, attempt(tmp_path / "calm", rows), output(tmp_path / "calm-output"))
    played = [attempt(tmp_path / "0", rows[: killed_at * BATCH]), attempt(tmp_path / "1", rows)]
    played[0].was_writing = was_writing
    interval = (CHECKPOINT_STEPS + 1) * BATCH
    found = [*of_output(STATUS, played, output(tmp_path / "out"), calm, interval_rows=interval)]
    assert found == ([] if was_writing else ["attempt 2 repeated 48 rows of 24 allowed"])


def test_as_many_rows_again_are_repeated_after_a_checkpoint_that_could_not_be_read(
    tmp_path: Path, reference: Reference
) -> None:
    made, played = output(tmp_path / "out"), [attempt(tmp_path / "0", ROWS[:4])]
    played.append(attempt(tmp_path / "1", ROWS))
    for unwritten, is_broken in ((0, True), (1, False)):
        found = of_output(STATUS, played, made, reference, interval_rows=2, num_unwritten=unwritten)
        assert bool([*found]) is is_broken


def test_an_unfinished_checkpoint_is_noted_when_a_driver_has_ended(tmp_path: Path) -> None:
    body = {"metadata": {"uid": "r1", "labels": {"tuneyard.io/job": "one"}}}
    listed = {"/apis/ray.io/v1/namespaces/n/rayjobs": [body], "/api/v1/namespaces/n/pods": []}
    api = SimpleNamespace(list=listed.__getitem__)
    scene = cast("Scene", SimpleNamespace(namespace="n", api=api))
    kubelet = Kubelet(scene, cast("Machine", None), tmp_path, tmp_path)
    played = attempt(tmp_path / "0", ROWS)
    played.attempt = cast("Attempt", SimpleNamespace(job=SimpleNamespace(name="one")))
    played.driver = psutil.Process()
    kubelet.played.append(played)
    kubelet._begun["r1"] = Future()
    kubelet._guarded = lambda *_: None  # type: ignore[method-assign]
    checkpoints = tmp_path / "models/one/out/stages/sft/checkpoints"
    (checkpoints / "step-00000010.abc.partial").mkdir(parents=True)
    kubelet._round()
    assert not played.ended
    played.driver = cast("psutil.Process", SimpleNamespace(is_running=lambda: False))
    kubelet._round()
    assert (played.ended, played.was_writing) == (True, True)


def test_a_later_process_with_the_number_of_an_ended_worker_is_not_the_worker(
    tmp_path: Path,
) -> None:
    played = attempt(tmp_path / "0", ROWS)
    played.pod.worker_id.write_text(str(os.getpid()))
    assert [each.pid for each in played.workers] == [os.getpid()]
    before = psutil.Process().create_time() - 60
    os.utime(played.pod.worker_id, (before, before))
    assert played.workers == []


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
    assert [*of_output(STATUS, played, made, reference, interval_rows=2)] == [broken]


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
