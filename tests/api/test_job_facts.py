"""The facts that a driver posts: bounded, and readable for another version."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tests.planning.models import facts
from tuneyard.api.job_facts import JobFacts
from tuneyard.api.progress import Post, PostResponse

MODEL: dict[str, Any] = facts("8B").model_dump(mode="json", by_alias=True)


def read(**changes: Any) -> JobFacts:
    """Return facts that arrive as JSON with an 8B model."""
    return JobFacts.model_validate_json(json.dumps({"model": MODEL, **changes}))


def test_the_facts_of_a_newer_driver_are_read_without_the_fields_that_are_unknown() -> None:
    newer = MODEL | {"ofANewerVersion": {}, "linears": [MODEL["linears"][0] | {"new": 1}]}
    assert read(model=newer, alsoNew=1, devices=8).devices == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"model": MODEL | {"layers": 0}},
        {"model": MODEL | {"hiddenSize": 1 << 33}},
        {"model": MODEL | {"layers": 1 << 32}},
        {"model": MODEL | {"linears": MODEL["linears"] * 20}},
        {"model": MODEL | {"architecture": "x" * 100}},
        {"model": MODEL | {"norm": "none of ours"}},
        {"model": MODEL | {"hiddenSize": "4096"}},
        {"model": {}},
        {"model": []},
        {"rows": 0},
        {"rows": (1 << 24) + 1},
        {"devices": 0},
        {"device": {"gpu": "x" * 129, "memory": 1}},
        {"device": {"memory": -1}},
        {"device": {"memory": 1 << 60}},
        {"device": {}},
    ],
)
def test_facts_that_no_job_has_are_refused(changes: dict[str, Any]) -> None:
    assert read()
    with pytest.raises(ValidationError):
        read(**changes)


def test_an_older_operator_answers_without_a_fit_and_an_older_driver_posts_no_facts() -> None:
    assert PostResponse.model_validate_json('{"stop": false}').fit is None
    post = {"trainerStatus": {}, "tuneyard": {"attempt": 1}}
    report = Post.model_validate(post).tuneyard
    assert report is not None
    assert report.facts is None
