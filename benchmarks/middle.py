"""What filling in the middle teaches, and what it costs on whole documents.

    python benchmarks/middle.py [--seeds 0 1 2]

Continues the pre-training of SmolLM2-135M on the example handbook, with no document changed (but
one in ten thousand, so that gaps are measured) and with half of the sequences changed. Prints the
held-out losses of both, on whole documents and on gaps, beside those of the base.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "from tuneyard.cli.entry import main; main()"
RATES = {"whole documents": 1e-4, "half with gaps": 0.5}
MARKERS = {"prefix": "<filename>", "suffix": "<file_sep>", "middle": "<repo_name>"}
"""Special tokens of SmolLM2's tokenizer that the handbook does not use."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    print(f"{'trained on':<18}{'documents':>11}{'gaps':>8}   held-out loss, nats per token")
    for index, (name, rate) in enumerate(RATES.items()):
        found = [measured(rate, seed) for seed in seeds]
        if index == 0:
            before = found[0]
            print(
                line("the base", before["baseValidationLoss"], before["baseValidationLossOfGaps"])
            )
        loss = fmean(each["validationLoss"] for each in found)
        print(line(name, loss, fmean(each["validationLossOfGaps"] for each in found)), flush=True)
    print(f"means of {len(seeds)} seeds")


def line(name: str, loss: float, gap_loss: float) -> str:
    return f"{name:<18}{loss:>11.3f}{gap_loss:>8.3f}"


def measured(rate: float, seed: int) -> dict[str, Any]:
    """Return the metrics of the evaluation of one run."""
    value = yaml.safe_load((ROOT / "examples/pretrain.yaml").read_text())
    spec = value["spec"]
    for dataset in (*spec["data"]["train"], *spec["data"]["validation"]["data"]):
        dataset["uri"] = dataset["uri"].replace("file://", f"file://{ROOT}/examples/")
    spec["data"]["fillInTheMiddle"] = {"rate": rate, "markers": MARKERS}
    spec["training"] |= {"epochs": 6, "seed": seed}
    spec["evaluate"] = {"samples": 0}
    spec["output"] = {"uri": "file://out"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.yaml").write_text(yaml.safe_dump(value))
        command = [sys.executable, "-c", ENTRY, "run", "job.yaml"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        record = Path(folder) / "out/stages/evaluate/record.json"
        metrics: dict[str, Any] = json.loads(record.read_text())["metrics"]
        return metrics


if __name__ == "__main__":
    main()
