"""The reasons are a public surface: users' scripts and alerts compare them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tuneyard.api.pods import STALE_ATTEMPT
from tuneyard.api.reasons import REASONS
from tuneyard_trainer.data.preprocessing import REFUSALS

ROOT = Path(__file__).resolve().parents[2]
TAKE_A_REASON = {
    "StageError",
    "Cause",
    "Failure",
    "Stop",
    "_Category",
    "read_back_mismatch",
    "_ask_to_stop",
    "_leave_at_once",
}
"""Classes and functions whose first argument, or whose argument `reason`, is a reason."""


def written_in(source: str) -> Iterator[str]:
    """Yield the reasons that a module writes as literals."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        named = [each.value for each in node.keywords if each.arg == "reason"]
        for reason in [*node.args[:1], *named][:1]:
            is_text = isinstance(reason, ast.Constant) and isinstance(reason.value, str)
            if called in TAKE_A_REASON and is_text:
                yield ast.literal_eval(reason)


def test_the_reasons_are_exactly_those_that_the_code_writes() -> None:
    """A new reason is added to api/reasons.py, a renamed or removed one to the changelog too."""
    files = [path for root in ("operator", "trainer") for path in (ROOT / root).rglob("*.py")]
    written = {reason for path in files for reason in written_in(path.read_text())}
    assert written | {STALE_ATTEMPT, *REFUSALS} == REASONS


def test_a_reason_in_any_of_these_calls_is_found() -> None:
    source = "StageError('A', 'text'); errors.Cause(reason='B'); Other('C'); Failure(reason=cause)"
    assert [*written_in(source)] == ["A", "B"]
