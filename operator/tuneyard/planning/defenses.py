"""Faults and descriptions of defenses against forgetting, and of the choice of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from tuneyard.api.adapters import Adapter
from tuneyard.api.preserving import GuardLimits, PreserveTerms
from tuneyard.api.sources import FineTuneData
from tuneyard.api.training import FineTuning, Training
from tuneyard.errors import Fault

LOSS, GENERAL_LOSS = "validationLoss", "generalLoss"
MEASURED: dict[str, tuple[str, ...]] = {
    "fineTuning": (LOSS, GENERAL_LOSS),
    "reward": (LOSS, "rewardAccuracy", "rewardMargin"),
    "dpo": (LOSS, "preferenceAccuracy", "preferenceMargin"),
    "kto": (LOSS, "preferenceAccuracy"),
    "distill": (LOSS,),
}
"""The metrics of every evaluation during training, by method. Those of PPO, GRPO and RLOO are
chosen by the held-out reward."""


def defense_faults(
    path: str, training: FineTuning, adapter: Adapter | None, data: FineTuneData, data_path: str
) -> Iterator[Fault]:
    """Yield a fault for each defense that cannot work as asked. `path`: the training's field."""
    terms = training.preserve
    if terms and training.engine == "trl":
        yield Fault(
            f"{path}.preserve",
            "needs the native engine, as TRL's trainer has no such terms in its loss: set engine "
            "to native, or remove preserve",
        )
    pulls = {"l2Sp": terms and terms.l2_sp, "ewc": terms and terms.ewc}
    for name, pull in pulls.items():
        if pull and adapter:
            yield Fault(
                f"{path}.preserve.{name}",
                f"pulls the weights of the model toward their start, and adapter.{adapter.kind} "
                "leaves them as they are: use kl, or remove the adapter",
            )
    for name, defense in (("preserve", terms), ("guard", training.guard)):
        if defense and defense.data and data.retrieval:
            yield Fault(
                f"{path}.{name}.data",
                f"is general data, and {data_path}.retrieval would put a context before its rows: "
                f"remove {name} or retrieval",
            )
    yield from best_by_faults(path, training, "fineTuning", has_guard=training.guard is not None)


def best_by_faults(
    path: str, training: Training, method: str, *, has_guard: bool = False
) -> Iterator[Fault]:
    """Yield a fault for a metric that evaluations during training do not measure. `method`: a key
    of MEASURED, or another method."""
    name = training.best_by
    if name is None:
        return
    where, known = f"{path}.bestBy", MEASURED.get(method, ())
    if not known:
        yield Fault(
            where,
            f"chooses an evaluation of held-out rows, and {method} keeps the step with the best "
            "held-out reward: remove bestBy",
        )
    elif name not in known:
        close = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"
        yield Fault(where, f"'{name}' is not measured during training: {hint}")
    elif name == GENERAL_LOSS and not has_guard:
        yield Fault(where, f"{GENERAL_LOSS} is measured on the data of a guard: set {path}.guard")


def describe_terms(terms: PreserveTerms) -> str:
    """Return terms against forgetting in a few words."""
    parts = []
    if terms.l2_sp:
        parts.append(f"l2Sp, strength {terms.l2_sp.strength:g}")
    if terms.ewc:
        samples = f"Fisher information of {terms.ewc.samples} sequences"
        parts.append(f"ewc, strength {terms.ewc.strength:g}, {samples}")
    if terms.kl:
        kl = terms.kl
        parts.append(
            f"kl, strength {kl.strength:g}, temperature {kl.temperature:g}, {kl.batch_size} "
            "sequences a step"
        )
    return "; ".join(parts)


def describe_guard(guard: GuardLimits) -> str:
    """Return the bound of a guard in a few words."""
    times = "" if guard.patience == 1 else f" at {guard.patience} evaluations in a row"
    return f"stop when the general loss is {guard.worsens_by:g} nats above the base's{times}"
