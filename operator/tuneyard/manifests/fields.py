"""The fields of the API's models, and the mappings of a manifest that they describe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuneyard.api.meta import yaml_fields
from tuneyard.manifests.documents import Path


def nested(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation (`Model | None`, `list[Model]`). None: no model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := nested(part))), None)


def user_description(text: str | None) -> str:
    """Return a docstring for people who write YAML: one line, `None:` as `Unset:`."""
    return re.sub(r"\bNone(?=:)", "Unset", " ".join((text or "").split()))


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """Return the model that describes the value at a path. None: no model does."""
    here: type[BaseModel] | None = model
    for part in path:
        if here is not None and isinstance(part, str):
            info = yaml_fields(here).get(part)
            here = nested(info.annotation) if info else None
    return here


def all_paths(model: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """Yield the path of every field; a path through a list goes through its first item."""
    for name, info in yaml_fields(model).items():
        yield (*path, name)
        inner = nested(info.annotation)
        if inner is not None:
            index = (0,) if _is_list(info.annotation) else ()
            yield from all_paths(inner, (*path, name, *index))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_is_list, get_args(annotation)))


def mappings(
    model: type[BaseModel], value: Any, path: Path = ()
) -> Iterator[tuple[type[BaseModel], dict[str, Any], Path]]:
    """Yield every mapping of a manifest that a model describes, parents first."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from mappings(model, item, (*path, index))
    if not isinstance(value, dict):
        return
    yield model, value, path
    for name, info in yaml_fields(model).items():
        inner = nested(info.annotation)
        if inner is not None and name in value:
            yield from mappings(inner, value[name], (*path, name))


def keeps_null(info: FieldInfo) -> bool:
    """Return whether null differs from an absent field: None is allowed and not the default."""
    return type(None) in get_args(info.annotation) and info.default is not None


class Partial:
    """A mapping that may have faults, with the attributes of its model.

    An absent field has its default; an absent required field is None.
    """

    def __init__(self, model: type[BaseModel], value: Mapping[str, Any]) -> None:
        self._model, self._value = model, value

    def __getattr__(self, name: str) -> Any:
        info = self._model.model_fields[name]
        value = self._value.get(info.alias or name)
        if value is None:
            return None if info.is_required() else info.get_default(call_default_factory=True)
        inner = nested(info.annotation)
        return Partial(inner, value) if inner and isinstance(value, Mapping) else value
