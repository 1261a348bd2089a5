"""Read the jobs of a manifest, or report every fault of every document with its field and line."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import API_VERSION, Model, yaml_fields
from tuneyard.errors import Fault, ManifestError
from tuneyard.manifests.documents import Document, Path, dotted, load
from tuneyard.manifests.explain import NOT_TAKEN, closest, explain, same_word, shown
from tuneyard.manifests.fields import Partial, all_paths, keeps_null, mappings, model_at

Job = FineTuneJob | AlignmentJob

KINDS: Mapping[str, type[FineTuneJob | AlignmentJob]] = {
    "FineTuneJob": FineTuneJob,
    "AlignmentJob": AlignmentJob,
}
METADATA_FIELDS = (
    *("name", "generateName", "namespace", "labels", "annotations", "uid", "resourceVersion"),
    *("generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"),
    *("ownerReferences", "finalizers", "managedFields", "selfLink"),
)
"""The fields of Kubernetes' ObjectMeta; Tuneyard reads some of them and ignores the others."""
COLUMN_EDGES = 3
"""The most edges between an unknown field and a column's name in `fields` that may be meant: those
from `spec.data`."""


def read(text: str, source: str | None = None) -> list[Job]:
    """Return the jobs of a YAML text, in order. `source`: the file's name for messages, if any.

    A `status` is ignored, as by `kubectl apply`. Raises ManifestError with every fault.
    """
    documents, faults = load(text, source)
    jobs: list[Job] = []
    for document in documents:
        job, found = _validate(document, from_server=False)
        faults += _new_faults(found, faults, document, source)
        if job is not None:
            jobs.append(job)
            faults += _duplicates(job, jobs[:-1], document, source)
    if not documents and not faults:
        message = f"the manifest is empty: write a job, beginning with apiVersion: {API_VERSION}"
        faults = [Fault("", message, None, source)]
    if faults:
        raise ManifestError(sorted(faults, key=lambda fault: fault.line or 0))
    return jobs


def parse(value: Mapping[str, Any]) -> Job:
    """Return the job of an object from the API server, with its status.

    Unknown fields are ignored: after a rollback, the object may have fields of a newer version.
    Raises ManifestError with every fault; their lines are None.
    """
    kind = KINDS.get(str(value.get("kind")))
    if kind is not None:
        # Plain validation takes a quarter of the time of the reading that explains faults.
        with suppress(ValidationError):
            return kind.model_validate(value, extra="ignore", by_alias=True, by_name=False)
    document = Document(dict(value))
    job, found = _validate(document, from_server=True)
    if job is None:
        raise ManifestError([_located(problem, document, None) for problem in found])
    return job


def unknown_fields(value: Mapping[str, Any]) -> list[str]:
    """Return the paths of a valid object's spec fields that `parse` ignores."""
    spec = {name: part for name, part in value.items() if name != "status"}
    try:
        KINDS[value["kind"]].model_validate(spec, by_alias=True, by_name=False)
    except ValidationError as error:
        ignored = [each for each in error.errors() if each["type"] == "extra_forbidden"]
        paths = dict.fromkeys(dotted(_written_path(each, spec)) for each in ignored)
        return [path for path in paths if path.startswith("spec.")]
    return []


@dataclass(frozen=True)
class _Problem:
    """A fault without its line."""

    path: Path
    message: str
    meant: Path | None = None
    """The known field that an unknown one probably stands for. None: unclear, or the field is
    known."""


def _located(problem: _Problem, document: Document, source: str | None) -> Fault:
    line = document.line_of(problem.path)
    return Fault(dotted(problem.path), problem.message, line, source)


def _new_faults(
    problems: Sequence[_Problem], known: Sequence[Fault], document: Document, source: str | None
) -> list[Fault]:
    """Return the problems with their lines, except for fields whose YAML has a fault already."""
    places = {(fault.path, fault.line) for fault in known}
    located = (_located(problem, document, source) for problem in problems)
    return [fault for fault in located if (fault.path, fault.line) not in places]


def _duplicates(
    job: Job, earlier: Sequence[Job], document: Document, source: str | None
) -> Iterator[Fault]:
    def identity(one: Job) -> tuple[str, str | None, str]:
        return one.kind, one.metadata.namespace, one.metadata.name

    if any(identity(job) == identity(other) for other in earlier):
        message = f"'{job.metadata.name}' is the name of an earlier {job.kind} too: rename one"
        yield _located(_Problem(("metadata", "name"), message), document, source)


def _validate(document: Document, *, from_server: bool) -> tuple[Job | None, list[_Problem]]:
    value = document.value
    if not isinstance(value, dict):
        return None, [_Problem((), f"{shown(value)} is not a manifest: write a mapping")]
    problems = [*_api_version_problems(value), *_kind_problems(value)]
    kind = closest(str(value.get("kind")), list(KINDS))
    if kind is None:
        return None, problems
    model = KINDS[kind]
    value = {**copy.deepcopy(value), "apiVersion": API_VERSION, "kind": kind}
    if not from_server:
        value.pop("status", None)
        problems += _metadata_problems(value.get("metadata"))
    _drop_nulls(model, value)
    try:
        extra: Literal["ignore"] | None = "ignore" if from_server else None
        job = model.model_validate(value, extra=extra, by_alias=True, by_name=False)
    except ValidationError as error:
        document = Document(value, document.line, document.lines, document.texts)
        problems += _field_problems(error.errors(), model, document)
        problems += _broken_rules(model, value, problems)
        if not problems:
            raise  # A defect of Tuneyard: the value is refused, but no problem was found.
        return None, problems
    return (None if problems else job), problems


