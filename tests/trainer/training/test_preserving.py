"""Terms against forgetting: against direct computations, on two workers, and after a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.stop_after import StopAfter, StopAtCheck
from tuneyard.api.stage_settings import TrainSettings
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.training import fisher as fisher_module
from tuneyard_trainer.training import sft
from tuneyard_trainer.training.fisher import FILE, fisher_information
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.preserving import Preserving
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

CPU = torch.device("cpu")
ROWS = random_rows(10)
GENERAL = random_rows(6, seed=5)
L2SP = {"l2Sp": {"strength": 0.3}}
EWC = {"ewc": {"strength": 40.0, "samples": 4}}
KL = {"kl": {"strength": 0.7, "temperature": 2.0, "batchSize": 3}}
TERMS = {"l2Sp": L2SP, "ewc": EWC, "kl": KL, "all": {**L2SP, **EWC, **KL}}
BATCH = np.arange(4)


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, general=GENERAL)
    return {"model": tiny_model_dir, "data": tmp_path / "data"}


def build(
    folder: Path, inputs: dict[str, Path], worker: Worker | None = None, **settings: Any
) -> Loop:
    stage = train_stage(**settings)
    context = StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU))
    assert isinstance(stage.settings, TrainSettings)
    return sft.build(context, stage.settings)


def move(parameters: Any) -> None:
    """Move the weights away from the start, the same way each time."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)


def gradients(loop: Loop, step: int = 0) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics and gradients of a step."""
    metrics, _ = loop.backward(BATCH, step)
    found = {name: p.grad.clone() for name, p in loop.parameters.items() if p.grad is not None}
    loop.optimizer.zero_grad(set_to_none=True)
    return metrics, found


def added(folder: Path, inputs: dict[str, Path], **settings: Any) -> tuple[Any, Any, Loop]:
    """Return what terms add to the metrics and the gradients of a step, and their loop."""
    _, plain = gradients(moved(build(folder, inputs, **(settings | {"preserve": None}))))
    loop = moved(build(folder, inputs, **settings))
    metrics, whole = gradients(loop)
    return metrics, {name: whole[name] - plain[name] for name in whole}, loop


def moved(loop: Loop) -> Loop:
    move(loop.parameters)
    return loop


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=2e-4, atol=atol)


# ---- each term against a direct computation -----------------------------------------------------


@pytest.mark.parametrize("name", ["l2Sp", "ewc"])
def test_a_pull_is_the_quadratic_form_of_its_paper(
    name: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The weights at the start are read from the model's own file."""
    metrics, found, _ = added(tmp_path, inputs, preserve=TERMS[name])
    start = AutoModelForCausalLM.from_pretrained(inputs["model"])
    tuned = copy.deepcopy(start)
    parameters = dict(tuned.named_parameters())
    move(parameters)
    fisher = load_file(tmp_path / "checkpoints" / FILE) if name == "ewc" else {}
    total = torch.zeros((), dtype=torch.float64)
    for key, at_start in start.named_parameters():
        squares = (parameters[key].double() - at_start.detach().double()) ** 2
        total = total + (squares * fisher.get(key, torch.ones(()))).sum()
    total = total * (0.3 if name == "l2Sp" else 40.0) / 2
    total.backward()
    assert metrics[f"{name}Penalty"] == pytest.approx(float(total), rel=1e-5)
    assert float(total) > 0
    assert_close(found, {key: p.grad for key, p in parameters.items() if p.grad is not None})


