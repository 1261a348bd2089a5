"""Train every method under every engine that has it, with 1, 2 and 4 workers and three seeds, and
print how its own measure on held-out rows changed, from the lowest to the highest of all runs.

    make matrix                                          everything: about an hour on two cores
    .venv/bin/python benchmarks/matrix.py trl/grpo       cells whose name starts so
    .venv/bin/python benchmarks/matrix.py trl/ --workers 2 --seeds 0

The model is a Llama of random weights with one token for each byte. A method that samples first
learns to answer with one letter and to end there. Training is good if the held-out loss fell, or
the held-out reward rose. Prints a table as Markdown, and exits with 1 if a cell did not learn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cluster import tiny_model
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job

ROOT = Path(__file__).resolve().parents[1]
WORKERS, SEEDS = (1, 2, 4), (0, 1, 2)
LETTERS, GOOD = "abcdefgh", "abc"
"""The letters that are answers, and those that are rewarded."""
SUPERVISED = ("sft", "pretrain", "reward", "dpo", "kto")
CELLS = (
    *(f"native/{method}" for method in (*SUPERVISED, "ppo", "grpo", "rloo")),
    *(f"trl/{method}" for method in (*SUPERVISED, "grpo", "rloo", "distill")),
    "trl/sft, sharded",
    "trl/pretrain, sharded",
    "trl/dpo, sharded",
    "trl/kto, sharded",
    "trl/grpo, sharded",
    "trl/rloo, sharded",
)
MEASURES = (("baseValidationLoss", "validationLoss"), ("baseReward", "reward"))
"""Names of a measure before and after, in a stage's record; a loss falls, a reward rises."""


