"""Faults and descriptions of defenses against forgetting, and of the choice of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from tuneyard.api.adapters import Adapter
from tuneyard.api.evaluation import Evaluate
from tuneyard.api.preserving import GuardLimits, PreserveTerms
from tuneyard.api.sources import FineTuneData
from tuneyard.api.training import FineTuning, Training
from tuneyard.errors import Fault
from tuneyard.planning.suites import training_metrics, training_suite_faults

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
WITH_SUITES = ("fineTuning", "dpo", "kto", "distill")
"""The methods whose evaluations can measure suites."""
_WITHOUT_SUITES = {
    "reward": "measure a model that writes, and a reward model does not",
    **{
        method: f"are measured beside held-out rows, and {method} measures held-out rewards alone"
        for method in ("ppo", "grpo", "rloo")
    },
}


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


def measured_faults(
    path: str, training: Training, method: str, evaluate: Evaluate, *, has_guard: bool = False
) -> Iterator[Fault]:
    """Yield the faults of suites that are measured during training, and of the metric that chooses
    an evaluation. `method`: a key of MEASURED, or another method."""
    suites = training.suites
    if suites and method not in WITH_SUITES:
        yield Fault(f"{path}.suites", f"{_WITHOUT_SUITES[method]}: remove suites")
    else:
        yield from training_suite_faults(f"{path}.suites", suites, evaluate)
    known = MEASURED.get(method, ())
    if training.best_by and not known:
        yield Fault(
            f"{path}.bestBy",
            f"chooses an evaluation of held-out rows, and {method} keeps the step with the best "
            "held-out reward: remove bestBy",
        )
    elif training.best_by:
        known = (*known, *training_metrics(suites, evaluate))
        problem = _unmeasured(training.best_by, known, path, evaluate)
        if problem is None and training.best_by == GENERAL_LOSS and not has_guard:
            problem = f"{GENERAL_LOSS} is measured on the data of a guard: set {path}.guard"
        if problem:
            yield Fault(f"{path}.bestBy", problem)


def _unmeasured(name: str, known: Sequence[str], path: str, evaluate: Evaluate) -> str | None:
    """Return the message for a metric that evaluations during training do not measure. None: they
    do. `path`: the training's field."""
    if name in known:
        return None
    suite = name.partition("/")[0]
    measured = {each.partition("/")[0] for each in known if "/" in each}
    if "/" in name and suite not in measured and suite in {each.name for each in evaluate.suites}:
        return f"the suite {suite} is not measured during training: add it to {path}.suites"
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"
    return f"'{name}' is not measured during training: {hint}"


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