def kl_of(start: Any, tuned: Any, rows: list[int], temperature: float) -> Tensor:
    """Return KL(start || tuned) per target, one row at a time with all logits, in float64."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, mask = GENERAL[row]
        wanted = [position - 1 for position in range(1, len(ids)) if mask[position]]
        with torch.no_grad():
            before = start(input_ids=torch.tensor([ids])).logits[0, wanted].double()
        after = tuned(input_ids=torch.tensor([ids])).logits[0, wanted].double()
        p = (before / temperature).softmax(-1)
        q = (after / temperature).softmax(-1)
        total = total + (p * (p.log() - q.log())).sum()
        targets += len(wanted)
    return total / targets


@pytest.mark.parametrize("tokens", [16384, 24], ids=["one micro-batch", "a row at a time"])
def test_the_divergence_is_the_mean_over_the_targets_of_the_rows_of_a_step(
    tokens: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    runtime = {"microBatchTokens": tokens}
    metrics, found, loop = added(tmp_path, inputs, preserve=KL, runtime=runtime)
    start = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    tuned = copy.deepcopy(start).train()
    parameters = dict(tuned.named_parameters())
    move(parameters)
    assert isinstance(loop.objective, Preserving)
    assert loop.objective._kl is not None
    rows = loop.objective._kl.rows_of(0).tolist()
    assert len(rows) == 3
    divergence = kl_of(start, tuned, rows, temperature=2.0)
    assert float(divergence) > 1e-4
    (divergence * 0.7 * 2.0**2).backward()
    assert metrics["klToStart"] == pytest.approx(float(divergence), rel=1e-4)
    assert_close(found, {key: p.grad for key, p in parameters.items() if p.grad is not None})


def test_the_divergence_under_an_adapter_is_from_the_model_without_it(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    metrics, _, loop = added(tmp_path, inputs, preserve=KL, adapter={"lora": {}})
    start = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    assert isinstance(loop.objective, Preserving)
    assert loop.objective._kl is not None
    rows = loop.objective._kl.rows_of(0).tolist()
    expected = kl_of(start, loop.model, rows, temperature=2.0)
    assert metrics["klToStart"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_every_general_row_has_its_turn_and_steps_differ(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    objective = build(tmp_path, inputs, preserve=KL).objective
    assert isinstance(objective, Preserving)
    assert objective._kl is not None
    steps = [objective._kl.rows_of(step).tolist() for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(6))
    assert steps[0] + steps[1] != steps[2] + steps[3]


def test_before_the_first_step_the_terms_are_zero(tmp_path: Path, inputs: dict[str, Path]) -> None:
    loop = build(tmp_path, inputs, preserve=TERMS["all"])
    metrics, _ = gradients(loop)
    for name in ("l2SpPenalty", "ewcPenalty", "klToStart"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-6)


def test_the_fisher_information_is_the_expected_squared_slope_per_token(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The reference sums over every token of the vocabulary, weighted by its probability."""
    model = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    rows = Prepared.open(inputs["data"]).general
    assert rows is not None
    chosen = np.argsort(rows.targets)[:2]
    expected, targets = 0.0, 0
    norms = [p for name, p in model.named_parameters() if name.endswith("input_layernorm.weight")]
    for row in chosen:
        wanted = np.flatnonzero(rows.mask(row)) - 1
        ids = torch.from_numpy(np.array(rows.ids(row), dtype=np.int64))[None]
        logprobs = model(input_ids=ids).logits[0, wanted].log_softmax(-1)
        for scores in logprobs:
            targets += 1
            for token in range(len(scores)):
                slopes = torch.autograd.grad(scores[token], norms, retain_graph=True)
                squares = sum(float((slope**2).sum()) for slope in slopes)
                expected += float(scores[token].detach().exp()) * squares
    forward = Forward(CPU, torch.float32, pad=3, pack=False, capacity=64, max_tokens=64)
    found = []
    for seed in range(60):
        each = fisher_information(model, rows, chosen, forward, seed, Worker(0, 1, CPU))
        named = {name: value for name, value in each.items() if "input_layernorm" in name}
        found.append(sum(float(value.sum()) for value in named.values()))
    assert np.mean(found) == pytest.approx(expected / targets, rel=0.1)


# ---- several workers ----------------------------------------------------------------------------


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    loop = moved(build(folder, inputs, Worker(rank, 2, CPU), preserve=TERMS["all"]))
    metrics, found = gradients(loop)
    torch.save(found, folder / f"rank-{rank}.pt")
    notes[rank] = metrics


def test_two_workers_give_the_terms_the_weight_that_one_worker_gives_them(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The Fisher information too is that of one worker."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    notes = spawn(2, _worker, two, inputs)
    metrics, expected = gradients(moved(build(one, inputs, preserve=TERMS["all"])))
    stored = [load_file(folder / "checkpoints" / FILE) for folder in (one, two)]
    for name in stored[0]:
        torch.testing.assert_close(*(each[name] for each in stored), rtol=1e-4, atol=1e-9)
    for rank in range(2):
        assert notes[rank] == pytest.approx(metrics, rel=1e-4)
        assert_close(torch.load(two / f"rank-{rank}.pt", weights_only=True), expected, atol=1e-5)


# ---- resume -------------------------------------------------------------------------------------


def run(
    folder: Path, inputs: dict[str, Path], worker: Worker | None = None, **settings: Any
) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    stage = train_stage(learning_rate=1e-2, **settings)
    sft.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors")))


LORA = {"lora": {"dropout": 0.1}}


@pytest.mark.parametrize(
    ("name", "adapter"), [("l2Sp", None), ("ewc", None), ("kl", None), ("kl", LORA), ("all", None)]
)
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    name: str,
    adapter: Any,
    tmp_path: Path,
    inputs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Fisher information is not computed again."""
    settings = {"preserve": TERMS[name], "adapter": adapter}
    whole = run(tmp_path / "whole", inputs, **settings)
    without = run(tmp_path / "without", inputs, adapter=adapter)
    assert any(not torch.equal(whole[key], without[key]) for key in whole)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", inputs, StopAfter(3).worker(), **settings)
    monkeypatch.setattr(fisher_module, "fisher_information", None)
    resumed = run(tmp_path / "parts", inputs, **settings)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_stop_while_the_fisher_information_is_estimated_costs_nothing_else(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole = run(tmp_path / "whole", inputs, preserve=EWC)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "parts", inputs, StopAtCheck(2).worker(), preserve=EWC)
    assert stopped.value.step == 0
    assert not (tmp_path / "parts" / "checkpoints" / FILE).exists()
    resumed = run(tmp_path / "parts", inputs, preserve=EWC)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_damaged_file_of_the_fisher_information_is_written_again(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole = run(tmp_path / "whole", inputs, preserve=EWC)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", inputs, StopAfter(3).worker(), preserve=EWC)
    path = tmp_path / "parts" / "checkpoints" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed = run(tmp_path / "parts", inputs, preserve=EWC)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