def write_files(folder: Path) -> None:
    """Write the model, the teacher of distillation and the rows."""
    import torch

    tokenizer = tiny_model.tokenizer()
    for name, seed in (("model", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        tiny_model.model(len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    numbers = range(64)
    rows: dict[str, list[dict[str, Any]]] = {
        "rows": [{"prompt": f"Say {n}.", "completion": LETTERS[n % 8]} for n in numbers],
        "texts": [{"text": f"Say {n}. {LETTERS[n % 8] * 20}"} for n in numbers],
        "pairs": [{"prompt": f"Say {n}.", "chosen": "abc", "rejected": "xyz"} for n in numbers],
        "prompts": [{"prompt": f"Say {n}.", "good": [*GOOD]} for n in numbers],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def manifest(cell: str, folder: Path, workers: int, seed: int) -> dict[str, Any]:
    """Return the job of a cell."""
    engine, _, name = cell.partition("/")
    method, _, sharded = name.partition(", ")
    training: dict[str, Any] = {
        "maxSteps": 30,
        "batchSize": 16,
        "learningRate": 0.003,
        "evaluationSteps": 10,
        "seed": seed,
    }
    chosen = training if method == "distill" else {**training, "engine": engine}
    spec: dict[str, Any] = {
        "model": {"uri": f"file://{folder}/model"},
        "compute": {"workers": workers, "sharding": "fsdp" if sharded else "none"},
        "output": {"uri": "file://unused"},
    }
    prompts = {"uri": f"file://{folder}/prompts.jsonl"}
    if method in ("sft", "pretrain"):
        data = "rows" if method == "sft" else "texts"
        spec |= {
            "method": method,
            "data": {
                "train": [{"uri": f"file://{folder}/{data}.jsonl"}],
                "validation": {"fraction": 0.25},
            },
            "training": chosen,
        }
    elif method in ("reward", "dpo", "kto"):
        spec["preferences"] = {"data": [{"uri": f"file://{folder}/pairs.jsonl"}], "heldOut": 0.25}
        if method == "reward":
            spec["rewardModel"] = {"train": {"training": chosen}}
        else:
            loss = "kto" if method == "kto" else "sigmoid"
            spec["optimize"] = {"dpo": {"loss": loss, "training": chosen}}
    else:
        # The first answers are letters of any kind; 3 of 8 are good.
        rows_of_letters = [{"uri": f"file://{folder}/rows.jsonl"}]
        spec["sft"] = {
            "data": {"train": rows_of_letters},
            "training": {**chosen, "maxSteps": 60, "learningRate": 0.01},
        }
        sampling = {"maxNewTokens": 4}
        own: dict[str, Any] = {"prompts": prompts, "sampling": sampling, "training": chosen}
        if method == "distill":
            own["teacher"] = {"uri": f"file://{folder}/teacher"}
        else:
            spec["rewardModel"] = {"rule": {"exactMatch": "good"}}
        if method == "ppo":
            own["rollouts"] = 32
        spec["optimize"] = {method: own}
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob" if method in ("sft", "pretrain") else "AlignmentJob",
        "metadata": {"name": "matrix"},
        "spec": spec,
    }


def train(folder: Path, cell: str, workers: int, seeds: list[int]) -> None:
    """Train a cell once for each seed, as one worker of torchrun, and print the measures."""
    from tuneyard_trainer.running import torchrun

    for seed in seeds:
        plan = plan_job(read(yaml.safe_dump(manifest(cell, folder, workers, seed)))[0])
        kind = cell.partition("/")[2].partition(",")[0].replace("kto", "dpo")
        kind = "sft" if kind == "pretrain" else "grpo" if kind == "rloo" else kind
        last = max(i for i, stage in enumerate(plan.stages) if stage.kind in (kind, "pretrain"))
        plan = plan.model_copy(update={"stages": plan.stages[: last + 1]})
        output = folder / f"{cell.replace('/', '-').replace(', ', '-')}-{workers}-{seed}"
        torchrun.run(plan, str(output), base_dir=ROOT, cache_dir=folder / "cache", emit=_ignore)
        record = output / "stages" / plan.stages[-1].name / "record.json"
        metrics = json.loads(record.read_text())["metrics"]
        found = next(pair for pair in MEASURES if pair[1] in metrics)
        before, after = (metrics[name] for name in found)
        line = {"seed": seed, "measure": found[1], "before": before, "after": after}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _ignore(_: dict[str, Any]) -> None:
    return


def runs(cell: str, workers: int, seeds: list[int], folder: Path) -> list[Run]:
    """Return a cell's runs with so many workers; none if it failed."""
    own = ["--train", str(folder), cell, "--workers", str(workers)]
    command = [sys.executable, __file__, *own, "--seeds", *map(str, seeds)]
    if workers > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command[1:1] = launch
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.stderr.write(f"{cell} with {workers} workers failed:\n{done.stderr[-4000:]}\n")
        return []
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seed"')]
    found = {line.pop("seed"): Run(**line) for line in lines}  # every worker prints the same
    sys.stderr.write(f"{cell} with {workers} workers: {', '.join(map(str, found.values()))}\n")
    return list(found.values())


class Run(NamedTuple):
    """How the measure of a run changed."""

    measure: str
    before: float
    after: float

    @property
    def learned(self) -> bool:
        """Whether the loss fell, or the reward rose."""
        fell = self.after < self.before
        return fell if self.measure == "validationLoss" else self.after > self.before

    def __str__(self) -> str:
        return f"{self.before:.3f} → {self.after:.3f}"


def row(cell: str, found: list[Run], expected: int) -> str:
    """Return a cell's row of the table. `expected`: the number of its runs."""
    measures = {"validationLoss": "held-out loss", "reward": "held-out reward"}
    measure = measures[found[0].measure] if found else ""
    before, after = (
        _range([getattr(each, name) for each in found]) for name in ("before", "after")
    )
    learned = f"{sum(each.learned for each in found)} of {expected}"
    return f"| {' | '.join((cell, measure, before, after, learned))} |"


def _range(values: list[float]) -> str:
    texts = sorted({f"{value:.3f}" for value in values}, key=float)
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) if texts else ""


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", nargs="?", default="", help="start of the cells' names")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.start, options.workers[0], options.seeds)
        return 0
    sys.stdout.write("| method | measure | before | after | learned |\n|---|---|---:|---:|---:|\n")
    learned = True
    with tempfile.TemporaryDirectory(prefix="tuneyard-matrix-") as folder:
        write_files(Path(folder))
        for cell in CELLS:
            if not cell.startswith(options.start):
                continue
            chosen = [n for n in options.workers if n > 1 or "sharded" not in cell]
            found = [run for n in chosen for run in runs(cell, n, options.seeds, Path(folder))]
            expected = len(chosen) * len(options.seeds)
            learned &= sum(run.learned for run in found) == expected
            sys.stdout.write(row(cell, found, expected) + "\n")
            sys.stdout.flush()
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
