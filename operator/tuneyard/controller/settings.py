"""The settings of one operator process, which the platform team chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from tuneyard.api.compute import Compute
from tuneyard.errors import Fault, ManifestError
from tuneyard.rendering.rayjob import DEFAULT_IMAGE


@dataclass(frozen=True)
class Settings:
    """The settings of the process; they do not change while it runs."""

    namespaces: tuple[str, ...] = ()
    """The namespaces to serve; empty: all."""
    image: str = DEFAULT_IMAGE
    """The trainer image of jobs that set no image."""
    profiles: Mapping[str, Compute] = field(default_factory=dict)
    """The platform team's compute profiles, by name."""
    progress_url: str | None = None
    """URL of the status server for training pods; None: no progress is posted."""
    progress_port: int = 8443
    """The status server's port; 0: any free one."""
    metrics_port: int = 8080
    """Port of /metrics, /healthz and /readyz; 0: any free one."""
    own_namespace: str = "default"
    """Namespace of the operator's Lease and certificate."""
    identity: str = "tuneyard"
    """This replica's name in the Lease."""
    lease: str = "tuneyard-operator"
    """The Lease's name."""
    tls_secret: str = "tuneyard-tls"  # noqa: S105  a name
    """The Secret of the status server's certificates."""
    job_network_policies: bool = False
    """Whether each job gets a NetworkPolicy, at the cost of one more write per attempt."""
    concurrency: int = 16
    """Number of jobs that are reconciled at the same time."""
    progress_writes: int = 20
    """Status writes per second, over all jobs, that change progress alone."""


def read_profiles(path: Path) -> dict[str, Compute]:
    """Read profiles from a YAML mapping of names to fields of `compute`. Raises ManifestError."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        profiles = TypeAdapter(dict[str, Compute]).validate_python(value)
    except (OSError, yaml.YAMLError) as error:
        raise ManifestError(
            [Fault("", f"the file cannot be read: {error}", None, str(path))]
        ) from error
    except ValidationError as error:
        faults = [
            Fault(".".join(str(part) for part in item["loc"]), item["msg"], None, str(path))
            for item in error.errors()
        ]
        raise ManifestError(faults) from error
    nested = [name for name, profile in profiles.items() if profile.profile]
    if nested:
        message = "a profile cannot refer to another profile: write its fields here"
        raise ManifestError([Fault(f"{name}.profile", message, None, str(path)) for name in nested])
    return profiles
