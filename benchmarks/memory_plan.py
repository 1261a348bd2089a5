"""Compare the planned memory of a training step with torch's memory trackers, at true size.

    .venv/bin/python benchmarks/memory_plan.py                    all steps
    .venv/bin/python benchmarks/memory_plan.py --results FILE     keep them, and continue
    .venv/bin/python benchmarks/memory_plan.py 8B/lora            steps whose name starts so

Prints a table as Markdown, and the longest sequence with which 70B under QLoRA stays below 48 GB.
Tensors and processes are simulated, so that no GPU is needed. Models of more than 16 layers are
tracked at 4 and at 8 layers. The optimizer is left out: two moments of four bytes are arithmetic.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tracked_memory import Step, Tracked, extrapolated
from tuneyard.api.adapters import Adapter, Lora, Qlora
from tuneyard.api.model_config import facts_of
from tuneyard.planning.memory.activations import Computation, MicroBatch
from tuneyard.planning.memory.parameters import trained
from tuneyard.planning.memory.training import Step as PlannedStep

GB, GIB = 10**9, 1 << 30
HEADLINE_BYTES = 48 * GB
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MISTRAL_7B = LLAMA_8B | {"model_type": "mistral", "vocab_size": 32768, "sliding_window": None}
LLAMA_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": QWEN_05B,
    "1B": LLAMA_1B,
    "7B": MISTRAL_7B,
    "8B": LLAMA_8B,
    "70B": LLAMA_70B,
}
# model, tuning, method, rows x tokens, GPUs; r: recomputed, m: with a mask
STEPS = """
0.5B full  sft 2x2048    1
0.5B full  sft 4x2048    1 r
0.5B lora  sft 4x1024    1 m
0.5B full  ppo 4x1024    1
0.5B qlora ppo 4x1024    1 r
1B   full  dpo 2x2048    1
1B   full  sft 4x1024    1 m
1B   full  sft 1x32768   1 r
1B   full  sft 1x2048    2
1B   lora  dpo 2x4096    1 r
1B   lora  ppo 4x1024    1
1B   qlora sft 2x2048    1
1B   lora  sft 1x131072  8 r
7B   lora  sft 1x4096    1 r
8B   full  sft 1x4096    1 r
8B   full  sft 1x4096    8 r
8B   full  sft 1x2048    8
8B   full  sft 1x131072 64 r
8B   full  dpo 2x8192   16 r
8B   full  ppo 4x2048   32 r
8B   lora  sft 1x2048    1
8B   lora  sft 1x8192    1 r
8B   qlora sft 1x8192    1 r
8B   qlora dpo 2x2048    1 r
8B   lora  ppo 4x1024    1 r
8B   lora  sft 1x16384   4 r
70B  full  sft 1x4096   64 r
70B  full  dpo 2x2048   32 r
70B  lora  sft 1x4096   16 r
70B  qlora sft 1x1792    1 r
"""


def steps() -> dict[str, Step]:
    """Return the compared steps by their names, such as `8B/lora/sft/1x2048/1`."""
    found = {}
    for line in STEPS.split("\n"):
        if fields := line.split():
            model, tuning, method, shape, gpus, *flags = fields
            rows, width = map(int, shape.split("x"))
            config: Any = MODELS[model], tuning, method, rows, width, int(gpus)
            found["/".join(fields)] = Step(*config, "r" in flags, "m" in flags)
    return found


def planned(step: Step) -> Tracked:
    """Return what the plan calculates for a step."""
    calculated = _step(step)
    state = dict(calculated.state)
    moments = [moment.total for moment in calculated.moments() if moment.name != "optimizer step"]
    kept = state["weights"] + state["gradients"]
    activations = max(moments) - kept - state["optimizer"]
    return Tracked(state["weights"], state["gradients"], activations)


def _step(step: Step) -> PlannedStep:
    facts = facts_of(step.config)
    adapters = {
        "full": None,
        "lora": Adapter(lora=Lora(rank=step.rank)),
        "qlora": Adapter(qlora=Qlora(rank=step.rank)),
    }
    learned = trained(facts, adapters[step.tuning], None)
    sharding = "fsdp" if step.gpus > 1 else "none"
    return PlannedStep(
        facts=facts,
        trained=learned,
        batch=MicroBatch(step.rows, step.width),
        how=Computation.of(learned, 2, sharding, masked=step.masked),
        loss="tokenLogprobs" if step.method == "ppo" else "crossEntropy",
        devices=step.gpus,
        sharding=sharding,
        checkpointing=step.checkpointing,
        added_parameters=facts.hidden_size + 1 if step.method == "ppo" else 0,
    )


def longest_sequence() -> int:
    """Return the tokens of the longest sequence, in steps of 128, with which a step of 70B under
    QLoRA of rank 16 on one GPU stays below 48 GB, everything included."""

    def total(width: int) -> int:
        step = _step(Step(LLAMA_70B, "qlora", "sft", 1, width, checkpointing=True))
        return max(moment.total for moment in step.moments())

    return max(width for width in range(128, 32768, 128) if total(width) < HEADLINE_BYTES)


# ---- the table ----------------------------------------------------------------------------------


def results(file: Path | None, wanted: dict[str, Step]) -> dict[str, Tracked]:
    """Return what the tracker found for the steps. Results in `file` are read, new ones added."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    found = {line["name"]: Tracked(**line["bytes"]) for line in map(json.loads, lines)}
    for name, step in wanted.items():
        if name not in found:
            found[name] = extrapolated(step)
            print(f"{name}: tracked", file=sys.stderr)
            if file:
                with file.open("a") as out:
                    out.write(json.dumps({"name": name, "bytes": asdict(found[name])}) + "\n")
    return {name: found[name] for name in wanted}


def table(found: dict[str, Tracked], wanted: dict[str, Step]) -> list[str]:
    """Return the rows of the table, and a line with the largest difference."""
    rows = [
        "| model, tuning, method | rows x tokens | GPUs | parameters | gradients | activations: "
        "tracked | planned | difference |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    largest = 0.0
    for name, seen in found.items():
        plan = planned(wanted[name])
        differences = [
            plan.parameters / seen.parameters - 1,
            plan.gradients / seen.gradients - 1,
            plan.activations / seen.activations - 1,
        ]
        largest = max(largest, *map(abs, differences))
        model, tuning, method, shape, gpus, *flags = name.split("/")
        marks = [{"r": "recomputed", "m": "masked"}[flag] for flag in flags]
        rows.append(
            f"| {', '.join([model, tuning, method, *marks])} | {shape} | {gpus} | "
            f"{seen.parameters / GIB:.2f} | {seen.gradients / GIB:.2f} | "
            f"{seen.activations / GIB:.2f} | {plan.activations / GIB:.2f} | "
            f"{differences[2]:+.1%} |"
        )
    count = len(found)
    return [*rows, "", f"Largest difference of any of the three, {count} steps: {largest:.1%}."]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare planned with tracked memory.")
    parser.add_argument("start", nargs="?", default="", help="Start of the steps' names.")
    parser.add_argument("--results", type=Path, metavar="FILE", help="Where results are kept.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    wanted = {name: step for name, step in steps().items() if name.startswith(arguments.start)}
    print("\n".join(table(results(arguments.results, wanted), wanted)))
    print(f"70B, QLoRA of rank 16, one GPU: {longest_sequence():,} tokens stay below 48 GB.")


if __name__ == "__main__":
    main()
