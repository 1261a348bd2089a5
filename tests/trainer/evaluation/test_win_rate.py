"""The win rate of the aligned model by a second judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.evaluation.measuring import ALONE, alignment_stage
from tests.trainer.judge_server import QUESTION, Answer, JudgeServer, answers_of, completion
from tests.trainer.speaking import share_of, write_prompts
from tuneyard.api.plan import Plan, TrainRuntime
from tuneyard.api.stage_settings import JudgeSettings, WinRateSettings
from tuneyard.errors import StageError
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation.length_controlled import LengthControlled, length_controlled
from tuneyard_trainer.evaluation.part import Answered, Found
from tuneyard_trainer.evaluation.win_rate import (
    WinRate,
    at_equal_length,
    make_pairs,
    win_rate_metrics,
)
from tuneyard_trainer.judging.judges import Verdict
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.worker import StageContext


def verdicts(*outcomes: Any) -> list[Verdict]:
    return [Verdict(outcome, 0.5, outcome in ("first", "second")) for outcome in outcomes]


# ---- metrics ----------------------------------------------------------------------------------


def test_undecided_pairs_count_half_and_unlabeled_pairs_do_not_count() -> None:
    found = win_rate_metrics(
        verdicts("first", "second", "second", "dropped", "tie", "unlabeled"), 0
    )
    assert found == {"winRate": 0.4, "judgeAgreement": 0.6, "judgedPairs": 5.0}


def test_identical_completions_count_half_and_leave_the_agreement_unchanged() -> None:
    found = win_rate_metrics(verdicts("first", "first"), identical=2)
    assert found == {"winRate": 0.75, "judgeAgreement": 1.0, "judgedPairs": 2.0}
    assert win_rate_metrics([], identical=3) == {"winRate": 0.5, "judgedPairs": 0.0}


def test_a_judge_that_decides_nothing_leaves_no_win_rate() -> None:
    assert win_rate_metrics(verdicts("unlabeled"), identical=5) == {"judgedPairs": 0.0}


def test_only_completions_that_differ_are_compared_the_tuned_models_first() -> None:
    pairs = make_pairs([("Ho", "same", "same"), ("Hi", "new", "old")], ["be kind"], seed=1)
    assert pairs.keys() == {1}
    assert pairs[1].completions == ("new", "old")
    changed = make_pairs([("Ho", "same", "same"), ("Hi", "newer", "old")], ["be kind"], seed=1)
    assert pairs[1].key != changed[1].key


# ---- at equal length --------------------------------------------------------------------------


def test_the_win_rate_at_equal_length_is_that_of_the_judged_prompts_and_of_ties() -> None:
    """Lengths are in characters; prompts without a verdict are left out, in both win rates."""
    prompts = [Prompt(messages=(), where=f"row {n}") for n in range(50)]
    before = ["same"] * 50
    tuned = ["same" + "x" * (n % 7) if n % 2 else "s" * (1 + n % 3) for n in range(50)]
    tuned[4] = "same"
    answered = Answered(prompts, tuned, before, np.zeros(50))
    outcomes = {n: ("first", "second", "tie")[n % 3] for n in range(50) if n != 4}
    outcomes[6] = "unlabeled"
    found = dict(zip(outcomes, verdicts(*outcomes.values()), strict=True))
    result = at_equal_length(answered, found)
    kept = [n for n in range(50) if n != 6]
    wins = [0.5 if n == 4 else {"first": 1, "second": 0, "tie": 0.5}[outcomes[n]] for n in kept]
    longer = [len(tuned[n]) - 4 for n in kept]
    expected = length_controlled(np.array(wins, dtype=float), np.array(longer, dtype=float))
    assert isinstance(expected, LengthControlled)
    assert result.metrics["lengthControlledWinRate"] == expected.win_rate
    assert result.estimates["lengthControlledWinRate"].items == 49
    assert result.metrics["judgeLengthEffect"] == expected.length_effect


# ---- judgments that are missing -----------------------------------------------------------------


def rated(folder: Path, tuned: list[str], respond: Any, most: int | None = None) -> Found:
    """Let a judge compare completions with "same". `most`: its budget in requests."""
    judge = JudgeSettings(model="judge-2", max_requests=most, max_tokens=None, label_tokens=8)
    settings = WinRateSettings(judge=judge, principles=["be kind"], question=QUESTION)
    prompts = [Prompt(({"role": "user", "content": f"{n}?"},), f"row {n}") for n in range(30)]
    answered = Answered(prompts[: len(tuned)], tuned, ["same"] * len(tuned), np.ones(len(tuned)))
    with JudgeServer(respond) as server, SharedStage(ALONE) as shared:
        runtime = TrainRuntime(endpoint=server.settings(concurrency=1))
        stage = alignment_stage().model_copy(update={"runtime": runtime})
        context = StageContext(stage, {}, folder, ALONE)
        return WinRate(context, shared, settings, seed=1).rate(answered)


def test_without_a_judged_pair_there_is_no_win_rate_at_equal_length_either(
    tmp_path: Path,
) -> None:
    """The judge decides in one order alone; the 25 equal pairs are ties that it never saw."""
    tuned = [f"new {n}" if n < 5 else "same" for n in range(30)]
    found = rated(tmp_path, tuned, lambda _, number: completion("A" if number % 2 else "maybe"))
    assert found.metrics["judgedPairs"] == 0
    assert {"winRate", "lengthControlledWinRate"}.isdisjoint(found.metrics)
    assert not found.estimates


def test_a_spent_budget_is_told_and_fails_if_it_was_too_small_for_one_pair(
    tmp_path: Path,
) -> None:
    tuned = [f"new {n}" for n in range(4)]
    found = rated(tmp_path / "some", tuned, fewer_a, most=2)
    assert (found.metrics["judgedPairs"], found.metrics["budgetSpent"]) == (1.0, 1.0)
    found = rated(tmp_path / "all", tuned, fewer_a, most=8)
    assert (found.metrics["judgedPairs"], found.metrics["budgetSpent"]) == (4.0, 0.0)
    with pytest.raises(StageError, match="before any of 4 pairs was judged") as caught:
        rated(tmp_path / "none", tuned, fewer_a, most=1)
    assert caught.value.reason == "BudgetSpent"


# ---- a job ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hacked_reward() -> Iterator[None]:
    """Replace the reward by the share of the letter a in a completion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "load", lambda *_: share_of("a"))
        yield


