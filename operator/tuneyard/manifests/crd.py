"""Generate the CustomResourceDefinitions from the models: OpenAPI v3 schemas and CEL rules.

`tuneyard crds` writes them as YAML to `crds/`; a test checks that the files are up to date.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import GROUP, NAME_LENGTH, NAME_PATTERN, VERSION, Model, Rule
from tuneyard.manifests.explain import NAME_RULE
from tuneyard.manifests.fields import user_description

Schema = dict[str, Any]

_HEADER = "# Generated from operator/tuneyard/api by `tuneyard crds`. Do not edit.\n"


_Column = tuple[str, str, str, str]
"""Title, type, JSON path and description."""

_STATE: tuple[_Column, ...] = (
    ("Phase", "string", ".status.phase", "State of the job in one word."),
    ("Stage", "string", ".status.progress.stage", "Name of the running stage."),
    ("Progress%", "integer", ".status.progress.percentage", "Share of the whole job that is done."),
    ("Loss", "number", ".status.progress.metrics.loss", "Newest training loss."),
    (
        "Held-Out",
        "number",
        ".status.progress.metrics.validationLoss",
        "Newest held-out loss.",
    ),
)
_REWARD = (
    "Reward",
    "number",
    ".status.progress.metrics.reward",
    "Mean reward of the newest completions.",
)
_TIME: tuple[_Column, ...] = (
    (
        "ETA(s)",
        "integer",
        ".status.progress.estimatedRemainingSeconds",
        "Time to the end of the stage, in seconds.",
    ),
    ("Age", "date", ".metadata.creationTimestamp", "Time since the job was created."),
)


class _Kind(NamedTuple):
    model: type[FineTuneJob | AlignmentJob]
    plural: str
    short_name: str
    columns: tuple[_Column, ...]


_KINDS = (
    _Kind(FineTuneJob, "finetunejobs", "ftj", (*_STATE, *_TIME)),
    _Kind(AlignmentJob, "alignmentjobs", "aj", (*_STATE, _REWARD, *_TIME)),
)

_STANDARD_PROPERTIES = {
    "apiVersion": {"type": "string", "description": "The API's group and version."},
    "kind": {"type": "string", "description": "The resource's kind."},
    "metadata": {"type": "object"},
}


def crds() -> dict[str, dict[str, Any]]:
    """Return the CustomResourceDefinitions by their file names in `crds/`."""
    return {f"{GROUP}_{kind.plural}.yaml": _crd(kind) for kind in _KINDS}


def to_yaml(crd: Mapping[str, Any]) -> str:
    """Return the text of a CustomResourceDefinition's file."""
    text = yaml.dump(
        dict(crd), Dumper=_WithoutAliases, sort_keys=False, width=100, allow_unicode=True
    )
    return _HEADER + text


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, _: Any) -> bool:
        return True


