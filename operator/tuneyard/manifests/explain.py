"""Messages in place of pydantic's errors: the value, the reason, the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tuneyard.api.adapters import LAYERS_PATTERN
from tuneyard.api.cleaning import LANGUAGE_PATTERN
from tuneyard.api.meta import NAME_LENGTH, NAME_PATTERN, OBJECT_NAME_PATTERN
from tuneyard.api.quantity import QUANTITY_PATTERN
from tuneyard.api.sources import KEY_PATTERN, URL_PATTERN
from tuneyard.api.suites import SUITE_PATTERN, TASK_PATTERN
from tuneyard.api.tracking import TRACKER_URL_PATTERN
from tuneyard.manifests.fields import user_description

NAME_RULE = (
    f"use at most {NAME_LENGTH} lower-case letters, digits and dashes, starting with a letter"
)
REMEDIES = {
    NAME_PATTERN: NAME_RULE,
    OBJECT_NAME_PATTERN: "use lower-case letters, digits, dashes and dots",
    QUANTITY_PATTERN: 'write a Kubernetes quantity, e.g. "500m" or "16Gi"',
    LAYERS_PATTERN: 'write layer indices and ranges, e.g. "0-3,8"',
    KEY_PATTERN: "use letters, digits, dashes, dots and underscores",
    LANGUAGE_PATTERN: "write a language as its ISO 639 code, e.g. en",
    SUITE_PATTERN: "use letters, digits, dashes and underscores, a letter first",
    TASK_PATTERN: "write one name, without white space and commas",
    URL_PATTERN: "write an http:// or https:// address without white space",
    TRACKER_URL_PATTERN: "write the http:// or https:// address of the server without a user name, "
    "a password and a query: a token goes into tokenSecret",
}
"""The remedy for a string that does not match a pattern."""

NOT_TAKEN = {
    "independentReward.judge": "a judge compares completions once training is over: set "
    "evaluate.winRate.judge",
}
"""The remedies for fields that users may expect, by their last two names."""

_KINDS = {
    "int_type": ("an integer", "write a number, e.g. 3"),
    "int_from_float": ("an integer", "write a whole number, e.g. 3"),
    "float_type": ("a number", "write a number, e.g. 0.5"),
    "finite_number": ("a finite number", "write a number, e.g. 0.5"),
    "bool_type": ("a boolean", "write true or false"),
    "string_type": ("a string", "write text"),
    "list_type": ("a list", "write a list, '- ' before each item"),
    "dict_type": ("a mapping", "write 'key: value' lines below it"),
    "model_type": ("a mapping", "write its fields below it"),
}
_BOUNDS = {
    "greater_than": "{value} is too small: write more than {gt}",
    "greater_than_equal": "{value} is too small: write at least {ge}",
    "less_than": "{value} is too large: write less than {lt}",
    "less_than_equal": "{value} is too large: write at most {le}",
    "string_too_short": "{size} characters are too few: write at least {min_length}",
    "string_too_long": "{size} characters are too many: write at most {max_length}",
    "too_short": "{size} items are too few: write at least {min_length}",
    "too_long": "{size} items are too many: write at most {max_length}",
}


def name_problem(name: str) -> str | None:
    """Return why a text cannot be the name of a job. None: it can."""
    if re.fullmatch(NAME_PATTERN, name) and len(name) <= NAME_LENGTH:
        return None
    return f"'{name}' cannot be the name of a job: {NAME_RULE}"


def shown(value: Any, text: str | None = None) -> str:
    """Return a value as the user wrote it. `text`: its source text; None: unknown."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 80 else f"'{value[:77]}...'"
    return text or json.dumps(value)


def explain(errors: Sequence[ErrorDetails], text: str | None, info: FieldInfo | None) -> str:
    """Return the message for all errors of one field; a union has an error for each alternative."""
    first = errors[0]
    value = first["input"]
    literals = [choice for error in errors for choice in _choices(error)]
    others = [error for error in errors if error["type"] != "literal_error"]
    bound = next((error for error in others if error["type"] in _BOUNDS), None)
    if bound:
        return ", or ".join((_bound(bound, text), *literals))
    if first["type"] == "missing":
        return _missing(info)
    if first["type"] == "string_pattern_mismatch":
        return _pattern(str(value), first["ctx"]["pattern"])
    if not others:
        return _not_one_of(value, text, literals)
    if any(error["type"] not in _KINDS for error in others):
        return f"{shown(value, text)} is not valid: {first['msg']}"
    return _wrong_type(value, text, [error["type"] for error in others], literals)


