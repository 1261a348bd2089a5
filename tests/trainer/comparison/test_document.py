"""The comparison as a document, which other programs read: its fields stay."""

from __future__ import annotations

import json
from pathlib import Path

from tests.trainer.comparison.outputs import comparison
from tuneyard.api.comparison import VERSION, Comparison

FROZEN = Path(__file__).parent / "comparison_keys.json"


def test_the_fields_of_the_document_stay() -> None:
    schema = Comparison.model_json_schema(by_alias=True, mode="serialization")
    parts = {"Comparison": schema, **schema["$defs"]}
    expected = json.loads(FROZEN.read_text())
    assert expected["version"] == VERSION
    assert {name: sorted(part["properties"]) for name, part in parts.items()} == expected["fields"]


def test_a_document_reads_back(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    assert Comparison.model_validate_json(found.to_json()) == found
