"""Suites that are measured during training, and the checkpoints that they choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainer.preferring import WORDS, loop_settings, planned, separable, write_pairs
from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.several_workers import Notes, end_of, spawn
from tests.trainer.stop_after import StopAfter, StopAtCheck, without_times
from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation.suites.during_training import suites_of
from tuneyard_trainer.preference import dpo
from tuneyard_trainer.reporting.plots import Curves
from tuneyard_trainer.reporting.results import headline
from tuneyard_trainer.training import sft as native
from tuneyard_trainer.trl_engine import sft as trl
from tuneyard_trainer.worker import Interrupted, StageContext, Worker, never_stop

CPU = torch.device("cpu")
ROWS, HELD_OUT = random_rows(10), random_rows(4, seed=9)
ENGINES = {"native": native, "trl": trl}
SUITES: list[dict[str, Any]] = [
    {"name": "words", "kind": "choices", "limit": 16, "items": 10, "chat": None},
    {"name": "manners", "kind": "refusals", "limit": None, "items": 4, "chat": None},
]
TOLERANCE = {"native": 0, "trl": 1e-5}
DROPOUT = {"lora": {"rank": 4, "dropout": 0.3}}
BY_WORDS = {"suites": SUITES[:1], "best_by": "words/accuracy"}

Measured = Callable[[], dict[str, float]]


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_tokenizer: Any
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("during")
    write_prepared(folder / "data", tiny_tokenizer, ROWS, HELD_OUT)
    write_prepared(folder / "unheld", tiny_tokenizer, ROWS)
    random = np.random.default_rng(1)
    pairs = [" ".join(random.choice(WORDS, 4)) for _ in range(40)]
    items = [
        {"good": f"The {good}.", "bad": f"The {bad}."}
        for good, bad in zip(pairs[:20], pairs[20:], strict=True)
    ]
    asked = [
        {"prompt": f"Which {word}?", "label": label}
        for word, label in zip(WORDS, ("safe", "unsafe") * 5, strict=True)
    ]
    for name, rows in (("words", items), ("manners", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": tiny_model_dir,
        "data": folder / "data",
        "suite.0": folder / "words.jsonl",
        "suite.1": folder / "manners.jsonl",
    }


def with_rows(stage: PlannedStage) -> PlannedStage:
    sources = {
        f"suite.{n}": SourceInput(uri="file://s", path=f"spec.evaluate.suites[{n}].uri")
        for n in range(2)
    }
    return stage.model_copy(update={"inputs": {**stage.inputs, **sources}})


def train(
    folder: Path,
    inputs: dict[str, Path],
    worker: Worker | None = None,
    engine: str = "native",
    measured: Any = suites_of,
    **settings: Any,
) -> Any:
    """Train for 6 steps with an evaluation at every second one."""
    folder.mkdir(exist_ok=True)
    fixed = {"max_steps": 6, "epochs": None, "evaluation_steps": 2, "learning_rate": 1e-2}
    stage = with_rows(train_stage(**(fixed | settings)))
    context = StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU), suites_of=measured)
    return ENGINES[engine].run(context)


def run(
    folder: Path, inputs: dict[str, Path], worker: Worker | None = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the trained weights and the outcome."""
    outcome = train(folder, inputs, worker, **settings)
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in found]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if "loss" not in line]


def planted(**series: list[float]) -> Any:
    """Return what measures, of the base and then of each evaluation, these values."""
    rest = iter([dict(zip(series, each, strict=True)) for each in zip(*series.values())])  # noqa: B905
    return lambda *_: lambda: next(rest)


# ---- what is measured ---------------------------------------------------------------------------


