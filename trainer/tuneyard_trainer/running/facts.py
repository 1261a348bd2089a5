"""The facts of a job that decide whether it fits: its model, its rows and its device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuneyard.api.earlier import current
from tuneyard.api.job_facts import Device, JobFacts, PromptFacts, RowFacts
from tuneyard.api.model_config import UnknownModelError, facts_of
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import Plan, PlannedStage, StageInput, StageRecord
from tuneyard.api.stage_settings import (
    ChatSettings,
    EvaluateSettings,
    PromptSettings,
    scoring_terms,
)
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.prompts import read_prompts, tokenize
from tuneyard_trainer.machine import memory_limit, swap_limit
from tuneyard_trainer.models.base import load_tokenizer

MOST_PROMPTS = 10_000
"""Prompts of a set that are measured: 2 seconds at most."""

AtHand = Callable[[PlannedStage, str], Path | None]
"""Returns the path of a stage's input by its role. None: it is not on this machine yet."""


def job_facts(
    plan: Plan,
    model: Path,
    records: Mapping[str, StageRecord],
    at_hand: AtHand,
    device: torch.device | None,
    *,
    devices: int,
    neighbors: int,
) -> JobFacts:
    """Return the facts of a job.

    `model`: the folder that the first stage which trains starts from. `records`: of the stages
    that are done. `device` None: that of the workers is not known yet. `devices`: workers that
    train together. `neighbors`: workers that share the memory of this machine or pod.
    """
    known, why = _model(model / "config.json")
    left = [current(stage) for stage in plan.stages if stage.name not in records]
    rows = _rows(left, at_hand)
    return JobFacts(
        model=known,
        unknown_model=why,
        done=list(records),
        rows=rows,
        prompts=_prompts(left, model, rows, at_hand),
        models=_models(left, at_hand),
        device=None if device is None else device_of(device, neighbors),
        devices=devices,
    )


def _model(config: Path) -> tuple[ModelFacts | None, str]:
    """Return the model's facts, or None and the reason."""
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        return facts_of(read if isinstance(read, dict) else {}), ""
    except (OSError, ValueError, RecursionError) as error:
        # The stage that loads the model reports what is wrong.
        why = str(error) if isinstance(error, UnknownModelError) else "it has no readable config"
        return None, why[:1024]


def _models(stages: Iterable[PlannedStage], at_hand: AtHand) -> dict[str, int]:
    """Return the parameters of the reward models, judges and teachers from outside the job."""
    found = {}
    for stage in stages:
        for role, source in stage.inputs.items():
            kind = role.partition(".")[0]
            if kind not in ("reward", "judge", "teacher") or isinstance(source, StageInput):
                continue
            folder = at_hand(stage, role)
            facts = folder and _model(_weights(folder) / "config.json")[0]
            if facts:
                head = facts.head_parameters if kind == "reward" else 0
                found[f"{stage.name}/{role}"] = facts.parameters - head
    return found


def _weights(folder: Path) -> Path:
    """Return the folder of a model's config: that of a reward stage's output is below it."""
    return folder / "weights" if (folder / "weights").is_dir() else folder


# ---- lengths ------------------------------------------------------------------------------------


def _rows(stages: Iterable[PlannedStage], at_hand: AtHand) -> dict[str, RowFacts]:
    """Return the lengths of the rows that the stages read, by the stage that prepared them."""
    found = {}
    for stage in stages:
        data = stage.inputs.get("data")
        folder = at_hand(stage, "data") if isinstance(data, StageInput) else None
        if isinstance(data, StageInput) and folder and data.stage not in found:
            splits = ("train", "validation", "general")
            longest, held_out, general = (_longest(folder, split) for split in splits)
            if longest:
                facts = RowFacts(longest=longest, held_out=held_out, general=general)
                found[data.stage] = facts
    return found


def _longest(folder: Path, split: str) -> int | None:
    rows = Rows.open(folder, split)
    return int(rows.lengths.max()) if rows else None


def _prompts(
    stages: Iterable[PlannedStage], model: Path, rows: Mapping[str, RowFacts], at_hand: AtHand
) -> dict[str, PromptFacts]:
    """Return the prompts that the stages complete."""
    found: dict[str, PromptFacts] = {}
    known: dict[tuple[Path, str], PromptFacts | None] = {}
    for stage in stages:
        held_out = _held_out_prompts(stage, rows, at_hand)
        if held_out:
            found[stage.name] = held_out
        path = at_hand(stage, "prompts") if "prompts" in stage.inputs else None
        settings = _prompt_settings(stage)
        if held_out or path is None or settings is None:
            continue
        chat: ChatSettings = getattr(stage.settings, "chat")  # noqa: B009  of every such kind
        key = (path, settings.model_dump_json() + chat.model_dump_json())
        if key not in known:
            known[key] = _prompt_set(path, settings, chat, model)
        if prompts := known[key]:
            found[stage.name] = prompts
    return found


def _prompt_settings(stage: PlannedStage) -> PromptSettings | None:
    """Return how a stage reads its input `prompts`. None: it has none."""
    settings = stage.settings
    if isinstance(settings, EvaluateSettings):
        return settings.completions.prompts if settings.completions else None
    found: PromptSettings | None = getattr(settings, "prompts", None)
    return found


def _held_out_prompts(
    stage: PlannedStage, rows: Mapping[str, RowFacts], at_hand: AtHand
) -> PromptFacts | None:
    """Return the held-out prompts of an evaluation. None: it has none."""
    settings = stage.settings
    if not isinstance(settings, EvaluateSettings):
        return None
    if (data := stage.inputs.get("data")) and isinstance(data, StageInput) and data.stage in rows:
        longest, held_out = rows[data.stage].held_out, _held_out(stage, "data", at_hand)
        if longest is not None and held_out is not None:
            return PromptFacts(longest=longest, count=len(held_out))
    has_rule = any(term.rule for term in scoring_terms(settings))
    held_out = None if has_rule else _held_out(stage, "pairs", at_hand)
    if held_out:
        lengths = [int(held_out.mask(row).argmax()) for row in range(len(held_out))]
        return PromptFacts(longest=max(1, *lengths), count=len(held_out))
    return None


def _held_out(stage: PlannedStage, role: str, at_hand: AtHand) -> Rows | None:
    folder = at_hand(stage, role) if role in stage.inputs else None
    return Rows.open(folder, "validation") if folder else None


def _prompt_set(
    path: Path, settings: PromptSettings, chat: ChatSettings, model: Path
) -> PromptFacts | None:
    """Return the first MOST_PROMPTS prompts of a set. None: the set cannot be read, which the stage
    that completes it reports."""
    few = settings.model_copy(update={"limit": min(settings.limit or MOST_PROMPTS, MOST_PROMPTS)})
    try:
        tokenizer = load_tokenizer(model)
        prompts = read_prompts(path, few, chat, name="the prompts")
        tokenized = [tokenize(prompt, tokenizer, chat) for prompt in prompts]
    except StageError:
        return None
    lengths = [len(prompt.ids) for prompt in tokenized if prompt and prompt.ids]
    return PromptFacts(longest=max(lengths), count=len(lengths)) if lengths else None


# ---- the device ---------------------------------------------------------------------------------


def device_of(device: torch.device, neighbors: int) -> Device:
    """Return the description of a worker's device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(gpu=properties.name, memory=properties.total_memory)
    memory = memory_limit()
    return Device(memory=memory // neighbors, most=memory + swap_limit())


def facts_event(facts: JobFacts) -> dict[str, Any]:
    """Return the event that asks the driver whether and how the job trains."""
    value = facts.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"type": "facts", "facts": value}
