"""The state of a tracker in the output: where an attempt goes on, and which run it continues."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tuneyard.api.plan import Plan
from tuneyard_trainer.storage.records import Store


@dataclass
class TrackerState:
    """`tracking/NAME.json`: which run of the tracker belongs to the output."""

    place: str
    """The server and experiment, or the folder. The state of another place is not continued."""
    fingerprints: list[str]
    """Those of the plan's stages: another plan begins another run."""
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    """The run's tag `tuneyard.id`, which is chosen before the run is created: a run whose creation
    was not answered is found by it."""
    identities: dict[str, str] = field(default_factory=dict)
    """By stage: the identity whose steps the run has. Other data begins another run."""
    steps: dict[str, int] = field(default_factory=dict)
    """By stage: the last step in the event files."""
    ended: bool = False
    """Whether the run has everything, and its end."""

    @classmethod
    def of(cls, store: Store, name: str, place: str, plan: Plan) -> Self:
        """Return the state that the output holds; a new one if that is of another run. `name` and
        `place`: the tracker's."""
        fingerprints = [stage.fingerprint for stage in plan.stages]
        value = store.tracker_state(name)
        try:
            known = cls(**value) if value else None
        except TypeError:  # written by another version
            known = None
        if known and (known.place, known.fingerprints) == (place, fingerprints):
            return known
        return cls(place, fingerprints)

    def renewed(self) -> Self:
        """Return the state of a new run at the same place."""
        return type(self)(self.place, self.fingerprints)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return asdict(self)
