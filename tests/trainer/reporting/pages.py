"""A page with many answers, for tests in a browser: every kind of section, and hostile texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.trainer.finished import LINES, MANIFEST, folders
from tuneyard_trainer.data.encoding.masks import Run
from tuneyard_trainer.reporting import plots
from tuneyard_trainer.reporting.document import document
from tuneyard_trainer.reporting.page import Pictures, render
from tuneyard_trainer.reporting.summary import RunSummary

HOSTILE = '</script><script>document.title = "broken"</script>\x1b[2J\u202e"\'<!--'
LONG = "word " * 300

ANSWERS: list[dict[str, Any]] = [
    {"where": "row 1", "prompt": "How long is the warranty?", "reference": "30 months.",
     "expected": ["30 months"], "base": "I do not know.", "fewShot": "It is 24 months.",
     "tuned": "The warranty is 30 months long."},
    {"where": "row 2", "prompt": "Which port does it use?", "reference": "Port 80.",
     "expected": ["80"], "base": "It uses port 80.", "fewShot": "80", "tuned": "It uses port 81."},
    {"where": "row 3", "prompt": "What color is it?", "reference": "Green.", "expected": ["green"],
     "base": "It is green.", "fewShot": "Green", "tuned": "It is green, and rather large."},
    {"where": "row 4", "prompt": HOSTILE, "reference": "", "expected": [],
     "base": HOSTILE, "fewShot": HOSTILE, "tuned": HOSTILE},
    {"where": "row 5", "prompt": "Tell a story.", "reference": "", "expected": [], "base": "No.",
     "fewShot": "Once.", "tuned": LONG},
]  # fmt: skip
ITEMS = {
    "answerAccuracy": {
        "ids": ["row 1", "row 2", "row 3"],
        "tuned": [1.0, 0.0, 1.0],
        "base": [0.0, 1.0, 1.0],
    },
    "tokenF1": {
        "ids": [f"row {number}" for number in range(1, 6)],
        "tuned": [0.8, 0.5, 0.5, 0.0, 0.2],
        "base": [0.1, 1.0, 0.6, 0.0, 0.1],
    },
}
METRICS = {
    "answerAccuracy": 0.75, "baseAnswerAccuracy": 0.25, "questions": 16.0,
    "tokenF1": 0.62, "baseTokenF1": 0.31,
    "fewShotExamples": 4.0, "fewShotTokens": 210.0, "baseFewShotAnswerAccuracy": 0.5,
    "answerAccuracyFewShotGain": 0.25, "answerAccuracyFewShotGainError": 0.08,
    "grammar/accuracy": 0.71, "grammar/baseAccuracy": 0.75, "grammar/accuracyChange": -0.04,
    "manners/overRefusal": 0.2, "manners/baseOverRefusal": 0.05,
}  # fmt: skip
FLIPS = {"gained": 9, "lost": 1, "pValue": 0.02, "gainedItems": ["row 1"], "lostItems": ["row 2"]}
EVIDENCE = {
    "validationLoss": {"items": 16, "higherIsBetter": False, "interval": [0.8, 1.2],
                       "baseInterval": [1.7, 2.3], "differenceInterval": [-1.3, -0.7]},
    "answerAccuracy": {"items": 16, "higherIsBetter": True, "interval": [0.5, 0.9],
                       "baseInterval": [0.1, 0.5], "differenceInterval": [0.2, 0.7],
                       "flips": FLIPS},
    "baseFewShotAnswerAccuracy": {"interval": [0.28, 0.72]},
    "tokenF1": {"items": 16, "higherIsBetter": True, "interval": [0.5, 0.7],
                "baseInterval": [0.2, 0.4], "differenceInterval": [-0.1, 0.5]},
    "grammar/accuracy": {"items": 200, "higherIsBetter": True, "interval": [0.64, 0.77],
                         "baseInterval": [0.69, 0.8], "differenceInterval": [-0.1, 0.02]},
    "manners/overRefusal": {"items": 90, "higherIsBetter": False, "interval": [0.1, 0.3],
                            "baseInterval": [0.01, 0.1], "differenceInterval": [0.05, 0.25]},
}  # fmt: skip
GATES = [
    {"metric": "answerAccuracy", "notWorseThanBaseBy": 0.05, "verdict": "pass", "value": 0.75,
     "base": 0.25, "worseBy": -0.5, "low": -0.7, "high": -0.2, "items": 16},
    {"metric": "grammar/accuracy", "notWorseThanBaseBy": 0.05, "tier": "advisory",
     "verdict": "insufficientEvidence", "value": 0.71, "base": 0.75, "worseBy": 0.04,
     "low": -0.02, "high": 0.1, "items": 200},
]  # fmt: skip
SUITES = [
    {"name": "grammar", "choices": {"uri": "file://data/blimp.jsonl"}},
    {"name": "manners", "refusals": {"uri": "file://data/xstest.csv"}},
]


CAPITALS = {
    "id": ["capitals.jsonl row 6", "capitals.jsonl row 7", "capitals.jsonl row 8"],
    "prompt": ["The capital of France?", "The capital of Peru?", HOSTILE],
    "targets": [["Paris"], ["Lima", "Ciudad de los Reyes"], [""]],
    "tuned": ["Lyon", "Lima", HOSTILE],
    "base": ["Paris", "Cusco", HOSTILE],
}
"""The answers to a suite, of which one is no longer right and one now is."""
OF_CAPITALS = {
    "capitals/exactMatch": {
        "ids": CAPITALS["id"],
        "tuned": [0.0, 1.0, 0.0],
        "base": [1.0, 0.0, 0.0],
    }
}


def written(
    folder: Path,
    answers: list[dict[str, Any]] | None = None,
    suites: dict[str, Any] | None = None,
) -> Path:
    """Write the page of a finished job and return its file. `suites`: the answers to suites, as
    `evaluation.json` has them."""
    guard = {"worsensBy": 0.1}
    spec = MANIFEST["spec"] | {
        "evaluate": {
            "suites": [
                *SUITES,
                *({"name": name, "answers": {"uri": f"file://{name}"}} for name in suites or ()),
            ]
        },
        "training": MANIFEST["spec"]["training"] | {"guard": guard, "seed": 7},
    }
    manifest = MANIFEST | {"spec": spec}
    inputs = folders(folder / "stages", lines=[*LINES, {"step": 40, "generalLoss": 3.3}])
    _change(
        inputs["tuned"],
        {"generalLoss": 3.3, "baseGeneralLoss": 3.2, "generalLossIncrease": 0.1},
        {"plannedMemoryBytes": 2 * 2**30},
    )
    shown = ANSWERS if answers is None else answers
    items = {name: {"items": len(each["id"])} for name, each in (suites or {}).items()}
    details = {
        "evidence": EVIDENCE,
        "gates": GATES,
        "suites": {"grammar": {"items": 200}, **items},
    }
    of_suites = {f"{name}/exactMatch": 0.5 for name in suites or ()}
    _change(inputs["evaluation"], METRICS | of_suites, details)
    measured = {
        "answers": shown,
        "items": ITEMS | (OF_CAPITALS if suites else {}),
        "suiteAnswers": suites or {},
    }
    (inputs["evaluation"] / "evaluation.json").write_text(json.dumps(measured))
    (folder / "result/adapter").mkdir(parents=True)
    summary = RunSummary.of(folder / "result", inputs, manifest, {}, None)
    rows = [[Run("Which <b>?", False), Run("The one.", True)]]
    files = [("README.md", "the model card"), ("report.json", "this report as JSON")]
    found = document(summary, inputs, rows, files)
    (folder / "report.json").write_text(found.to_json())
    pictures = Pictures(
        plots.draw(summary.curves, "job"), plots.draw(summary.curves, "job", "dark")
    )
    page = folder / "report.html"
    page.write_text(render(found, summary, pictures, [("With code:", "print(1)\n" + "x" * 200)]))
    return page


def _change(folder: Path, metrics: dict[str, float], details: dict[str, Any]) -> None:
    path = folder / "record.json"
    value = json.loads(path.read_text())
    value["metrics"] |= metrics
    value["details"] |= details
    path.write_text(json.dumps(value))
