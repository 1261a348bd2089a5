"""The independent reward is measured beside the optimized one, and changes nothing in training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainer.conftest import VOCABULARY
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.speaking import grpo_stage, ppo_stage, share_of, write_prompts
from tests.trainer.stop_after import StopAtCheck, without_times
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import RewardTerm
from tuneyard.errors import StageError
from tuneyard_trainer.reinforcement import arithmetic, grpo, ppo, rewards
from tuneyard_trainer.reinforcement.rewards import Attempt
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

CPU = torch.device("cpu")
INDEPENDENT = {"independent_reward": {"role": "reward.independent"}}
LENGTH = "rewardLengthCorrelation"
load_of_the_trainer = rewards.load


def a_against_b(terms: Sequence[RewardTerm], *rest: Any) -> Callable[[Sequence[Attempt]], Tensor]:
    """Load the rewards of these tests: the share of the letter a is optimized, and the independent
    reward falls with it."""
    if terms[0].role == "reward":
        return share_of("a")
    return lambda attempts: 10 - 5 * share_of("a")(attempts)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a setter of `rewards.load`, which is `a_against_b` at first."""

    def set_to(load: Any) -> None:
        monkeypatch.setattr(rewards, "load", load)

    set_to(a_against_b)
    return set_to


@pytest.fixture
def inputs(tmp_path: Path, speaking_model_dir: Path) -> dict[str, Path]:
    return {"model": speaking_model_dir, "prompts": write_prompts(tmp_path / "prompts.jsonl")}


