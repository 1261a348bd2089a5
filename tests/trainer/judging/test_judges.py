"""Judges: what their replies are worth, and how an endpoint is asked that fails in every way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.trainer.judge_server import Answer, JudgeServer, completion
from tuneyard.api.alignment import JudgeEndpoint
from tuneyard.api.sources import SecretKeyRef
from tuneyard.errors import StageError
from tuneyard_trainer.judging import endpoint
from tuneyard_trainer.judging.endpoint import Budget, Endpoint
from tuneyard_trainer.judging.judges import (
    Ask,
    Disagreement,
    Pair,
    Reply,
    Tally,
    filled,
    label_of,
    verdict,
)

KEY = SecretKeyRef(name="judge", key="token")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)


def asks(count: int) -> list[Ask]:
    return [Ask(str(i), ({"role": "user", "content": f"{i}?"},), 16, True) for i in range(count)]


def ask_all(
    settings: JudgeEndpoint, count: int = 1, budget: Budget | None = None, **changes: Any
) -> list[Reply]:
    judge = Endpoint(settings, budget or Budget(None, None), stop=lambda: False, **changes)
    return sorted(judge.replies(asks(count)), key=lambda reply: int(reply.key))


# ---- labels in a reply --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A", "A"),
        (" b.", "B"),
        ("**B**", "B"),
        ("(A)", "A"),
        ("A) It is shorter than B.", "A"),
        ("A\n\nB invents a source.", "A"),
        ("Answer: B", "B"),
        ("The better answer is A.", "A"),
        ("I think Answer B is clearly better.", "B"),
        ("Both are polite. A is short.\nFinal answer: B", "B"),
        ("<think>A? No, rather B. A...</think>\n\nB", "B"),
    ],
)
def test_a_reply_that_decides_is_understood(text: str, label: str) -> None:
    assert label_of(text) == label


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Both are good.",
        "A good answer would be honest.",
        "A and B",
        "A or B",
        "Neither A nor B follows it.",
        "Answer A is better. Answer B is better.",
        "Answer A is not better",
        "<think>A, I would say, since",
        "As an AI language model I cannot choose.",
        "C",
    ],
)
def test_a_reply_that_decides_nothing_is_no_label(text: str) -> None:
    """Least of all one that begins with the article."""
    assert label_of(text) is None


def test_what_an_answer_says_never_becomes_part_of_the_question() -> None:
    question = filled("{first} | {second}", first="say {second}", second="{first}")
    assert question == "say {second} | {first}"


# ---- two orders ---------------------------------------------------------------------------------


def reply(p: float | None) -> Reply:
    return Reply("k", probability=p)


@pytest.mark.parametrize(
    ("straight", "swapped", "disagreement", "outcome", "probability"),
    [
        (0.9, 0.2, "drop", "first", 0.85),
        (0.1, 0.8, "drop", "second", 0.15),
        (0.9, 0.8, "drop", "dropped", 0.55),
        (0.9, 0.8, "tie", "tie", 0.55),
        (0.9, 0.8, "average", "first", 0.55),
        (1.0, 1.0, "average", "dropped", 0.5),
        (1.0, 1.0, "tie", "tie", 0.5),
        (0.5, 0.2, "drop", "dropped", 0.65),
        (None, 0.2, "average", "unlabelled", None),
        (0.9, None, "tie", "unlabelled", None),
    ],
)
def test_a_label_needs_both_orders(
    straight: float | None,
    swapped: float | None,
    disagreement: Disagreement,
    outcome: str,
    probability: float | None,
) -> None:
    found = verdict(reply(straight), reply(swapped), disagreement)
    assert found.outcome == outcome
    assert found.probability == (None if probability is None else pytest.approx(probability))


def test_an_order_that_was_never_answered_leaves_no_label() -> None:
    assert verdict(reply(0.9), None, "average").outcome == "unlabelled"
    assert verdict(None, reply(0.9), "average").outcome == "unlabelled"


def test_the_second_question_shows_the_answers_in_each_others_place() -> None:
    straight, swapped = Pair("7", "Hello?", ("x", "y"), "Be kind.").asks("{first}<{second}", 3)
    assert straight.messages[0]["content"] == "x<y"
    assert swapped.messages[0]["content"] == "y<x"
    assert straight.key != swapped.key


# ---- patience with nonsense ---------------------------------------------------------------------


def test_some_nonsense_is_counted_and_borne() -> None:
    tally = Tally("judge-1")
    for number in range(100):
        tally.add(Reply(str(number), "?", None if number % 10 == 9 else 1.0), wants_label=True)
    assert tally.metrics()["judgeNonsense"] == 10


def test_too_much_nonsense_ends_the_stage_by_name() -> None:
    tally = Tally("judge-1")
    blah = Reply("k", "blah")
    for _ in range(7):
        tally.add(blah, wants_label=True)
    with pytest.raises(StageError, match=r"8 of 8 replies of the judge judge-1 .*'blah'") as caught:
        tally.add(blah, wants_label=True)
    assert caught.value.reason == "JudgeNonsense"
    assert not caught.value.retryable


def test_a_few_questions_that_all_fail_are_as_bad_as_many() -> None:
    tally = Tally("judge-1")
    tally.add(Reply("0", problem="HTTP 503"), wants_label=True)
    with pytest.raises(StageError, match="HTTP 503") as caught:
        tally.finish()
    assert caught.value.reason == "JudgeUnavailable"
    assert caught.value.retryable


# ---- an endpoint --------------------------------------------------------------------------------


def test_label_probabilities_come_from_the_log_probabilities() -> None:
    """All spellings of a letter count; other tokens do not."""
    labels = {"A": 0.5, " A": 0.1, "B": 0.2, "The": 0.1}
    with JudgeServer(lambda _body, _number: completion("A", labels)) as server:
        (found,) = ask_all(server.settings())
    assert found.probability == pytest.approx(0.75)
    assert found.mass == pytest.approx(0.8)
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["temperature"] == 0
    assert server.paths == ["/v1/chat/completions"]


def test_without_log_probabilities_the_reply_is_read() -> None:
    with JudgeServer(lambda _body, _number: completion("Answer: B")) as server:
        (found,) = ask_all(server.settings())
    assert (found.probability, found.mass) == (0.0, None)


def test_a_reply_that_means_something_else_is_no_label_whatever_its_probabilities() -> None:
    labels = {"The": 0.999, "A": 4e-4, "B": 1e-4}
    with JudgeServer(lambda _body, _number: completion("The weather", labels)) as server:
        (found,) = ask_all(server.settings())
    assert found.probability is None
    assert found.problem is None


@pytest.mark.parametrize(
    ("refusal", "field", "instead"),
    [
        ("logprobs are not supported by this model", "logprobs", None),
        ("Unsupported value: 'temperature'", "temperature", None),
        ("use 'max_completion_tokens' instead", "max_tokens", "max_completion_tokens"),
    ],
)
def test_what_an_endpoint_does_not_know_is_left_out_from_then_on(
    refusal: str, field: str, instead: str | None
) -> None:
    def respond(body: dict[str, Any], _number: int) -> Answer:
        if field in body:
            return Answer({"error": {"message": refusal}}, status=400)
        return completion("A")

    with JudgeServer(respond) as server:
        found = ask_all(server.settings(concurrency=1), 3)
    assert [one.probability for one in found] == [1.0, 1.0, 1.0]
    assert len(server.bodies) == 4
    assert instead is None or server.bodies[-1][instead] == 16


def test_a_question_that_is_refused_is_given_up_alone() -> None:
    """A question that is too long does not cost the others their log-probabilities."""

    def respond(body: dict[str, Any], _number: int) -> Answer:
        if body["messages"][0]["content"] == "1?":
            return Answer({"error": "maximum context length exceeded"}, status=400)
        return completion("A", {"A": 0.9, "B": 0.1})

    with JudgeServer(respond) as server:
        found = ask_all(server.settings(concurrency=1), 3)
    assert [one.mass for one in found] == [pytest.approx(1.0), None, pytest.approx(1.0)]
    assert "maximum context length" in (found[1].problem or "")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_may_pass_is_asked_again(status: int) -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        return completion("A") if number >= 2 else Answer(b"later", status=status)

    with JudgeServer(respond) as server:
        (found,) = ask_all(server.settings())
    assert (found.probability, found.attempts) == (1.0, 3)
    assert len(server.bodies) == 3


def test_an_endpoint_that_asks_for_patience_gets_it_from_every_thread() -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            return Answer(b"slow down", status=429, headers={"Retry-After": "1"})
        return completion("A", tokens=1) if number > 1 else Answer(b"", 500, delay=0.2)

    with JudgeServer(respond) as server:
        found = ask_all(server.settings(), 6)
    assert [one.probability for one in found] == [1.0] * 6
    assert all(moment - server.times[0] > 0.9 for moment in server.times[2:])


def test_a_request_that_takes_too_long_is_given_up_and_said_so() -> None:
    with JudgeServer(lambda _body, _number: Answer(b"", delay=1.5)) as server:
        (found,) = ask_all(server.settings(timeout_seconds=1, max_attempts=2))
    assert found.problem == "no answer within 1 s, 2 times"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("body", [b"<html>hello</html>", {"choices": []}, {"error": "x"}, []])
def test_an_answer_that_is_no_completion_is_never_a_label(body: Any) -> None:
    with JudgeServer(lambda _body, _number: Answer(body)) as server:
        (found,) = ask_all(server.settings(max_attempts=2))
    assert found.probability is None
    assert "an answer that is no" in (found.problem or "")


def test_an_endpoint_that_is_not_there_is_a_problem_not_a_crash() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        settings = server.settings(max_attempts=2)
    (found,) = ask_all(settings)
    assert found.problem is not None


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY.variable, "sk-secret")

    def respond(_body: dict[str, Any], _number: int) -> Answer:
        return Answer({"error": "Incorrect API key provided: sk-secret"}, status=401)

    with (
        JudgeServer(respond) as server,
        pytest.raises(StageError, match=r"\[key\]") as caught,
    ):
        ask_all(server.settings(key=KEY))
    assert server.keys == ["Bearer sk-secret"]
    assert caught.value.reason == "JudgeForbidden"
    assert "sk-secret" not in str(caught.value)


def test_a_key_that_is_not_there_is_asked_for_by_its_variable() -> None:
    with (
        JudgeServer(lambda _body, _number: completion("A")) as server,
        pytest.raises(StageError, match="TUNEYARD_SECRET_JUDGE_TOKEN"),
    ):
        ask_all(server.settings(key=KEY))
    assert server.bodies == []


def test_a_redirect_is_refused_and_takes_the_key_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY.variable, "sk-secret")
    with JudgeServer(lambda _body, _number: completion("A")) as other:
        moved = Answer(status=302, headers={"Location": other.url})
        with (
            JudgeServer(lambda _body, _number: moved) as server,
            pytest.raises(StageError, match="302") as caught,
        ):
            ask_all(server.settings(key=KEY))
    assert caught.value.reason == "JudgeNotFound"
    assert other.bodies == []


def test_a_wrong_model_or_place_is_said_at_once() -> None:
    with (
        JudgeServer(lambda _body, _number: Answer(b"no such model", status=404)) as server,
        pytest.raises(StageError, match="no such model") as caught,
    ):
        ask_all(server.settings(), 50)
    assert caught.value.reason == "JudgeNotFound"
    assert len(server.bodies) <= 4


def test_no_more_requests_are_under_way_than_allowed() -> None:
    def respond(_body: dict[str, Any], _number: int) -> Answer:
        answer = completion("A")
        answer.delay = 0.05
        return answer

    with JudgeServer(respond) as server:
        ask_all(server.settings(concurrency=3), 12)
    assert server.most_at_once == 3


def test_the_budget_of_requests_counts_repeated_ones() -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        return completion("A") if number % 2 else Answer(b"", status=500)

    budget = Budget(7, None)
    with JudgeServer(respond) as server:
        found = ask_all(server.settings(concurrency=1), 10, budget)
    assert len(server.bodies) == 7
    assert budget.refused
    assert [one.key for one in found if one.probability is not None] == ["0", "1", "2"]


def test_the_budget_of_tokens_is_what_the_endpoint_counts() -> None:
    budget = Budget(None, 100)
    with JudgeServer(lambda _body, _number: completion("A", tokens=30)) as server:
        found = ask_all(server.settings(concurrency=1), 10, budget)
    assert len(server.bodies) == len(found) == 4
    assert budget.refused


def test_an_earlier_attempts_spending_counts() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        ask_all(server.settings(concurrency=1), 10, Budget(5, None, requests=3))
    assert len(server.bodies) == 2


def test_a_stage_that_is_stopped_keeps_the_replies_under_way() -> None:
    stopping = threading.Event()

    def respond(_body: dict[str, Any], number: int) -> Answer:
        if number == 1:
            stopping.set()
        answer = completion("A")
        answer.delay = 0.3
        return answer

    with JudgeServer(respond) as server:
        judge = Endpoint(server.settings(), Budget(None, None), stop=stopping.is_set)
        found = list(judge.replies(asks(20)))
    assert len(server.bodies) == len(found) == 2


def test_a_listener_that_leaves_early_leaves_no_thread_asking() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        judge = Endpoint(server.settings(), Budget(None, None), stop=lambda: False)
        listening: Iterator[Reply] = judge.replies(asks(50))
        next(listening)
        listening.close()  # type: ignore[attr-defined]
        asked = len(server.bodies)
    assert asked < 10
