"""Numeric answers are compared as math-verify compares them, and no answer hangs the evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from math_verify import parse, verify

from tests.trainer.evaluation.test_answer_suites import evaluated, lines
from tuneyard_trainer.evaluation import bounded, numeric, numeric_child, task_metrics
from tuneyard_trainer.evaluation.bounded import BoundedProcess

GSM8K = Path("/work/shared/data/gsm8k-test-500.jsonl")


@pytest.fixture(scope="module")
def process() -> Iterator[BoundedProcess]:
    with numeric.verifier() as found:
        yield found


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("The answer is 1,234.5", "1234.5"),
        ("The answer is 18 dollars.", "18"),
        ("She sells 9 eggs for $2 each.\n#### 18", "9 * 2 = <<9*2=18>>18\n#### 18"),
        ("So it is \\boxed{\\frac{1}{2}}.", "0.5"),
        ("It is 50%.", "50%"),
        ("It is 50%.", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("$2(x+1)$", "2x + 2"),
        ("It was 7, then 8, so the answer is -3", "-3"),
        ("It is 0.0000001.", "1e-07"),
        ("2.50e-3", "0.0025"),
        ("1500", "1.5E3"),
        ("The answer is \u22125.", "-5"),
        ("The result is 42.\n\n#### Explanation\nWe added them.", "42"),
    ],
)
def test_a_final_answer_equals_a_target_as_a_number_or_an_expression(
    process: BoundedProcess, answer: str, target: str
) -> None:
    found = numeric.compare(process, answer, [target])
    assert found == numeric.Compared(equal=True, readable=True, ended=True)
    assert numeric.compare(process, answer, ["997", target]).equal, (
        "any of several targets is enough"
    )
    assert not numeric.compare(process, answer, ["997"]).equal


def test_the_e_of_an_expression_stays_eulers_number(process: BoundedProcess) -> None:
    assert numeric.compare(process, "$e - 7$", ["e - 7"]).equal
    assert not numeric.compare(process, "$e - 7$", ["1e-07"]).equal
    assert numeric.compare(process, "$2e$", ["2e"]).equal


def test_an_answer_without_a_number_is_wrong_and_a_target_without_one_is_named(
    process: BoundedProcess,
) -> None:
    assert not numeric.compare(process, "I do not know.", ["4"]).equal
    assert not numeric.compare(process, "", ["4"]).equal
    assert numeric.compare(process, "4", ["Paris"]) == numeric.Compared(equal=False, readable=False)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's rows are not on this machine")
def test_answers_to_gsm8k_are_right_where_math_verify_says_so() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    targets = [row["answer"] for row in rows]
    draw = np.random.default_rng(3)
    forms = [
        "The answer is {0}.",
        "{0}",
        "I count 3 and 4, so the answer is \\boxed{{{0}}}",
        "Therefore $x = {0}$.",
        "{0} dollars in total",
        "#### {0}",
        "{0}/2",
        "{0}%",
        "about {0}.5",
        "No idea.",
    ]
    answers = []
    for number, target in enumerate(targets):
        value = numeric_child.final(target)
        shown = value if draw.random() < 0.7 else str(int(value.replace(",", "")) + 1)
        answers.append(forms[number % len(forms)].format(shown))
    found = task_metrics.numeric_match(answers, [[target] for target in targets])
    expected = [
        float(verify(parse(numeric_child.final(target)), parse(answer)))
        for answer, target in zip(answers, targets, strict=True)
    ]
    assert found.means["numericMatch"].tolist() == expected
    assert 0.3 < np.mean(expected) < 0.8
    assert found.details["numeric"] == {"notCompared": 0, "withoutNumber": 0}


def test_gsm8ks_own_solutions_are_right() -> None:
    if not GSM8K.exists():
        pytest.skip("GSM8K's rows are not on this machine")
    targets = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    found = task_metrics.numeric_match(targets, [[target] for target in targets])
    assert found.metrics == {"numericMatch": 1.0}


HOSTILE = [
    "9**9**9**9",
    "$9^{9^{9^{9}}}$",
    "$" + "{" * 1500 + "$",
    "(" * 3000,
    "1" * 100_000,
    "\x00\ud800",
]


def test_hostile_answers_are_wrong_within_the_limit_and_the_next_answer_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numeric, "ANSWER_SECONDS", 1.0)
    longest = 1.0 + bounded.GRACE_SECONDS + 30.0  # to start it again on a machine that is busy
    ended = []
    with numeric.verifier() as process:
        for answer in HOSTILE:
            before = time.monotonic()
            found = numeric.compare(process, answer, ["4"])
            assert time.monotonic() - before < longest
            assert not found.equal
            ended.append(found.ended)
        assert not ended[0], "it cannot be computed"
        assert numeric.compare(process, "4", ["4"]).equal


def test_what_could_not_be_compared_is_counted_and_equal_answers_are_compared_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numeric, "ANSWER_SECONDS", 1.0)
    answers = ["4", *["9**9**9**9"] * 40, "5"]
    before = time.monotonic()
    found = task_metrics.numeric_match(answers, [*[["4"]] * 41, ["red"]])
    assert found.means["numericMatch"].tolist() == [1.0, *[0.0] * 41]
    assert found.details["numeric"] == {"notCompared": 40, "withoutNumber": 1}
    assert time.monotonic() - before < 40


def test_a_suite_of_answers_is_measured_by_numbers(tmp_path: Path, inputs: dict[str, Path]) -> None:
    file = lines(tmp_path / "numbers.jsonl", [{"prompt": "3 + 4?", "target": 7}])
    given = {"model": inputs["model"], "tuned": inputs["tuned"], "suite.0": file}
    found = evaluated(tmp_path / "out", given, answers={"metrics": ["numeric"]})
    assert {"capitals/numericMatch", "capitals/baseNumericMatch"} <= found.metrics.keys()
    counts = {"notCompared": 0, "withoutNumber": 0}
    assert found.details["suites"]["capitals"]["numeric"] == {"tuned": counts, "base": counts}
