"""feedback and critique: a tiny model completes prompts, and a server or a model judges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.judge_server import (
    QUESTION,
    Answer,
    JudgeServer,
    completion,
    prefers_greater,
)
from tuneyard.api.plan import PlannedStage, SourceInput, StageInput, TrainRuntime
from tuneyard.api.sources import FieldMap, JudgeEndpoint
from tuneyard.api.stage_settings import (
    ChatSettings,
    CritiqueSettings,
    DatasetSettings,
    FeedbackSettings,
    JudgeSettings,
    PromptSettings,
)
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.rows import Row
from tuneyard_trainer.data.reading.stream import examples
from tuneyard_trainer.judging import critique, endpoint, feedback
from tuneyard_trainer.preference.rows import parse_preferences
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

CHAT = ChatSettings(system_prompt=None, chat_template=None)
PROMPTS = PromptSettings(format="auto", fields=FieldMap(), limit=None)
WORKER = Worker(rank=0, world_size=1, device=torch.device("cpu"), identity="sha256:one")
LAMPS = 6


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Path]:
    rows = [{"prompt": f"Which port has lamp {i}?"} for i in range(LAMPS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": tiny_model_dir, "prompts": tmp_path / "prompts.jsonl"}


@pytest.fixture(scope="session")
def fluent_model_dir(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with untied embeddings, whose likeliest completion is not white space."""
    folder = tmp_path_factory.mktemp("fluent")
    tiny_llama(VOCABULARY, tie_word_embeddings=False).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def judge_settings(judge: JudgeEndpoint) -> JudgeSettings:
    return JudgeSettings(
        model=judge.model,
        max_requests=judge.max_requests,
        max_tokens=judge.max_tokens,
        label_tokens=judge.label_tokens,
    )


def feedback_stage(judge: JudgeEndpoint | None, **changes: Any) -> PlannedStage:
    """Return a feedback stage; without an endpoint its judge is the input `judge`."""
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "chat": CHAT,
        "judge": judge_settings(judge) if judge else None,
        "principles": ["Be kind.", "Be brief."],
        "question": QUESTION,
        "responses_per_prompt": 2,
        "temperature": 1.0,
        "max_new_tokens": 8,
        "disagreement": "drop",
        "seed": 1,
    }
    return PlannedStage(
        name="feedback",
        settings=FeedbackSettings(**(settings | changes)),
        inputs={"model": StageInput(stage="x"), "judge": SourceInput(uri="hf://org/judge")},
        runtime=TrainRuntime(endpoint=judge),
        fingerprint="sha256:test",
    )


def run_feedback(
    server: JudgeServer, inputs: dict[str, Path], workdir: Path, **changes: Any
) -> StageOutcome:
    given = {name: changes.pop(name) for name in ("max_requests",) if name in changes}
    worker = changes.pop("worker", WORKER)
    stage = feedback_stage(server.settings(**given), **changes)
    return feedback.run(StageContext(stage, inputs, workdir, worker))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unbiased(body: dict[str, Any], _number: int) -> Answer:
    label = prefers_greater(body)
    return completion(label, {label: 0.8, "AB".replace(label, ""): 0.2})


# ---- labels -------------------------------------------------------------------------------------


def test_every_pair_gets_the_judges_label(inputs: dict[str, Path], workdir: Path) -> None:
    with JudgeServer(unbiased) as server:
        outcome = run_feedback(server, inputs, workdir, responses_per_prompt=3)
    rows = rows_of(workdir / "preferences.jsonl")
    assert len(rows) == outcome.metrics["labels"] == 3 * LAMPS
    assert len(server.bodies) == outcome.metrics["judgeRequests"] == 6 * LAMPS
    for row in rows:
        assert row["chosen"][0]["content"] > row["rejected"][0]["content"]
        assert row["probability"] == pytest.approx(0.8)
    assert outcome.metrics["judgeAgreement"] == 1.0
    assert outcome.metrics["judgePrefersFirst"] == 0.5