@pytest.fixture(scope="module")
def aligned(
    hacked_reward: None, speaking_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished job without a win rate."""
    folder = tmp_path_factory.mktemp("aligned")
    run(job(folder, speaking_model_dir), folder)
    return folder


@pytest.fixture
def folder(aligned: Path, tmp_path: Path) -> Path:
    """A copy of the finished job; with a win rate it repeats the evaluation and the export only."""
    shutil.rmtree(shutil.copytree(aligned, tmp_path / "job") / "out" / "result")
    return tmp_path / "job"


def job(folder: Path, model: Path, **evaluate: Any) -> Plan:
    write_prompts(folder / "prompts.jsonl")
    optimize = {
        "prompts": {"uri": "file://prompts.jsonl"},
        "sampling": {"maxNewTokens": 12},
        "groupSize": 8,
        "training": {
            "maxSteps": 12,
            "batchSize": 32,
            "learningRate": 0.005,
            "schedule": {"type": "constant", "warmup": 0.0},
        },
    }
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "judged"},
        "spec": {
            "model": {"uri": f"file://{model}"},
            "rewardModel": {"rule": {"exactMatch": "prompt"}},
            "optimize": {"grpo": optimize},
            "evaluate": {"maxNewTokens": 12, "samples": 1, **evaluate},
            "output": {"uri": "file://out"},
        },
    }
    return plan_job(read(json.dumps(value))[0])


def run(planned: Plan, folder: Path) -> dict[str, Any]:
    """Run the plan and return the record of its evaluation."""
    found: dict[str, Any] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["stage"] == "evaluate" and event["record"]:
            found.update(event["record"])

    out = str(folder / "out")
    torchrun.run(planned, out, base_dir=folder, cache_dir=folder / "cache", emit=emit)
    return found


def fewer_a(body: dict[str, Any], _number: int) -> Answer:
    """Reply as a judge that prefers the completion with fewer letters a."""
    first, second = (answer.count("a") for answer in answers_of(body))
    return completion("A" if first < second else "B")


def at(server: JudgeServer) -> dict[str, Any]:
    endpoint = {"url": server.url, "model": "judge-2", "concurrency": 1}
    return {"judge": {"endpoint": endpoint}, "question": QUESTION, "principles": ["be kind"]}


def test_a_hacked_reward_rises_while_the_win_rate_falls(
    folder: Path, speaking_model_dir: Path
) -> None:
    with JudgeServer(fewer_a) as server:
        record = run(job(folder, speaking_model_dir, winRate=at(server)), folder)
        requests = len(server.bodies)
    metrics = record["metrics"]
    assert metrics["rewardGain"] > 0
    assert metrics["winRate"] < 0.5
    assert requests == metrics["judgeRequests"] == 2 * metrics["judgedPairs"]
    assert record["details"]["judge"] == "judge-2"
    assert record["details"]["lengthControlledWinRate"] == (
        "7 prompts were judged, and 20 are needed"
    )
    assert "lengthControlledWinRate" not in metrics
    card = (folder / "out" / "result" / "README.md").read_text()
    assert "Win rate by the judge" in card


def test_a_gate_on_the_win_rate_prevents_the_export_of_a_hacked_model(
    folder: Path, speaking_model_dir: Path
) -> None:
    gates = [{"metric": "winRate", "atLeast": 0.6}]
    with JudgeServer(fewer_a) as server:
        planned = job(folder, speaking_model_dir, winRate=at(server), gates=gates)
        with pytest.raises(StageError, match=r"winRate is .* below 0.6") as caught:
            run(planned, folder)
        assert caught.value.reason == "GateFailed"
        assert not (folder / "out" / "result").exists()


def test_requests_answered_before_an_outage_are_not_repeated(
    folder: Path, speaking_model_dir: Path
) -> None:
    def failing(body: dict[str, Any], number: int) -> Answer:
        return fewer_a(body, number) if number < 3 else Answer(status=401)

    with JudgeServer(failing) as server:
        planned = job(folder, speaking_model_dir, winRate=at(server))
        with pytest.raises(StageError) as caught:
            run(planned, folder)
        assert caught.value.reason == "JudgeForbidden"
        failed = len(server.bodies)
        server.respond = fewer_a
        metrics = run(planned, folder)["metrics"]
        assert len(server.bodies) - failed == 2 * metrics["judgedPairs"] - 3


def test_a_model_can_be_the_second_judge(
    folder: Path, speaking_model_dir: Path, tiny_model_dir: Path
) -> None:
    judge = {"model": {"uri": f"file://{tiny_model_dir}"}}
    win_rate = {"judge": judge, "question": QUESTION, "principles": ["be kind"]}
    record = run(job(folder, speaking_model_dir, winRate=win_rate), folder)
    assert 0 <= record["metrics"]["winRate"] <= 1
    assert record["details"]["judge"] == judge["model"]["uri"]
