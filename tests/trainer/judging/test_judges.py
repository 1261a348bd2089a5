"""Judges: labels in replies, verdicts, limits on invalid replies, and requests to an endpoint."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.trainer.judge_server import Answer, JudgeServer, completion
from tuneyard.api.sources import JudgeEndpoint, SecretKeyRef
from tuneyard.errors import StageError
from tuneyard_trainer.judging import endpoint
from tuneyard_trainer.judging.endpoint import Budget, Endpoint
from tuneyard_trainer.judging.judges import (
    Disagreement,
    JudgePrompt,
    Pair,
    Reply,
    Tally,
    fill_template,
    label_of,
    verdict,
)

KEY = SecretKeyRef(name="judge", key="token")


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)


def prompts(count: int) -> list[JudgePrompt]:
    return [
        JudgePrompt(str(i), ({"role": "user", "content": f"{i}?"},), 16, True) for i in range(count)
    ]


def replies_of(
    settings: JudgeEndpoint, count: int = 1, budget: Budget | None = None, **changes: Any
) -> list[Reply]:
    judge = Endpoint(settings, budget or Budget(None, None), stop=lambda: False, **changes)
    return sorted(judge.replies(prompts(count)), key=lambda reply: int(reply.key))


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
def test_a_reply_that_names_a_label_is_parsed(text: str, label: str) -> None:
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
def test_a_reply_that_names_no_label_or_both_gives_none(text: str) -> None:
    """The article at the start of "A good answer" is not a label."""
    assert label_of(text) is None


def test_braces_in_a_completion_are_not_replaced() -> None:
    question = fill_template("{first} | {second}", first="say {second}", second="{first}")
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
        (None, 0.2, "average", "unlabeled", None),
        (0.9, None, "tie", "unlabeled", None),
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


def test_a_missing_reply_leaves_the_pair_unlabeled() -> None:
    assert verdict(reply(0.9), None, "average").outcome == "unlabeled"
    assert verdict(None, reply(0.9), "average").outcome == "unlabeled"


def test_the_second_prompt_swaps_the_completions() -> None:
    straight, swapped = Pair("7", "Hello?", ("x", "y"), "Be kind.").prompts("{first}<{second}", 3)
    assert straight.messages[0]["content"] == "x<y"
    assert swapped.messages[0]["content"] == "y<x"
    assert straight.key != swapped.key


# ---- invalid replies ----------------------------------------------------------------------------


def test_a_few_invalid_replies_are_counted() -> None:
    tally = Tally("judge-1")
    for number in range(100):
        valid = number % 10 != 9
        tally.add(Reply(str(number), "?", 1.0 if valid else None), valid=valid)
    assert tally.metrics()["judgeNonsense"] == 10


def test_too_many_invalid_replies_fail_the_stage() -> None:
    tally = Tally("judge-1")
    invalid = Reply("k", "blah")
    assert not invalid.is_valid(prompts(1)[0])
    for _ in range(7):
        tally.add(invalid, valid=False)
    with pytest.raises(StageError, match=r"8 of 8 replies of the judge judge-1 .*'blah'") as caught:
        tally.add(invalid, valid=False)
    assert caught.value.reason == "JudgeNonsense"
    assert not caught.value.retryable


def test_the_stage_fails_if_all_of_a_few_prompts_fail() -> None:
    tally = Tally("judge-1")
    tally.add(Reply("0", problem="HTTP 503"), valid=False)
    with pytest.raises(StageError, match="HTTP 503") as caught:
        tally.finish()
    assert caught.value.reason == "JudgeUnavailable"
    assert caught.value.retryable


# ---- an endpoint --------------------------------------------------------------------------------


def test_label_probabilities_come_from_the_log_probabilities() -> None:
    """All spellings of a letter count; other tokens do not."""
    labels = {"A": 0.5, " A": 0.1, "B": 0.2, "The": 0.1}
    with JudgeServer(lambda _body, _number: completion("A", labels)) as server:
        (found,) = replies_of(server.settings())
    assert found.probability == pytest.approx(0.75)
    assert found.mass == pytest.approx(0.8)
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["temperature"] == 0
    assert server.paths == ["/v1/chat/completions"]


def test_without_log_probabilities_the_label_comes_from_the_text() -> None:
    with JudgeServer(lambda _body, _number: completion("Answer: B")) as server:
        (found,) = replies_of(server.settings())
    assert (found.probability, found.mass) == (0.0, None)


def test_with_a_log_probability_that_is_nan_the_label_comes_from_the_text() -> None:
    """Python reads NaN in JSON; as a probability of 1 it would win against the text's own label."""
    labels = {"B": 0.4, "A": 0.1}
    reply = completion("B", labels)
    reply.body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = math.nan
    with JudgeServer(lambda _body, _number: reply) as server:
        (found,) = replies_of(server.settings())
    assert (found.probability, found.mass) == (0.0, None)


