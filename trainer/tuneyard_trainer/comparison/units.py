"""The unit of a metric: the reward, the judge or the check that its values come from. Pure.

Two jobs may answer the same prompts and have other judges: their values do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CHECKS = {"patternMatch": "answerPattern", "schemaValid": "answerSchema"}
"""The fields of the manifest that hold a check, by its metric."""
WIN_RATES = ("winRate", "lengthControlledWinRate")
_JUDGED = ("judge", "model", "start")
"""The inputs of an evaluation that decide a win rate: the judge and the model that is beaten."""
_REWARD, _INDEPENDENT = "reward", "reward.independent"


def unit_of(metric: str, manifest: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return a text that is equal for equal units. "": the items of the metric alone decide it.

    `manifest`: {} if it is unknown. `sources`: digests of the evaluation's inputs by role.
    """
    spec, (suite, _, name) = _mapping(manifest.get("spec")), metric.rpartition("/")
    evaluate = _mapping(spec.get("evaluate"))
    if name in CHECKS:
        return str((_answers(evaluate, suite) if suite else evaluate).get(CHECKS[name]))
    if metric == "reward":
        return str((_rules(spec), _digests(sources, _is_optimized)))
    if metric == "independentReward":
        rule = _mapping(spec.get("independentReward")).get("rule")
        return str((rule, sources.get(_INDEPENDENT)))
    if metric in WIN_RATES:
        return str((_judge(evaluate), _digests(sources, _JUDGED.__contains__)))
    return ""


def _is_optimized(role: str) -> bool:
    """Return whether an input is a part of the reward that is optimized."""
    return role == _REWARD or (role.startswith(f"{_REWARD}.") and role != _INDEPENDENT)


def _digests(sources: Mapping[str, str], chosen: Callable[[str], bool]) -> dict[str, str]:
    return {role: sources[role] for role in sorted(sources) if chosen(role)}


def _rules(spec: Mapping[str, Any]) -> list[Any]:
    """Return the rules and the weights of the reward; the models are inputs."""
    terms = [_mapping(term) for term in _list(spec.get("rewardTerms"))]
    weighted = [(term.get("weight"), term.get("rule")) for term in terms]
    return [_mapping(spec.get("rewardModel")).get("rule"), weighted]


def _judge(evaluate: Mapping[str, Any]) -> list[Any]:
    """Return the name of a judge behind an endpoint and what it is asked; a model is an input."""
    win_rate = _mapping(evaluate.get("winRate"))
    endpoint = _mapping(_mapping(win_rate.get("judge")).get("endpoint"))
    return [endpoint.get("model"), win_rate.get("principles"), win_rate.get("question")]


def _answers(evaluate: Mapping[str, Any], suite: str) -> Mapping[str, Any]:
    suites = [_mapping(each) for each in _list(evaluate.get("suites"))]
    found = next((each for each in suites if each.get("name") == suite), {})
    return _mapping(found.get("answers"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