def test_the_stage_pairs_reads_the_labels(inputs: dict[str, Path], workdir: Path) -> None:
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs, workdir)
    (found,) = parse_preferences(
        Row(1, rows_of(workdir / "preferences.jsonl")[0]), FieldMap(), labeled=False
    )
    assert found.prompt[0].content == "Which port has lamp 0?"
    assert found.completions[0].content > found.completions[1].content
    assert found.label == pytest.approx(0.8)


def test_labels_and_judgments_state_their_provenance(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs, workdir)
    row, kept = (rows_of(workdir / name)[0] for name in ("preferences.jsonl", "judgments.jsonl"))
    assert row["provenance"]["judge"] == kept["judge"] == "judge-1"
    assert row["provenance"]["principle"] == kept["principle"]
    assert kept["principle"] in server.bodies[0]["messages"][0]["content"]
    assert kept["straight"]["probability"] == pytest.approx(1 - kept["swapped"]["probability"])
    assert kept["straight"]["attempts"] == 1
    assert kept["prompt"] == "prompts.jsonl row 1"


def test_a_judge_that_always_replies_a_gives_no_labels(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with (
        JudgeServer(lambda _body, _number: completion("A")) as server,
        pytest.raises(StageError, match="6 have different verdicts in the two orders") as caught,
    ):
        run_feedback(server, inputs, workdir)
    assert caught.value.reason == "NoPreferences"
    assert rows_of(workdir / "preferences.jsonl") == []


def test_pairs_with_different_verdicts_are_ties_if_the_manifest_says_so(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with JudgeServer(lambda _body, _number: completion("A")) as server:
        outcome = run_feedback(server, inputs, workdir, disagreement="tie")
    assert outcome.metrics["ties"] == LAMPS
    assert {row["probability"] for row in rows_of(workdir / "preferences.jsonl")} == {0.5}


def test_the_mean_probability_of_a_biased_judge_decides_if_the_manifest_says_so(
    inputs: dict[str, Path], workdir: Path
) -> None:
    """The judge always replies A, with a higher probability if A is greater: the bias cancels."""

    def biased(body: dict[str, Any], _number: int) -> Answer:
        p = 0.9 if prefers_greater(body) == "A" else 0.6
        return completion("A", {"A": p, "B": 1 - p})

    with JudgeServer(biased) as server:
        outcome = run_feedback(server, inputs, workdir, disagreement="average")
    assert outcome.metrics["judgePrefersFirst"] == 1.0
    for row in rows_of(workdir / "preferences.jsonl"):
        assert row["chosen"][0]["content"] > row["rejected"][0]["content"]
        assert row["probability"] == pytest.approx(0.65)


def test_an_invalid_reply_is_counted_and_gives_no_label(
    inputs: dict[str, Path], workdir: Path
) -> None:
    def mostly_unbiased(body: dict[str, Any], number: int) -> Answer:
        return completion("As an AI, I cannot say") if number == 0 else unbiased(body, number)

    with JudgeServer(mostly_unbiased) as server:
        outcome = run_feedback(server, inputs, workdir)
    assert outcome.metrics["judgeNonsense"] == outcome.metrics["unlabeled"] == 1
    assert outcome.metrics["labels"] == LAMPS - 1
    assert outcome.details["problems"]["nonsense"] == ["'As an AI, I cannot say'"]


def test_a_judge_with_only_invalid_replies_fails_the_stage(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with (
        JudgeServer(lambda _body, _number: completion("Lovely weather")) as server,
        pytest.raises(StageError, match="Lovely weather") as caught,
    ):
        run_feedback(server, inputs, workdir)
    assert caught.value.reason == "JudgeNonsense"
    assert len(server.bodies) < 2 * LAMPS
    assert not (workdir / "preferences.jsonl").exists()


def test_identical_completions_are_not_compared(
    inputs: dict[str, Path], workdir: Path, fluent_model_dir: Path
) -> None:
    with (
        JudgeServer(unbiased) as server,
        pytest.raises(StageError, match="6 pairs of completions are identical") as caught,
    ):
        run_feedback(server, inputs | {"model": fluent_model_dir}, workdir, temperature=1e-4)
    assert caught.value.reason == "NoPreferences"
    assert server.bodies == []


# ---- killed, stopped, out of budget -------------------------------------------------------------


def prompt_counts(server: JudgeServer) -> Counter[str]:
    return Counter(body["messages"][0]["content"] for body in server.bodies)


def test_a_killed_stage_repeats_no_request_and_gives_the_same_labels(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    def failing(body: dict[str, Any], number: int) -> Answer:
        return Answer(b"gone", status=401) if number >= 5 else unbiased(body, number)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs, whole)
    with JudgeServer(failing) as server:
        with pytest.raises(StageError, match="gone"):
            run_feedback(server, inputs, broken)
        answered = len(rows_of(broken / "checkpoints" / "journal.jsonl")) - 1 - LAMPS
        first = server.bodies[:answered]
        server.respond = unbiased
        del server.bodies[:]
        outcome = run_feedback(server, inputs, broken)
        again = prompt_counts(server)
    assert answered >= 4
    assert len(server.bodies) == 2 * LAMPS - answered
    assert set(again.values()) == {1}
    assert outcome.metrics["judgeRequests"] == 2 * LAMPS
    assert not again.keys() & {body["messages"][0]["content"] for body in first}
    same = [(folder / "preferences.jsonl").read_text() for folder in (whole, broken)]
    assert same[0] == same[1]


def test_a_journal_with_an_incomplete_line_loses_only_that_line(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs, workdir)
        journal = workdir / "checkpoints" / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-5])
        del server.bodies[:]
        run_feedback(server, inputs, workdir)
    assert len(server.bodies) == 1


def test_a_journal_of_another_identity_is_not_used(inputs: dict[str, Path], workdir: Path) -> None:
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs, workdir)
        del server.bodies[:]
        run_feedback(server, inputs, workdir, worker=replace(WORKER, identity="sha256:two"))
    assert len(server.bodies) == 2 * LAMPS


