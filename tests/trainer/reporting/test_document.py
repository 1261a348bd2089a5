"""The report as a document: `report.json`, which other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finished import MANIFEST, folders
from tuneyard.api.report import VERSION, JobReport
from tuneyard_trainer.reporting import report

FROZEN = Path(__file__).parent / "report_keys.json"


def evaluated(root: Path, **changes: Any) -> dict[str, Path]:
    """Write the inputs of an export. `changes`: keys of the evaluation's record and, as `items` and
    `answers`, of its file."""
    inputs = folders(root / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    file = {key: changes.pop(key) for key in ("items", "answers") if key in changes}
    (inputs["evaluation"] / "evaluation.json").write_text(json.dumps(file))
    value["metrics"] |= changes.pop("metrics", {})
    value["details"] |= changes
    path.write_text(json.dumps(value))
    return inputs


def reported(root: Path, inputs: dict[str, Path], manifest: dict[str, Any] = MANIFEST) -> JobReport:
    """Write the report and read its document, as another program does."""
    result = root / "result"
    (result / "adapter").mkdir(parents=True)
    report.write(result, inputs, manifest=manifest, measured={}, base_license=None)
    return JobReport.model_validate_json((result / "report.json").read_text("utf-8"))


def keys(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Return the fields of a JSON Schema's objects, by object."""
    parts = {"JobReport": schema, **schema["$defs"]}
    return {name: sorted(part["properties"]) for name, part in sorted(parts.items())}


def test_the_fields_of_the_document_stay(request: pytest.FixtureRequest) -> None:
    found = keys(JobReport.model_json_schema(by_alias=True, mode="serialization"))
    expected = json.loads(FROZEN.read_text())
    assert expected["version"] == VERSION
    assert found == expected["fields"]


def test_a_finished_job_gives_a_document_that_reads_back(tmp_path: Path) -> None:
    found = reported(tmp_path, evaluated(tmp_path))
    assert found.job.name == "support-bot"
    assert found.job.base_model == "hf://acme/small-model"
    right = next(each for each in found.comparisons if each.metric == "answerAccuracy")
    assert (right.base, right.tuned, right.verdict) == (1 / 16, 14 / 16, "better")
    assert [curve.metric for curve in found.curves] == ["loss", "learningRate"]
    assert found.answers[0].tuned_right is True
    assert found.answers[0].flipped == "gained"
    assert found.memory[0].measured_bytes == 1610612736
    assert [stage.seconds for stage in found.stages] == [75.0, 120.0, 75.0]
