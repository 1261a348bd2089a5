"""The volumes and Secrets that a plan's sources, output and cache need on a cluster.

All sources that pods cannot reach, such as local files, are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tuneyard.api.plan import Plan, SourceInput
from tuneyard.api.sources import SecretKeyRef
from tuneyard.errors import Fault

OUTPUT_PATH = "spec.output.uri"
EVENTS_PATH = "spec.tracking.tensorboard.uri"
_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class Storage(NamedTuple):
    """The volumes and Secrets of the workers and, as `output_*`, of the head."""

    claims: dict[str, bool]
    """Every claim; the value is whether the claim is written to."""
    output_claims: dict[str, bool]
    """The output's claim alone."""
    tracker_claims: dict[str, bool]
    """The claim of the event files, for the pods that run a driver."""
    tokens: dict[str, SecretKeyRef]
    """Access tokens and judges' keys by environment variable."""
    tracker_tokens: dict[str, SecretKeyRef]
    """Trackers' tokens by environment variable, for the pods that run a driver."""
    credentials: list[str]
    """Names of all credentials Secrets."""
    output_credentials: list[str]
    """The output's credentials Secret alone."""


def storage_faults(plan: Plan) -> Iterator[Fault]:
    """Yield the sources that pods cannot reach and the Secrets that conflict."""
    places = _places(plan)
    for place in [*places, *_event_files(plan)]:
        yield from _place_faults(place)
    yield from _credential_faults(places)
    yield from _token_faults([*_tokens(plan, places), *_tracker_tokens(plan)])


def storage(plan: Plan) -> Storage:
    """Return the volumes and Secrets of a plan without faults."""
    places = _places(plan)
    output = places[-1]
    claims: dict[str, bool] = {}
    for place in places:
        if claim := _claim(place.uri):
            claims[claim] = claims.get(claim, False) or place is output
    if plan.compute.cache_claim:
        claims[plan.compute.cache_claim] = True
    output_claim = _claim(output.uri)
    return Storage(
        claims=claims,
        output_claims={output_claim: True} if output_claim else {},
        tracker_claims={
            claim: True for place in _event_files(plan) if (claim := _claim(place.uri))
        },
        tokens={secret.variable: secret for _, secret in _tokens(plan, places)},
        tracker_tokens={secret.variable: secret for _, secret in _tracker_tokens(plan)},
        credentials=list(dict.fromkeys(p.credentials.name for p in places if p.credentials)),
        output_credentials=[output.credentials.name] if output.credentials else [],
    )


def _places(plan: Plan) -> list[SourceInput]:
    """Return every source once, in the order of the plan, and the output last."""
    sources = {
        source.path: source
        for stage in plan.stages
        for source in stage.inputs.values()
        if isinstance(source, SourceInput)
    }
    output = SourceInput(uri=plan.output.uri, credentials=plan.output.credentials, path=OUTPUT_PATH)
    return [*sources.values(), output]


def _event_files(plan: Plan) -> list[SourceInput]:
    """Return the folder of TensorBoard's event files, if it is outside the output."""
    tensorboard = plan.tracking and plan.tracking.tensorboard
    if not tensorboard or not tensorboard.uri:
        return []
    return [SourceInput(uri=tensorboard.uri, path=EVENTS_PATH)]


def _claim(uri: str) -> str | None:
    """Return the claim of a pvc:// URI; None: another scheme."""
    scheme, _, rest = uri.partition("://")
    return rest.split("/")[0] if scheme == "pvc" else None


def _place_faults(place: SourceInput) -> Iterator[Fault]:
    scheme, _, rest = place.uri.partition("://")
    if scheme == "file":
        yield Fault(
            place.path,
            f"{place.uri} is a path of this machine, which the job's pods cannot reach: copy it to "
            "a volume and write pvc://CLAIM/PATH, or run the job here with `tuneyard run`",
        )
    if scheme == "job":
        yield Fault(
            place.path,
            f"{place.uri} is the model of another job, whose URI only the operator knows: write "
            f"the output URI of {rest} instead",
        )
    claim = _claim(place.uri)
    if claim is not None and not _CLAIM.fullmatch(claim):
        yield Fault(
            place.path,
            f"{claim!r} is not a PersistentVolumeClaim's name: write pvc://CLAIM/PATH, where CLAIM "
            "consists of lower-case letters, digits, dashes and dots",
        )


def _credential_faults(places: list[SourceInput]) -> Iterator[Fault]:
    """Yield conflicting credentials: a pod reads credentials from environment variables, so it has
    one set for each scheme."""
    first: dict[str, SourceInput] = {}
    for place in places:
        if place.credentials is None:
            continue
        scheme = place.uri.partition("://")[0]
        other = first.setdefault(scheme, place)
        if other.credentials and other.credentials.name != place.credentials.name:
            yield Fault(
                place.path.removesuffix("uri") + "credentials",
                f"Secret {place.credentials.name} and Secret {other.credentials.name} "
                f"({other.path}) would both set the {scheme}:// credentials of the job's pods: use "
                "one Secret that grants access to all of them",
            )


def _tokens(plan: Plan, places: list[SourceInput]) -> list[tuple[str, SecretKeyRef]]:
    """Return every access token and judge's key, with the field that names it."""
    tokens = [
        (place.path.removesuffix("uri") + "tokenSecret", place.token_secret)
        for place in places
        if place.token_secret
    ]
    keys = [
        (f"the judge's key of stage {stage.name}", stage.runtime.endpoint.key)
        for stage in plan.stages
        if stage.runtime.endpoint and stage.runtime.endpoint.key
    ]
    return tokens + keys


def _tracker_tokens(plan: Plan) -> list[tuple[str, SecretKeyRef]]:
    """Return the trackers' tokens, with the field that names each."""
    mlflow = plan.tracking and plan.tracking.mlflow
    if not mlflow or not mlflow.token_secret:
        return []
    return [("spec.tracking.mlflow.tokenSecret", mlflow.token_secret)]


def _token_faults(tokens: list[tuple[str, SecretKeyRef]]) -> Iterator[Fault]:
    first: dict[str, SecretKeyRef] = {}
    for path, secret in tokens:
        other = first.setdefault(secret.variable, secret)
        if other != secret:
            yield Fault(
                path,
                f"{secret.name}/{secret.key} and {other.name}/{other.key} would share the "
                f"environment variable {secret.variable}: rename one of the Secrets or keys",
            )