def test_an_outage_ends_the_attempt_and_the_next_one_sends_the_rest(
    inputs: dict[str, Path], workdir: Path
) -> None:
    def unavailable(body: dict[str, Any], number: int) -> Answer:
        return Answer(b"out of order", status=503) if number >= 2 else unbiased(body, number)

    with JudgeServer(unavailable) as server:
        with pytest.raises(StageError, match="out of order") as caught:
            run_feedback(server, inputs, workdir)
        assert caught.value.reason == "JudgeUnavailable"
        assert caught.value.retryable
        server.respond = unbiased
        before = len(server.bodies)
        outcome = run_feedback(server, inputs, workdir)
    assert len(server.bodies) - before == 2 * LAMPS - 2
    assert outcome.metrics["labels"] == LAMPS


def test_a_stopped_stage_keeps_its_replies(inputs: dict[str, Path], workdir: Path) -> None:
    with JudgeServer(unbiased) as server:
        worker = replace(WORKER, stop=lambda: len(server.bodies) >= 3)
        with pytest.raises(Interrupted):
            run_feedback(server, inputs, workdir, worker=worker)
        stopped = len(server.bodies)
        run_feedback(server, inputs, workdir)
    assert stopped < 2 * LAMPS
    assert len(server.bodies) == 2 * LAMPS


