"""What a platform team sets for one operator."""

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
    """Fixed for the life of the process."""

    namespaces: tuple[str, ...] = ()
    """The namespaces to serve; empty: all."""
    image: str = DEFAULT_IMAGE
    """The trainer image of jobs that name none."""
    profiles: Mapping[str, Compute] = field(default_factory=dict)
    """The platform team's presets, by name."""
    progress_url: str | None = None
    """Where training pods reach the status server; None: progress is posted nowhere."""
    progress_port: int = 8443
    """The status server's port; 0: any free one."""
    metrics_port: int = 8080
    """Port of /metrics, /healthz and /readyz; 0: any free one."""
    own_namespace: str = "default"
    """Where the operator's Lease and certificate lie."""
    identity: str = "tuneyard"
    """This replica's name in the Lease."""
    lease: str = "tuneyard-operator"
    """The Lease's name."""
    tls_secret: str = "tuneyard-tls"  # noqa: S105  a name
    """The Secret of the status server's certificates."""
    concurrency: int = 16
    """Jobs that are reconciled at a time."""


def read_profiles(path: Path) -> dict[str, Compute]:
    """Presets from a YAML mapping of names to fields of `compute`. Raises ManifestError."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        profiles = TypeAdapter(dict[str, Compute]).validate_python(value)
    except (OSError, yaml.YAMLError) as error:
        raise ManifestError([Fault("", f"cannot be read: {error}", None, str(path))]) from error
    except ValidationError as error:
        faults = [
            Fault(".".join(str(part) for part in item["loc"]), item["msg"], None, str(path))
            for item in error.errors()
        ]
        raise ManifestError(faults) from error
    nested = [name for name, profile in profiles.items() if profile.profile]
    if nested:
        message = "a profile cannot build on another: write its fields out"
        raise ManifestError([Fault(f"{name}.profile", message, None, str(path)) for name in nested])
    return profiles
