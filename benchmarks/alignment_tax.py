"""What DPO gains on preferences, and what it costs in general ability, with each defense.

    .venv/bin/python benchmarks/alignment_tax.py --preferences FILE [--pairs FILE]
        [--questions FILE] [--seeds 0 1 2] [--journal FILE]

Aligns SmolLM2-135M-Instruct with the shortest dialogues of hh-rlhf (`--preferences`: JSON lines
with `chosen` and `rejected`, compressed or not) at a high learning rate, once without a defense and
once with each of them. Two fifths of the prompts are held out. It prints a Markdown table of means
over the seeds, with the least and the most in parentheses:

- held-out pairs: the share of them whose chosen completion has gained more log-probability than the
  rejected one (0.5 without training), and by how much more, in nats,
- general loss: of passages of Python's manual, in nats per token,
- pairs: the share of minimal pairs of English in which the good sentence is more probable, with
  `--pairs`, such as those of BLiMP; questions: that of questions with two choices, with
  `--questions`: JSON lines with `question`, `good` and `bad`. The probability of the right choice
  moves also where no answer changes.

`--suites` runs one whole job instead, with the same pairs and questions as `evaluate.suites`, and
prints the metrics of its evaluation. Each finished run is a line of the journal: a benchmark that
was interrupted goes on with the next run, and `--print` only prints.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ability import Ability, Run, drawn, run_job, shortest, write_passages, write_rows
from benchmarks.journal import THE_BASE, Column, Journal

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Help."}
"""Without a system turn, the chat template writes one of 21 tokens."""
FEWEST_WORDS = 3
"""Words of a completion: shorter ones are mostly fragments."""
RATE, BETA = 1e-4, 0.1
"""The rate is 200 times the default, which is meant for models of billions of parameters."""
NO_DEFENSE = "no defense"
DEFENSES: dict[str, dict[str, Any]] = {
    NO_DEFENSE: {},
    "beta 0.5": {"beta": 0.5},
    "LoRA": {"adapter": {"lora": {"rank": 16, "alpha": 32}}, "learningRate": 0.001},
    "a third of the rate": {"learningRate": RATE / 3},
    "early stopping": {
        "evaluationSteps": 2,
        "earlyStopping": {"patience": 1},
        "keepBest": True,
    },
}
"""The changes of the job by the label of the row."""
COLUMNS = (
    Column("held-out pairs", "accuracy", "{:.2f}"),
    Column("margin", "margin", "{:.2f}"),
    Column("general loss", "general", "{:.2f}"),
    Column("rise", "general", "{:+.2f}", sign=1),
    Column("pairs", "pairs", "{:.3f}"),
    Column("questions", "questions", "{:.3f}"),
    Column("their probability", "questionsProbability", "{:.3f}"),
)


def dialogues(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the preferences of dialogues with one question, which has two different answers."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    for line in text.decode().splitlines():
        row = json.loads(line)
        (asked, _, chosen), (same, _, rejected) = (
            row[side].rpartition(ASSISTANT) for side in ("chosen", "rejected")
        )
        answers = {"chosen": chosen.strip(), "rejected": rejected.strip()}
        is_short = min(len(answer.split()) for answer in answers.values()) < FEWEST_WORDS
        is_one = asked == same and asked.startswith(HUMAN) and asked.count("\n\n") == 1
        if is_one and not is_short and chosen != rejected:
            question = {"role": "user", "content": asked.removeprefix(HUMAN).strip()}
            yield {"prompt": [SYSTEM, question], **answers}


def shortest_dialogues(path: Path, number: int) -> list[dict[str, Any]]:
    """Return the shortest dialogues, each prompt once."""

    def length(row: Mapping[str, Any]) -> int:
        question = len(row["prompt"][-1]["content"])
        return 2 * question + len(row["chosen"]) + len(row["rejected"])

    distinct = {row["prompt"][-1]["content"].lower(): row for row in dialogues(path)}
    return sorted(distinct.values(), key=length)[:number]


def spec_of(changes: Mapping[str, Any], seed: int, batch: int) -> dict[str, Any]:
    """Return the spec of a run: one epoch on the pairs that are not held out."""
    own = {**changes}
    beta, adapter = own.pop("beta", BETA), own.pop("adapter", None)
    training = {
        "epochs": 1,
        "batchSize": batch,
        "learningRate": RATE,
        "schedule": {"warmup": 0.05},
        "keepBest": False,
        "seed": seed,
    }
    return {
        "preferences": {"data": [{"uri": "file://preferences.jsonl"}], "heldOut": 0.4},
        "optimize": {"dpo": {"beta": beta, "training": {**training, **own}}},
        **({"adapter": adapter} if adapter else {}),
    }


def figures(run: Run) -> dict[str, Any]:
    """Return the figures of a finished run. The margin is in nats: without beta."""
    dpo = run.record("dpo")
    metrics, details = dpo["metrics"], dpo["details"]
    return {
        "accuracy": metrics["preferenceAccuracy"],
        "margin": metrics["preferenceMargin"] / details["beta"],
        "loss": metrics["validationLoss"],
        "steps": metrics["steps"],
        "kept": details["bestStep"],
        "trainingSeconds": round(metrics["trainingSeconds"]),
    }


def measure(
    journal: Journal, folder: Path, label: str, seed: int, options: argparse.Namespace
) -> None:
    """Train, measure and write a run, and first the base if no run has."""
    started = time.monotonic()
    spec = spec_of(DEFENSES[label], seed, options.batch)
    run = run_job(folder, "AlignmentJob", spec, stages=2)  # pairs and dpo
    ability = Ability(
        folder,
        options.most_passages,
        pairs=drawn(options.pairs, options.most_pairs),
        questions=shortest(options.questions, options.most_questions),
    )
    if not journal.has(THE_BASE, 0):
        journal.add(THE_BASE, 0, accuracy=0.5, margin=0.0, **ability.of(None))
    found = ability.of(run.stages / "dpo" / "weights")
    seconds = round(time.monotonic() - started)
    journal.add(label, seed, **figures(run), **found, seconds=seconds)
    run.remove()


def with_suites(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the metrics of the evaluation of a whole job without a defense, with suites."""
    given = {
        "pairs": drawn(options.pairs, options.most_pairs),
        "questions": shortest(options.questions, options.most_questions),
    }
    suites = []
    for name, rows in given.items():
        if rows:
            write_rows(folder / f"{name}.jsonl", rows)
            suites.append({"name": name, "choices": {"uri": f"file://{name}.jsonl"}})
    spec = spec_of(DEFENSES[NO_DEFENSE], options.seeds[0], options.batch)
    spec["evaluate"] = {"samples": 0, "maxNewTokens": 4, "suites": suites}
    metrics = run_job(folder, "AlignmentJob", spec, stages=3).record("evaluate")["metrics"]
    for name, value in sorted(metrics.items()):
        yield f"{name} {value:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preferences", type=Path, help="dialogues of hh-rlhf as JSON lines")
    parser.add_argument("--most-preferences", type=int, default=64)
    parser.add_argument("--most-passages", type=int, default=32, help="of the general loss")
    parser.add_argument("--pairs", type=Path, help="minimal pairs to measure, as JSON lines")
    parser.add_argument("--most-pairs", type=int, default=100)
    parser.add_argument("--questions", type=Path, help="questions to measure, as JSON lines")
    parser.add_argument("--most-questions", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--journal", type=Path, default=Path("alignment_tax.jsonl"))
    parser.add_argument("--only", nargs="+", help="labels of rows to run")
    parser.add_argument("--suites", action="store_true", help="run one whole job with suites")
    parser.add_argument("--print", action="store_true", help="print the journal's table and end")
    options = parser.parse_args()
    journal = Journal(options.journal)
    if options.print:
        print("\n".join(journal.table(COLUMNS)))
        return
    if options.preferences is None:
        parser.error("--preferences is needed to train")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_passages(folder)
        rows = shortest_dialogues(options.preferences, options.most_preferences)
        write_rows(folder / "preferences.jsonl", rows)
        if options.suites:
            print("\n".join(with_suites(folder, options)))
            return
        for seed in options.seeds:
            for label in options.only or DEFENSES:
                if not journal.has(label, seed):
                    measure(journal, folder, label, seed, options)
    print("\n".join(journal.table(COLUMNS)))


if __name__ == "__main__":
    main()