def test_the_budget_covers_whole_pairs_and_a_restart_adds_nothing(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with JudgeServer(unbiased) as server:
        for _ in range(2):
            outcome = run_feedback(server, inputs, workdir, max_requests=7)
            assert len(server.bodies) == 7
    assert outcome.metrics["labels"] == 3
    assert outcome.metrics["unlabeled"] == LAMPS - 3
    assert outcome.metrics["budgetSpent"] == 1.0


def test_a_budget_too_small_for_one_label_fails_the_stage(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with (
        JudgeServer(unbiased) as server,
        pytest.raises(StageError, match="maxRequests") as caught,
    ):
        run_feedback(server, inputs, workdir, max_requests=1)
    assert caught.value.reason == "BudgetSpent"


# ---- a model as judge ---------------------------------------------------------------------------


def test_a_model_judges_without_an_endpoint(inputs: dict[str, Path], workdir: Path) -> None:
    """Random weights prefer one letter, and the mean of both orders still decides."""
    stage = feedback_stage(None, disagreement="average", question="{first}\nor\n{second}? A or B?")
    outcome = feedback.run(
        StageContext(stage, inputs | {"judge": inputs["model"]}, workdir, WORKER)
    )
    rows = rows_of(workdir / "preferences.jsonl")
    assert len(rows) == outcome.metrics["labels"] == LAMPS
    assert all(0.5 < row["probability"] < 1 for row in rows)
    assert rows[0]["provenance"]["judge"] == "hf://org/judge"


def test_a_prompt_longer_than_the_judges_context_is_not_truncated(
    inputs: dict[str, Path], workdir: Path
) -> None:
    stage = feedback_stage(None, question="{first} {second} " + "A or B? " * 100)
    with pytest.raises(StageError, match="exceed the judge's context of 256") as caught:
        feedback.run(StageContext(stage, inputs | {"judge": inputs["model"]}, workdir, WORKER))
    assert caught.value.reason == "JudgeUnavailable"


@pytest.fixture
def base_model(inputs: dict[str, Path], tmp_path: Path) -> Path:
    """The policy without its chat template."""
    base = tmp_path / "base"
    base.mkdir()
    for path in inputs["model"].iterdir():
        if path.name != "chat_template.jinja":
            (base / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template is None
    return base


def conversations(path: Path) -> Path:
    """Write prompts of three turns each."""
    turns = [{"role": role, "content": f"{role}?"} for role in ("user", "assistant", "user")]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


def test_a_policy_without_a_chat_template_gives_completions_of_plain_text(
    inputs: dict[str, Path], workdir: Path, base_model: Path
) -> None:
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs | {"model": base_model}, workdir)
    assert isinstance(rows_of(workdir / "preferences.jsonl")[0]["chosen"], str)


def test_a_policy_without_a_chat_template_is_labeled_on_all_turns_of_a_prompt(
    inputs: dict[str, Path], workdir: Path, base_model: Path
) -> None:
    """The labels hold the turns that the completions were sampled for."""
    prompts = conversations(workdir.parent / "prompts.jsonl")
    with JudgeServer(unbiased) as server:
        run_feedback(server, inputs | {"model": base_model, "prompts": prompts}, workdir)
    (row,) = rows_of(workdir / "preferences.jsonl")
    (found,) = parse_preferences(Row(1, row), FieldMap(), labeled=False)
    assert [turn.content for turn in found.prompt] == ["user?", "assistant?", "user?"]


def test_prompts_without_room_for_a_completion_fail_the_stage(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with (
        JudgeServer(unbiased) as server,
        pytest.raises(StageError, match="6 leave no room for 250") as caught,
    ):
        run_feedback(server, inputs, workdir, max_new_tokens=250)
    assert caught.value.reason == "NoPrompts"


# ---- critique -----------------------------------------------------------------------------------


def critique_stage(judge: JudgeEndpoint | None, **changes: Any) -> PlannedStage:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "chat": CHAT,
        "judge": judge_settings(judge) if judge else None,
        "principles": ["Be kind.", "Be brief."],
        "critique_request": "Criticize: {principle}",
        "revision_request": "Revise: {principle}",
        "revisions": 2,
        "max_new_tokens": 8,
        "seed": 1,
    }
    return PlannedStage(
        name="critique",
        settings=CritiqueSettings(**(settings | changes)),
        inputs={},
        runtime=TrainRuntime(endpoint=judge),
        fingerprint="sha256:test",
    )


def critic(body: dict[str, Any], _number: int) -> Answer:
    """Reply with the kind of the request and the number of messages."""
    messages = body["messages"]
    return completion(f"{messages[-1]['content'].partition(':')[0]} {len(messages)}")


def test_a_completion_is_criticized_and_revised_round_by_round(
    inputs: dict[str, Path], workdir: Path
) -> None:
    with JudgeServer(critic) as server:
        stage = critique_stage(server.settings())
        outcome = critique.run(StageContext(stage, inputs, workdir, WORKER))
    assert len(server.bodies) == 4 * LAMPS
    assert outcome.metrics["revisions"] == LAMPS
    assert outcome.metrics["roundsPerRevision"] == 2.0
    written = rows_of(workdir / "critiques.jsonl")[0]
    assert [one["critique"] for one in written["rounds"]] == ["Criticize 3", "Criticize 3"]
    assert [one["revision"] for one in written["rounds"]] == ["Revise 5", "Revise 5"]
    second = [b["messages"] for b in server.bodies if b["messages"][1]["content"] == "Revise 5"]
    assert len(second) == 2 * LAMPS  # the second round criticizes the revision of the first


def test_the_stage_prepare_reads_the_revisions(inputs: dict[str, Path], workdir: Path) -> None:
    with JudgeServer(critic) as server:
        critique.run(StageContext(critique_stage(server.settings()), inputs, workdir, WORKER))
    settings = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
    found = list(
        examples(workdir / "revisions.jsonl", settings, on_invalid="error", name="revisions")
    )
    assert len(found) == LAMPS
    assert [turn.content for turn in found[0].messages] == ["Which port has lamp 0?", "Revise 5"]


def test_the_revisions_of_a_model_without_a_chat_template_keep_all_turns(
    inputs: dict[str, Path], workdir: Path, base_model: Path
) -> None:
    prompts = conversations(workdir.parent / "prompts.jsonl")
    with JudgeServer(critic) as server:
        stage = critique_stage(server.settings())
        given = inputs | {"model": base_model, "prompts": prompts}
        critique.run(StageContext(stage, given, workdir, WORKER))
    (row,) = rows_of(workdir / "revisions.jsonl")
    assert row["prompt"] == (
        "\n\nHuman: user?\n\nAssistant: assistant?\n\nHuman: user?\n\nAssistant: "
    )


def test_a_killed_critique_repeats_no_request(inputs: dict[str, Path], workdir: Path) -> None:
    def failing(body: dict[str, Any], number: int) -> Answer:
        return Answer(b"gone", status=401) if number >= 9 else critic(body, number)

    with JudgeServer(failing) as server:
        stage = critique_stage(server.settings())
        with pytest.raises(StageError, match="gone"):
            critique.run(StageContext(stage, inputs, workdir, WORKER))
        answered = len(rows_of(workdir / "checkpoints" / "journal.jsonl")) - 1 - LAMPS
        server.respond = critic
        del server.bodies[:]
        outcome = critique.run(StageContext(stage, inputs, workdir, WORKER))
    assert answered >= 8
    assert len(server.bodies) == 4 * LAMPS - answered
    assert outcome.metrics["revisions"] == LAMPS


def test_an_empty_reply_leaves_the_completion_unrevised(
    inputs: dict[str, Path], workdir: Path
) -> None:
    """A completion without a revision is not written."""

    def sometimes_empty(body: dict[str, Any], number: int) -> Answer:
        empty = body["messages"][0]["content"] == "Which port has lamp 2?"
        return completion("  ") if empty else critic(body, number)

    with JudgeServer(sometimes_empty) as server:
        outcome = critique.run(
            StageContext(critique_stage(server.settings()), inputs, workdir, WORKER)
        )
    assert outcome.metrics["unrevised"] == outcome.metrics["judgeNonsense"] == 1
    assert len(rows_of(workdir / "revisions.jsonl")) == LAMPS - 1


def test_the_model_can_be_its_own_critic(
    inputs: dict[str, Path], workdir: Path, fluent_model_dir: Path
) -> None:
    stage = critique_stage(None, revisions=1)
    outcome = critique.run(
        StageContext(stage, inputs | {"model": fluent_model_dir}, workdir, WORKER)
    )
    assert outcome.metrics["revisions"] == LAMPS
    assert outcome.details["critic"] == "the model itself"


def test_without_a_revision_the_stage_fails(inputs: dict[str, Path], workdir: Path) -> None:
    def run(respond: Callable[[dict[str, Any], int], Answer], **changes: Any) -> str:
        with JudgeServer(respond) as server, pytest.raises(StageError) as caught:
            critique.run(
                StageContext(critique_stage(server.settings(**changes)), inputs, workdir, WORKER)
            )
        return caught.value.reason

    assert run(lambda _body, _number: completion("")) == "JudgeNonsense"
    assert run(critic, max_requests=3) == "BudgetSpent"
