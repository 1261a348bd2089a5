"""FineTuneJob: supervised fine-tuning and continued pre-training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.api.adapters import Adapter
from tuneyard.api.compute import Compute, RunPolicy
from tuneyard.api.evaluation import Evaluate
from tuneyard.api.meta import API_VERSION, Model, ObjectMeta, Rule
from tuneyard.api.sources import FineTuneData, ModelSource, Output
from tuneyard.api.status import JobStatus
from tuneyard.api.tracking import Tracking
from tuneyard.api.training import (
    FREEZE_WITHOUT_ADAPTER,
    MERGE_NEEDS_LINEARITY,
    STOPPING_NEEDS_VALIDATION,
    FineTuning,
)


class FineTuneSpec(Model):
    """The specification of a fine-tuning."""

    model: ModelSource
    """The base model."""
    method: Literal["sft", "pretrain"] = "sft"
    """Training method. sft: loss on the completions of chat or prompt data. pretrain: loss on every
    token of text."""
    data: FineTuneData
    """Training and held-out data."""
    adapter: Adapter | None = None
    """A parameter-efficient method. None: full fine-tuning."""
    training: FineTuning = FineTuning()
    """The training loop."""
    evaluate: Evaluate = Evaluate()
    """The measurements of the result, and the bounds it must meet."""
    output: Output
    """The location of the result and its content."""
    compute: Compute = Compute()
    """The workers that the job runs on."""
    tracking: Tracking | None = None
    """The trackers that follow the job. None: none."""
    run_policy: RunPolicy = RunPolicy()
    """How the job is run. It may change while the job runs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        FREEZE_WITHOUT_ADAPTER,
        STOPPING_NEEDS_VALIDATION,
        MERGE_NEEDS_LINEARITY,
        Rule(
            cel="size(self.evaluate.gates) == 0 || size(self.evaluate.suites) > 0"
            " || has(self.data.validation)",
            holds=lambda spec: (
                not spec.evaluate.gates
                or bool(spec.evaluate.suites)
                or spec.data.validation is not None
            ),
            message="need held-out rows or suites: set data.validation or evaluate.suites, or "
            "remove evaluate.gates",
            path="evaluate.gates",
            reads=("evaluate.gates", "evaluate.suites", "data.validation"),
        ),
        Rule(
            cel="self.method == 'sft' || !has(self.data.retrieval)",
            holds=lambda spec: spec.method == "sft" or spec.data.retrieval is None,
            message="puts passages before questions, which method pretrain does not have: set "
            "method: sft, or remove data.retrieval",
            path="data.retrieval",
            reads=("method", "data.retrieval"),
        ),
        Rule(
            cel="self.method == 'sft' || !has(self.data.augment)",
            holds=lambda spec: spec.method == "sft" or spec.data.augment is None,
            message="rewrites questions, which method pretrain does not have: set method: sft, or "
            "remove data.augment",
            path="data.augment",
            reads=("method", "data.augment"),
        ),
    )


class FineTuneJob(Model):
    """Fine-tune a language model, or continue its pre-training."""

    api_version: Literal["tuneyard.io/v1alpha1"] = API_VERSION
    """The API's group and version."""
    kind: Literal["FineTuneJob"]
    """The resource's kind."""
    metadata: ObjectMeta
    """Name, namespace and labels."""
    spec: FineTuneSpec
    """The specification of the job."""
    status: JobStatus | None = Field(default=None)
    """The state of the job, as the operator reports it. None: not reported yet."""
