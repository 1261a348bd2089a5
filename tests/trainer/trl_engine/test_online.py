"""GRPO and RLOO by TRL's trainers: the native loop's updates, course, and errors with a reason."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.speaking import grpo_stage, share_of, write_prompts
from tests.trainer.stop_after import StopAfter
from tuneyard.api.plan import PlannedStage, TrainRuntime
from tuneyard.api.stage_settings import ChatSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, tokenize
from tuneyard_trainer.generation.sampling import Sampled, TransformersSampler
from tuneyard_trainer.reinforcement import grpo as native
from tuneyard_trainer.reinforcement import loading, rewards, rollouts
from tuneyard_trainer.reinforcement.rewards import Attempt
from tuneyard_trainer.trl_engine import grpo, online, rloo
from tuneyard_trainer.trl_engine.batches import Layout
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

CPU = torch.device("cpu")
LORA = {"lora": {"rank": 4}}


@pytest.fixture
def inputs(tmp_path: Path, speaking_model_dir: Path) -> dict[str, Path]:
    return {"model": speaking_model_dir, "prompts": write_prompts(tmp_path / "prompts.jsonl")}


@pytest.fixture(autouse=True)
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a setter of the reward function; the initial reward is the share of the letter a."""

    def set_to(chosen: Any) -> None:
        monkeypatch.setattr(rewards, "load", lambda *_: chosen)

    set_to(share_of("a"))
    return set_to


def stage(estimator: str, training: dict[str, Any] | None = None, **changes: Any) -> PlannedStage:
    loop = {"engine": "trl", "max_steps": 2, "keep_best": False, **(training or {})}
    return grpo_stage(loop, **{"estimator": estimator, "kl_coefficient": 0.1, **changes})


