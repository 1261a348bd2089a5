"""vLLM samples with the policy's own probabilities after every update.

Needs vLLM, on CPU or GPU (`make test-vllm`). Tests that need no vLLM are in
`reinforcement/test_loop.py` and `models/test_adapters.py`.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.trainer.chance import chi_squared
from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.ports import free_port
from tests.trainer.speaking import grpo_stage, ppo_stage, share_of, speaking_model, write_prompts
from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import Sampling
from tuneyard.api.plan import PlannedStage
from tuneyard.errors import StageError
from tuneyard_trainer.generation.sampling import Sampled
from tuneyard_trainer.generation.vllm import VllmSampler
from tuneyard_trainer.models import adapters
from tuneyard_trainer.reinforcement import grpo, ppo, rewards
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
pytestmark = pytest.mark.timeout(900)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GAP = 2e-2 if DEVICE.type == "cuda" else 1e-5
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
KEYS = [101, 102, 103, 2**62 + 104]
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32 numbers: the smallest that vLLM's attention supports."""


@pytest.fixture
def samplers() -> Iterator[Any]:
    """Make samplers, and close them after the test."""
    made: list[VllmSampler] = []

    def make(model: Any = None, **settings: Any) -> VllmSampler:
        policy = wide() if model is None else model
        chosen = Sampling.model_validate({"max_new_tokens": 12} | settings)
        made.append(
            VllmSampler.of(
                policy.to(DEVICE), (2,), chosen, precision=torch.float32, longest=100, workers=1
            )
        )
        return made[-1]

    yield make
    for sampler in made:
        if sampler.copy.llm:
            sampler.close()


def wide(**changes: Any) -> Any:
    return tiny_llama(VOCABULARY, **(WIDE | changes)).eval()


def gaps(model: Any, completions: list[Sampled], temperature: float = 1.0) -> list[float]:
    """Return, for each completion, the largest difference from the model's log-probabilities."""
    found = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids_T = torch.tensor(completion.tokens, device=DEVICE)
        text_1L = torch.tensor([[*prompt, *completion.tokens]], device=DEVICE)
        with torch.no_grad():
            logits_TV = model(input_ids=text_1L).logits[0, len(prompt) - 1 : -1].float()
        logprobs_T = (logits_TV / temperature).log_softmax(-1).gather(-1, ids_T[:, None])[:, 0]
        assert completion.logprobs is not None
        engine_T = torch.tensor(completion.logprobs, device=DEVICE)
        found.append(float((logprobs_T - engine_T).abs().max()))
    return found


def tokens(completions: list[Sampled]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def test_a_completion_depends_on_its_prompt_and_key_and_not_on_its_batch(samplers: Any) -> None:
    sampler = samplers()
    together = tokens(sampler(PROMPTS, KEYS))
    alone = [tokens(sampler([p], [key]))[0] for p, key in zip(PROMPTS, KEYS, strict=True)]
    assert together == alone == tokens(sampler(PROMPTS[::-1], KEYS[::-1]))[::-1]
    assert tokens(sampler(PROMPTS, [key + 1 for key in KEYS])) != together


@pytest.mark.parametrize("tied", [True, False])
def test_each_call_samples_with_the_present_weights(tied: bool, samplers: Any) -> None:
    model = wide(tie_word_embeddings=tied)
    sampler = samplers(model, temperature=0.7)
    before = sampler(PROMPTS, KEYS)
    assert max(gaps(model, before, 0.7)) < GAP
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert max(gaps(model, before, 0.7)) > 10 * GAP  # other weights show up as a gap
    assert max(gaps(model, sampler(PROMPTS, KEYS), 0.7)) < GAP


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_is_sampled_and_its_base_does_not_change(
    kind: str, samplers: Any, tiny_tokenizer: Any
) -> None:
    settings = {"lora": {"decomposed": True}} if kind == "dora" else {kind: {}}
    base = wide()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapter = Adapter.model_validate(settings)
    model = adapters.attach(base, adapter, seed=0, tokenizer=tiny_tokenizer)
    sampler = samplers(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        assert max(gaps(model, sampler(PROMPTS, KEYS))) < GAP
    for name, tensor in base.state_dict().items():
        plain = name.replace(".base_layer", "")
        assert plain not in weights or torch.equal(tensor.cpu(), weights[plain])


def test_sampled_tokens_have_the_models_probabilities(samplers: Any) -> None:
    """Chi-squared over 6 likely tokens of 4,000 completions of one token: below the 0.1% point."""
    model = wide()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # far from uniform
    sampler = samplers(model, max_new_tokens=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]], device=DEVICE)).logits
    probs = logits[0, -1].softmax(-1)
    count = 4000
    first = torch.tensor([s.tokens[0] for s in sampler([[5, 6, 7]] * count, list(range(count)))])
    assert chi_squared(first, probs) < 22.5