def share_of_likelier(model_dir: Path, tokenizer: Any, file: Path, chosen: list[int]) -> float:
    """Return how often the better text is likelier, computed one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    @torch.no_grad()
    def likelihood(text: str) -> float:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None]).sum())

    right = [likelihood(rows[i]["good"]) > likelihood(rows[i]["bad"]) for i in chosen]
    return sum(right) / len(right)


def test_suites_are_measured_before_training_and_at_each_evaluation(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    """On the same items each time, which are a choice of the first rows, not the first ones."""
    _, outcome = run(tmp_path / "a", inputs, suites=SUITES, keep_best=False)
    found = evaluations(tmp_path / "a")
    assert [line["step"] for line in found] == [0, 2, 4, 6]
    names = {"words/accuracy", "words/probability", "manners/overRefusal"}
    assert all(names <= line.keys() for line in found[1:])
    assert {"words/baseAccuracy", "manners/baseOverRefusal", "baseValidationLoss"} <= {*found[0]}
    chosen = sorted(np.random.default_rng(0).permutation(16)[:10].tolist())
    assert chosen != [*range(10)]
    of = (tiny_tokenizer, inputs["suite.0"], chosen)
    assert found[0]["words/baseAccuracy"] == pytest.approx(share_of_likelier(inputs["model"], *of))
    tuned = share_of_likelier(tmp_path / "a" / "weights", *of)
    assert found[3]["words/accuracy"] == pytest.approx(tuned)
    assert outcome.metrics["words/accuracy"] == found[3]["words/accuracy"]
    assert outcome.metrics["words/baseAccuracy"] == found[0]["words/baseAccuracy"]
    assert "words/accuracy" in " ".join(headline("sft", outcome.metrics, outcome.details))
    panels = Curves.read(tmp_path / "a" / "metrics.jsonl").panels
    assert [panel.name for panel in panels] == [
        *("loss", "words/accuracy", "manners/overRefusal", "manners/unsafeCompliance")
    ]
    assert panels[1].held_out == [(line["step"], line["words/accuracy"]) for line in found[1:]]
    assert panels[1].base == found[0]["words/baseAccuracy"]


def test_the_items_of_a_smaller_limit_are_among_those_of_a_larger_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    def items(count: int) -> set[str]:
        loop = train_stage(suites=[SUITES[0] | {"items": count}]).settings
        context = StageContext(with_rows(train_stage()), inputs, tmp_path, Worker(0, 1, CPU))
        model = AutoModelForCausalLM.from_pretrained(inputs["model"])
        return set(suites_of(context, loop, model).suites[0].items)  # type: ignore[arg-type, attr-defined]

    assert len(items(5)) == 5
    assert items(5) < items(9) < items(100)
    assert len(items(100)) == 16, "the limit of the suite itself"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", [None, DROPOUT], ids=["full", "lora"])
def test_suites_leave_the_trained_weights_as_they_are_without_them(
    engine: str, adapter: Any, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"adapter": adapter, "keep_best": False, "engine": engine}
    plain, _ = run(tmp_path / "plain", inputs, **settings)
    beside, _ = run(tmp_path / "beside", inputs, suites=SUITES, **settings)
    assert plain.keys() == beside.keys()
    assert all(torch.equal(plain[name], beside[name]) for name in plain)
    without = [
        {name: value for name, value in line.items() if "/" not in name}
        for line in lines(tmp_path / "beside")
    ]
    assert without == lines(tmp_path / "plain")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_was_stopped_has_the_same_curves_and_keeps_the_same_step(
    engine: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Bit for bit with the native engine, and with TRL as closely as it resumes without suites."""
    settings = {"adapter": DROPOUT, "suites": SUITES, "best_by": "words/accuracy"}
    settings |= {"early_stopping": {"patience": 2}, "engine": engine}
    whole, expected = run(tmp_path / "whole", inputs, **settings)
    for name, worker in (("3", StopAfter(3).worker()), ("4", StopAfter(4).worker())):
        folder = tmp_path / name
        with pytest.raises(Interrupted):
            run(folder, inputs, worker, **settings)
        resumed, outcome = run(folder, inputs, **settings)
        for each, weight in whole.items():
            torch.testing.assert_close(
                resumed[each], weight, rtol=TOLERANCE[engine], atol=TOLERANCE[engine] / 10
            )
        for ours, theirs in zip(lines(tmp_path / "whole"), lines(folder), strict=True):
            assert theirs == pytest.approx(ours, rel=TOLERANCE[engine])
        assert outcome.details["bestStep"] == expected.details["bestStep"]


def test_a_stop_while_a_suite_is_measured_leaves_the_evaluation_to_the_next_attempt(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(tmp_path / "whole", inputs, suites=SUITES)
    stopper, begun = StopAtCheck(1 << 60), []

    def stopping(*arguments: Any) -> Measured:
        inner = suites_of(*arguments)

        def measure() -> dict[str, float]:
            begun.append(0)
            if len(begun) == 2:
                stopper.check = stopper.checks + 2  # after the stage has agreed to measure
            return inner()

        return measure

    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "a", inputs, stopper.worker(), measured=stopping, suites=SUITES)
    assert stopped.value.step == 2
    assert [line["step"] for line in evaluations(tmp_path / "a")] == [0]
    resumed, _ = run(tmp_path / "a", inputs, suites=SUITES)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert lines(tmp_path / "a") == lines(tmp_path / "whole")