def closest(word: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Return the choice most similar to a word. None: no choice is similar enough."""
    plain = {_plain(choice): choice for choice in reversed(choices)}
    matches = get_close_matches(_plain(word), list(plain), n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def same_word(one: str, other: str) -> bool:
    """Return whether two names are equal except for case, dashes and underscores."""
    return _plain(one) == _plain(other)


def _plain(word: str) -> str:
    return re.sub(r"[-_]", "", word).lower()


def _choices(error: ErrorDetails) -> list[str]:
    if error["type"] != "literal_error":
        return []
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _bound(error: ErrorDetails, text: str | None) -> str:
    value = error["input"]
    bounds = {
        name: f"{bound:g}" if isinstance(bound, float) and abs(bound) < 1e6 else bound
        for name, bound in error["ctx"].items()
    }
    size = len(value) if isinstance(value, str | list | dict) else None
    return _BOUNDS[error["type"]].format(value=shown(value, text), size=size, **bounds)


def _missing(info: FieldInfo | None) -> str:
    description = user_description(info.description) if info else ""
    return f"required and missing: add it. {description}".strip()


def _not_one_of(value: Any, text: str | None, choices: list[str]) -> str:
    message = f"{shown(value, text)} is not one of {', '.join(choices)}"
    if isinstance(value, bool) and "always" in choices:
        return f"{message}: did you mean '{'always' if value else 'never'}'?"
    match = closest(str(value), choices)
    return f"{message}: did you mean '{match}'?" if match else f"{message}: write one of them"


def _wrong_type(value: Any, text: str | None, kinds: list[str], choices: list[str]) -> str:
    names = [*(_KINDS[kind][0] for kind in kinds), *(f"'{choice}'" for choice in choices)]
    message = f"{shown(value, text)} is not {_or(names)}"
    if isinstance(value, str) and _belongs_unquoted(value, kinds):
        return f"{message}: remove the quotes"
    if isinstance(value, str) and (match := closest(value, choices)):
        return f"{message}: did you mean '{match}'?"
    if kinds == ["string_type"] and isinstance(value, bool | int | float):
        kind = "boolean" if isinstance(value, bool) else "number"
        return f'{shown(value, text)} is a {kind}, not a string: quote it: "{shown(value, text)}"'
    if kinds == ["model_type"] and isinstance(value, str) and "://" in value:
        return f"{message}: write uri: {value} below it"
    remedy = _or([_KINDS[kind][1] for kind in kinds])
    return f"{message}: {remedy}, or {_or(choices)}" if choices else f"{message}: {remedy}"


def _belongs_unquoted(value: str, kinds: list[str]) -> bool:
    if "bool_type" in kinds:
        return value.lower() in ("true", "false")
    number = r"[-+]?[0-9]+" if "int_type" in kinds else r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?"
    numeric = {"int_type", "float_type"} & set(kinds)
    return bool(numeric) and re.fullmatch(number, value) is not None


def _or(words: Sequence[str]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def _pattern(value: str, pattern: str) -> str:
    schemes = re.match(r"\^\(([a-z0-9|]+)\)://", pattern)
    if schemes:
        return _uri(value, schemes[1].split("|"))
    return f"{shown(value)} is not valid: {REMEDIES.get(pattern, f'it must match {pattern}')}"


def _uri(value: str, schemes: list[str]) -> str:
    scheme, separator, rest = value.partition("://")
    if re.search(r"\s", value):
        return f"{shown(value)} contains white space: rename the file or folder"
    if not separator:
        return f"{shown(value)} has no scheme: write {_with_scheme(value, schemes)}"
    if scheme in schemes:
        return f"{shown(value)} has no path: write one after {scheme}://"
    match = closest(scheme, schemes)
    remedy = f"did you mean {match}://{rest}?" if match else f"write one of {', '.join(schemes)}"
    return f"{shown(value)} has the scheme '{scheme}', which this field does not support: {remedy}"


def _with_scheme(value: str, schemes: list[str]) -> str:
    """Return the URI that a value without `://` probably stands for: `s3:bucket/key`, a model
    ORG/NAME of the hub, or else a file."""
    scheme, colon, rest = value.partition(":")
    if colon and scheme in schemes:
        return f"{scheme}://{rest.lstrip('/')}"
    if "job" in schemes and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value):
        return f"hf://{value} for a model of the hub, or file://{value} for a folder"
    return f"file://{value}"
