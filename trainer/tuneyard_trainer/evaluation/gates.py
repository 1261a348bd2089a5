"""Gates: the limits on metrics that a result must satisfy before it is exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tuneyard.api.evaluation import Gate
from tuneyard.errors import StageError


def check_gates(gates: Sequence[Gate], metrics: Mapping[str, float]) -> None:
    """Raise StageError GateFailed, with every gate that the metrics miss. NaN and missing metrics
    miss every gate."""
    missed = []
    for gate in gates:
        value = metrics.get(gate.metric, math.nan)
        if gate.at_least is not None and not value >= gate.at_least:
            missed.append(f"{gate.metric} is {value:.4g}, below {gate.at_least:g}")
        if gate.at_most is not None and not value <= gate.at_most:
            missed.append(f"{gate.metric} is {value:.4g}, above {gate.at_most:g}")
    if missed:
        raise StageError(
            "GateFailed",
            f"the tuned model misses its gates: {'; '.join(missed)}.",
            advice="Train longer or on more data (training.epochs, data.train), or change "
            "evaluate.gates.",
        )
