"""The process that `numeric` starts: it compares final answers by math-verify, one by one."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from tuneyard_trainer.evaluation.bounded_child import serve

MARK = "####"
"""What stands before the final answer in GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""

_MATH = re.compile(r"\$|\\boxed|\\\(|\\\[")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SYMBOL = re.compile(r"[A-Za-z\\^]")
_SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,2}(?!\w)")
_MINUS = "\u2212"


def plain(text: str) -> str:
    """Return a text with numbers as math-verify reads them: 0.0000001 for 1e-07, whose e it takes
    for Euler's number, and a hyphen for the minus sign of Unicode."""
    text = text.replace(_MINUS, "-")
    return _SCIENTIFIC.sub(lambda found: format(Decimal(found[0]), "f"), text)


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

    golds = [parse(target_text(plain(target)), parsing_timeout=None) for target in targets]
    answer = plain(answer)
    # A heading of Markdown begins with the mark too.
    given = parse(final(answer), parsing_timeout=None) or parse(answer, parsing_timeout=None)
    equal = any(verify(gold, given, timeout_seconds=None) for gold in golds if gold)
    return {"equal": equal, "readable": all(golds)}


if __name__ == "__main__":
    compare("The answer is 1.", ["1"])  # its imports and patterns take seconds
    serve(lambda request: compare(**request))