def test_a_reply_with_tiny_label_probabilities_is_no_label() -> None:
    labels = {"The": 0.999, "A": 4e-4, "B": 1e-4}
    with JudgeServer(lambda _body, _number: completion("The weather", labels)) as server:
        (found,) = replies_of(server.settings())
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
def test_a_field_that_the_endpoint_rejects_is_left_out_from_then_on(
    refusal: str, field: str, instead: str | None
) -> None:
    def respond(body: dict[str, Any], _number: int) -> Answer:
        if field in body:
            return Answer({"error": {"message": refusal}}, status=400)
        return completion("A")

    with JudgeServer(respond) as server:
        found = replies_of(server.settings(concurrency=1), 3)
    assert [one.probability for one in found] == [1.0, 1.0, 1.0]
    assert len(server.bodies) == 4
    assert instead is None or server.bodies[-1][instead] == 16


def test_a_rejected_prompt_does_not_change_the_requests_of_the_others() -> None:
    """The other prompts keep their log-probabilities after one that is too long."""

    def respond(body: dict[str, Any], _number: int) -> Answer:
        if body["messages"][0]["content"] == "1?":
            return Answer({"error": "maximum context length exceeded"}, status=400)
        return completion("A", {"A": 0.9, "B": 0.1})

    with JudgeServer(respond) as server:
        found = replies_of(server.settings(concurrency=1), 3)
    assert [one.mass for one in found] == [pytest.approx(1.0), None, pytest.approx(1.0)]
    assert "maximum context length" in (found[1].problem or "")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_failure_is_retried(status: int) -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        return completion("A") if number >= 2 else Answer(b"later", status=status)

    with JudgeServer(respond) as server:
        (found,) = replies_of(server.settings())
    assert (found.probability, found.attempts) == (1.0, 3)
    assert len(server.bodies) == 3


def test_every_thread_waits_for_retry_after() -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            return Answer(b"slow down", status=429, headers={"Retry-After": "1"})
        return completion("A", tokens=1) if number > 1 else Answer(b"", 500, delay=0.2)

    with JudgeServer(respond) as server:
        found = replies_of(server.settings(), 6)
    assert [one.probability for one in found] == [1.0] * 6
    assert all(moment - server.times[0] > 0.9 for moment in server.times[2:])


def test_a_request_that_times_out_is_reported() -> None:
    with JudgeServer(lambda _body, _number: Answer(b"", delay=1.5)) as server:
        (found,) = replies_of(server.settings(timeout_seconds=1, max_attempts=2))
    assert found.problem == "no response within 1 s, 2 times"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", {"choices": []}, {"error": "x"}, [], b"[" * 100_000]
)
def test_a_response_that_is_not_a_chat_completion_gives_no_label(body: Any) -> None:
    with JudgeServer(lambda _body, _number: Answer(body)) as server:
        (found,) = replies_of(server.settings(max_attempts=2))
    assert found.probability is None
    assert "the response is not" in (found.problem or "")


