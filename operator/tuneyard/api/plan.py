"""The wire between planner, operator and trainer: Plan, PlannedStage, StageRecord.

A Plan is JSON, deterministic for a manifest. A stage's *fingerprint* covers its settings and the
wiring of its inputs; its *identity* adds the digests that its inputs turned out to have. Neither
ever covers where anything lies, so moving a bucket retrains nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from tuneyard.api.alignment import JudgeEndpoint
from tuneyard.api.compute import Compute
from tuneyard.api.meta import Model
from tuneyard.api.sources import Output, SecretKeyRef, SecretRef
from tuneyard.api.stage_settings import Settings, StageKind


def digest(value: Any) -> str:
    """`sha256:` and the hash of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class StageInput(Model):
    """The output of an earlier stage."""

    stage: str
    """That stage's name."""
    file: str | None = None
    """One file of its output folder; None: the folder."""


class SourceInput(Model):
    """Something from outside the plan: a model or a data set."""

    uri: str
    """Where it lies; no part of any identity."""
    revision: str | None = None
    """The revision of an hf:// model; None: the default branch."""
    token_secret: SecretKeyRef | None = None
    """The access token; None: anonymous."""
    credentials: SecretRef | None = None
    """Object store credentials; None: ambient."""
    path: str = ""
    """The manifest's field path, for messages."""


Input = StageInput | SourceInput


# ---- alignment --------------------------------------------------------------------------------
# A policy is the input `model` with, where an earlier stage trained it, `tuned` (an adapter over
# `model`, or whole weights). Every stage that trains a policy leaves it the same way, so that
# `model` and the last `tuned` are always the whole of it.


class TrainRuntime(Model):
    """How training is carried out: nothing here changes the result beyond rounding, so nothing here
    is part of an identity."""

    micro_batch_tokens: int | Literal["auto"] = "auto"
    """The most tokens of one pass on one worker."""
    gradient_checkpointing: bool = False
    """Recompute activations."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints; None: every 10 minutes and at each evaluation."""
    endpoint: JudgeEndpoint | None = None
    """Where a judge answers, with which key and how many requests at once; None: no endpoint."""


class PlannedStage(Model):
    """One stage of a plan."""

    name: str
    """Unique in the plan; also the folder of its output."""
    settings: Settings
    """What it does; all of it is identity."""
    inputs: dict[str, StageInput | SourceInput]
    """What it reads, by role."""
    runtime: TrainRuntime = TrainRuntime()
    """How it is carried out; never identity."""
    fingerprint: str
    """Digest of settings, kind version and input roles (`planning.fingerprint`)."""

    @property
    def kind(self) -> StageKind:
        return self.settings.kind

    def identity(self, input_digests: Mapping[str, str]) -> str:
        """The digest that a record must carry to stand for this stage. `input_digests`: the content
        digest of each input, by role."""
        return digest({"fingerprint": self.fingerprint, "inputs": dict(input_digests)})


class JobRef(Model):
    """Whose plan it is."""

    kind: str
    """FineTuneJob or AlignmentJob."""
    name: str
    """The job's name."""
    namespace: str | None = None
    """Its namespace; None on one machine."""


class Plan(Model):
    """Everything the trainer needs to know."""

    api_version: str
    """The contract's version."""
    kind: Literal["Plan"] = "Plan"
    job: JobRef
    """Whose plan it is."""
    stages: list[PlannedStage]
    """In execution order."""
    output: Output
    """Where records and results go."""
    compute: Compute
    """What it runs on."""
    manifest: dict[str, Any]
    """The job as the user wrote it, defaults filled in; exported beside the weights. Without its
    run policy, which may change under way: no plan depends on it."""
    notes: list[str] = Field(default=[])
    """What the planner decided in the user's stead, and why."""

    def to_json(self) -> str:
        """The wire form: camelCase JSON, two spaces, sorted keys."""
        value = self.model_dump(mode="json", by_alias=True)
        return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class StageRecord(Model):
    """What a finished stage leaves beside its output, written last."""

    stage: str
    """The stage's name."""
    kind: StageKind
    """What it did."""
    identity: str
    """`PlannedStage.identity` at the time: a record with the same identity means done."""
    input_digests: dict[str, str]
    """The digests that the identity was made of."""
    digest: str
    """The digest of the output files."""
    attempt: int = Field(ge=1)
    """Which attempt wrote it."""
    started_at: str
    """RFC 3339, UTC."""
    finished_at: str
    """RFC 3339, UTC."""
    metrics: dict[str, float] = Field(default={})
    """Numbers worth comparing."""
    details: dict[str, Any] = Field(default={})
    """Anything else worth showing: formats found, rows skipped, sampled answers."""
    versions: dict[str, str] = Field(default={})
    """Versions of tuneyard, torch, transformers and peft that made it."""
