"""The generated CRDs: `crds/` is up to date, and Kubernetes accepts the schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.manifests.manifests import VALID, Manifest
from tuneyard.manifests.crd import crds, to_yaml
from tuneyard.manifests.manifest import parse

CRDS = crds()
FOLDER = Path(__file__).parents[2] / "crds"
ALLOWED = {
    *("type", "description", "default", "enum", "format", "pattern", "nullable", "required"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"),
    *("items", "minItems", "maxItems", "properties", "additionalProperties"),
    *("minProperties", "maxProperties", "x-kubernetes-validations", "x-kubernetes-list-type"),
    *("x-kubernetes-list-map-keys", "x-kubernetes-int-or-string"),
    *("x-kubernetes-preserve-unknown-fields", "not"),
}
"""The keywords of a structural schema that Tuneyard uses: no $ref, no anyOf, no title."""

Schema = dict[str, Any]


def root(crd: dict[str, Any]) -> Schema:
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield every schema inside a schema with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


@pytest.mark.parametrize("name", CRDS)
def test_the_folder_is_up_to_date_with_the_models(name: str) -> None:
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == to_yaml(CRDS[name]), "run `tuneyard crds` to regenerate"


def test_the_folder_holds_nothing_else() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(CRDS)


@pytest.mark.parametrize("crd", CRDS.values(), ids=lambda crd: crd["metadata"]["name"])
def test_the_yaml_is_read_back_as_the_same_object(crd: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(crd)) == crd


@pytest.mark.parametrize("name", CRDS)
def test_every_schema_is_structural(name: str) -> None:
    for path, schema in nodes(root(CRDS[name])):
        assert set(schema) <= ALLOWED, path
        free = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")
        assert "type" in schema or any(schema.get(key) is True for key in free), path
        assert not ("properties" in schema and "additionalProperties" in schema), path
        assert "items" in schema or schema.get("type") != "array", path
        assert set(schema.get("required", ())) <= set(schema.get("properties", ())), path


@pytest.mark.parametrize("name", CRDS)
def test_every_default_is_valid_once_nested_defaults_are_added(name: str) -> None:
    for path, schema in nodes(root(CRDS[name])):
        if "default" in schema:
            default = filled(schema, schema["default"])
            assert jsonschema.Draft4Validator(schema).is_valid(default), path


def filled(schema: Schema, value: Any) -> Any:
    """Return a value with the defaults that the API server adds."""
    if isinstance(value, list):
        return [filled(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    given = {name: field["default"] for name, field in fields.items() if "default" in field}
    return {name: filled(fields.get(name, {}), item) for name, item in {**given, **value}.items()}


@pytest.mark.parametrize("manifest", VALID.values(), ids=VALID)
def test_the_api_server_adds_the_defaults_of_the_models(manifest: Manifest) -> None:
    crd = next(crd for crd in CRDS.values() if crd["spec"]["names"]["kind"] == manifest["kind"])
    by_server = {**manifest, "spec": filled(root(crd)["properties"]["spec"], manifest["spec"])}
    assert parse(by_server) == parse(manifest)


@pytest.mark.parametrize("name", CRDS)
def test_every_field_has_a_description(name: str) -> None:
    bare = [
        path
        for path, schema in nodes(root(CRDS[name]))
        if "description" not in schema and not re.search(r"(\[\]|\{\}|\.metadata)$", path)
    ]
    assert not bare


@pytest.mark.parametrize("name", CRDS)
def test_every_part_of_a_spec_has_a_limit_so_that_rules_have_a_cost(name: str) -> None:
    for path, schema in nodes(root(CRDS[name])["properties"]["spec"], "spec"):
        if schema.get("type") == "string":
            assert {"maxLength", "enum"} & set(schema), path
        if schema.get("type") == "array":
            assert "maxItems" in schema, path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path


@pytest.mark.parametrize("name", CRDS)
def test_no_bound_has_a_fraction_that_the_api_server_would_truncate(name: str) -> None:
    for path, schema in nodes(root(CRDS[name])):
        for key in ("minimum", "maximum"):
            assert float(schema.get(key, 0)).is_integer(), path


@pytest.mark.parametrize("name", CRDS)
def test_no_bound_overflows_in_the_api_server(name: str) -> None:
    """It computes with bounds as floating-point numbers, and refuses every status if one near the
    largest int64 overflows."""
    for path, schema in nodes(root(CRDS[name])):
        for bound in ("minimum", "maximum"):
            assert abs(schema.get(bound, 0)) <= 1 << 53, path


@pytest.mark.parametrize("crd", CRDS.values(), ids=lambda crd: crd["metadata"]["name"])
def test_everything_but_the_run_policy_is_immutable_once_planned(crd: dict[str, Any]) -> None:
    rules = root(crd)["x-kubernetes-validations"]
    fixed = {rule["fieldPath"] for rule in rules if "oldSelf.status.planDigest" in rule["rule"]}
    fields = set(root(crd)["properties"]["spec"]["properties"])
    assert fixed == {f".spec.{name}" for name in fields - {"runPolicy"}}


def test_kinds_have_short_names_and_a_category() -> None:
    names = {crd["spec"]["names"]["kind"]: crd["spec"]["names"] for crd in CRDS.values()}
    assert names["FineTuneJob"]["shortNames"] == ["ftj"]
    assert names["AlignmentJob"]["shortNames"] == ["aj"]
    assert all(each["categories"] == ["tuneyard"] for each in names.values())


def test_kubectl_shows_a_reward_for_alignment_jobs() -> None:
    titles = {
        crd["spec"]["names"]["kind"]: [
            column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]
        ]
        for crd in CRDS.values()
    }
    state, time = ["Phase", "Stage", "Progress%", "Loss", "Held-Out"], ["ETA(s)", "Age"]
    assert titles["FineTuneJob"] == [*state, *time]
    assert titles["AlignmentJob"] == [*state, "Reward", *time]


@pytest.mark.parametrize("crd", CRDS.values(), ids=lambda crd: crd["metadata"]["name"])
def test_every_printer_column_shows_a_field_that_exists(crd: dict[str, Any]) -> None:
    paths = {path for path, _ in nodes(root(crd))}
    for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]:
        path = column["jsonPath"]
        known = path in paths or path.rsplit(".", 1)[0] + "{}" in paths
        assert known or path == ".metadata.creationTimestamp", column
