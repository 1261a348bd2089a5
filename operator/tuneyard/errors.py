"""The errors of both packages. Each error carries what a user needs to act on it.

Standard library only: every layer of both packages may raise these errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault of a manifest.

    `path`: the field's path as the user wrote it (`spec.training.epochs`); "": the document.
    `message`: the value, the reason and the remedy. `source` and `line` (1-based): the place; None:
    the manifest did not come from a file.
    """

    path: str
    message: str
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.source, self.line) if part is not None)
        return ": ".join(part for part in (place, self.path, self.message) if part)


class TuneyardError(Exception):
    """Base of the errors whose message is written for a user; any other exception is a defect."""


class ManifestError(TuneyardError):
    """A refused manifest, with all its faults in document order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class PlanError(ManifestError):
    """A valid manifest that this version or this environment cannot run: for example with a
    PersistentVolumeClaim outside a cluster."""


class StageError(TuneyardError):
    """A stage that failed for a known reason.

    `reason`: a CamelCase word for conditions and metrics. `advice`: the field to change; "": no
    change of the manifest helps. `retryable`: whether another attempt of the same plan could
    succeed. True after the loss of a node, for example, and False after a broken row.
    """

    def __init__(
        self, reason: str, message: str, *, advice: str = "", retryable: bool = False
    ) -> None:
        self.reason, self.message, self.advice, self.retryable = reason, message, advice, retryable
        super().__init__(f"{message} {advice}".strip())

    def with_message(self, message: str, *, advice: str | None = None) -> StageError:
        """Return the same failure with another message. `advice`: None: the same."""
        kept = self.advice if advice is None else advice
        return StageError(self.reason, message, advice=kept, retryable=self.retryable)

    def __reduce__(self) -> tuple[object, ...]:  # Exceptions cross process boundaries under Ray.
        return (_stage_error, (self.reason, self.message, self.advice, self.retryable))


def _stage_error(reason: str, message: str, advice: str, retryable: bool) -> StageError:
    return StageError(reason, message, advice=advice, retryable=retryable)
