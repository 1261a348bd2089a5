"""What each defense against forgetting keeps, and what it costs on the task.

    .venv/bin/python benchmarks/forgetting.py [--seeds 0 1 2] [--pairs FILE] [--answers]
        [--journal FILE]

Teaches SmolLM2-135M-Instruct the 20 facts of the quickstart by full fine-tuning at a high learning
rate, once without a defense and once with each of them, and prints a Markdown table of means over
the seeds, with the least and the most in parentheses:

- facts: the held-out loss of the facts, in nats per token, and with `--answers` the right answers,
- general loss: of passages of Python's manual that no run has read, in nats per token,
- pairs: the share of minimal pairs of English in which the good sentence is more probable, with
  `--pairs`: JSON lines with `good` and `bad`, such as those of BLiMP (Warstadt et al. 2020).

The general data of replay, EWC and KL are other passages of the manual, and so are those that the
guard watches. Each finished run is a line of the journal: a benchmark that was interrupted goes on
with the next run, and `--print` only prints.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ability import Ability, Run, drawn, general, run_job, write_passages
from benchmarks.journal import THE_BASE, Column, Journal

FACTS = Path(__file__).resolve().parents[1] / "examples" / "data" / "support"
RATE = 3e-4
"""The learning rate of full fine-tuning: 15 times the default, as a user in a hurry would set."""
NO_DEFENSE = "no defense"
COLUMNS = (
    Column("loss of the facts", "loss", "{:.2f}"),
    Column("right answers", "right", "{:.1f}"),
    Column("general loss", "general", "{:.2f}"),
    Column("rise", "general", "{:+.2f}", sign=1),
    Column("pairs", "pairs", "{:.3f}"),
)


def defenses(folder: Path, batch: int) -> dict[str, dict[str, Any]]:
    """Return the changes of the manifest's spec by the label of the row."""
    data = general(folder, "general")

    def preserve(**terms: Any) -> dict[str, Any]:
        return {"training": {"preserve": terms}}

    def lora(rate: float) -> dict[str, Any]:
        return {
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {"learningRate": rate},
        }

    return {
        NO_DEFENSE: {},
        "replay, share 0.3": {"data": {"replay": {"data": data, "share": 0.3}}},
        "L2-SP, 0.1": preserve(l2Sp={"strength": 0.1}),
        "L2-SP, 1": preserve(l2Sp={"strength": 1.0}),
        "EWC, 100": preserve(ewc={"strength": 100.0, "samples": 12 * batch}, data=data),
        "EWC, 1000": preserve(ewc={"strength": 1000.0, "samples": 12 * batch}, data=data),
        "KL": preserve(kl={"strength": 1.0, "batchSize": batch // 2}, data=data),
        "LoRA, 0.002": lora(0.002),
        "LoRA, 0.0005": lora(0.0005),
        "a third of the rate": {"training": {"learningRate": RATE / 3}},
        "guard, 0.1": {
            "training": {
                "guard": {"data": general(folder, "watched"), "worsensBy": 0.1},
                "evaluationSteps": 4,
                "keepBest": True,
            }
        },
    }


def spec_of(
    changes: Mapping[str, Any], *, seed: int, steps: int, batch: int, held_out: int
) -> dict[str, Any]:
    """Return the spec of a run. `held_out`: questions to measure, of the 20."""
    spec: dict[str, Any] = {
        "data": {
            "train": [{"uri": f"file://{FACTS / 'train.jsonl'}"}],
            "validation": {
                "data": [{"uri": f"file://{FACTS / 'validation.jsonl'}", "limit": held_out}]
            },
            "systemPrompt": "Hedgo help.",
        },
        "training": {
            "maxSteps": steps,
            "batchSize": batch,
            "learningRate": RATE,
            "schedule": {"warmup": 0.05},
            "keepBest": False,
            "seed": seed,
        },
        "evaluate": {"compareWithBase": False, "samples": 0, "maxNewTokens": 16},
    }
    for part, values in changes.items():
        spec[part] = {**spec.get(part, {}), **values}
    return spec


def figures(run: Run, *, answers: bool, held_out: int) -> dict[str, Any]:
    """Return the figures of a finished run. `answers`: whether it was evaluated."""
    record = run.record("sft")
    found = {
        "loss": record["metrics"]["validationLoss"],
        "steps": record["metrics"]["steps"],
        "kept": record["details"]["bestStep"],
        "note": record["details"].get("stoppedByGuard"),
    }
    if answers:
        found["right"] = round(run.record("evaluate")["metrics"]["answerAccuracy"] * held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step, at least 2")
    parser.add_argument("--held-out", type=int, default=20, help="questions to measure, at most 20")
    parser.add_argument("--answers", action="store_true", help="count the right answers too")
    parser.add_argument("--most-passages", type=int, default=32, help="of the general loss")
    parser.add_argument("--pairs", type=Path, help="minimal pairs to measure, as JSON lines")
    parser.add_argument("--most-pairs", type=int, default=200)
    parser.add_argument("--journal", type=Path, default=Path("forgetting.jsonl"))
    parser.add_argument("--only", nargs="+", help="labels of rows to run")
    parser.add_argument("--print", action="store_true", help="print the journal's table and end")
    options = parser.parse_args()
    journal = Journal(options.journal)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_passages(folder)
        chosen = defenses(folder, options.batch)
        for seed in options.seeds * (not options.print):
            for label in options.only or chosen:
                if not journal.has(label, seed):
                    measure(journal, folder, label, chosen[label], seed, options)
    print("\n".join(journal.table(COLUMNS)))


def measure(
    journal: Journal,
    folder: Path,
    label: str,
    changes: Mapping[str, Any],
    seed: int,
    options: argparse.Namespace,
) -> None:
    """Train, measure and write a run, and first the base if no run has."""
    started = time.monotonic()
    spec = spec_of(
        changes, seed=seed, steps=options.steps, batch=options.batch, held_out=options.held_out
    )
    # prepare and sft, and with answers evaluate
    run = run_job(folder, "FineTuneJob", spec, stages=2 + options.answers)
    ability = Ability(folder, options.most_passages, pairs=drawn(options.pairs, options.most_pairs))
    if not journal.has(THE_BASE, 0):
        loss = run.record("sft")["metrics"]["baseValidationLoss"]
        journal.add(THE_BASE, 0, loss=loss, **ability.of(None))
    found = ability.of(run.stages / "sft" / "weights")
    seconds = round(time.monotonic() - started)
    journal.add(
        label,
        seed,
        **figures(run, answers=options.answers, held_out=options.held_out),
        **found,
        seconds=seconds,
    )
    run.remove()


if __name__ == "__main__":
    main()
