"""The process that `numeric` starts: it compares final answers by math-verify, one by one."""

from __future__ import annotations

import re
from typing import Any

from tuneyard_trainer.evaluation.bounded_child import serve

MARK = "####"
"""What stands before the final answer in GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""

_MATH = re.compile(r"\$|\\boxed|\\\(|\\\[")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SYMBOL = re.compile(r"[A-Za-z\\^]")


def final(text: str) -> str:
    """Return the part of a text after its last mark of a final answer; without one, the text."""
    _, mark, after = text.rpartition(MARK)
    return after.strip() if mark and after.strip() else text


def target_text(target: str) -> str:
    r"""Return a target as math-verify reads it: an expression without words, such as `x^2 + 1` or
    `\frac{1}{2}`, is marked as LaTeX."""
    text = final(target).strip()
    words = _WORD.search(_COMMAND.sub(" ", text))
    is_expression = bool(_SYMBOL.search(text)) and not words and not _MATH.search(text)
    return f"${text}$" if is_expression else text


def compare(answer: str, targets: list[str]) -> dict[str, Any]:
    """Return whether the final answer equals any target, and whether every target is readable."""
    from math_verify import parse, verify

    golds = [parse(target_text(target), parsing_timeout=None) for target in targets]
    given = parse(final(answer), parsing_timeout=None)
    equal = any(verify(gold, given, timeout_seconds=None) for gold in golds if gold)
    return {"equal": equal, "readable": all(golds)}


if __name__ == "__main__":
    compare("The answer is 1.", ["1"])  # its imports and patterns take seconds
    serve(lambda request: compare(**request))
