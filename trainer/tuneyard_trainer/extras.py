"""Checks for optional packages, made before the first stage runs.

The stage that needs a package may start hours later, so a missing package is reported at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.api.tracking import Tracking
from tuneyard.errors import StageError


def require(stages: Iterable[PlannedStage]) -> None:
    """Raise StageError MissingExtra for the first optional package that a stage needs and that is
    not installed."""
    for stage in stages:
        adapter = getattr(stage.settings, "adapter", None)
        if adapter and adapter.qlora:
            require_bitsandbytes()
        loop = getattr(stage.settings, "training", stage.settings)
        if getattr(loop, "engine", None) == "trl":
            require_trl()
        clean = getattr(stage.settings, "clean", None)
        if clean and clean.repair_encoding:
            require_cleaning("ftfy")
        if clean and clean.languages:
            require_cleaning("py3langid")
        suites = getattr(stage.settings, "suites", None) or ()
        if any(suite.kind == "task" for suite in suites):
            require_harness()
        for metric in getattr(stage.settings, "metrics", None) or ():
            require_metric(metric, "evaluate.metrics")
        for number, suite in enumerate(suites):
            answers = getattr(suite, "answers", None)  # suites during training have none
            for metric in answers.metrics if answers else ():
                require_metric(metric, f"evaluate.suites[{number}].answers.metrics")
        sampling = getattr(stage.settings, "sampling", None)
        if sampling and sampling.engine == "vllm":
            require_vllm("sampling.engine")
        if isinstance(stage.settings, EvaluateSettings) and stage.settings.engine == "vllm":
            require_vllm("evaluate.engine")


def require_bitsandbytes() -> None:
    """Raise StageError MissingExtra unless bitsandbytes, which 4-bit bases need, is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StageError(
            "MissingExtra",
            "adapter.qlora needs bitsandbytes, which is not installed.",
            advice='Install it with `pip install "tuneyard[qlora]"`, or use adapter.lora.',
        )


CLEANING = {"ftfy": "data.clean.repairEncoding", "py3langid": "data.clean.languages"}
"""The packages of the extra `cleaning`, with the field of the manifest that needs each."""


def require_cleaning(package: str) -> None:
    """Raise StageError MissingExtra unless a package of CLEANING is installed."""
    if importlib.util.find_spec(package) is None:
        raise StageError(
            "MissingExtra",
            f"{CLEANING[package]} needs {package}, which is not installed.",
            advice='Install it with `pip install "tuneyard[cleaning]"`, or remove '
            f"{CLEANING[package]}.",
        )


def require_harness() -> None:
    """Raise StageError MissingExtra unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise StageError(
            "MissingExtra",
            "a suite of evaluate.suites is a task of lm-evaluation-harness, which is not "
            "installed.",
            advice='Install it with `pip install "tuneyard[harness]"`, or remove the suites with '
            "task from evaluate.suites.",
        )


METRICS = {
    "rouge": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "numeric": "math_verify",
}
"""The packages of the extra `metrics` that metrics of answers need."""


def require_metric(name: str, field: str) -> None:
    """Raise StageError MissingExtra unless the package is installed that a metric of answers needs.
    `field`: the list in the manifest that names it."""
    package = METRICS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise StageError(
            "MissingExtra",
            f"the metric {name} needs {package.replace('_', '-')}, which is not installed.",
            advice='Install it with `pip install "tuneyard[metrics]"`, or remove '
            f"{name} from {field}.",
        )


def require_trl() -> None:
    """Raise StageError MissingExtra unless TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        raise StageError(
            "MissingExtra",
            "training.engine is trl, and TRL is not installed.",
            advice='Install it with `pip install "tuneyard[trl]"`, or remove training.engine.',
        )


def require_vllm(path: str) -> None:
    """Raise StageError MissingExtra unless vLLM is installed. `path`: the field of the manifest
    that needs it."""
    if importlib.util.find_spec("vllm") is None:
        raise StageError(
            "MissingExtra",
            f"{path} is vllm, and vLLM is not installed.",
            advice="Set compute.image to a trainer image with vLLM (on one machine, install "
            '`pip install "tuneyard[trainer,vllm]"` into a separate environment), or remove '
            f"{path}.",
        )


TRACKING = {"mlflow": "mlflow", "tensorboard": "tensorboardX"}
"""The packages of the extra `tracking`, by the field of the manifest that needs each."""


def require_tracking(tracking: Tracking) -> None:
    """Raise StageError MissingExtra unless the packages of the trackers are installed."""
    for field, package in TRACKING.items():
        if getattr(tracking, field) and importlib.util.find_spec(package) is None:
            raise StageError(
                "MissingExtra",
                f"spec.tracking.{field} needs {package}, which is not installed.",
                advice='Install it with `pip install "tuneyard[tracking]"`, or remove '
                f"spec.tracking.{field}.",
            )
