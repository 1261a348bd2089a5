"""FineTuneJob: supervised fine-tuning and continued pre-training."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuneyard.api.compute import Compute, RunPolicy
from tuneyard.api.meta import API_VERSION, Model, ObjectMeta, Rule
from tuneyard.api.methods import MERGEABLE, Adapter, Evaluate, Training
from tuneyard.api.sources import FineTuneData, ModelSource, Output
from tuneyard.api.status import JobStatus


class FineTuneSpec(Model):
    """What to tune, on what, how, and where the result goes."""

    model: ModelSource
    """The model to start from."""
    method: Literal["sft", "pretrain"] = "sft"
    """sft: loss on the answers of chat or prompt data. pretrain: loss on every token of text."""
    data: FineTuneData
    """Training and held-out data."""
    adapter: Adapter | None = None
    """A parameter-efficient method. None: full fine-tuning."""
    training: Training = Training()
    """The training loop."""
    evaluate: Evaluate = Evaluate()
    """What to measure of the result."""
    output: Output
    """Where the result goes."""
    compute: Compute = Compute()
    """What the job runs on."""
    run_policy: RunPolicy = RunPolicy()
    """How it is run; may change while it runs."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.adapter) && has(self.training.freeze))",
            "training.freeze applies to full fine-tuning: an adapter freezes the whole base; remove "
            "one",
        ),
        Rule(
            "!has(self.training.earlyStopping) || has(self.data.validation)",
            "training.earlyStopping needs held-out rows: set data.validation",
        ),
        Rule(
            "size(self.evaluate.gates) == 0 || has(self.data.validation)",
            "evaluate.gates need held-out rows: set data.validation",
        ),
        Rule(
            "!self.output.merge || !has(self.adapter) || "
            + " || ".join(f"has(self.adapter.{name})" for name in MERGEABLE),
            f"output.merge needs one of the adapters {', '.join(MERGEABLE)}: the others are not "
            "linear in the base weights",
        ),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if self.adapter and self.training.freeze:
            faults.append(
                "training.freeze applies to full fine-tuning: an adapter freezes the whole base; "
                "remove one"
            )
        if self.training.early_stopping and not self.data.validation:
            faults.append("training.earlyStopping needs held-out rows: set data.validation")
        if self.evaluate.gates and not self.data.validation:
            faults.append("evaluate.gates need held-out rows: set data.validation")
        if self.output.merge and self.adapter and self.adapter.kind not in MERGEABLE:
            faults.append(
                f"output.merge needs one of the adapters {', '.join(MERGEABLE)}: "
                f"{self.adapter.kind} is not linear in the base weights; remove output.merge"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


class FineTuneJob(Model):
    """A fine-tuning job."""

    api_version: Literal["tuneyard.io/v1alpha1"] = API_VERSION
    """The API's group and version."""
    kind: Literal["FineTuneJob"]
    """The resource's kind."""
    metadata: ObjectMeta
    """Name, namespace and labels."""
    spec: FineTuneSpec
    """What the user wants."""
    status: JobStatus | None = Field(default=None)
    """What the operator saw; None before it looked."""
