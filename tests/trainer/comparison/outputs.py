"""Outputs of finished jobs with chosen values, for tests of comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.trainer.finished import LINES, MANIFEST, TRAIN_METRICS
from tuneyard.api.comparison import Comparison
from tuneyard.api.plan import StageRecord
from tuneyard_trainer.comparison.compare import compare
from tuneyard_trainer.comparison.job_result import Named
from tuneyard_trainer.evaluation.items import Items

HOSTILE = '</script><script>document.title = "broken"</script>\x1b[2J\u202e"\'<!--'
LOSSES = np.random.default_rng(1).gamma(4, 0.5, 40)
QUESTIONS = [f"Question {number}?" for number in range(1, 41)]


def items_of(
    losses: Sequence[float], right: Sequence[float] | None, tokens: int
) -> dict[str, Items]:
    """Return the items of an evaluation. `right`: whether each answer is; None: not checked."""
    ids = tuple(f"row {number + 1}" for number in range(len(losses)))
    base_N = np.full(len(losses), 3.0)
    weights_N = np.full(len(losses), float(tokens))
    found = {
        "validationLoss": Items(
            ids, np.array(losses), base_N, higher_is_better=False, weights_N=weights_N
        )
    }
    if right is not None:
        found["answerAccuracy"] = Items(
            ids, np.array(right), np.zeros(len(ids)), higher_is_better=True
        )
    return found


def write_output(
    folder: Path,
    name: str,
    *,
    losses: Sequence[float],
    right: Sequence[float] | None = None,
    questions: Sequence[str] = QUESTIONS,
    tokens: int = 10,
    spec: Mapping[str, Any] | None = None,
    training: Mapping[str, float] | None = None,
    base: str = "sha256:base",
    samples: Sequence[Mapping[str, Any]] = (),
    exported: bool = True,
    evaluated: bool = True,
) -> Path:
    """Write the output of a job and return its folder. `spec`: replaces fields of the manifest's
    spec. `training`: replaces metrics of the training. `exported`: whether it has `result/`; one
    that is not exported missed a gate, so its evaluation has no record."""
    asked = [*questions][: len(losses)]
    for stage in ("prepare", "sft", *(["evaluate"] if evaluated else [])):
        (folder / "stages" / stage).mkdir(parents=True)
    rows = "".join(json.dumps({"messages": question}) + "\n" for question in asked)
    (folder / "stages/prepare/validation.jsonl").write_text(rows)
    (folder / "stages/prepare/data.json").write_text(json.dumps({"chatTemplate": None}))
    digest = f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"
    _record(folder, "prepare", {"rows": 90.0}, {"model": base}, digest)
    trained = {**TRAIN_METRICS, **(training or {})}
    _record(folder, "sft", trained, {"model": base, "data": digest}, f"sha256:{name}")
    history = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "stages/sft/metrics.jsonl").write_text(history)
    if evaluated:
        _evaluate(folder, items_of(losses, right, tokens), samples, exported=exported, inputs={
            "model": base, "data": digest, "tuned": f"sha256:{name}",
        })  # fmt: skip
    if exported:
        (folder / "result").mkdir()
        manifest = {**MANIFEST, "metadata": {"name": name}}
        manifest["spec"] = {**MANIFEST["spec"], **(spec or {})}
        (folder / "result/job.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    return folder


def _evaluate(
    folder: Path,
    items: Mapping[str, Items],
    samples: Sequence[Mapping[str, Any]],
    *,
    inputs: Mapping[str, str],
    exported: bool,
) -> None:
    metrics = {name: found.mean(found.tuned_N) for name, found in items.items()}
    evidence = {name: found.summary() for name, found in items.items()}
    shown = {"samples": [*samples], "gates": [], "evidence": evidence}
    values = {name: found.values() for name, found in items.items()}
    found = {"metrics": metrics, **shown, "items": values}
    (folder / "stages/evaluate/evaluation.json").write_text(json.dumps(found))
    if exported:
        _record(folder, "evaluate", metrics, inputs, "sha256:found", shown)
    else:
        (folder / "stages/evaluate.begun.json").write_text("{}")


def _record(
    folder: Path,
    stage: str,
    metrics: Mapping[str, float],
    inputs: Mapping[str, str],
    digest: str,
    details: Mapping[str, Any] | None = None,
) -> None:
    value = StageRecord.model_validate(
        {
            "stage": stage,
            "kind": stage,
            "identity": "sha256:identity",
            "inputDigests": dict(inputs),
            "digest": digest,
            "attempt": 1,
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:01:15Z",
            "metrics": dict(metrics),
            "details": dict(details or {}),
        }
    )
    text = value.model_dump_json(by_alias=True)
    (folder / "stages" / stage / "record.json").write_text(text)


def sample(prompt: str, tuned: str) -> dict[str, object]:
    given = {"reference": "30 months.", "expected": ["30 months"], "base": "I am a model."}
    return {"prompt": prompt, "tuned": tuned, **given}


def comparison(root: Path) -> Comparison:
    """Return a comparison of two jobs with other answers, curves and settings."""
    asked = ["How long?", "Same?", HOSTILE]
    answers = {"low": ["30 months", "No", HOSTILE], "high": ["24 months", "No", "word " * 90]}
    for name, change in (("low", 0.0), ("high", -0.2)):
        write_output(
            root / name,
            name,
            losses=[*(LOSSES + change)],
            spec={"training": {"learningRate": 0.001 - change}},
            samples=[sample(*each) for each in zip(asked, answers[name], strict=True)],
        )
    return compare([Named(name, str(root / name)) for name in answers])
