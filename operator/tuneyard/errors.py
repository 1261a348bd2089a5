"""The three ways a job can be refused, each carrying what a user needs to act on it.

Standard library only: both import packages and every layer may raise these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a manifest.

    `path` is the field's path as the user wrote it (`spec.training.epochs`, "" for the document),
    `message` says the value, the reason and the remedy, `source` and `line` (1-based) say where;
    None means that the manifest did not come from a file.
    """

    path: str
    message: str
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.source, self.line) if part is not None)
        return ": ".join(part for part in (where, self.path, self.message) if part)


class TuneyardError(Exception):
    """Base of every error whose message is written for a user; anything else is a defect."""


class ManifestError(TuneyardError):
    """A manifest that cannot be accepted; carries every fault found, in document order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class PlanError(ManifestError):
    """A valid manifest that this version cannot carry out, or not here: a PVC, say, off-cluster."""


class StageError(TuneyardError):
    """A stage that failed for a known reason.

    `reason` is one CamelCase word for conditions and metrics, `advice` names the field to change
    ("" where nothing in the manifest helps). `retryable` is True only when the same plan could
    succeed on another attempt: a lost node, never a broken row.
    """

    def __init__(
        self, reason: str, message: str, *, advice: str = "", retryable: bool = False
    ) -> None:
        self.reason, self.message, self.advice, self.retryable = reason, message, advice, retryable
        super().__init__(f"{message} {advice}".strip())

    def __reduce__(self) -> tuple[object, ...]:  # Exceptions cross process boundaries under Ray.
        return (_stage_error, (self.reason, self.message, self.advice, self.retryable))


def _stage_error(reason: str, message: str, advice: str, retryable: bool) -> StageError:
    return StageError(reason, message, advice=advice, retryable=retryable)
