"""The model that a job://NAME source names: what the export stage of that job writes."""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.adapters import MERGEABLE
from tuneyard.api.plan import Plan, SourceInput, StageInput
from tuneyard.api.pods import model_uri
from tuneyard.api.stage_settings import ExportSettings, RewardSettings
from tuneyard.errors import Fault, PlanError

JOB = "job://"


def named_job(source: SourceInput) -> str | None:
    """Return the job that a job:// source names; None: another scheme."""
    return source.uri.removeprefix(JOB) if source.uri.startswith(JOB) else None


def with_models(plan: Plan, jobs: Mapping[str, Plan]) -> Plan:
    """Return the plan with each source that names one of the jobs replaced by that job's model.

    `jobs`: plans by the job's name. Raises PlanError, at the fields of the sources, if a job
    exports no model or one that does not fit the input's role.
    """
    stages, faults = [], []
    for stage in plan.stages:
        inputs = dict(stage.inputs)
        for role, source in inputs.items():
            if not isinstance(source, SourceInput):
                continue
            other = jobs.get(named_job(source) or "")
            if other is None:
                continue
            if problem := _problem(other, is_reward=role.partition(".")[0] == "reward"):
                faults.append(Fault(source.path, f"{source.uri}: {problem}"))
            inputs[role] = source.model_copy(update={"uri": model_uri(other.output.uri)})
        stages.append(stage.model_copy(update={"inputs": inputs}))
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    return plan.model_copy(update={"stages": stages})


def _problem(plan: Plan, *, is_reward: bool) -> str | None:
    export = plan.stages[-1]
    tuned = export.inputs["tuned"]
    if not isinstance(export.settings, ExportSettings) or not isinstance(tuned, StageInput):
        raise TypeError(f"the plan of {plan.job.name} does not end with an export")
    trained = next(stage.settings for stage in plan.stages if stage.name == tuned.stage)
    if isinstance(trained, RewardSettings):
        return None if is_reward else "the job trains a reward model: name a language model"
    if is_reward:
        return "the job trains no reward model: name a job that ends with rewardModel.train"
    adapter = getattr(trained, "adapter", None)
    if adapter is None or export.settings.merge:
        return None
    if adapter.kind not in MERGEABLE:
        kind = adapter.kind
        return f"the job exports only its {kind} adapter, which has no merged form: name a model"
    return (
        "the job exports only its adapter: create it again with output.merge: true and the same "
        "output.uri, which repeats no training, and then this job"
    )
