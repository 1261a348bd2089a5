"""The training loop on a tiny model: resume, early stopping, the best weights, failures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.stop_after import NEVER, StopAfter, StopAtCheck, without_times
from tuneyard.errors import StageError
from tuneyard_trainer.training import checkpoints, sft
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

CPU = torch.device("cpu")
ROWS = random_rows(10)
HELD_OUT = random_rows(4, seed=9)


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, HELD_OUT)
    return {"model": tiny_model_dir, "data": tmp_path / "data"}


def run(
    folder: Path, inputs: dict[str, Path], worker: Worker | None = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    outcome = sft.run(
        StageContext(train_stage(**settings), inputs, folder, worker or Worker(0, 1, CPU))
    )
    weights = next((folder / "weights").glob("*.safetensors"))
    return load_file(weights), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_reports_its_metrics(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    _, outcome = run(tmp_path / "a", inputs, epochs=20.0, learning_rate=1e-2)
    steps = [line for line in lines(tmp_path / "a") if "loss" in line]
    assert len(steps) == outcome.metrics["steps"] == 60
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert outcome.metrics["tokens"] == 20 * sum(len(ids) for ids, _ in ROWS)
    assert outcome.metrics["baseValidationLoss"] == pytest.approx(math.log(400), rel=0.1)
    assert outcome.contents == ("weights",)


@pytest.mark.parametrize("packing", ["always", "never"])
def test_the_record_counts_the_rows_that_an_epoch_is_packed_into(
    tmp_path: Path, inputs: dict[str, Path], packing: str
) -> None:
    """Of the first epoch, however many follow."""
    _, outcome = run(tmp_path / "a", inputs, packing=packing, epochs=2.0)
    found = outcome.details["packing"]
    assert (found["sequences"], found["tokens"]) == (10, sum(len(ids) for ids, _ in ROWS))
    assert outcome.details["packed"] == (packing == "always") == (found["rows"] < 10)
    assert outcome.metrics["packedSequences"] == 10
    assert outcome.metrics["packedRows"] == found["rows"]
    share = 1 - found["tokens"] / found["positions"]
    assert outcome.metrics["paddingShare"] == pytest.approx(share)
    assert (share > 0) == (packing == "never")


@pytest.mark.parametrize("adapter", [None, {"lora": {"dropout": 0.1}}], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    adapter: Any, stop: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(tmp_path / "whole", inputs, adapter=adapter)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "parts", inputs, StopAfter(stop).worker(), adapter=adapter)
    assert stopped.value.step == stop + 1
    resumed, outcome = run(tmp_path / "parts", inputs, adapter=adapter)
    assert outcome.details["resumedAtStep"] == stop + 1
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def losses(folder: Path) -> list[Any]:
        return [(line["step"], line.get("loss")) for line in lines(folder)]

    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_stop_at_any_moment_is_seen_within_a_batch_and_resumed_exactly(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Before the first step nothing is saved; in an evaluation the step before it is, and the
    resumed run begins with that evaluation. Weights, curves, baseline and metrics are those of an
    undisturbed run."""
    settings: dict[str, Any] = {
        "evaluation_steps": 2,
        "early_stopping": {"patience": 1},
        "learning_rate": 1e-2,
        "packing": "never",  # a held-out row is a batch
        "runtime": {"microBatchTokens": 32},
    }
    undisturbed = StopAtCheck(NEVER)
    whole, expected = run(tmp_path / "whole", inputs, undisturbed.worker(), **settings)
    evaluations = sum("validationLoss" in line for line in lines(tmp_path / "whole"))
    steps = int(expected.metrics["steps"])
    batches, rest = divmod(undisturbed.checks - steps, evaluations + 1)  # and the baseline
    assert batches > 2
    assert rest == 0
    for check in range(1, undisturbed.checks + 1):
        folder, stop = tmp_path / str(check), StopAtCheck(check)
        with pytest.raises(Interrupted) as stopped:
            run(folder, inputs, stop.worker(), **settings)
        assert stop.checks == check
        assert (stopped.value.step == 0) == (check <= batches)
        assert (folder / "checkpoints").exists() == (stopped.value.step > 0)
        resumed, outcome = run(folder, inputs, **settings)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert without_times(outcome.metrics) == without_times(expected.metrics)
        for found, line in zip(lines(folder), lines(tmp_path / "whole"), strict=True):
            assert without_times(found) == without_times(line)