def test_a_completion_ends_with_its_first_stop_token(samplers: Any) -> None:
    model = wide(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[2] = 0.5 * model.lm_head.weight[10:].norm(dim=0)
    completions = tokens(samplers(model, max_new_tokens=64)([[5, 6]] * 40, list(range(40))))
    assert all(2 not in completion[:-1] for completion in completions)
    assert all(len(completion) == 64 for completion in completions if completion[-1] != 2)
    assert any(completion[-1] == 2 for completion in completions)


def test_top_p_leaves_out_the_tail(samplers: Any) -> None:
    """Log-probabilities within the nucleus exceed the policy's by less than log(1 / top_p)."""
    model = wide()
    completions = samplers(model, top_p=0.5)(PROMPTS, KEYS)
    assert 0 < max(gaps(model, completions)) <= torch.tensor(2.0).log() + GAP


def test_a_model_that_vllm_cannot_run_is_refused_by_name(samplers: Any) -> None:
    unsupported = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=12, n_layer=1, n_head=2))
    type(unsupported).__name__, name = "Unsupported", type(unsupported).__name__
    try:
        with pytest.raises(StageError, match="vLLM cannot run Unsupported") as caught:
            samplers(unsupported)
    finally:
        type(unsupported).__name__ = name
    assert caught.value.reason == "EngineUnsupported"


def test_closing_a_sampler_frees_its_model(samplers: Any) -> None:
    sampler = samplers()
    (model,) = sampler.copy.llm.apply_model(weakref.ref)
    assert model() is not None
    sampler.close()
    assert model() is None


# ---- in a stage ---------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> dict[str, Path]:
    monkeypatch.setattr(rewards, "load", lambda *_: share_of("a"))
    model = speaking_model(tmp_path / "model", tiny_tokenizer, **WIDE)
    return {"model": model, "prompts": write_prompts(tmp_path / "prompts.jsonl")}


def stages(**training: Any) -> dict[str, PlannedStage]:
    engine = {"sampling": {"max_new_tokens": 12, "engine": "vllm"}}
    more = {"seed": 3} | training
    return {
        "ppo": ppo_stage(more, **engine),
        "grpo": grpo_stage(more, kl_coefficient=0.1, **engine),
        "rloo": grpo_stage(more, estimator="rloo", **engine),
        "ppo-lora": ppo_stage(more, adapter={"lora": {}}, **engine),
    }


def run(
    method: str, stage: PlannedStage, folder: Path, inputs: Any, worker: Any = None
) -> StageOutcome:
    folder.mkdir(exist_ok=True)
    module = ppo if method.startswith("ppo") else grpo
    return module.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, DEVICE)))


def updates(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "learningRate" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "weights").glob("*.safetensors")))


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_reward_rises_while_the_kl_stays_bounded(
    method: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The engine's log-probabilities stay the policy's up to the last update."""
    outcome = run(method, stages(max_steps=20)[method], tmp_path / "out", inputs)
    assert outcome.metrics["baseReward"] < 0.35
    assert outcome.metrics["reward"] > 0.55
    assert outcome.metrics["kl"] < 8
    assert all(0 < update["samplerLogprobGap"] < GAP for update in updates(tmp_path / "out"))


@pytest.mark.parametrize("method", ["ppo", "ppo-lora"])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    method: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    stage, steps = stages()[method], []
    run(method, stage, tmp_path / "whole", inputs)

    def report(*, step: int = 0, **_: Any) -> None:
        steps.append(step)

    stopping = Worker(0, 1, DEVICE, report=report, stop=lambda: max(steps) >= 1)
    with pytest.raises(Interrupted) as stopped:
        run(method, stage, tmp_path / "parts", inputs, stopping)
    outcome = run(method, stage, tmp_path / "parts", inputs)
    assert outcome.details["resumedAtStep"] == stopped.value.step > 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def _worker(rank: int, port: int, folder: Path, inputs: dict[str, Path]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # as Ray Train sets them
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rewards.load = lambda *_: share_of("a")  # type: ignore[assignment]
    for _ in range(2):  # two engines in one process, as in rounds of alignment
        (folder / "two").mkdir(exist_ok=True)
        stage = stages(max_steps=2, keep_best=False)["ppo"]
        ppo.run(StageContext(stage, inputs, folder / "two", Worker(rank, 2, torch.device("cpu"))))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="two workers need two GPUs")
def test_two_workers_train_to_the_weights_of_one(tmp_path: Path, inputs: dict[str, Path]) -> None:
    port = free_port()
    mp.spawn(_worker, args=(port, tmp_path, inputs), nprocs=2)
    run("ppo", stages(max_steps=2, keep_best=False)["ppo"], tmp_path / "one", inputs)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)
