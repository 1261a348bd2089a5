"""The condition GatesPassed, from the verdicts of an evaluation. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tuneyard.api.gates import GateResult, overall


def gates_condition(gates: Sequence[GateResult]) -> tuple[bool | None, str, str]:
    """Return whether the required gates are met (None: unknown), the reason and the message.

    The reasons: GatesPassed, GateFailed (a breach, or a metric that is missing),
    InsufficientEvidence, and NoRequiredGates, which holds.
    """
    verdict = overall(gates)
    required = [gate for gate in gates if gate.is_required]
    missed = "; ".join(gate.sentence for gate in required if not gate.passed)
    if verdict is None:
        return True, "NoRequiredGates", "all gates are advisory"
    if verdict == "pass":
        return True, "GatesPassed", f"all {len(required)} required gates are met"
    if verdict == "insufficientEvidence":
        return None, "InsufficientEvidence", missed
    return False, "GateFailed", missed