def run(
    chosen: PlannedStage,
    folder: Path,
    inputs: dict[str, Path],
    worker: Worker | None = None,
    engine: Any = None,
) -> tuple[dict[str, Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    context = StageContext(chosen, inputs, folder, worker or Worker(0, 1, CPU))
    outcome = (engine or by_trl(chosen)).run(context)
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def by_trl(chosen: PlannedStage) -> Any:
    return rloo if getattr(chosen.settings, "estimator", None) == "rloo" else grpo


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if "learningRate" in line]


# ---- the same updates ---------------------------------------------------------------------------


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Record the completions of TRL's updates. Return a function that makes the native loop sample
    the same ones."""
    recorded: list[list[Sampled]] = []
    score = rollouts.Collector.score

    def recording(self: Any, prompts: Any, owned: Any, sampled: Any, seconds: float) -> Any:
        if len(prompts) == 32:
            recorded.append(list(sampled))
        return score(self, prompts, owned, sampled, seconds)

    class Replaying(TransformersSampler):
        def __call__(self, prompts: Any, keys: Any, *more: Any) -> list[Sampled]:
            if len(prompts) == 32:
                return recorded.pop(0)
            return super().__call__(prompts, keys, *more)

    def replay() -> None:
        monkeypatch.setattr(rollouts.Collector, "score", score)
        monkeypatch.setattr(loading, "TransformersSampler", Replaying)

    monkeypatch.setattr(rollouts.Collector, "score", recording)
    return replay


@pytest.mark.parametrize(
    ("estimator", "adapter", "tokens"),
    [
        ("grpo", None, "auto"),
        ("grpo", None, 100),
        ("grpo", LORA, 100),
        ("grpo", {"qlora": {}}, "auto"),
        ("grpo", {"ia3": {}}, "auto"),
        ("grpo", {"bottleneck": {}}, "auto"),
        ("rloo", None, 100),
        ("rloo", LORA, "auto"),
    ],
)
def test_both_engines_make_the_same_updates_of_the_same_completions(
    estimator: str,
    adapter: Any,
    tokens: Any,
    tmp_path: Path,
    inputs: dict[str, Path],
    replayed: Callable[[], None],
) -> None:
    """The second update has a KL. `tokens`: of a micro-batch; 100: several of them. AdamW's epsilon
    is large, since it would turn the rounding of tiny gradients into steps."""
    sampling = {"max_new_tokens": 12, "temperature": 0.8}
    training = {"optimizer": {"epsilon": 1e-3}, "learning_rate": 2e-2}
    chosen = stage(estimator, training, adapter=adapter, sampling=sampling)
    chosen = chosen.model_copy(update={"runtime": TrainRuntime(micro_batch_tokens=tokens)})
    theirs, found = run(chosen, tmp_path / "trl", inputs)
    replayed()
    ours, expected = run(chosen, tmp_path / "native", inputs, engine=native)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=2e-4)
    for one, other in zip(updates(tmp_path / "native"), updates(tmp_path / "trl"), strict=True):
        if estimator == "grpo":  # the native loop's policyLoss of RLOO is weighted by length
            loss = one["policyLoss"] + 0.1 * one["tokenKl"]
            assert other["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
        assert one.keys() - other.keys() <= {"policyLoss", "tokenKl"}
        same = one.keys() & other.keys() - {"tokensPerSecond"}
        for name in {name for name in same if not name.endswith("Seconds")}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert updates(tmp_path / "trl")[1]["kl"] != pytest.approx(0, abs=1e-4)
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.details.keys() == expected.details.keys() | {"engine", "sharding"}
    assert lines(tmp_path / "trl")[0] == lines(tmp_path / "native")[0]  # the same held-out reward
    configs = [
        folder / "weights" / "config.json" for folder in (tmp_path / "trl", tmp_path / "native")
    ]
    if adapter is None:
        assert configs[0].read_text() == configs[1].read_text()


@pytest.mark.parametrize("adapter", [None, LORA], ids=str)
def test_updates_in_bfloat16_stay_near_those_of_the_native_engine(
    adapter: Any, tmp_path: Path, inputs: dict[str, Path], replayed: Callable[[], None]
) -> None:
    """Mixed precision, as on a GPU. The native loop computes logits in float32, TRL does not."""
    training = {"precision": "bfloat16", "optimizer": {"epsilon": 1e-3}, "learning_rate": 2e-2}
    chosen = stage("grpo", training, adapter=adapter)
    weights, outcome = run(chosen, tmp_path / "trl", inputs)
    replayed()
    run(chosen, tmp_path / "native", inputs, engine=native)
    assert outcome.details["precision"] == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    for one, other in zip(updates(tmp_path / "native"), updates(tmp_path / "trl"), strict=True):
        assert other["gradientNorm"] == pytest.approx(one["gradientNorm"], rel=0.1)
        assert other["entropy"] == pytest.approx(one["entropy"], rel=0.05)


def test_trl_trains_on_our_tokens_of_the_prompts(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the prompts of each update in the native loop's order, each as often as a group is
    large."""
    trained: list[tuple[int, ...]] = []
    asked: list[list[TokenizedPrompt]] = []
    loss, score = grpo.GRPOTrainer.compute_loss, rollouts.Collector.score

    def recording(self: Any, model: Any, given: Any, *more: Any, **named: Any) -> Any:
        pairs = zip(given["prompt_ids"], given["prompt_mask"], strict=True)
        trained.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)
        return loss(self, model, given, *more, **named)

    def scoring(self: Any, prompts: Any, *more: Any) -> Any:
        asked.append(list(prompts))
        return score(self, prompts, *more)

    monkeypatch.setattr(grpo.GRPOTrainer, "compute_loss", recording)
    monkeypatch.setattr(rollouts.Collector, "score", scoring)
    chosen = stage("grpo")
    run(
        chosen.model_copy(update={"runtime": TrainRuntime(micro_batch_tokens=100)}),
        tmp_path / "a",
        inputs,
    )
    ours = [prompt.ids for prompts in asked if len(prompts) == 32 for prompt in prompts]
    assert sorted(trained) == sorted(ours)
    assert len(set(ours[:8])) == 1 < len(set(ours))