def run(
    stage: PlannedStage, folder: Path, inputs: dict[str, Path], worker: Worker | None = None
) -> tuple[dict[str, Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    module = ppo if stage.kind == "ppo" else grpo
    outcome = module.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    found = (folder / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in found]


# ---- curves -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("make", [ppo_stage, grpo_stage])
def test_a_reward_that_is_exploited_rises_and_the_independent_one_falls(
    make: Callable[..., PlannedStage], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = make({"max_steps": 8, "evaluation_steps": 2}, **INDEPENDENT)
    _, outcome = run(stage, tmp_path / "a", inputs)
    measured = [line for line in lines(tmp_path / "a") if "heldOutReward" in line]
    assert [line["step"] for line in measured] == [0, 2, 4, 6, 8]
    for line in measured:
        expected = 10 - 5 * line["heldOutReward"]
        assert line["heldOutIndependentReward"] == pytest.approx(expected, abs=1e-5)
    assert outcome.metrics["rewardGain"] > 0.1
    assert outcome.metrics["independentRewardGain"] == pytest.approx(
        outcome.metrics["independentReward"] - outcome.metrics["baseIndependentReward"]
    )
    assert outcome.metrics["independentRewardGain"] < -0.5


@pytest.mark.usefixtures("loaded")
def test_without_an_independent_reward_none_is_reported(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    _, outcome = run(grpo_stage({"max_steps": 1}), tmp_path / "a", inputs)
    names = {*outcome.metrics, *(name for line in lines(tmp_path / "a") for name in line)}
    assert not any("ndependent" in name for name in names)


def test_every_update_has_the_correlation_of_its_rewards_with_its_lengths(
    tmp_path: Path, inputs: dict[str, Path], loaded: Callable[[Any], None]
) -> None:
    """A reward that is the number of letters, each of which is a token."""
    loaded(lambda *_: lambda attempts: torch.tensor([-1.0 * len(text) for _, text in attempts]))
    run(grpo_stage({"max_steps": 2}), tmp_path / "a", inputs)
    updates = [line for line in lines(tmp_path / "a") if "policyLoss" in line]
    assert len(updates) == 2
    assert all(-1 <= line[LENGTH] < -0.9 for line in updates)
    start = lines(tmp_path / "a")[0]
    assert -1 <= start["heldOutRewardLengthCorrelation"] < -0.9


def test_the_correlation_is_that_of_numpy_and_absent_if_rewards_or_lengths_are_constant() -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(1, 50, 64).astype(np.float32)
    scores = (0.02 * lengths + random.normal(0, 1, 64)).astype(np.float32)
    found = arithmetic.correlation(torch.from_numpy(scores), torch.from_numpy(lengths))
    expected = np.corrcoef(scores.astype(np.float64), lengths.astype(np.float64))[0, 1]
    assert found == pytest.approx(expected, abs=1e-12)
    same, other = torch.full((5,), 0.1), torch.arange(5.0)
    assert arithmetic.correlation(same, other) is None
    assert arithmetic.correlation(other, same) is None
    assert arithmetic.correlation(other[:1], other[:1]) is None
    assert arithmetic.correlation(other, torch.tensor([0.0, 1, 2, 3, math.inf])) is None


def test_equal_rewards_leave_the_correlation_out_of_the_curves(
    tmp_path: Path, inputs: dict[str, Path], loaded: Callable[[Any], None]
) -> None:
    loaded(lambda *_: lambda attempts: torch.ones(len(attempts)))
    run(grpo_stage({"max_steps": 1}), tmp_path / "a", inputs)
    assert not any(LENGTH in line for line in lines(tmp_path / "a"))


# ---- training stays as it was -------------------------------------------------------------------


def classifier(folder: Path, tokenizer: Any) -> Path:
    """A reward model with random weights, saved as by the reward stage."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=3,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "weights")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("adapter", [None, {"lora": {"dropout": 0.1}}], ids=["full", "lora"])
@pytest.mark.parametrize("make", [ppo_stage, grpo_stage])
def test_training_with_an_independent_reward_model_gives_the_same_weights_bit_for_bit(
    make: Callable[..., PlannedStage],
    adapter: Any,
    tmp_path: Path,
    inputs: dict[str, Path],
    tiny_tokenizer: Any,
    loaded: Callable[[Any], None],
) -> None:
    """The classifier is loaded, which draws random numbers, and asked; curves apart from its own,
    and torch's random state, are as without it."""

    def load(terms: Sequence[RewardTerm], *rest: Any) -> Any:
        if terms[0].role == "reward":
            return share_of("a")
        torch.rand(3)
        return load_of_the_trainer(terms, *rest)

    loaded(load)
    inputs["reward.independent"] = classifier(tmp_path / "classifier", tiny_tokenizer)
    found = {}
    for name, more in (("without", {}), ("with", INDEPENDENT)):
        torch.manual_seed(5)
        stage = make({"max_steps": 3, "evaluation_steps": 1}, adapter=adapter, **more)
        weights, _ = run(stage, tmp_path / name, inputs)
        found[name] = weights, torch.random.get_rng_state(), lines(tmp_path / name)
    assert found["with"][0].keys() == found["without"][0].keys()
    for name, tensor in found["without"][0].items():
        assert torch.equal(tensor, found["with"][0][name])
    assert torch.equal(found["with"][1], found["without"][1])
    independent = [line.pop("heldOutIndependentReward", None) for line in found["with"][2]]
    assert sum(value is not None for value in independent) == 4
    assert found["with"][2] == found["without"][2]


@pytest.mark.usefixtures("loaded")
def test_a_stopped_run_resumes_with_the_curves_of_an_undisturbed_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = grpo_stage({"max_steps": 3, "evaluation_steps": 2}, **INDEPENDENT)
    whole, expected = run(stage, tmp_path / "whole", inputs)
    for check in (1, 3, 5):
        folder = tmp_path / str(check)
        with pytest.raises(Interrupted):
            run(stage, folder, inputs, StopAtCheck(check).worker())
        resumed, outcome = run(stage, folder, inputs)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert lines(folder) == lines(tmp_path / "whole")
        assert without_times(outcome.metrics) == without_times(expected.metrics)


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    """Measure, then measure with an independent reward that fails on the second worker only."""
    loading: Any = a_against_b
    rewards.load = loading
    stage = grpo_stage({"max_steps": 1}, **INDEPENDENT)
    grpo.run(StageContext(stage, inputs, folder, Worker(rank, 2, CPU)))

    def load(terms: Sequence[RewardTerm], *rest: Any) -> Any:
        def failing(attempts: Sequence[Attempt]) -> Tensor:
            return torch.full((len(attempts),), math.nan if rank == 1 else 0.0)

        return share_of("a") if terms[0].role == "reward" else failing

    loading = load
    rewards.load = loading
    (folder / "failing").mkdir(exist_ok=True)
    try:
        grpo.run(StageContext(stage, inputs, folder / "failing", Worker(rank, 2, CPU)))
    except StageError as error:
        (folder / f"reason-{rank}").write_text(f"{error.reason} {error}")


@pytest.mark.usefixtures("loaded")
def test_two_workers_measure_like_one_and_fail_together(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    two = tmp_path / "two"
    two.mkdir()
    spawn(2, _worker, two, inputs)
    run(grpo_stage({"max_steps": 1}, **INDEPENDENT), tmp_path / "one", inputs)
    start, other = lines(tmp_path / "one")[0], lines(two)[0]
    assert start["heldOutIndependentReward"] > 0
    assert start == pytest.approx(other, abs=1e-5)
    update, other = lines(tmp_path / "one")[1], lines(two)[1]
    assert update[LENGTH] == pytest.approx(other[LENGTH], abs=1e-5)
    for rank in (0, 1):
        reason = (two / f"reason-{rank}").read_text()
        assert reason.startswith("NonFiniteReward independentReward: the reward of ")


# ---- errors -------------------------------------------------------------------------------------


def test_an_independent_reward_that_cannot_be_computed_names_its_field(
    tmp_path: Path, inputs: dict[str, Path], loaded: Callable[[Any], None]
) -> None:
    def load(terms: Sequence[RewardTerm], *rest: Any) -> Any:
        return share_of("a") if terms[0].role == "reward" else load_of_the_trainer(terms, *rest)

    loaded(load)
    rule = {"independent_reward": {"rule": {"exact_match": "missing"}}}
    with pytest.raises(StageError, match="independentReward: 7 of 7 prompts have no field") as one:
        run(grpo_stage({"max_steps": 1}, **rule), tmp_path / "a", inputs)
    assert one.value.reason == "RewardFieldMissing"
    assert one.value.advice == "Change independentReward, or remove it: it is measured only."

    def raising(terms: Sequence[RewardTerm], *rest: Any) -> Any:
        return share_of("a") if terms[0].role == "reward" else lambda _: 1 / 0

    loaded(raising)
    with pytest.raises(StageError, match="independentReward: the reward raised Zero") as two:
        run(grpo_stage({"max_steps": 1}, **INDEPENDENT), tmp_path / "b", inputs)
    assert two.value.reason == "RewardFailed"