def test_an_evaluation_that_was_left_out_may_be_stopped_again(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"evaluation_steps": 2}
    whole, _ = run(tmp_path / "whole", inputs, **settings)
    for stop in (StopAfter(1), StopAtCheck(1), StopAtCheck(1)):
        with pytest.raises(Interrupted) as stopped:
            run(tmp_path / "parts", inputs, stop.worker(), **settings)
        assert stopped.value.step == 2
    resumed, _ = run(tmp_path / "parts", inputs, **settings)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [line["step"] for line in lines(tmp_path / "parts")].count(2) == 2


def test_other_seeds_give_other_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    first, _ = run(tmp_path / "a", inputs, seed=1)
    second, _ = run(tmp_path / "b", inputs, seed=2)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_weights_with_the_best_held_out_loss_are_kept(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The learning rate is so high that the held-out loss rises again."""
    settings = {"epochs": 30.0, "learning_rate": 3e-2, "evaluation_steps": 5}
    _, outcome = run(tmp_path / "a", inputs, **settings)
    evaluated = {
        line["step"]: line["validationLoss"]
        for line in lines(tmp_path / "a")
        if "validationLoss" in line
    }
    best = min(evaluated, key=evaluated.__getitem__)
    assert outcome.details["bestStep"] == best < max(evaluated)
    assert outcome.metrics["validationLoss"] == evaluated[best]
    again = sft.build(
        StageContext(
            train_stage(),
            {"model": tmp_path / "a" / "weights", "data": inputs["data"]},
            tmp_path,
            Worker(0, 1, CPU),
        ),
        train_stage().settings,  # type: ignore[arg-type]
    )
    assert again.objective.held_out()["validationLoss"] == pytest.approx(evaluated[best], abs=1e-6)


def test_without_keep_best_the_record_has_the_held_out_loss_of_the_last_weights(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The learning rate is so high that the held-out loss rises again."""
    settings = {"epochs": 30.0, "learning_rate": 3e-2, "evaluation_steps": 5}
    _, outcome = run(tmp_path / "a", inputs, keep_best=False, **settings)
    *_, last = (line for line in lines(tmp_path / "a") if "validationLoss" in line)
    assert outcome.details["bestStep"] < last["step"] == outcome.metrics["steps"]
    assert outcome.metrics["validationLoss"] == last["validationLoss"]


def test_early_stopping_ends_the_run_after_the_patience_also_when_resumed(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings: dict[str, Any] = {
        "epochs": 100.0,
        "learning_rate": 3e-2,
        "evaluation_steps": 2,
        "early_stopping": {"patience": 2},
    }
    _, outcome = run(tmp_path / "a", inputs, **settings)
    best, steps = outcome.details["bestStep"], outcome.metrics["steps"]
    assert outcome.details["stoppedEarly"]
    assert steps == best + 4 < 300
    with pytest.raises(Interrupted):
        run(tmp_path / "b", inputs, StopAfter(int(steps) - 3).worker(), **settings)
    _, again = run(tmp_path / "b", inputs, **settings)
    assert again.metrics["steps"] == steps


NO_DECREASE_COUNTS: dict[str, Any] = {
    "epochs": 100.0,
    "learning_rate": 1e-3,
    "evaluation_steps": 2,
    "early_stopping": {"patience": 3, "minDelta": 1.0},
}
"""Settings under which the held-out loss never falls by minDelta."""


def test_min_delta_decides_the_patience_and_not_the_kept_checkpoint_also_when_resumed(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """No decrease reaches minDelta, and the held-out loss still falls at every evaluation."""
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, ROWS[:4])
    inputs = {"model": tiny_model_dir, "data": tmp_path / "data"}
    whole, outcome = run(tmp_path / "a", inputs, **NO_DECREASE_COUNTS)
    measured = {
        line["step"]: line["validationLoss"]
        for line in lines(tmp_path / "a")
        if "validationLoss" in line
    }
    best = min(measured, key=measured.__getitem__)
    assert list(measured) == [2, 4, 6, 8], "the first evaluation and the patience"
    assert best == outcome.details["bestStep"] == 8, "the first evaluation is not kept"
    assert outcome.metrics["validationLoss"] == measured[best]
    with pytest.raises(Interrupted):
        run(tmp_path / "b", inputs, StopAfter(5).worker(), **NO_DECREASE_COUNTS)
    resumed, again = run(tmp_path / "b", inputs, **NO_DECREASE_COUNTS)
    assert again.metrics["steps"] == 8
    assert again.details["bestStep"] == best
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


FIELDS_OF_0_2 = {"step", "tokens", "seconds", "best_step", "best_loss", "stale"}


@pytest.mark.parametrize("rule", [None, {"patience": 9}, {"patience": 9, "minDelta": 0.5}])
@pytest.mark.parametrize("evaluation_steps", [1, 2], ids=["measured", "not measured"])
def test_version_0_2_can_resume_a_checkpoint(
    tmp_path: Path, inputs: dict[str, Path], rule: Any, evaluation_steps: int
) -> None:
    """After a rollback an attempt starts with the trainer of 0.2, which refuses other fields."""
    settings = {"epochs": 20.0, "evaluation_steps": evaluation_steps, "early_stopping": rule}
    with pytest.raises(Interrupted):
        run(tmp_path / "a", inputs, StopAfter(5).worker(), learning_rate=3e-2, **settings)
    files = list((tmp_path / "a" / "checkpoints").glob("*/state.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text()).keys() <= FIELDS_OF_0_2


def test_a_checkpoint_of_0_2_goes_on_with_the_loss_that_its_patience_compared_with(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Version 0.2 had one loss for both: the last one that fell by more than minDelta."""
    settings = NO_DECREASE_COUNTS | {"evaluation_steps": 3}
    with pytest.raises(Interrupted):
        run(tmp_path / "a", inputs, StopAfter(4).worker(), **settings)
    (file,) = (tmp_path / "a" / "checkpoints").glob("step-00000005/state.json")
    assert json.loads(file.read_text()).keys() == FIELDS_OF_0_2
    for other in ("added.json", "digests.json"):
        (file.parent / other).unlink()
    _, outcome = run(tmp_path / "a", inputs, **settings)
    assert outcome.metrics["steps"] == 12
    assert outcome.details["resumedAtStep"] == 5


def test_without_held_out_rows_nothing_is_evaluated_and_the_last_weights_are_kept(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS)
    _, outcome = run(tmp_path / "a", {"model": tiny_model_dir, "data": tmp_path / "data"})
    assert "validationLoss" not in outcome.metrics
    assert outcome.details["bestStep"] is None


def test_a_loss_that_is_not_finite_is_a_permanent_failure_that_names_the_field(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as failure:
        run(
            tmp_path / "a",
            inputs,
            epochs=200.0,
            learning_rate=10.0,
            optimizer={"maxGradientNorm": None},
            adapter={"lora": {"alpha": 4096, "rank": 1}},
        )
    assert failure.value.reason == "LossNotFinite"
    assert not failure.value.retryable
    assert "training.learningRate" in failure.value.advice


def test_frozen_parts_do_not_change(
    tmp_path: Path, inputs: dict[str, Path], tiny_model_dir: Path
) -> None:
    tuned, _ = run(tmp_path / "a", inputs, freeze={"layers": "0", "embeddings": True})
    base = load_file(tiny_model_dir / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed
    assert all("layers.1." in name or name == "model.norm.weight" for name in changed)


def test_checkpoints_keep_only_the_two_newest_and_their_best(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(tmp_path / "a", inputs, epochs=6.0, runtime={"checkpoint_steps": 1})
    left = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert len(left) <= 4


def test_a_checkpoint_that_is_written_again_does_not_replace_the_one_before_it(
    tmp_path: Path,
) -> None:
    """A late evaluation belongs to the newest checkpoint."""
    layer = torch.nn.Linear(2, 2)
    context = StageContext(train_stage(), {}, tmp_path, Worker(0, 1, CPU))

    def opened() -> checkpoints.Checkpoints[LoopState]:
        optimizer = torch.optim.AdamW(layer.parameters())
        return checkpoints.Checkpoints(
            context, LoopState, dict(layer.named_parameters()), optimizer
        )

    def save(into: checkpoints.Checkpoints[LoopState], step: int) -> list[str]:
        into.save(LoopState(step=step))
        into.wait()
        return sorted(path.name for path in into.folder.iterdir())

    first = opened()
    save(first, 2)
    both = save(first, 4)
    assert save(first, 4) == both == ["step-00000002", "step-00000004"]
    resumed = opened()
    assert (resumed.resume() or LoopState()).step == 4
    assert save(resumed, 4) == both
    assert save(resumed, 6) == ["step-00000004", "step-00000006"]


def resume_before_a_damaged_checkpoint(
    folder: Path, inputs: dict[str, Path], damage: Callable[[Path], None]
) -> None:
    """Stop a run, damage its newest checkpoint and resume: the checkpoint before it decides, and
    the weights are those of an undisturbed run."""
    whole, _ = run(folder / "whole", inputs)
    parts, runtime = folder / "parts", {"checkpoint_steps": 2}
    with pytest.raises(Interrupted):
        run(parts, inputs, StopAfter(4).worker(), runtime=runtime)
    newest, before = sorted((parts / "checkpoints").iterdir(), reverse=True)[:2]
    damage(newest)
    resumed, outcome = run(parts, inputs, runtime=runtime)
    assert outcome.details["resumedAtStep"] == int(before.name.removeprefix("step-"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("cut", [0, 9, -1], ids=["empty", "in the header", "in the last byte"])
@pytest.mark.parametrize("name", ["weights", "optimizer", "state"])
def test_a_damaged_checkpoint_costs_one_interval_and_changes_nothing(
    name: str, cut: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    def cut_short(newest: Path) -> None:
        (damaged,) = newest.glob(f"{name}.*")
        damaged.write_bytes(damaged.read_bytes()[:cut])

    resume_before_a_damaged_checkpoint(tmp_path, inputs, cut_short)


@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "optimizer.safetensors", "state.json", "added.json", "digests.json"],
)
def test_a_flipped_bit_in_a_checkpoint_costs_one_interval_and_changes_nothing(
    name: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The file is as long as before, and readable."""

    def flip(newest: Path) -> None:
        content = bytearray((newest / name).read_bytes())
        content[-6] ^= 1
        (newest / name).write_bytes(content)

    resume_before_a_damaged_checkpoint(tmp_path, inputs, flip)


def test_without_an_undamaged_checkpoint_the_run_starts_again_and_says_so(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(tmp_path / "whole", inputs)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", inputs, StopAfter(4).worker())
    for path in (tmp_path / "parts" / "checkpoints").glob("*/weights.safetensors"):
        path.unlink()
    messages: list[str] = []

    def report(*, message: str | None = None, **_: Any) -> None:
        messages.append(message or "")

    resumed, outcome = run(tmp_path / "parts", inputs, Worker(0, 1, CPU, report=report))
    assert outcome.details["resumedAtStep"] is None
    assert any("training starts again" in message for message in messages)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_does_not_compete_with_itself_for_the_lock_of_the_claim(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """A slow write of a checkpoint holds it while training goes on."""
    lock = threading.Lock()

    @contextmanager
    def owned() -> Iterator[None]:
        assert lock.acquire(blocking=False)
        time.sleep(0.1)
        yield
        lock.release()

    worker = Worker(0, 1, CPU, owned=owned)
    _, outcome = run(tmp_path / "a", inputs, worker, runtime={"checkpoint_steps": 1})
    assert outcome.metrics["steps"] > 2


def test_a_partial_checkpoint_and_a_partial_metrics_line_are_ignored(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(tmp_path / "whole", inputs)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", inputs, StopAfter(2).worker())
    partial = tmp_path / "parts" / "checkpoints" / "step-00000005.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    resumed, _ = run(tmp_path / "parts", inputs)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all("step" in line for line in lines(tmp_path / "parts"))


def test_what_a_killed_run_wrote_of_a_checkpoint_does_not_take_the_space_of_the_next_one(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, inputs, StopAfter(2).worker())
    left = tmp_path / "checkpoints" / f"step-00000004.{'0' * 32}.partial"
    left.mkdir()
    present: list[bool] = []

    def watched(tensors: Any, path: Path) -> None:
        present.append(left.exists())
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", watched)
    run(tmp_path, inputs, runtime={"checkpoint_steps": 2})
    assert present
    assert not any(present)


def test_a_full_disk_is_one_message_and_the_last_checkpoint_stays_complete(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(StageError) as failure:  # a checkpoint of the whole model takes 0.4 MB
            run(folder, inputs, epochs=4.0, runtime={"checkpoint_steps": 2})
        whole = list((folder / "checkpoints").glob("step-????????"))
        assert all((path / "state.json").exists() for path in whole)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert failure.value.reason == "DiskFull"
    assert "output.uri" in failure.value.advice