def test_the_stop_token_of_the_jobs_template_ends_what_trl_samples(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is written has its own stop token, as before."""
    ends: list[Any] = []
    monkeypatch.setattr(
        rloo.RLOOTrainer, "train", lambda self: ends.append(self.generation_config.eos_token_id)
    )
    template = tiny_tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    chat = {"system_prompt": None, "chat_template": template}
    run(stage("rloo", chat=chat), tmp_path / "a", inputs)
    assert ends == [[0, 2]]
    written = json.loads((tmp_path / "a" / "weights" / "generation_config.json").read_text())
    assert written["eos_token_id"] == 2


def test_several_steps_of_an_update_clip_its_ratios(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """`num_iterations`: TRL takes that many steps on the completions of an update."""
    more = {"trl": {"num_iterations": 2, "epsilon_high": 0.01}, "learning_rate": 2e-2}
    _, outcome = run(stage("grpo", more), tmp_path / "a", inputs)
    assert [line["step"] for line in updates(tmp_path / "a")] == [1, 2]
    assert outcome.details["optimizerSteps"] == 4
    assert max(line["clipFraction"] for line in updates(tmp_path / "a")) > 0


def test_deterministic_algorithms_end_with_the_stage(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(stage("grpo", {"trl": {"full_determinism": True}, "max_steps": 1}), tmp_path / "a", inputs)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_argument_of_the_job_reaches_trls_loss(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """dr_grpo divides by the longest possible completion, and not by the tokens there are."""
    found = {}
    for loss_type in ("dapo", "dr_grpo"):
        chosen = stage("grpo", {"trl": {"loss_type": loss_type}, "max_steps": 1})
        run(chosen, tmp_path / loss_type, inputs)
        found[loss_type] = updates(tmp_path / loss_type)[0]["gradientNorm"]
    assert found["dr_grpo"] < 0.8 * found["dapo"]


# ---- the course ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_held_out_reward_rises_while_the_kl_stays_bounded(
    estimator: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """By the measure and the bounds of the native loop's test."""
    chosen = stage(estimator, {"max_steps": 20, "keep_best": True})
    _, outcome = run(chosen, tmp_path / "a", inputs)
    assert outcome.metrics["baseReward"] < 0.35
    assert outcome.metrics["reward"] > 0.55
    assert outcome.metrics["kl"] < 8
    steps = updates(tmp_path / "a")
    assert sum(s["reward"] for s in steps[-3:]) > sum(s["reward"] for s in steps[:3]) + 0.75
    assert all(math.isfinite(value) for s in steps for value in s.values())
    assert {"loss", "reward", "kl", "entropy", "completionLength", "endedShare"} <= steps[0].keys()


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_stopped_run_goes_on_with_the_next_update(
    estimator: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The prompts, the completions, the optimizer, its learning rate and the reference are those of
    a whole run."""
    linear = {"schedule": {"type": "linear", "warmup": 0.0, "finalFraction": 0.0}}
    chosen = stage(estimator, {"max_steps": 4, "trl": {"num_iterations": 2}, **linear})
    whole, _ = run(chosen, tmp_path / "whole", inputs)
    with pytest.raises(Interrupted) as stopped:
        run(chosen, tmp_path / "parts", inputs, StopAfter(2).worker())
    assert stopped.value.step == 2
    assert not (tmp_path / "parts" / "weights").exists()
    assert not list((tmp_path / "parts").rglob("*.pt"))
    resumed, outcome = run(chosen, tmp_path / "parts", inputs)
    assert outcome.details["resumedAtStep"] == 2
    assert [line["step"] for line in updates(tmp_path / "parts")] == [1, 2, 3, 4]
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)
    for one, other in zip(updates(tmp_path / "whole"), updates(tmp_path / "parts"), strict=True):
        for name in ("reward", "kl", "loss", "learningRate", "completionLength"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)


def test_a_second_stage_is_compared_with_the_model_that_it_began_with(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    training = {"max_steps": 3, "learning_rate": 2e-2}
    first, outcome = run(stage("grpo", training, adapter=LORA), tmp_path / "a", inputs)
    assert outcome.metrics["kl"] > 0.01
    tuned = inputs | {"tuned": tmp_path / "a"}
    again, _ = run(stage("grpo", training, adapter=LORA), tmp_path / "b", tuned)
    assert again.keys() == first.keys()
    start = lines(tmp_path / "b")[0]
    assert start["heldOutKl"] == pytest.approx(0, abs=1e-5)
    assert start["heldOutReward"] == pytest.approx(outcome.metrics["reward"], abs=1e-6)


def test_a_run_that_diverges_ends_with_its_best_model(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    training = {"max_steps": 40, "evaluation_steps": 2, "keep_best": True}
    chosen = stage("rloo", training, kl_coefficient=0.0, stop_on={"max_kl": 1.5})
    _, outcome = run(chosen, tmp_path / "a", inputs)
    assert outcome.details["stoppedBy"] == "KlBlowUp"
    assert 0 < outcome.details["bestStep"] <= outcome.metrics["steps"] < 40
    stopped = lines(tmp_path / "a")[-1]
    assert stopped["stopped"] == "KlBlowUp"
    assert stopped["kl"] > 1.5


# ---- errors -------------------------------------------------------------------------------------


def reason(chosen: PlannedStage, folder: Path, inputs: dict[str, Path]) -> StageError:
    with pytest.raises(StageError) as found:
        run(chosen, folder, inputs)
    assert not (folder / "weights").exists()
    return found.value


def test_a_reward_that_raises_is_named_with_the_prompts(
    tmp_path: Path, inputs: dict[str, Path], reward: Callable[[Any], None]
) -> None:
    calls = 0

    def failing(attempts: Sequence[Attempt]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:  # the first call is the held-out measurement
            raise ZeroDivisionError("division by zero")
        return share_of("a")(attempts)

    reward(failing)
    error = reason(stage("grpo"), tmp_path / "a", inputs)
    assert error.reason == "RewardFailed"
    assert "ZeroDivisionError" in error.message
    assert "prompts.jsonl row" in error.message


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (lambda attempts: torch.full((len(attempts),), math.nan), "NonFiniteReward"),
        (lambda attempts: torch.zeros(len(attempts)), "RewardsAlike"),
    ],
)
def test_rewards_without_a_use_end_the_run_as_under_the_native_engine(
    scores: Any,
    expected: str,
    tmp_path: Path,
    inputs: dict[str, Path],
    reward: Callable[[Any], None],
) -> None:
    reward(scores)
    assert reason(stage("grpo", {"max_steps": 9}), tmp_path / "a", inputs).reason == expected


def test_a_loss_that_is_not_finite_is_named(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = grpo.GRPOTrainer.compute_loss

    def broken(self: Any, *more: Any, **named: Any) -> Any:
        return loss(self, *more, **named) * (math.nan if self.state.global_step else 1.0)

    monkeypatch.setattr(grpo.GRPOTrainer, "compute_loss", broken)
    error = reason(stage("grpo"), tmp_path / "a", inputs)
    assert error.reason == "LossNotFinite"
    assert "step 2" in error.message


def test_prompts_of_which_trl_makes_other_tokens_are_named(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = loading.Policy.prompts

    def changed(self: Any, *given: Any) -> list[TokenizedPrompt]:
        prompts = split(self, *given)
        other = prompts[2]
        return [*prompts[:2], TokenizedPrompt(other.prompt, (*other.ids, 5)), *prompts[3:]]

    monkeypatch.setattr(loading.Policy, "prompts", changed)
    error = reason(stage("rloo"), tmp_path / "a", inputs)
    assert error.reason == "TokensDiffer"
    assert "1 of 7 prompts" in error.message
    assert "prompts.jsonl row 3" in error.message


@pytest.mark.parametrize("template", [True, False])
def test_prompts_are_compared_as_trl_tokenizes_them(template: bool, tiny_tokenizer: Any) -> None:
    """A text gets the tokenizer's special tokens, and a chat template brings its own."""
    tokenizer = copy.copy(tiny_tokenizer)
    if not template:
        tokenizer.chat_template = None
    given = Prompt(({"role": "user", "content": "Say one."},), "row 1")
    prompt = tokenize(given, tokenizer, ChatSettings(system_prompt=None, chat_template=None))
    assert prompt is not None
    online.require_same_tokens([prompt], tokenizer)
    with pytest.raises(StageError, match="row 1"):
        online.require_same_tokens([TokenizedPrompt(given, prompt.ids[1:])], tokenizer)


def test_completions_that_the_workers_cannot_share_equally_are_refused(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError, match="32 completions, which 3 workers") as found:
        run(stage("grpo"), tmp_path / "a", inputs, Worker(0, 3, CPU))
    assert found.value.reason == "UnevenBatch"


def test_a_model_whose_positions_count_padding_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    error = reason(stage("grpo"), tmp_path / "a", inputs | {"model": tmp_path / "gpt2"})
    assert error.reason == "EngineUnsupported"
    assert "left" in error.message


def test_an_adapter_of_the_head_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    tiny_llama(VOCABULARY, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    tiny_tokenizer.save_pretrained(tmp_path / "untied")
    chosen = stage("grpo", adapter={"lora": {"targets": ["lm_head"]}})
    error = reason(chosen, tmp_path / "a", inputs | {"model": tmp_path / "untied"})
    assert error.reason == "EngineUnsupported"
    assert "adapter of the head" in error.message


def test_a_step_is_cut_into_equal_micro_batches() -> None:
    for most, rows, accumulated in ((1000, 12, 1), (50, 4, 3), (45, 4, 3), (9, 1, 12)):
        assert online.layout_of(12, 10, most) == Layout(rows, accumulated)


# ---- two workers --------------------------------------------------------------------------------


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    """Train by each method, then with a reward that fails on the second worker only."""
    rewards.load = lambda *_: share_of("a")  # type: ignore[assignment]
    seen: list[Any] = []
    score = rollouts.Collector.score

    def recording(self: Any, prompts: Any, owned: Any, sampled: Any, seconds: float) -> Any:
        found = score(self, prompts, owned, sampled, seconds)
        if len(prompts) == 32:
            completions: list[Any] = [None, None]
            dist.all_gather_object(completions, [each.tokens for each in sampled])
            seen.append([*completions[0], *completions[1]])
        return found

    rollouts.Collector.score = recording  # type: ignore[method-assign]
    for estimator in ("grpo", "rloo"):
        seen.clear()
        chosen = stage(estimator, SHARED)
        context = StageContext(chosen, inputs, folder / estimator, Worker(rank, 2, CPU))
        by_trl(chosen).run(context)
        if rank == 0:
            (folder / f"{estimator}.json").write_text(json.dumps(seen))

    def failing(attempts: Sequence[Attempt]) -> Tensor:
        if rank == 1:
            raise ValueError("a defect")
        return share_of("a")(attempts)

    rewards.load = lambda *_: failing  # type: ignore[assignment]
    try:
        grpo.run(StageContext(stage("grpo"), inputs, folder / "failing", Worker(rank, 2, CPU)))
    except StageError as error:
        (folder / f"reason-{rank}").write_text(error.reason)


SHARED = {"optimizer": {"epsilon": 1e-3}, "learning_rate": 2e-2}


def test_two_workers_train_like_one_and_fail_together(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native loop on one worker makes the same updates of the completions of both workers. If
    the reward fails on one worker, the other fails with the same reason instead of waiting."""
    two = tmp_path / "two"
    for name in ("grpo", "rloo", "failing"):
        (two / name).mkdir(parents=True)
    spawn(2, _worker, two, inputs)
    for estimator in ("grpo", "rloo"):
        recorded = json.loads((two / f"{estimator}.json").read_text())
        assert len({tuple(ids) for ids in recorded[0]}) > 8  # the workers' completions differ

        class Replaying(TransformersSampler):
            def __call__(self, prompts: Any, keys: Any, *more: Any) -> list[Sampled]:
                if len(prompts) == 32:
                    return [Sampled(tuple(ids)) for ids in recorded.pop(0)]  # noqa: B023
                return super().__call__(prompts, keys, *more)

        monkeypatch.setattr(loading, "TransformersSampler", Replaying)
        alone, _ = run(stage(estimator, SHARED), tmp_path / estimator, inputs, engine=native)
        together = load_file(next((two / estimator / "weights").glob("*.safetensors")))
        for name in alone:
            torch.testing.assert_close(alone[name], together[name], rtol=1e-3, atol=5e-4)
        for one, other in zip(updates(tmp_path / estimator), updates(two / estimator), strict=True):
            for name in ("reward", "kl", "gradientNorm", "entropy", "completionLength"):
                assert other[name] == pytest.approx(one[name], rel=5e-3, abs=1e-4)
    reasons = [(two / f"reason-{rank}").read_text() for rank in (0, 1)]
    assert reasons == ["RewardFailed"] * 2
