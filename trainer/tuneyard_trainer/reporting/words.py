"""The summary of a job in words: what got better, what got worse, whether it was worth it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tuneyard.api.gates import VERDICT_WORDS, GateResult
from tuneyard.api.report import Comparison, Forgetting, Interval
from tuneyard_trainer.reporting.formatting import count, number, percent

MOST_NAMED = 6
"""Metrics that a sentence names; it counts the others."""
LEAST = 1e-4
"""The smallest difference in points that is shown."""
MOST_DIGITS = 9
"""Decimals of two values that are nearly equal."""


def shown(value: float | None, comparison: Comparison) -> str:
    """Return a value of a metric: a share in percent, else four digits."""
    if value is None or comparison.is_share:
        return percent(value)
    return _signed(value, plus=False, whole=False)


def shown_interval(interval: Interval | None, comparison: Comparison, plus: bool = False) -> str:
    """Return "40 to 60 %" or "1.2 to 1.4"; "": none. `plus`: with signs, of a difference."""
    if interval is None:
        return ""
    scale, unit = (100, " %") if comparison.is_share else (1, "")
    if plus:
        unit = " points" if unit else ""
    low, high = (_signed(scale * end, plus, comparison.is_share) for end in interval)
    return f"{low} to {high}{unit}"


def shown_difference(value: float | None, comparison: Comparison) -> str:
    """Return a difference with its sign: of shares in points; "": none."""
    if value is None:
        return ""
    if comparison.is_share:
        points = _signed(100 * value, True, True)
        return f"{points} point{'' if points[1:] == '1' else 's'}"
    return _signed(value, True, False)


def _signed(value: float, plus: bool, whole: bool) -> str:
    text = _whole(abs(value)) if whole else number(abs(value))
    is_zero = not any(digit in text for digit in "123456789") and text != "∞"
    sign = "" if is_zero else "\N{MINUS SIGN}" if value < 0 else "+" if plus else ""
    return f"{sign}{text}"


def _whole(value: float) -> str:
    """Return a whole number; one that is not 0 keeps its first digit where it would be 0. What is
    smaller than LEAST is an error of the arithmetic, and 0."""
    return f"{value:.1g}" if LEAST <= value < 0.5 else f"{value:.0f}"


def summary(
    comparisons: Sequence[Comparison],
    gates: Sequence[GateResult],
    forgetting: Forgetting | None,
    examples: tuple[int, float] | None,
) -> list[str]:
    """Return the sentences, the most important ones first. `examples`: the number of worked
    examples in the prompt of the base model, and their tokens; None: it had none."""
    told = [each for each in comparisons if each.metric != "validationPerplexity"]
    if not told:
        return ["No rows were held out, so the result was not measured."]
    sentences = [*_changes(told), *_flips(told), *_worth(told, examples)]
    return [*sentences, *_general(forgetting), *_gates(gates)]


def _changes(comparisons: Sequence[Comparison]) -> Iterable[str]:
    """Yield what got better, what got worse, and what did not clearly change."""
    compared = [each for each in comparisons if each.base is not None]
    if not compared:
        tuned = _listed(f"{_name(each)} is {shown(each.tuned, each)}" for each in comparisons)
        yield f"The base model was not measured. {_capital(tuned)}."
        return
    by_verdict = {
        verdict: [each for each in compared if each.verdict == verdict]
        for verdict in ("better", "worse", "unclear", "equal")
    }
    better, worse = by_verdict["better"], by_verdict["worse"]
    yield f"Better: {_listed(map(_change, better))}." if better else "Nothing got clearly better."
    yield f"Worse: {_listed(map(_change, worse))}." if worse else "Nothing got clearly worse."
    lost = [_name(each) for each in comparisons if each.tuned is None]
    if lost:
        yield f"Not a number, so the model may have diverged: {_listed(lost)}."
    same = by_verdict["unclear"] + by_verdict["equal"]
    if same:
        yield f"No clear difference: {_listed(map(_change, same))}."


def _change(each: Comparison) -> str:
    before, after = _ends(each)
    if each.base_is_chance:
        return f"{_name(each)} is {after}, and a random choice has {before}"
    if before == after:
        return f"{_name(each)} stayed at {after}"
    verb = "rose" if (each.difference or 0) > 0 else "fell"
    return f"{_name(each)} {verb} from {before} to {after}"


def _ends(each: Comparison) -> tuple[str, str]:
    """Return the values of both models, with more digits where fewer hide a clear difference."""
    before, after = shown(each.base, each), shown(each.tuned, each)
    is_clear = each.verdict in ("better", "worse")
    if not is_clear or before != after or each.base is None or each.tuned is None:
        return before, after
    scale, unit = (100, " %") if each.is_share else (1, "")
    for digits in range(1, MOST_DIGITS + 1):
        longer = [f"{scale * value:,.{digits}f}{unit}" for value in (each.base, each.tuned)]
        if longer[0] != longer[1]:
            return longer[0], longer[1]
    return before, after


def _flips(comparisons: Sequence[Comparison]) -> Iterable[str]:
    found = next((each for each in comparisons if each.gained is not None), None)
    if found is None or found.scope == "suite" or found.metric != "answerAccuracy":
        return
    gained, lost = (count(each) if each else "none" for each in (found.gained, found.lost))
    yield f"Answers that became right: {gained}; that became wrong: {lost}."


def _worth(comparisons: Sequence[Comparison], examples: tuple[int, float] | None) -> Iterable[str]:
    """Yield whether tuning was worth it: against worked examples in the prompt."""
    each = next((c for c in comparisons if c.few_shot_difference is not None), None)
    if each is None or examples is None:
        return
    gain, between = each.few_shot_difference or 0.0, each.few_shot_difference_interval
    is_clear = between is not None and not between[0] <= 0 <= between[1]
    verdict = "Whether tuning was worth it is not clear"
    if is_clear:
        verdict = "Tuning was worth it" if gain > 0 else "Tuning was not worth it"
    number_of, tokens = examples
    plural, cost = ("", "costs") if number_of == 1 else ("s", "cost")
    yield (
        f"{verdict}. {_capital(_name(each))}: {shown(each.tuned, each)} after tuning, and "
        f"{shown(each.few_shot, each)} of the base model with {count(number_of)} example{plural} "
        f"in the prompt, which {cost} {count(tokens)} tokens in each request."
    )


def _general(forgetting: Forgetting | None) -> Iterable[str]:
    if forgetting is None or forgetting.increase is None:
        return
    changed = "did not change"
    if forgetting.increase:
        verb = "rose" if forgetting.increase > 0 else "fell"
        changed = f"{verb} by {number(abs(forgetting.increase))} nats per token"
    bound = (
        f"; the guard allows an increase of {number(forgetting.allowed)}"
        if forgetting.allowed is not None
        else ""
    )
    yield f"The loss on general data {changed}{bound}."
    if forgetting.stopped:
        yield f"The training was {forgetting.stopped}."


def _gates(gates: Sequence[GateResult]) -> Iterable[str]:
    """Yield how many gates are met. The warnings say more about those that are not."""
    missed = [
        f"{gate.metric} ({'' if gate.is_required else 'advisory, '}{VERDICT_WORDS[gate.verdict]})"
        for gate in gates
        if not gate.passed
    ]
    if missed:
        are = "is" if len(missed) == 1 else "are"
        yield f"{len(missed)} of {len(gates)} gates {are} not met: {', '.join(missed)}."
    elif gates:
        met = {1: "The gate is met.", 2: "Both gates are met."}
        yield met.get(len(gates), f"All {len(gates)} gates are met.")


def _name(each: Comparison) -> str:
    label = each.label.partition(" (")[0]
    if each.scope == "suite" or not label[1:2].islower():
        return label
    return f"{label[0].lower()}{label[1:]}"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _listed(parts: Iterable[str]) -> str:
    every = [*parts]
    named = every[:MOST_NAMED]
    if len(every) > MOST_NAMED:
        named.append(f"and {len(every) - MOST_NAMED} more")
    return "; ".join(named)