def _api_version_problems(value: Mapping[str, Any]) -> Iterator[_Problem]:
    found = value.get("apiVersion")
    if found is None:
        yield _Problem(("apiVersion",), f"required and missing: add apiVersion: {API_VERSION}")
    elif found != API_VERSION:
        message = f"{shown(found)} is not a version of this API: write {API_VERSION}"
        yield _Problem(("apiVersion",), message)


def _kind_problems(value: Mapping[str, Any]) -> Iterator[_Problem]:
    found = value.get("kind")
    if found is None:
        yield _Problem(("kind",), f"required and missing: add kind: {' or '.join(KINDS)}")
    elif not isinstance(found, str) or found not in KINDS:
        match = closest(str(found), list(KINDS))
        remedy = f"did you mean '{match}'?" if match else f"write {' or '.join(KINDS)}"
        yield _Problem(("kind",), f"{shown(found)} is not a kind of job: {remedy}")


def _drop_nulls(model: type[BaseModel], value: dict[str, Any]) -> None:
    """Remove fields without a value: the API server takes them as absent too."""
    for owner, mapping, _ in mappings(model, value):
        for name, info in yaml_fields(owner).items():
            if name in mapping and mapping[name] is None and not keeps_null(info):
                del mapping[name]


def _metadata_problems(metadata: Any) -> Iterator[_Problem]:
    for name in metadata if isinstance(metadata, dict) else ():
        if name not in METADATA_FIELDS:
            match = closest(name, METADATA_FIELDS)
            remedy = f"did you mean '{match}'?" if match else "put it in labels or annotations"
            yield _Problem(("metadata", name), f"unknown field '{name}': {remedy}")


def _field_problems(
    errors: Sequence[ErrorDetails], model: type[BaseModel], document: Document
) -> Iterator[_Problem]:
    """Yield one problem for each field that has errors; a union has one for each alternative."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        if error["type"] != "value_error":  # `_broken_rules` reports broken rules.
            by_path.setdefault(_written_path(error, document.value), []).append(error)
    for path, group in by_path.items():
        if group[0]["type"] == "extra_forbidden":
            yield _unknown_field(path, model)
        elif not (group[0]["type"] == "literal_error" and _has_deeper(path, by_path)):
            owner = model_at(model, path[:-1])
            info = yaml_fields(owner).get(str(path[-1])) if owner else None
            yield _Problem(path, explain(group, document.texts.get(path), info))


def _written_path(error: ErrorDetails, value: Any) -> Path:
    """Return an error's path without pydantic's names for the alternatives of a union."""
    path: Path = ()
    for part in error["loc"]:
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int)):
            path, value = (*path, part), value[part]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


def _has_deeper(path: Path, paths: Mapping[Path, Any]) -> bool:
    """Return whether a fault is inside the value: then the value itself has the right type."""
    return any(len(other) > len(path) and other[: len(path)] == path for other in paths)


def _unknown_field(path: Path, model: type[BaseModel]) -> _Problem:
    parent, name = path[:-1], str(path[-1])
    owner = model_at(model, parent)
    known = list(yaml_fields(owner)) if owner else []
    text = f"unknown field '{name}'"
    if remedy := NOT_TAKEN.get(".".join(map(str, path[-2:]))):
        return _Problem(path, f"{text}: {remedy}")
    local = closest(name, known)
    others = [] if local and same_word(local, name) else _elsewhere(name, parent, model)
    if local and not any(same_word(str(other[-1]), name) for other in others):
        return _Problem(path, f"{text}: did you mean '{local}'?", (*parent, local))
    if 0 < len(others) <= 3:
        places = " or ".join(dotted(other) for other in others)
        return _Problem(path, f"{text}: it belongs at {places}", others[0])
    return _Problem(path, f"{text}: {dotted(parent) or 'a job'} takes {', '.join(known)}")


def _elsewhere(name: str, parent: Path, model: type[BaseModel]) -> list[Path]:
    """Return the fields of the spec with this or a similar name that are nearest in the tree.

    Names of columns, which are words such as `rank`, count within their data set only.
    """
    paths = [
        path
        for path in all_paths(model)
        if path[0] == "spec"
        and (path[-2:-1] != ("fields",) or _distance(parent, path) <= COLUMN_EDGES)
    ]
    meant = closest(name, [str(path[-1]) for path in paths], cutoff=0.8)
    found = [path for path in paths if meant is not None and same_word(str(path[-1]), meant)]
    nearest = min((_distance(parent, path) for path in found), default=0)
    return [path for path in found if _distance(parent, path) == nearest]


def _distance(one: Path, other: Path) -> int:
    """Return the number of edges between two paths in the tree of fields, without list indices."""
    names, others = ([part for part in path if isinstance(part, str)] for path in (one, other))
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(names, others, strict=False))))
    return len(names) + len(others) - 2 * shared


def _broken_rules(
    model: type[BaseModel], value: dict[str, Any], problems: Sequence[_Problem]
) -> Iterator[_Problem]:
    """Yield a problem for each broken rule, except for rules that read a field with a fault."""
    wrong = [path for problem in problems for path in (problem.path, problem.meant) if path]
    for owner, mapping, path in mappings(model, value):
        partial = Partial(owner, mapping)
        for rule in owner.rules if issubclass(owner, Model) else ():
            reads = [(*path, *name.split(".")) for name in rule.reads]
            if any(read[: len(bad)] == bad for read in reads for bad in wrong):
                continue
            if not rule.holds(partial):
                blamed = (*path, *rule.path.split(".")) if rule.path else path
                yield _Problem(blamed, rule.message_for(partial))
