"""PPO, GRPO and RLOO on a tiny model: learning, exact resumption, and errors with a reason."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainer.conftest import VOCABULARY
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.speaking import (
    LETTERS,
    QUESTIONS,
    grpo_stage,
    ppo_stage,
    share_of,
    write_prompts,
)
from tests.trainer.stop_after import NEVER, StopAtCheck
from tests.trainer.stop_after import without_times as not_timed
from tuneyard.api.alignment import StopConditions
from tuneyard.api.plan import PlannedStage, TrainRuntime
from tuneyard.errors import StageError
from tuneyard_trainer.generation import sampling
from tuneyard_trainer.generation.sampling import Sampled, TransformersSampler
from tuneyard_trainer.reinforcement import grpo, loading, ppo, rewards, stop_conditions
from tuneyard_trainer.reinforcement.rewards import Attempt
from tuneyard_trainer.reinforcement.stop_conditions import diverged
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

CPU = torch.device("cpu")
TIMES = {"generationSeconds", "scoringSeconds", "trainingSeconds", "tokensPerSecond"}


@pytest.fixture
def inputs(tmp_path: Path, speaking_model_dir: Path) -> dict[str, Path]:
    return {"model": speaking_model_dir, "prompts": write_prompts(tmp_path / "prompts.jsonl")}


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a setter of the reward function; the initial reward is the share of the letter a."""

    def set_to(chosen: Any) -> None:
        monkeypatch.setattr(rewards, "load", lambda *_: chosen)

    set_to(share_of("a"))
    return set_to