def test_an_endpoint_that_is_down_gives_a_problem() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        settings = server.settings(max_attempts=2)
    (found,) = replies_of(settings)
    assert found.problem is not None


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY.variable, "sk-secret")

    def respond(_body: dict[str, Any], _number: int) -> Answer:
        return Answer({"error": "Incorrect API key provided: sk-secret"}, status=401)

    with (
        JudgeServer(respond) as server,
        pytest.raises(StageError, match=r"\[key\]") as caught,
    ):
        replies_of(server.settings(key=KEY))
    assert server.keys == ["Bearer sk-secret"]
    assert caught.value.reason == "JudgeForbidden"
    assert "sk-secret" not in str(caught.value)


def test_the_error_of_a_missing_key_names_its_variable() -> None:
    with (
        JudgeServer(lambda _body, _number: completion("A")) as server,
        pytest.raises(StageError, match="TUNEYARD_SECRET_JUDGE_TOKEN"),
    ):
        replies_of(server.settings(key=KEY))
    assert server.bodies == []


def test_a_redirect_is_refused_and_never_gets_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY.variable, "sk-secret")
    with JudgeServer(lambda _body, _number: completion("A")) as other:
        moved = Answer(status=302, headers={"Location": other.url})
        with (
            JudgeServer(lambda _body, _number: moved) as server,
            pytest.raises(StageError, match="302") as caught,
        ):
            replies_of(server.settings(key=KEY))
    assert caught.value.reason == "JudgeNotFound"
    assert other.bodies == []


def test_a_wrong_model_or_url_fails_at_once() -> None:
    with (
        JudgeServer(lambda _body, _number: Answer(b"no such model", status=404)) as server,
        pytest.raises(StageError, match="no such model") as caught,
    ):
        replies_of(server.settings(), 50)
    assert caught.value.reason == "JudgeNotFound"
    assert len(server.bodies) <= 4


def test_concurrent_requests_stay_within_the_limit() -> None:
    def respond(_body: dict[str, Any], _number: int) -> Answer:
        answer = completion("A")
        answer.delay = 0.05
        return answer

    with JudgeServer(respond) as server:
        replies_of(server.settings(concurrency=3), 12)
    assert server.most_at_once == 3


def test_the_budget_of_requests_counts_retries() -> None:
    def respond(_body: dict[str, Any], number: int) -> Answer:
        return completion("A") if number % 2 else Answer(b"", status=500)

    budget = Budget(7, None)
    with JudgeServer(respond) as server:
        found = replies_of(server.settings(concurrency=1), 10, budget)
    assert len(server.bodies) == 7
    assert budget.exhausted
    assert [one.key for one in found if one.probability is not None] == ["0", "1", "2"]


def test_the_budget_of_tokens_uses_the_endpoints_count() -> None:
    budget = Budget(None, 100)
    with JudgeServer(lambda _body, _number: completion("A", tokens=30)) as server:
        found = replies_of(server.settings(concurrency=1), 10, budget)
    assert len(server.bodies) == len(found) == 4
    assert budget.exhausted


def test_the_budget_includes_earlier_attempts() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        replies_of(server.settings(concurrency=1), 10, Budget(5, None, requests=3))
    assert len(server.bodies) == 2


def test_a_stopped_stage_keeps_the_replies_in_progress() -> None:
    stopping = threading.Event()

    def respond(_body: dict[str, Any], number: int) -> Answer:
        if number == 1:
            stopping.set()
        answer = completion("A")
        answer.delay = 0.3
        return answer

    with JudgeServer(respond) as server:
        judge = Endpoint(server.settings(), Budget(None, None), stop=stopping.is_set)
        found = list(judge.replies(prompts(20)))
    assert len(server.bodies) == len(found) == 2


def test_closing_the_replies_early_stops_all_threads() -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        judge = Endpoint(server.settings(), Budget(None, None), stop=lambda: False)
        replies: Iterator[Reply] = judge.replies(prompts(50))
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        requests = len(server.bodies)
    assert requests < 10
