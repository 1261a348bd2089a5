"""The time and the memory of a merge, next to mergekit, on two models of the shape of Qwen2.5-0.5B.

    .venv/bin/python benchmarks/merging.py --mergekit .venv-mergekit/bin/python

The weights are random: a base in bfloat16, and two models that differ from it. Each side merges in
a process of its own, in turn with the other, with the same number of threads. The time is that of
the merge without imports, and so is the memory: the peak minus what the process held before.

Ours runs, as root, in a cgroup that has room for two of the largest tensors and for one file of at
most 5 GB, beside what the process held before.
`make merge-oracle` makes mergekit's environment. Without --mergekit, only our side runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

METHODS = {
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.5}},
    "taskArithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.5, "normalize": True}},
    "dareTies": {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
}
"""mergekit's recipes by our names. Both sides have a weight of 0.5 for each model."""
CONFIG: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
LARGEST_BYTES = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", metavar="PYTHON", help="of mergekit's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(*options.side)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.layers)
        shard = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        allowed = 2 * LARGEST_BYTES + shard
        print(f"one model: {shard / MIB:,.0f} MiB; its largest tensor: {LARGEST_BYTES / MIB:,.0f}")
        print(f"two tensors and one file: {allowed / MIB:,.0f} MiB\n")
        print("| method | Tuneyard | mergekit | times as fast | memory | of mergekit |")
        print("|---|---:|---:|---:|---:|---:|")
        for method in options.only:
            print(row(method, folder, options, allowed), flush=True)


def row(method: str, folder: Path, options: argparse.Namespace, allowed: int) -> str:
    """Return a line of the table: the medians of the rounds, and the range of the ratios."""
    sides = {"ours": sys.executable}
    if options.mergekit:
        sides["mergekit"] = options.mergekit
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sorted(sides, reverse=bool(number % 2)):
            found[side].append(run(sides[side], side, method, folder, allowed))
    shown = {
        side: (statistics.median(r["seconds"] for r in runs), max(r["bytes"] for r in runs))
        for side, runs in found.items()
    }
    seconds, size = shown["ours"]
    if "mergekit" not in shown:
        return f"| {method} | {seconds:.1f} s |  |  | {size / MIB:,.0f} MiB |  |"
    ratios = sorted(
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(found["ours"], found["mergekit"], strict=True)
    )
    other, more = shown["mergekit"]
    ratio = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    return (
        f"| {method} | {seconds:.1f} s | {other:.1f} s | {ratio} "
        f"| {size / MIB:,.0f} MiB | {more / MIB:,.0f} MiB |"
    )


def run(python: str, side: str, method: str, folder: Path, allowed: int) -> dict[str, float]:
    """Return the seconds and the bytes of a merge in a process of its own."""
    command = [python, __file__, "--side", side, method, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None:
            raise RuntimeError("the process has no output")
        process.stdout.readline()  # it has imported everything
        with limited(process.pid, allowed) if side == "ours" else nullcontext():
            output, errors = process.communicate("go\n")
    if process.returncode:
        raise SystemExit(f"{side} failed ({process.returncode}): {errors[-2000:]}")
    found: dict[str, float] = json.loads(output)
    return found


@contextmanager
def limited(pid: int, limit: int) -> Iterator[None]:
    """While active, a process gets at most `limit` more bytes of memory. What it holds counts for
    the cgroup that it comes from."""
    from benchmarks.memory_cgroup import cgroup

    with cgroup(limit) as group:
        (group / "cgroup.procs").write_text(str(pid))
        yield


# ---- one side, in its own process ---------------------------------------------------------------


def measure(side: str, method: str, name: str) -> None:
    """Import, print what the process holds, wait for a line, merge, and print the figures."""
    folder = Path(name)
    target = folder / f"{side}-{method}"
    act = ours(method, folder, target) if side == "ours" else theirs(method, folder, target)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    act()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": peak() - before}))
    shutil.rmtree(target)


def peak() -> int:
    """Return the peak of the resident memory, in bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def ours(method: str, folder: Path, target: Path) -> Any:
    from tuneyard.api.merging import MergePart, MergeRecipe
    from tuneyard_trainer.merging.opening import Named
    from tuneyard_trainer.merging.write import write_merged

    recipe = MergeRecipe.model_validate({"method": method, "density": 0.5})
    models = [Named(name, name, folder / name, MergePart(weight=0.5)) for name in ("a", "b")]
    return lambda: write_merged(
        folder / "base", models, recipe, target, report=lambda _done, _total: None
    )


def theirs(method: str, folder: Path, target: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    recipe = METHODS[method]
    base = folder / ("a" if method == "slerp" else "base")
    parts = [
        {"model": str(folder / name), "parameters": {} if method == "slerp" else {"weight": 0.5}}
        for name in ("a", "b")
    ]
    based = {} if method == "linear" else {"base_model": str(base)}
    configuration = MergeConfiguration.model_validate(
        {**recipe, **based, "models": parts, "dtype": "bfloat16"}
    )
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, quiet=True)
    return lambda: run_merge(configuration, str(target), options)


def write_models(folder: Path, layers: int) -> None:
    """Write the base and two models with random weights, which differ from it by a tenth."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.prepare import model as smollm
    from tuneyard_trainer.models.base import load_tokenizer

    scratch = folder / "smollm"
    scratch.mkdir()
    tokenizer = load_tokenizer(smollm(scratch))
    torch.manual_seed(0)
    config = Qwen2Config(**(CONFIG | {"num_hidden_layers": layers}))
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("base", "a", "b"):
        if name != "base":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape, dtype=torch.bfloat16)
                    parameter.copy_(start[key] + 0.1 * start[key].abs().mean() * noise)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