def run(
    stage: PlannedStage, folder: Path, inputs: dict[str, Path], worker: Worker | None = None
) -> tuple[dict[str, Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    module = ppo if stage.kind == "ppo" else grpo
    outcome = module.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stages(training: dict[str, Any], seed: int = 3) -> dict[str, PlannedStage]:
    more = training | {"seed": seed}
    return {
        "ppo": ppo_stage(more),
        "grpo": grpo_stage(more, kl_coefficient=0.1),
        "rloo": grpo_stage(more, estimator="rloo"),
    }


# ---- learning -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_reward_rises_while_the_kl_stays_bounded(
    method: str, seed: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """From an eighth of a completion to more than half of it, within 8 nats of the start."""
    _, outcome = run(stages({"max_steps": 20}, seed)[method], tmp_path / "out", inputs)
    steps = [line for line in lines(tmp_path / "out") if "learningRate" in line]
    assert outcome.metrics["baseReward"] < 0.35
    assert outcome.metrics["reward"] > 0.55
    assert outcome.metrics["kl"] < 8
    first, last = steps[:3], steps[-3:]
    assert sum(s["reward"] for s in last) > sum(s["reward"] for s in first) + 0.75
    assert all(math.isfinite(value) for s in steps for value in s.values())


def letter_reward_model(folder: Path, tokenizer: Any, letter: str) -> Path:
    """A reward model, saved as by the reward stage, trained here on pairs of completions
    (Bradley-Terry): the chosen one has more of the letter."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(LETTERS, k=4)) for _ in range(96)]
    shares = torch.tensor([text.count(letter) for text in texts])
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
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    rows = [_encoded(tokenizer, draw.choice(QUESTIONS), text) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), 3)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    better = shares[:, None] > shares[None, :]
    for _ in range(30):
        hidden = model.model(input_ids=ids)[0][torch.arange(len(rows)), lengths - 1]
        scores = model.score(hidden)[:, 0]
        loss = -logsigmoid(scores[:, None] - scores[None, :])[better].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "weights")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _encoded(tokenizer: Any, question: str, completion: str) -> list[int]:
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text + completion + tokenizer.eos_token)["input_ids"])


def test_ppo_with_a_learned_reward_raises_it_on_prompts_never_trained_on(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    """The letters that the reward model was trained to prefer rise with the reward."""
    numbers = [{"prompt": f"Say {number}."} for number in range(40)]
    inputs["prompts"].write_text("".join(json.dumps(row) + "\n" for row in numbers))
    inputs["reward"] = letter_reward_model(tmp_path / "reward", tiny_tokenizer, "c")
    _, outcome = run(ppo_stage({"max_steps": 15}), tmp_path / "out", inputs)
    assert outcome.details["heldOutPrompts"] == 4
    assert outcome.metrics["rewardGain"] > 1.0
    samples = outcome.details["samples"]

    def share(step: int) -> float:
        texts = [sample["answer"] for sample in samples if sample["step"] == step]
        return sum(text.count("c") for text in texts) / sum(len(text) for text in texts)

    assert share(max(sample["step"] for sample in samples)) > share(0)


# ---- exactness ----------------------------------------------------------------------------------


class StopAfter:
    """Requests a stop after `step` updates were reported."""

    def __init__(self, step: int) -> None:
        self.step, self.reported = step, 0

    def report(self, *, step: int = 0, **_: Any) -> None:
        self.reported = max(self.reported, step)

    def __call__(self) -> bool:
        return self.reported >= self.step

    def worker(self) -> Worker:
        return Worker(0, 1, CPU, report=self.report, stop=self)


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder)]


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo", "ppo-lora"])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(
    method: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Policy, value head, optimizer, prompts, completions, minibatches, adapted coefficient."""
    stage = stages({})[method.partition("-")[0]]
    if method.startswith("ppo"):
        adapter = {"lora": {"dropout": 0.1}} if method == "ppo-lora" else None
        stage = ppo_stage({}, target_kl=0.5, adapter=adapter)
    whole, _ = run(stage, tmp_path / "whole", inputs)
    with pytest.raises(Interrupted) as stopped:
        run(stage, tmp_path / "parts", inputs, StopAfter(1).worker())
    resumed, outcome = run(stage, tmp_path / "parts", inputs)
    assert outcome.details["resumedAtStep"] == stopped.value.step > 0
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


@pytest.mark.usefixtures("reward")
def test_a_stop_at_any_moment_is_seen_within_a_batch_and_resumed_exactly(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, curves, baseline, metrics and samples are those of an undisturbed run."""
    monkeypatch.setattr(sampling, "CPU_BATCH", 12)  # a measurement is several batches
    stage = grpo_stage({"max_steps": 3, "evaluation_steps": 2})
    undisturbed = StopAtCheck(NEVER)
    whole, expected = run(stage, tmp_path / "whole", inputs, undisturbed.worker())
    batches, rest = divmod(undisturbed.checks - 3, 3)  # measured at 0, 2 and 3
    assert batches > 1
    assert rest == 0
    for check in range(1, undisturbed.checks + 1):
        folder, stop = tmp_path / str(check), StopAtCheck(check)
        with pytest.raises(Interrupted) as stopped:
            run(stage, folder, inputs, stop.worker())
        assert stop.checks == check
        assert (stopped.value.step == 0) == (check <= batches)
        resumed, outcome = run(stage, folder, inputs)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert not_timed(outcome.metrics) == not_timed(expected.metrics)
        assert outcome.details["samples"] == expected.details["samples"]
        assert without_times(folder) == without_times(tmp_path / "whole")


FIELDS_OF_0_2 = {
    *("step", "tokens", "seconds", "best_step", "best_loss", "stale", "optimizer_steps"),
    *("kl_coefficient", "first_length", "truncated", "alike", "stopped", "base", "best", "last"),
}


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("evaluation_steps", [1, 2], ids=["measured", "not measured"])
def test_version_0_2_can_resume_a_checkpoint(
    evaluation_steps: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """After a rollback an attempt starts with the trainer of 0.2, which refuses other fields."""
    stage = grpo_stage({"max_steps": 4, "evaluation_steps": evaluation_steps})
    with pytest.raises(Interrupted):
        run(stage, tmp_path / "a", inputs, StopAfter(1).worker())
    files = list((tmp_path / "a" / "checkpoints").glob("*/state.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text()).keys() <= FIELDS_OF_0_2


def test_a_run_killed_in_its_first_update_resumes_with_the_measurement_before_it(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    whole, _ = run(ppo_stage(), tmp_path / "whole", inputs)
    calls = 0

    def interrupted(attempts: Sequence[Attempt]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return share_of("a")(attempts)

    reward(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(ppo_stage(), tmp_path / "parts", inputs)
    resumed, outcome = run(ppo_stage(), tmp_path / "parts", inputs)
    assert calls == 2 + 4 + 4  # the first measurement is not repeated
    assert outcome.details["resumedAtStep"] == 0
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_the_size_of_micro_batches_changes_an_update_by_rounding_alone(
    method: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = stages({"max_steps": 1, "keep_best": False})[method]
    runtime = TrainRuntime(micro_batch_tokens=40)
    large, _ = run(stage, tmp_path / "large", inputs)
    pieces, _ = run(stage.model_copy(update={"runtime": runtime}), tmp_path / "small", inputs)
    for name in large:
        torch.testing.assert_close(large[name], pieces[name], rtol=0, atol=2e-4)


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    """Train by PPO and by RLOO, then with a reward that fails on the second worker only."""
    rewards.load = lambda *_: share_of("a")  # type: ignore[assignment]
    for method in SHARED_BY_TWO:
        stage = stages(BRIEF)[method]
        module = ppo if method == "ppo" else grpo
        (folder / method).mkdir(exist_ok=True)
        module.run(StageContext(stage, inputs, folder / method, Worker(rank, 2, CPU)))

    def failing(attempts: Sequence[Attempt]) -> Tensor:
        if rank == 1:
            raise StageError("RewardContextTooShort", "a completion is too long.")
        return share_of("a")(attempts)

    rewards.load = lambda *_: failing  # type: ignore[assignment]
    try:
        ppo.run(StageContext(stages(BRIEF)["ppo"], inputs, folder, Worker(rank, 2, CPU)))
    except StageError as error:
        (folder / f"reason-{rank}").write_text(error.reason)


SHARED_BY_TWO = ("ppo", "rloo")
BRIEF = {"max_steps": 2, "keep_best": False}


@pytest.mark.usefixtures("reward")
def test_two_workers_train_like_one_and_fail_together(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Completions, advantages and minibatches are the same except for rounding. If the reward fails
    on one worker, the other fails with the same reason instead of waiting."""
    two = tmp_path / "two"
    two.mkdir()
    spawn(2, _worker, two, inputs)
    for method in SHARED_BY_TWO:
        alone, _ = run(stages(BRIEF)[method], tmp_path / method, inputs)
        together = load_file(next((two / method / "weights").glob("*.safetensors")))
        for name in alone:
            torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-3)
        for mine, theirs in zip(
            without_times(tmp_path / method), without_times(two / method), strict=True
        ):
            assert mine == pytest.approx(theirs, rel=2e-2, abs=2e-3)
    reasons = [(two / f"reason-{rank}").read_text() for rank in (0, 1)]
    assert reasons == ["RewardContextTooShort"] * 2


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("adapter", [None, {"lora": {}}, {"prefix": {"length": 3}}], ids=str)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_updates_in_bfloat16_stay_near_those_in_float32(
    method: str, adapter: Any, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Mixed precision, as on a GPU: the base under an adapter is in bfloat16, trained parameters
    are not. Ratios start at 1, since both forward passes round alike."""
    make = ppo_stage if method == "ppo" else grpo_stage
    more = {"optimization_epochs": 1} if method == "ppo" else {}
    training = {"max_steps": 1, "keep_best": False, "batch_size": 16}
    found = {}
    for precision in ("float32", "bfloat16"):
        stage = make(training | {"precision": precision}, adapter=adapter, **more)
        weights, _ = run(stage, tmp_path / precision, inputs)
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        found[precision] = next(ln for ln in lines(tmp_path / precision) if "policyLoss" in ln)
    assert found["bfloat16"]["clipFraction"] == 0
    assert found["bfloat16"]["entropy"] == pytest.approx(found["float32"]["entropy"], rel=0.05)
    assert found["bfloat16"]["gradientNorm"] > 0


# ---- the result ---------------------------------------------------------------------------------


def test_the_best_measured_model_is_the_result_not_the_last(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    """The reward changes its sign half way, so that the best model is an earlier one."""
    calls = 0

    def changing(attempts: Sequence[Attempt]) -> Tensor:
        nonlocal calls
        calls += 1
        return share_of("a")(attempts) * (1 if calls <= 9 else -1)

    reward(changing)
    training = {"max_steps": 8, "evaluation_steps": 2}
    _, outcome = run(ppo_stage(training), tmp_path / "a", inputs)
    measured = {
        line["step"]: line["heldOutObjective"]
        for line in lines(tmp_path / "a")
        if "heldOutObjective" in line
    }
    best = max(measured, key=measured.__getitem__)
    assert outcome.details["bestStep"] == best < 8
    assert outcome.metrics["objective"] == measured[best]
    kept = load_file(tmp_path / "a" / "weights" / "model.safetensors")
    saved = load_file(tmp_path / "a" / "checkpoints" / f"step-{best:08d}" / "weights.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    assert "value_head.linear.weight" in saved


@pytest.mark.usefixtures("reward")
def test_an_adapter_leaves_its_base_unchanged_and_a_later_stage_continues_it(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    lora = {"lora": {"rank": 4}}
    training = {"max_steps": 3, "learning_rate": 2e-2, "keep_best": False}
    first, outcome = run(ppo_stage(training, adapter=lora), tmp_path / "a", inputs)
    assert outcome.metrics["kl"] > 0.01
    assert not (tmp_path / "a" / "weights" / "model.safetensors").exists()
    tuned = inputs | {"tuned": tmp_path / "a"}
    again, _ = run(grpo_stage(training, adapter=lora), tmp_path / "b", tuned)
    assert again.keys() == first.keys()
    start = next(line for line in lines(tmp_path / "b") if line["step"] == 0)
    assert start["heldOutKl"] == pytest.approx(0, abs=1e-5)  # its reference is its start model
    assert start["heldOutReward"] == pytest.approx(outcome.metrics["reward"], abs=1e-6)


@pytest.mark.usefixtures("reward")
def test_prompts_are_held_out_if_there_are_enough_of_them(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    rows = [{"prompt": f"Say {number}."} for number in range(30)]
    inputs["prompts"].write_text("".join(json.dumps(row) + "\n" for row in rows + rows))
    _, outcome = run(ppo_stage({"max_steps": 1}), tmp_path / "a", inputs)
    assert (outcome.details["prompts"], outcome.details["heldOutPrompts"]) == (54, 3)


def test_the_kl_coefficient_follows_its_target(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    reward(share_of("a"))
    run(ppo_stage({"max_steps": 6}, target_kl=1e-3), tmp_path / "a", inputs)
    run(ppo_stage({"max_steps": 6}), tmp_path / "b", inputs)

    def coefficients(folder: Path) -> list[float]:
        return [line["klCoefficient"] for line in lines(folder) if "klCoefficient" in line]

    assert coefficients(tmp_path / "a")[-1] > 0.05
    assert set(coefficients(tmp_path / "b")) == {0.05}


def test_a_truncated_completion_is_penalized(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    """Completions of three tokens at most: only those that end by then get the full reward."""
    reward(lambda attempts: torch.ones(len(attempts)))
    stage = ppo_stage({"max_steps": 1}, sampling={"max_new_tokens": 3}, missing_eos_penalty=0.75)
    run(stage, tmp_path / "a", inputs)
    update = next(line for line in lines(tmp_path / "a") if "penalizedReward" in line)
    assert 0 < update["endedShare"] < 1
    assert update["penalizedReward"] == pytest.approx(1 - 0.75 * (1 - update["endedShare"]))


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_without_a_kl_term_there_is_no_reference_and_no_kl_of_zero_is_reported(
    method: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = grpo_stage({"max_steps": 2}, estimator=method, kl_coefficient=0.0)
    _, outcome = run(stage, tmp_path / "a", inputs)
    assert not any("kl" in line or "heldOutKl" in line for line in lines(tmp_path / "a"))
    assert "kl" not in outcome.metrics
    limited = grpo_stage(
        {"max_steps": 2}, estimator=method, kl_coefficient=0.0, stop_on={"max_kl": 99.0}
    )
    _, outcome = run(limited, tmp_path / "b", inputs)
    assert outcome.metrics["kl"] > 0 or outcome.details["bestStep"] == 0


# ---- errors -------------------------------------------------------------------------------------


def test_a_reward_that_is_not_finite_fails_the_stage_and_names_the_prompt(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    def broken(attempts: Sequence[Attempt]) -> Tensor:
        scores = torch.zeros(len(attempts))
        for index, attempt in enumerate(attempts):
            if attempt.prompt.question == "Say three.":
                scores[index] = math.nan
        return scores

    reward(broken)
    with pytest.raises(StageError, match=r"not finite: nan.*prompts\.jsonl row 3") as found:
        run(ppo_stage(), tmp_path / "a", inputs)
    assert found.value.reason == "NonFiniteReward"


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_run_with_truncated_completions_only_fails_with_its_reason(
    method: str, tmp_path: Path, inputs: dict[str, Path], tiny_model_dir: Path
) -> None:
    """A random model: one token in 400 stops it."""
    inputs["model"] = tiny_model_dir
    make = ppo_stage if method == "ppo" else grpo_stage
    stage = make({"max_steps": 9}, sampling={"max_new_tokens": 1})
    with pytest.raises(StageError, match=r"3 updates in a row none of") as found:
        run(stage, tmp_path / "a", inputs)
    assert found.value.reason == "AllCompletionsTruncated"
    assert max(line["step"] for line in lines(tmp_path / "a")) == 2


@pytest.mark.usefixtures("reward")
def test_truncated_completions_are_allowed_without_the_missing_eos_penalty(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = ppo_stage({"max_steps": 5}, sampling={"max_new_tokens": 1}, missing_eos_penalty=0.0)
    _, outcome = run(stage, tmp_path / "a", inputs)
    assert outcome.metrics["steps"] == 5


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_rewards_that_never_differ_fail_the_run_with_their_reason(
    method: str, tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    """Nothing can be learned from them, and the run would otherwise look successful."""
    reward(lambda attempts: torch.zeros(len(attempts)))
    with pytest.raises(StageError, match=r"same reward \(mean of the last update: 0\)") as found:
        run(stages({"max_steps": 20})[method], tmp_path / "a", inputs)
    assert found.value.reason == "RewardsAlike"
    steps = [line["step"] for line in lines(tmp_path / "a") if "learningRate" in line]
    assert steps == list(range(1, stop_conditions.ALIKE_UPDATES))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_rewards_that_differ_between_prompts_only_fail_the_run_too(
    method: str, tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    reward(lambda attempts: torch.tensor([float(len(p.question)) for p, _ in attempts]))
    with pytest.raises(StageError) as found:
        run(stages({"max_steps": 20})[method], tmp_path / "a", inputs)
    assert found.value.reason == "RewardsAlike"


def test_equal_rewards_after_successful_learning_do_not_fail_the_run(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    calls = 0

    def saturating(attempts: Sequence[Attempt]) -> Tensor:
        nonlocal calls
        calls += 1
        return share_of("a")(attempts) if calls < 4 else torch.ones(len(attempts))

    reward(saturating)
    _, outcome = run(stages({"max_steps": 14})["grpo"], tmp_path / "a", inputs)
    assert outcome.metrics["steps"] == 14


# ---- another engine ------------------------------------------------------------------------------


class OtherEngine:
    """Samples like the policy, and returns its log-probabilities plus `off` nats for each token."""

    def __init__(self, actor: Any, stop: Any, sampling: Any, off: float) -> None:
        self._own = TransformersSampler(actor.model, actor.pad, stop, sampling)
        self._actor, self._off, self.closed = actor, off, False

    def __call__(self, prompts: Any, keys: Any, *_: Any) -> list[Sampled]:
        own = self._own(prompts, keys)
        return [self._shifted(p, sampled) for p, sampled in zip(prompts, own, strict=True)]

    def _shifted(self, prompt: Sequence[int], sampled: Sampled) -> Sampled:
        with torch.no_grad():
            logits = self._actor.model(input_ids=torch.tensor([[*prompt, *sampled.tokens]])).logits
        scaled_TV = logits[0, len(prompt) - 1 : -1] / self._actor.temperature
        ids_T1 = torch.tensor(sampled.tokens)[:, None]
        logprobs_T = scaled_TV.log_softmax(-1).gather(-1, ids_T1)[:, 0] + self._off
        return Sampled(sampled.tokens, tuple(logprobs_T.tolist()))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def other_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[OtherEngine]]:
    """Return a function that sets another sampling engine and returns the engines made later."""

    def set_to(off: float) -> list[OtherEngine]:
        made: list[OtherEngine] = []

        def sampler(actor: Any, stop: Any, sampling: Any, *_: Any) -> OtherEngine:
            made.append(OtherEngine(actor, stop, sampling, off))
            return made[-1]

        monkeypatch.setattr(loading, "_sampler", sampler)
        return made

    return set_to


@pytest.mark.usefixtures("reward")
@pytest.mark.parametrize("off", [0.1, -0.1])
def test_another_engines_log_probabilities_are_compared_and_not_trained_on(
    off: float, tmp_path: Path, inputs: dict[str, Path], other_engine: Any
) -> None:
    stage = ppo_stage({"max_steps": 2}, sampling={"max_new_tokens": 12, "temperature": 0.8})
    whole, _ = run(stage, tmp_path / "own", inputs)
    other_engine(off)
    other, _ = run(stage, tmp_path / "other", inputs)
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    updates = [line for line in lines(tmp_path / "other") if "learningRate" in line]
    assert [line["samplerLogprobGap"] for line in updates] == pytest.approx([0.1, 0.1], abs=1e-4)
    assert not any("samplerLogprobGap" in line for line in lines(tmp_path / "own"))


@pytest.mark.usefixtures("reward")
def test_an_engine_that_runs_another_model_fails_the_run_before_any_update(
    tmp_path: Path, inputs: dict[str, Path], other_engine: Any
) -> None:
    made = other_engine(-0.4)
    with pytest.raises(StageError, match=r"0\.40 nats") as found:
        run(ppo_stage(), tmp_path / "a", inputs)
    assert found.value.reason == "SamplerMismatch"
    assert made[0].closed
    assert not lines(tmp_path / "a")


@pytest.mark.usefixtures("reward")
def test_the_allowed_gap_includes_the_probability_outside_the_nucleus(
    tmp_path: Path, inputs: dict[str, Path], other_engine: Any
) -> None:
    other_engine(0.4)
    stage = ppo_stage({"max_steps": 1}, sampling={"max_new_tokens": 12, "top_p": 0.8})
    _, outcome = run(stage, tmp_path / "a", inputs)
    assert outcome.metrics["steps"] == 1


WITHIN_LIMITS = {"kl": 2.0, "entropy": 1.0, "completionLength": 10.0}
LIMITS = StopConditions(max_kl=5.0, min_entropy=0.1, max_length_ratio=3.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"kl": 5.1}, "KlBlowUp"),
        ({"entropy": 0.09}, "EntropyCollapse"),
        ({"completionLength": 31.0}, "LengthDrift"),
    ],
)
def test_each_limit_has_its_reason(change: dict[str, float], reason: str | None) -> None:
    found = diverged(LIMITS, WITHIN_LIMITS | change, first_length=10.0)
    assert (found and found.reason) == reason
    assert diverged(None, WITHIN_LIMITS | change, first_length=10.0) is None


@pytest.mark.usefixtures("reward")
def test_a_run_that_diverges_ends_with_its_best_model(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    training = {"max_steps": 40, "evaluation_steps": 2}
    _, outcome = run(ppo_stage(training, stop_on={"max_kl": 1.5}), tmp_path / "a", inputs)
    assert outcome.details["stoppedBy"] == "KlBlowUp"
    assert 0 < outcome.details["bestStep"] <= outcome.metrics["steps"] < 40
    assert outcome.metrics["rewardGain"] > 0
    stopped = lines(tmp_path / "a")[-1]
    assert stopped["stopped"] == "KlBlowUp"
    assert stopped["kl"] > 1.5


@pytest.mark.usefixtures("reward")
def test_a_run_that_diverges_before_it_has_a_better_model_fails_with_that_reason(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError, match="below 100") as found:
        run(ppo_stage(stop_on={"min_entropy": 100.0}), tmp_path / "a", inputs)
    assert found.value.reason == "EntropyCollapse"
    assert not (tmp_path / "a" / "weights").exists()


@pytest.mark.usefixtures("reward")
def test_a_learning_rate_that_ruins_the_model_fails_with_a_reason(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage = ppo_stage({"max_steps": 30, "learning_rate": 9.0, "optimizer": {"epsilon": 1e-30}})
    with pytest.raises(StageError) as found:
        run(stage, tmp_path / "a", inputs)
    assert found.value.reason in ("LossNotFinite", "AllCompletionsTruncated")
