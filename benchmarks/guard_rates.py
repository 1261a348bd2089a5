"""Whether the guard stops where forgetting begins, at several learning rates.

    .venv/bin/python benchmarks/guard_rates.py [--rates 1e-4 3e-4 1e-3] [--journal FILE]
        [--plot FILE.png]

Teaches SmolLM2-135M-Instruct the 20 facts of the quickstart twice at each rate: with a guard whose
bound is never reached, and with the bound of `--worsens-by`. The first run's curve of the general
loss says where the second should stop, which is the first evaluation beyond the bound, and what it
should keep: the best evaluation before. The table shows both. The exit code is 1 if they differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ability import general, run_job, write_passages
from benchmarks.forgetting import FACTS
from benchmarks.journal import Journal
from tuneyard.errors import StageError

UNREACHED = 100.0
"""A bound in nats per token that no run reaches."""
GUARDED, UNGUARDED = "guarded", "unguarded"
NOTHING = "nothing"
"""The step that is kept if no evaluation is within the bound: the job fails with GuardExceeded."""


class Stop(NamedTuple):
    """The step where a run stops, and the step that it keeps."""

    step: int
    kept: int | str

    @classmethod
    def expected(cls, curve: Sequence[Mapping[str, float]], bound: float) -> Stop:
        """Return where a guard with this bound should stop a run with these evaluations."""
        first = next((n for n, each in enumerate(curve) if each["increase"] > bound), None)
        best = min(curve[:first], key=lambda each: each["validation"], default=None)
        return cls(
            int(curve[-1 if first is None else first]["step"]),
            NOTHING if best is None else int(best["step"]),
        )


class Comparison(NamedTuple):
    """The two runs at a rate."""

    rate: float
    bound: float
    unguarded: Mapping[str, Any]
    guarded: Mapping[str, Any]

    @classmethod
    def of(cls, journal: Journal, rate: float, bound: float) -> Comparison:
        """Return the runs of a journal."""
        runs = {each["label"]: each for each in journal.results if each["rate"] == rate}
        return cls(rate, bound, runs[UNGUARDED], runs[GUARDED])

    @property
    def rises(self) -> dict[int, float]:
        """The rise of the general loss at each evaluation without the guard."""
        return {int(each["step"]): each["increase"] for each in self.unguarded["curve"]}

    @property
    def expected(self) -> Stop:
        """Where the unguarded run says that the guard should stop."""
        return Stop.expected(self.unguarded["curve"], self.bound)

    @property
    def agrees(self) -> bool:
        """Whether the guarded run was the same up to there, stopped there, and kept that step."""
        curve = self.guarded["curve"]
        same = curve == self.unguarded["curve"][: len(curve)]
        return same and Stop(self.guarded["step"], self.guarded["kept"]) == self.expected

    def row(self) -> str:
        """Return the row of the table."""
        rises, expected = self.rises, self.expected
        is_beyond = rises[expected.step] > self.bound
        stopped = self.guarded["step"] if self.guarded["note"] else "not stopped"
        cells = [
            f"{self.rate:g}",
            f"{[*rises.values()][-1]:+.2f}",
            f"{expected.step} ({rises[expected.step]:+.3f})" if is_beyond else "none",
            expected.kept,
            stopped,
            self.guarded["kept"],
        ]
        return "| " + " | ".join(map(str, cells)) + " |"


def spec_of(folder: Path, rate: float, bound: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return the spec of a run."""
    return {
        "data": {
            "train": [{"uri": f"file://{FACTS / 'train.jsonl'}"}],
            "validation": {"data": [{"uri": f"file://{FACTS / 'validation.jsonl'}"}]},
            "systemPrompt": "Hedgo help.",
        },
        "training": {
            "maxSteps": options.steps,
            "batchSize": options.batch,
            "learningRate": rate,
            "schedule": {"warmup": 0.05},
            "evaluationSteps": options.every,
            "guard": {
                "data": [{**general(folder, "watched")[0], "limit": options.watched}],
                "worsensBy": bound,
            },
        },
    }


def measure(folder: Path, rate: float, bound: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the evaluations, where the run stopped, and what it kept."""
    spec = spec_of(folder, rate, bound, options)
    try:
        run = run_job(folder, "FineTuneJob", spec, stages=2)  # prepare and sft
    except StageError as error:
        stopped = re.search(r"by the guard at step (\d+)", error.message)
        if error.reason != "GuardExceeded" or stopped is None:
            raise
        return {"step": int(stopped[1]), "kept": NOTHING, "note": error.message, "curve": []}
    lines = (run.stages / "sft" / "metrics.jsonl").read_text("utf-8").splitlines()
    curve = [
        {
            "step": each["step"],
            "increase": each["generalLossIncrease"],
            "validation": each["validationLoss"],
        }
        for each in map(json.loads, lines)
        if "generalLossIncrease" in each
    ]
    record = run.record("sft")
    run.remove()
    return {
        "step": int(record["metrics"]["steps"]),
        "kept": record["details"]["bestStep"],
        "note": record["details"].get("stoppedByGuard"),
        "curve": curve,
    }


def table(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield ("| rate | rise at the end | first beyond the bound | best before | stopped at | kept |")
    yield "|---|---:|---:|---:|---:|---:|"
    for each in comparisons:
        yield each.row()


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw the unguarded curves, the bound, and what the guarded runs did."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for each, color in zip(comparisons, itertools.cycle(COLORS), strict=False):
        points = {0: 0.0} | each.rises
        label = f"rate {each.rate:g}, without a guard"
        axes.plot([*points], [*points.values()], color=color, marker=".", label=label)
        stopped, kept = each.guarded["step"], each.guarded["kept"]
        if each.guarded["note"]:
            axes.plot(stopped, points[stopped], "x", color=color, ms=13, mew=2.5)
        if kept in points:
            axes.plot(kept, points[kept], "o", color=color, ms=12, mfc="none", mew=2)
    axes.axhline(comparisons[0].bound, color="#6e7781", ls="--", label="the bound")
    axes.plot([], [], "x", color="#1f2328", ms=10, mew=2.5, label="the guard stopped here")
    axes.plot([], [], "o", color="#1f2328", ms=10, mfc="none", mew=2, label="this step was kept")
    axes.set(xlabel="Optimizer step", ylabel="Rise of the general loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d0d7de", lw=0.8)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


COLORS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7")
"""Of Okabe and Ito's palette, which color-blind readers can distinguish."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--worsens-by", type=float, default=0.1, help="the guard's bound")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--watched", type=int, default=12, help="passages that the guard watches")
    parser.add_argument("--journal", type=Path, default=Path("guard_rates.jsonl"))
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    options = parser.parse_args()
    journal, bound = Journal(options.journal), options.worsens_by
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_passages(folder)
        for rate in options.rates:
            for label, limit in ((UNGUARDED, UNREACHED), (GUARDED, bound)):
                if not any(
                    (each["label"], each["rate"]) == (label, rate) for each in journal.results
                ):
                    journal.add(label, 0, rate=rate, **measure(folder, rate, limit, options))
    comparisons = [Comparison.of(journal, rate, bound) for rate in options.rates]
    print("\n".join(table(comparisons)))
    if options.plot:
        draw(comparisons, options.plot)
    return 0 if all(each.agrees for each in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