def _crd(kind: _Kind) -> dict[str, Any]:
    name = kind.model.__name__
    names = {
        "kind": name,
        "listKind": f"{name}List",
        "plural": kind.plural,
        "singular": name.lower(),
        "shortNames": [kind.short_name],
        "categories": ["tuneyard"],
    }
    columns = [
        {"name": title, "type": type_, "jsonPath": path, "description": description}
        for title, type_, path, description in kind.columns
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root_schema(kind.model)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _root_schema(model: type[FineTuneJob | AlignmentJob]) -> Schema:
    schema = structural_schema(model)
    spec = schema["properties"]["spec"]
    fixed = [name for name in spec["properties"] if name != "runPolicy"]
    return {
        "type": "object",
        "description": schema["description"],
        "required": ["spec"],
        "properties": {
            **_STANDARD_PROPERTIES,
            "spec": spec,
            "status": schema["properties"]["status"],
        },
        "x-kubernetes-validations": [
            _name_rule(),
            _CANCELED_FOR_GOOD,
            *(_immutable(name, always_present=_always_present(name, spec)) for name in fixed),
        ],
    }


def _name_rule() -> Schema:
    return {
        "rule": f"size(self.metadata.name) <= {NAME_LENGTH} && "
        f"self.metadata.name.matches('{NAME_PATTERN}')",
        "message": f"metadata.name cannot be the name of a job: {NAME_RULE}",
    }


_CANCELED_FOR_GOOD = {
    "rule": "!oldSelf.spec.runPolicy.cancel || self.spec.runPolicy.cancel",
    "message": "spec.runPolicy.cancel cannot be undone: create a job with another name",
    "fieldPath": ".spec.runPolicy.cancel",
}


def _always_present(name: str, schema: Schema) -> bool:
    return name in schema["required"] or "default" in schema["properties"][name]


def _immutable(name: str, *, always_present: bool) -> Schema:
    """Return the rule that a field of the spec does not change once the job is planned.

    `self.spec.?name` would be shorter, but the API server's cost estimate assumes an unbounded size
    for an optional and refuses the rule as a hundred times too costly.
    """
    new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
    same = f"{new} == {old}"
    if not always_present:
        same = f"(has({new}) ? has({old}) && {same} : !has({old}))"
    return {
        "rule": f"!has(oldSelf.status) || !has(oldSelf.status.planDigest) || {same}",
        "message": f"spec.{name} cannot change once the job is planned, only spec.runPolicy can: "
        "create a job with another name",
        "fieldPath": f".spec.{name}",
    }


# ---- schemas ----------------------------------------------------------------------------------


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return a model's schema as Kubernetes requires it: no references, no titles, typed fields."""
    schema = model.model_json_schema(by_alias=True, schema_generator=_WithRules)
    return _structural(schema, schema.get("$defs", {}))


class _WithRules(GenerateJsonSchema):
    """Pydantic's JSON Schema generator, extended by the models' rules."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        result = super().model_schema(schema)
        model = schema["cls"]
        if issubclass(model, Model) and model.rules:
            result["x-kubernetes-validations"] = [_validation(rule) for rule in model.rules]
        return result


def _validation(rule: Rule) -> Schema:
    validation = {"rule": rule.cel, "message": f"{rule.path} {rule.message}".strip()}
    return validation | ({"fieldPath": f".{rule.path}"} if rule.path else {})


_KEPT = (
    *("description", "type", "format", "enum", "minimum", "maximum", "pattern", "required"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-validations"),
)


def _structural(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        own = {key: value for key, value in schema.items() if key != "$ref"}
        return _structural({**target, **own}, definitions)
    if "anyOf" in schema:
        return _union(schema, definitions)
    result = {key: schema[key] for key in _KEPT if key in schema}
    if "description" in result:
        result["description"] = user_description(result["description"])
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if schema.get("type") == "integer":
        result["format"] = "int64"
    result |= _exclusive_bounds(schema)
    if "items" in schema:
        result["items"] = _structural(schema["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(schema["additionalProperties"], definitions)
    if schema.get("additionalProperties") is True:
        result["x-kubernetes-preserve-unknown-fields"] = True
    if "properties" in schema:
        result["properties"] = {
            name: _structural(field, definitions) for name, field in schema["properties"].items()
        }
    return result | _default(schema)


def _exclusive_bounds(schema: Schema) -> Schema:
    result: Schema = {}
    if "exclusiveMinimum" in schema:
        result |= {"minimum": schema["exclusiveMinimum"], "exclusiveMinimum": True}
    if "exclusiveMaximum" not in schema:
        return result
    bound = schema["exclusiveMaximum"]
    if float(bound).is_integer():
        return result | {"maximum": bound, "exclusiveMaximum": True}
    # The API server truncates a bound before it compares a whole number with it: 0 would not be
    # less than 0.5.
    rule = {"rule": f"self < {bound}", "message": f"must be less than {bound}"}
    return result | {"x-kubernetes-validations": [rule]}


def _default(schema: Schema) -> Schema:
    """Return a field's default. None: the field is absent. A model's default is {}: the API server
    adds the defaults of its fields."""
    if schema.get("default") is None:
        return {}
    return {"default": {} if "properties" in schema else schema["default"]}


def _union(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    outer = {key: value for key, value in schema.items() if key != "anyOf"}
    alternatives = [one for one in schema["anyOf"] if one.get("type") != "null"]
    can_be_null = len(alternatives) < len(schema["anyOf"])
    if len(alternatives) == 1:
        result = _structural({**alternatives[0], **outer}, definitions)
    else:
        result = _mixed([_structural(one, definitions) for one in alternatives])
        result |= _structural(outer, definitions)
    # If null is not the default, it has a meaning and the API server must not drop it.
    return result | ({"nullable": True} if can_be_null and "default" in result else {})


def _mixed(alternatives: list[Schema]) -> Schema:
    """Return the schema of a union of keywords and values of one other type.

    Kubernetes supports integer-or-string. Any other mixture is a value of unknown type: each bound
    applies to values of its own type, and bounds exclude the types that no alternative has.
    """
    keywords = next(one["enum"] for one in alternatives if "enum" in one)
    other = next(one for one in alternatives if "enum" not in one)
    pattern = {"pattern": f"^({'|'.join(keywords)})$"}
    bounds = {key: value for key, value in other.items() if key not in ("type", "format", "items")}
    if other["type"] == "integer":
        return {"x-kubernetes-int-or-string": True, **pattern, **bounds}
    excluded: Schema = {"maxProperties": 0, "not": {"enum": [True, False, {}, []]}}
    if other["type"] == "array":
        excluded |= {"minimum": 1, "maximum": 0}
    else:
        excluded |= {"maxItems": 0}
    return {"x-kubernetes-preserve-unknown-fields": True, **pattern, **excluded, **bounds}
