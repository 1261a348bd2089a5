"""The stages of earlier versions' plans, as this version runs them."""

from __future__ import annotations

from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import (
    AssessSettings,
    CompletionsSettings,
    EvaluateSettings,
    PreferencesSettings,
)


def current(stage: PlannedStage) -> PlannedStage:
    """Return a stage with the settings and the roles of inputs of this version. Its fingerprint
    stays: a record belongs to the stage as it was planned."""
    settings = stage.settings
    if not isinstance(settings, AssessSettings):
        return stage
    return stage.model_copy(
        update={
            "settings": _evaluation(settings),
            "inputs": {current_role(stage, role): source for role, source in stage.inputs.items()},
        }
    )


def current_role(stage: PlannedStage, role: str) -> str:
    """Return the role that an input of a stage has in this version."""
    return "pairs" if stage.kind == "assess" and role == "data" else role


def _evaluation(settings: AssessSettings) -> EvaluateSettings:
    """Return the evaluation of an alignment of 0.2."""
    return EvaluateSettings(
        compare_with_base=True,
        samples=settings.samples,
        max_new_tokens=settings.sampling.max_new_tokens,
        gates=settings.gates,
        chat=settings.chat,
        completions=CompletionsSettings(prompts=settings.prompts, sampling=settings.sampling),
        preferences=PreferencesSettings(beta=settings.beta),
        reward=settings.reward or None,
        win_rate=settings.win_rate,
        seed=settings.seed,
    )
