"""The plan that the operator passes to the trainer, and the records of finished stages.

A Plan is JSON; the same manifest always gives the same plan. A stage's *fingerprint* covers its
settings and the kinds of its inputs; its *identity* adds the content digests of its inputs. Neither
covers a location, so moving a bucket retrains nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, TypeVar

from pydantic import Field

from tuneyard.api.compute import Compute
from tuneyard.api.meta import Model, Report
from tuneyard.api.sources import JudgeEndpoint, Output, SecretKeyRef, SecretRef
from tuneyard.api.stage_settings import PREPARING_KINDS, Settings, StageKind
from tuneyard.api.status import StageStatus
from tuneyard.api.tracking import Tracking


def digest(value: Any) -> str:
    """Return `sha256:` and the hash of a JSON value's canonical form (sorted keys, no white
    space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class StageInput(Model):
    """The output of an earlier stage."""

    stage: str
    """Name of that stage."""
    file: str | None = None
    """One file of its output folder. None: the folder."""
    path: str = Field(default="", exclude_if=lambda value: not value)
    """Path of the manifest's field that asks for it, for messages. "": no single field does."""


class SourceInput(Model):
    """A model or a data set that no stage of the plan writes."""

    uri: str
    """Location; not a part of any identity."""
    revision: str | None = None
    """Revision of an hf:// model. None: the default branch."""
    token_secret: SecretKeyRef | None = None
    """Access token. None: anonymous access."""
    credentials: SecretRef | None = None
    """Object store credentials. None: those of the environment."""
    path: str = ""
    """Path of the manifest's field, for messages."""


Input = StageInput | SourceInput


class TrainRuntime(Model):
    """Settings that change how a stage runs, but not its result beyond rounding.

    These settings are not a part of any identity.
    """

    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Most tokens of a micro-batch on one worker. auto: 2048 on CPU, 16384 on GPU, or
    fewer: `running.runner` applies the choice of an attempt."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints. None: every 10 minutes and at each evaluation."""
    sharding: Literal["auto", "none", "fsdp"] = Field(
        default="none", exclude_if=lambda value: value == "none"
    )
    """fsdp: each worker keeps a part of the model. none: each worker keeps all of it. auto: each
    attempt decides. All workers run a stage that may be sharded."""
    # Left out of a plan where it is none: plans of 0.2.0 keep their bytes.
    endpoint: JudgeEndpoint | None = None
    """Endpoint of the judge: its URL, key and concurrency. None: no endpoint."""


class PlannedStage(Model):
    """One stage of a plan."""

    name: str
    """Name, unique in the plan; also the folder of the stage's output."""
    settings: Settings
    """Settings that decide the result; all of them are a part of the identity."""
    inputs: dict[str, StageInput | SourceInput]
    """Inputs by role. A policy is the input `model` and, if an earlier stage trained it, `tuned`:
    an adapter on `model`, or whole weights. Every stage that trains a policy writes one of these
    two, so `model` and the last `tuned` always describe the whole policy."""
    runtime: TrainRuntime = TrainRuntime()
    """Settings that do not change the result; not a part of the identity."""
    fingerprint: str
    """Digest of the settings, the kind's version and the inputs' kinds (`planning.fingerprint`)."""

    @property
    def kind(self) -> StageKind:
        return self.settings.kind

    def identity(self, input_digests: Mapping[str, str]) -> str:
        """Return the digest that a record of this finished stage carries.

        `input_digests`: the content digest of each input, by role.
        """
        return digest({"fingerprint": self.fingerprint, "inputs": dict(input_digests)})


class JobRef(Model):
    """The job that a plan belongs to."""

    kind: str
    """FineTuneJob or AlignmentJob."""
    name: str
    """Name of the job."""
    namespace: str | None = None
    """Namespace of the job. None: outside a cluster."""


class Plan(Model):
    """The stages of a job, with everything that the trainer needs to run them."""

    api_version: str
    """The API's group and version."""
    kind: Literal["Plan"] = "Plan"
    job: JobRef
    """The job that the plan belongs to."""
    stages: list[PlannedStage]
    """Stages in order of execution."""
    output: Output
    """Location of records and results."""
    compute: Compute
    """Workers that the job runs on."""
    tracking: Tracking | None = Field(default=None, exclude_if=lambda value: value is None)
    """Trackers that follow the job. None: none. Not a part of any identity."""
    manifest: dict[str, Any]
    """The job's manifest with its defaults, exported beside the weights. It has no run policy,
    which may change while the job runs."""
    notes: list[str] = Field(default=[])
    """Values that the planner chose because the manifest leaves them open, with the reasons."""

    def to_json(self) -> str:
        """Return the plan as JSON: camelCase fields, sorted keys, indented by two spaces."""
        value = self.model_dump(mode="json", by_alias=True)
        return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


S = TypeVar("S", PlannedStage, StageStatus)


def leading(stages: Sequence[S]) -> list[S]:
    """Return the stages at the beginning of a plan that run no model, and so need no GPU."""
    return list(takewhile(lambda stage: stage.kind in PREPARING_KINDS, stages))


def prepares_first(plan: Plan) -> bool:
    """Return whether a Job prepares the data of a plan on a cluster before it has workers: these
    have GPUs, which would be idle meanwhile."""
    return bool(plan.compute.gpus_per_worker) and bool(leading(plan.stages))


class StageRecord(Report):
    """The record of a finished stage; it is written last, beside the stage's output. A record of a
    newer version is read too: the identity decides whether the stage is done."""

    stage: str
    """Name of the stage."""
    kind: StageKind
    """Kind of the stage."""
    identity: str
    """`PlannedStage.identity` when the stage ran. A later attempt skips a stage that has the same
    identity."""
    input_digests: dict[str, str]
    """Content digests of the inputs, by role; the identity covers them."""
    digest: str
    """Digest of the output files."""
    attempt: int = Field(ge=1)
    """Number of the attempt that wrote the record."""
    started_at: str
    """Time at which the stage started (RFC 3339, UTC)."""
    finished_at: str
    """Time at which the stage ended (RFC 3339, UTC)."""
    metrics: dict[str, float] = Field(default={})
    """Metrics of the stage."""
    details: dict[str, Any] = Field(default={})
    """Other facts for the report: detected formats, skipped rows, sampled completions."""
    versions: dict[str, str] = Field(default={})
    """Versions of tuneyard, torch, transformers and peft that the stage ran with."""
    reused: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether the files are copied from the cache, where another job left them: the metrics, the
    details and the versions are those of its stage."""