def test_the_base_of_a_new_adapter_is_the_model_without_it(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """New virtual tokens change what the model computes before they are trained."""
    suites = [SUITES[0] | {"items": 16}]
    base = {}
    for name, adapter in {"full": None, "prompt": {"prompt": {}}}.items():
        run(tmp_path / name, inputs, suites=suites, adapter=adapter, max_steps=2)
        base[name] = evaluations(tmp_path / name)[0]["words/baseProbability"]
    assert base["prompt"] == pytest.approx(base["full"], abs=1e-5)
    assert evaluations(tmp_path / "prompt")[1]["words/probability"] != base["prompt"]


def test_preferences_are_trained_on_beside_suites(tmp_path: Path, inputs: dict[str, Path]) -> None:
    data = write_pairs(tmp_path, inputs["model"], separable(16))
    training = loop_settings(suites=SUITES[:1], best_by="words/probability", evaluation_steps=1)
    settings = DpoSettings(
        adapter=None, loss="sigmoid", beta=0.1, label_smoothing=0, training=training
    )
    (tmp_path / "dpo").mkdir()
    given = {**inputs, "data": data}
    stage = with_rows(planned(settings))
    outcome = dpo.run(
        StageContext(stage, given, tmp_path / "dpo", Worker(0, 1, CPU), suites_of=suites_of)
    )
    found = evaluations(tmp_path / "dpo")[1:]
    best = max(found, key=lambda line: line["words/probability"])
    assert outcome.details["bestStep"] == best["step"]
    assert outcome.metrics["words/accuracy"] == best["words/accuracy"]
    assert "preferenceAccuracy" in outcome.metrics


# ---- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("words/accuracy", [0.5, 0.6, 0.9, 0.9], 4),
        ("manners/overRefusal", [0.5, 0.6, 0.2, 0.4], 4),
        ("manners/unsafeCompliance", [0.5, 0.1, 0.2, 0.4], 2),
    ],
)
def test_the_best_value_of_a_suite_decides_which_step_is_kept(
    metric: str, values: list[float], best: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The first of two equal ones, whatever the held-out loss is."""
    measured = planted(**{metric: values})
    _, outcome = run(tmp_path / "a", inputs, measured=measured, suites=SUITES, best_by=metric)
    losses = [line["validationLoss"] for line in evaluations(tmp_path / "a")[1:]]
    assert outcome.details["bestStep"] == best
    assert outcome.metrics[metric] == values[best // 2]
    assert outcome.metrics["validationLoss"] == losses[best // 2 - 1]


def test_training_stops_early_by_a_suite_without_held_out_rows(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    given = {**inputs, "data": inputs["data"].parent / "unheld"}
    measured = planted(**{"words/accuracy": [0.5, 0.9, 0.8, 0.7, 0.95]})
    settings = BY_WORDS | {"early_stopping": {"patience": 2}, "max_steps": 12}
    _, outcome = run(tmp_path / "a", given, measured=measured, **settings)
    assert (outcome.metrics["steps"], outcome.details["bestStep"]) == (6, 2)
    assert outcome.details["stoppedEarly"]
    assert outcome.metrics["words/accuracy"] == 0.9
    assert "validationLoss" not in outcome.metrics


def test_suites_that_choose_nothing_leave_the_last_weights(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    given = {**inputs, "data": inputs["data"].parent / "unheld"}
    plain, _ = run(tmp_path / "plain", given)
    beside, outcome = run(tmp_path / "beside", given, suites=SUITES)
    assert all(torch.equal(plain[name], beside[name]) for name in plain)
    assert outcome.details["bestStep"] is None


def test_a_metric_that_the_items_do_not_have_ends_the_stage_before_its_first_step(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"suites": SUITES, "best_by": "words/accuracyPerCharacter"}
    with pytest.raises(StageError) as failed:
        run(tmp_path / "a", inputs, **settings)
    assert failed.value.reason == "MetricNotMeasured"
    assert "words/accuracy, words/probability" in failed.value.advice
    assert not lines(tmp_path / "a")


def test_a_row_that_is_no_item_is_named_before_the_first_step(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(StageError) as failed:
        run(tmp_path / "a", {**inputs, "suite.0": tmp_path / "bad.jsonl"}, suites=SUITES)
    assert failed.value.reason == "InvalidData"
    assert "spec.evaluate.suites[0].uri" in failed.value.message


# ---- several workers ----------------------------------------------------------------------------

TOGETHER: dict[str, dict[str, Any]] = {
    "native": {"suites": SUITES},
    "trl, sharded": {"suites": SUITES, "engine": "trl", "runtime": {"sharding": "fsdp"}},
}


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    worker = Worker(rank, 2, CPU)
    for name, settings in TOGETHER.items():
        train(folder / name, inputs, worker, **settings)
        checks = StopAtCheck(1 << 60)

        def stopping(*arguments: Any, checks: StopAtCheck = checks) -> Measured:
            inner = suites_of(*arguments)

            def measure() -> dict[str, float]:
                checks.check = checks.checks + 2
                return inner()

            return measure

        asked = replace(worker, stop=checks if rank == 1 else never_stop)
        notes[name, rank] = end_of(
            lambda name=name, asked=asked, settings=settings, stopping=stopping: train(  # type: ignore[misc]
                folder / f"{name}, stopped", inputs, asked, measured=stopping, **settings
            )
        )


def test_two_workers_measure_what_one_does_and_stop_together(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Each on its share of the items, or all on a model that they share."""
    notes = spawn(2, _worker, tmp_path, inputs)
    for name, settings in TOGETHER.items():
        alone = {key: value for key, value in settings.items() if key != "runtime"}
        run(tmp_path / f"{name}, one", inputs, **alone)
        one, two = evaluations(tmp_path / f"{name}, one"), evaluations(tmp_path / name)
        assert len(one) == len(two) == 4
        for ours, theirs in zip(one, two, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-3), name
        assert [notes[name, rank] for rank in range(2)] == ["interrupted"] * 2
        assert not lines(tmp_path / f"{name}, stopped")
