"""Walks over the models: which fields there are, and which of them a manifest's mappings fill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuneyard.manifests.documents import Path


def nested(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation (`Model | None`, `list[Model]`); None: it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := nested(part))), None)


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by their YAML names."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model that describes the value at a path; None: none does."""
    here: type[BaseModel] | None = model
    for part in path:
        if here is not None and isinstance(part, str):
            info = fields(here).get(part)
            here = nested(info.annotation) if info else None
    return here


def all_paths(model: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """The path of every field, through the first item of each list."""
    for name, info in fields(model).items():
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
    """Every mapping of a manifest that a model describes, parents first."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from mappings(model, item, (*path, index))
    if not isinstance(value, dict):
        return
    yield model, value, path
    for name, info in fields(model).items():
        inner = nested(info.annotation)
        if inner is not None and name in value:
            yield from mappings(inner, value[name], (*path, name))


def keeps_null(info: FieldInfo) -> bool:
    """Whether null differs from absence: only where None is allowed and not the default."""
    return type(None) in get_args(info.annotation) and info.default is not None


class Partial:
    """A mapping that may hold faults, read as if it were its model: attributes are the fields, in
    Python's names; absent ones have their defaults, required ones that are absent None."""

    def __init__(self, model: type[BaseModel], value: Mapping[str, Any]) -> None:
        self._model, self._value = model, value

    def __getattr__(self, name: str) -> Any:
        info = self._model.model_fields[name]
        value = self._value.get(info.alias or name)
        if value is None:
            return None if info.is_required() else info.get_default(call_default_factory=True)
        inner = nested(info.annotation)
        return Partial(inner, value) if inner and isinstance(value, Mapping) else value
