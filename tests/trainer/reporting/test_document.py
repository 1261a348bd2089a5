"""The report as a document: `report.json`, which other programs read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finished import MANIFEST, folders, record
from tuneyard.api.evaluation import prefixed
from tuneyard.api.report import VERSION, Comparison, Forgetting, JobReport
from tuneyard.api.suites import KINDS
from tuneyard_trainer.reporting import report, words
from tuneyard_trainer.reporting.answered import MAX_SUITE_ANSWERS, shares, suite_answers
from tuneyard_trainer.reporting.comparisons import comparisons
from tuneyard_trainer.reporting.differing import differing
from tuneyard_trainer.reporting.formatting import ABSENT
from tuneyard_trainer.reporting.intervals import Bars

FROZEN = Path(__file__).parent / "report_keys.json"


def evaluated(root: Path, **changes: Any) -> dict[str, Path]:
    """Write the inputs of an export. `changes`: keys of the evaluation's record and, as `items` and
    `answers`, of its file."""
    inputs = folders(root / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    file = {key: changes.pop(key) for key in ("items", "answers") if key in changes}
    (inputs["evaluation"] / "evaluation.json").write_text(json.dumps(file))
    value["metrics"] |= changes.pop("metrics", {})
    value["details"] |= changes
    path.write_text(json.dumps(value))
    return inputs


def reported(root: Path, inputs: dict[str, Path], manifest: dict[str, Any] = MANIFEST) -> JobReport:
    """Write the report and read its document, as another program does."""
    result = root / "result"
    (result / "adapter").mkdir(parents=True)
    report.write(result, inputs, manifest=manifest, measured={}, base_license=None)
    return JobReport.model_validate_json((result / "report.json").read_text("utf-8"))


def keys(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Return the fields of a JSON Schema's objects, by object."""
    parts = {"JobReport": schema, **schema["$defs"]}
    return {name: sorted(part["properties"]) for name, part in sorted(parts.items())}


def test_the_fields_of_the_document_stay() -> None:
    found = keys(JobReport.model_json_schema(by_alias=True, mode="serialization"))
    expected = json.loads(FROZEN.read_text())
    assert expected["version"] == VERSION
    assert found == expected["fields"]


def test_a_finished_job_gives_a_document_that_reads_back(tmp_path: Path) -> None:
    found = reported(tmp_path, evaluated(tmp_path))
    assert found.job.name == "support-bot"
    assert found.job.base_model == "hf://acme/small-model"
    right = next(each for each in found.comparisons if each.metric == "answerAccuracy")
    assert (right.base, right.tuned, right.verdict) == (1 / 16, 14 / 16, "better")
    assert [curve.metric for curve in found.curves] == ["loss", "learningRate"]
    assert found.answers[0].tuned_right is True
    assert found.answers[0].flipped == "gained"
    assert found.memory[0].measured_bytes == 1610612736
    assert [stage.seconds for stage in found.stages] == [75.0, 120.0, 75.0]


# ---- comparisons ---------------------------------------------------------------------------------


def compared(metrics: dict[str, float], evidence: dict[str, Any] | None = None) -> Comparison:
    """Return the only comparison of some metrics."""
    (found,) = comparisons(metrics, evidence or {}, per_token=True)
    return found


@pytest.mark.parametrize(
    ("tuned", "interval", "verdict", "clear"),
    [
        (0.9, [0.1, 0.5], "better", True),
        (0.3, [-0.5, -0.1], "worse", True),
        (0.9, [-0.1, 0.9], "unclear", False),
        (0.9, [0.0, 0.9], "unclear", False),
        (0.9, None, "better", None),
        (0.6, [-0.1, 0.1], "equal", False),
    ],
)
def test_a_verdict_needs_an_interval_without_0_where_one_is_known(
    tuned: float, interval: list[float] | None, verdict: str, clear: bool | None
) -> None:
    evidence = {"exactMatch": {"differenceInterval": interval}}
    found = compared({"exactMatch": tuned, "baseExactMatch": 0.6}, evidence)
    assert (found.verdict, found.clear) == (verdict, clear)


def test_of_a_loss_lower_is_better_and_its_perplexity_is_as_clear_as_the_loss() -> None:
    metrics = {"validationLoss": 1.0, "baseValidationLoss": 1.1}
    metrics |= {"validationPerplexity": 2.7, "baseValidationPerplexity": 3.0}
    for interval, verdict in ([-0.2, -0.01], "better"), ([-0.2, 0.1], "unclear"):
        evidence = {"validationLoss": {"differenceInterval": interval}}
        found = comparisons(metrics, evidence, per_token=True)
        assert [each.verdict for each in found] == [verdict, verdict]


def test_a_share_of_an_alignment_is_compared_with_a_random_choice() -> None:
    found = compared({"winRate": 0.75}, {"winRate": {"interval": [0.6, 0.9], "items": 40}})
    assert (found.base, found.base_is_chance, found.verdict) == (0.5, True, "better")
    assert found.difference_interval == pytest.approx((0.1, 0.4))
    assert compared({"winRate": 0.75}, {"winRate": {"interval": [0.4, 0.9]}}).verdict == "unclear"


def test_signs_of_reward_hacking_and_unknown_directions_have_no_verdict() -> None:
    assert compared({"repetition": 0.9, "startRepetition": 0.1}).verdict == "none"
    assert (
        compared({"task/word_perplexity": 9.0, "task/baseWord_perplexity": 3.0}).verdict == "none"
    )


def test_numbers_that_are_not_finite_are_null() -> None:
    metrics = {"answerAccuracy": math.nan, "baseAnswerAccuracy": 1.0}
    found = compared(metrics, {"answerAccuracy": {"items": 3, "higherIsBetter": True}})
    assert (found.tuned, found.base, found.difference, found.verdict) == (None, 1.0, None, "none")
    sentences = words.summary([found], [], None, None)
    assert sentences[0] == "Nothing got clearly better."
    assert sentences[2] == "Not a number, so the model may have diverged: answers right."


# ---- answers -------------------------------------------------------------------------------------


def sample(number: int, base: str, tuned: str, *expected: str) -> dict[str, Any]:
    where = f"row {number}"
    return {"where": where, "prompt": "?", "base": base, "tuned": tuned, "expected": expected}


def test_answers_flip_by_the_expected_text_and_get_worse_by_the_first_metric_that_differs(
    tmp_path: Path,
) -> None:
    given = [
        sample(1, "no", "yes", "yes"),
        sample(2, "yes", "no", "yes"),
        sample(3, "yes", "yes, well", "yes"),
        sample(4, "a", "b"),
        sample(5, "a", "b"),
        sample(6, "a", "b"),
    ]
    ids = [f"row {number}" for number in range(1, 7)]
    items = {
        "validationLoss": {"ids": ids, "tuned": [9.0] * 6, "base": [1.0, 1, 1, 1, 1, 9]},
        "tokenF1": {
            "ids": ids,
            "tuned": [1.0, 0, 0.5, 0.9, 0.2, 0.5],
            "base": [0.0, 1, 1.0, 0.1, 0.2, None],
        },
        "grammar/accuracy": {"ids": ids, "tuned": [0.0] * 6, "base": [1.0] * 6},
    }
    metrics = {"tokenF1": 0.5, "baseTokenF1": 0.5, "grammar/accuracy": 0.0}
    found = reported(tmp_path, evaluated(tmp_path, answers=given, items=items, metrics=metrics))
    assert [answer.flipped for answer in found.answers[:3]] == ["gained", "lost", "none"]
    assert [answer.worse for answer in found.answers] == [False, True, True, False, True, False]
    assert found.answers[0].scores.keys() == {"validationLoss", "tokenF1"}
    assert found.answers[5].scores["tokenF1"].base is None
    assert found.answers_total == 6


def test_without_expected_texts_an_answer_is_right_by_a_metric_of_0_and_1(tmp_path: Path) -> None:
    items = {"jsonValid": {"ids": ["row 1"], "tuned": [1.0], "base": [0.0]}}
    metrics = {"jsonValid": 1.0, "baseJsonValid": 0.0}
    inputs = evaluated(tmp_path, answers=[sample(1, "x", "{}")], items=items, metrics=metrics)
    (answer,) = reported(tmp_path, inputs).answers
    assert (answer.base_right, answer.tuned_right, answer.flipped) == (False, True, "gained")


def test_answers_to_suites_are_beside_the_others_with_their_own_scores(tmp_path: Path) -> None:
    """An item of a suite may have the name of a held-out row."""
    columns = {
        "id": ["row 1", "row 2"],
        "prompt": ["Who?", "Where?"],
        "targets": [["We", "Us"], [""]],
        "tuned": ["we", "x" * 9000],
        "base": ["they", "there"],
    }
    items = {
        "tokenF1": {"ids": ["row 1"], "tuned": [0.5], "base": [0.5]},
        "people/numericMatch": {"ids": ["row 1", "row 2"], "tuned": [1.0, 0], "base": [0.0, 1]},
    }
    metrics = {"tokenF1": 0.5, "people/numericMatch": 0.5, "people/baseNumericMatch": 0.5}
    inputs = evaluated(tmp_path, answers=[sample(1, "x", "y")], items=items, metrics=metrics)
    file = inputs["evaluation"] / "evaluation.json"
    without_base = {name: column for name, column in columns.items() if name != "base"}
    suites = {"people": columns, "alone": without_base}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suiteAnswers": suites}))
    found = reported(tmp_path, inputs)
    assert [(each.id, each.suite) for each in found.answers] == [("row 1", None)]
    assert found.answers[0].scores.keys() == {"tokenF1"}
    assert found.answers_total == 1
    assert [each.suite for each in found.suite_answers] == ["people", "people", "alone", "alone"]
    gained, lost, alone, _ = found.suite_answers
    assert (gained.prompt, gained.reference, gained.expected) == ("Who?", "We\nUs", [])
    assert gained.scores.keys() == {"numericMatch"}
    assert (gained.base_right, gained.tuned_right, gained.flipped) == (False, True, "gained")
    assert (lost.flipped, lost.worse, lost.reference, lost.clipped) == ("lost", True, "", True)
    assert len(lost.tuned) == 8001
    assert (alone.base, alone.base_right, alone.scores) == (None, None, {})


def test_no_suite_takes_the_room_of_another_in_the_document() -> None:
    def columns(count: int) -> dict[str, list[Any]]:
        ids = [f"row {number}" for number in range(count)]
        texts = [""] * count
        return {"id": ids, "targets": [[""]] * count, "tuned": texts, "base": texts}

    found = suite_answers({"large": columns(1000), "small": columns(9)}, {}, [])
    assert len(found) == MAX_SUITE_ANSWERS
    assert sum(each.suite == "small" for each in found) == 9


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([], 10, []),
        ([3, 4], 10, [3, 4]),
        ([300, 2, 300], 10, [4, 2, 4]),
        ([5, 5, 5], 10, [3, 3, 4]),
        ([5, 5, 5], 0, [0, 0, 0]),
    ],
)
def test_the_room_is_shared_evenly(sizes: list[int], most: int, expected: list[int]) -> None:
    assert shares(sizes, most) == expected


def test_long_answers_are_cut_and_say_so(tmp_path: Path) -> None:
    inputs = evaluated(tmp_path, answers=[sample(1, "x", "y" * 9000)])
    (answer,) = reported(tmp_path, inputs).answers
    assert (len(answer.tuned), answer.length, answer.clipped) == (8001, 9000, True)


def test_an_evaluation_without_a_file_shows_the_samples_of_its_record(tmp_path: Path) -> None:
    """Evaluations of earlier versions hold no answers."""
    found = reported(tmp_path, folders(tmp_path / "stages"))
    assert [answer.id for answer in found.answers] == [""]
    assert found.answers_total == 1


# ---- lineage, words -------------------------------------------------------------------


def test_jobs_among_the_sources_are_parents(tmp_path: Path) -> None:
    spec = MANIFEST["spec"] | {"model": {"uri": "job://before"}}
    found = reported(tmp_path, folders(tmp_path / "stages"), MANIFEST | {"spec": spec})
    assert [(each.role, each.uri) for each in found.lineage.parents] == [("model", "job://before")]
    sources = {each.role: each.digest for each in found.lineage.sources}
    assert sources == {"model": "sha256:base", "train.0": "sha256:rows"}


def written(folder: Path, stage: str, kind: str, inputs: dict[str, str], **details: Any) -> None:
    """Write the record of a stage that took an hour, before the others."""
    (folder / stage).mkdir()
    value = record(kind, {"peakMemoryBytes": 2.0**30, "trainingSeconds": 3600.0}, **details)
    changes = {"stage": stage, "input_digests": inputs, "digest": f"sha256:{stage}",
               "started_at": "2025-12-31T00:00:00Z"}  # fmt: skip
    text = value.model_copy(update=changes).model_dump_json(by_alias=True)
    (folder / stage / "record.json").write_text(text)


def test_all_stages_of_the_run_are_counted_and_none_of_an_earlier_one(tmp_path: Path) -> None:
    inputs, stages = evaluated(tmp_path), tmp_path / "stages"
    read = {"reward": "sha256:reward", "model": "sha256:base", "train.0": "sha256:rows"}
    path = inputs["tuned"] / "record.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"inputDigests": read}))
    written(stages, "reward", "reward", {"pairs": "sha256:pairs"})
    written(stages, "pairs", "pairs", {"preferences.0": "sha256:other"})
    written(stages, "old", "reward", {"model": "sha256:base"})  # read by no stage of the run
    found = reported(tmp_path, inputs)
    assert {each.name for each in found.stages} == {"prepare", "sft", "evaluate", "reward", "pairs"}
    assert found.seconds == sum(each.seconds for each in found.stages) > 7200
    memory = {each.stage: each.measured_bytes for each in found.memory}
    assert memory == {"reward": 2**30, "sft": 1610612736}
    assert found.ledger == []  # of the data of the result alone


@pytest.mark.parametrize("searched", ["sha256:rows", "sha256:earlier"])
def test_items_of_suites_in_the_training_data_are_a_warning_of_the_report(
    tmp_path: Path, searched: str
) -> None:
    leak = {"item": "a.jsonl row 1", "training": "train.jsonl row 2", "span": "which lamp"}
    leaks = {"items": 1, "checked": 9, "examples": [leak]}
    inputs = evaluated(tmp_path)
    written(tmp_path / "stages", "leaks", "leaks", {"train.0": searched}, leaks=leaks)
    found = reported(tmp_path, inputs)
    said = [each for each in found.warnings if "1 of 9 items of suites have text" in each]
    assert bool(said) == (searched == "sha256:rows")
    card = (tmp_path / "result/README.md").read_text("utf-8")
    assert ("items of suites" in card) == bool(said)


def test_prompts_rewards_and_judges_are_sources_and_what_only_measures_is_none(
    tmp_path: Path,
) -> None:
    inputs = evaluated(tmp_path)
    for stage, kind, read in (
        ("tuned", "grpo", {"model": "sha256:base", "prompts": "sha256:prompts",
                           "reward": "sha256:reward", "reward.1": "sha256:second"}),
        ("evaluation", "evaluate", {"model": "sha256:base", "judge": "sha256:judge"}),
    ):  # fmt: skip
        path = inputs[stage] / "record.json"
        value = json.loads(path.read_text()) | {"kind": kind, "inputDigests": read}
        path.write_text(json.dumps(value))
    judge = {"judge": {"model": {"uri": "hf://a/judge"}}}
    spec = {
        "model": {"uri": "job://before"},
        "rewardModel": {"model": {"uri": "hf://a/reward"}},
        "rewardTerms": [{"rule": {"exactMatch": "answer"}}, {"model": {"uri": "hf://a/second"}}],
        "optimize": {"grpo": {"prompts": {"uri": "pvc://data/prompts.jsonl"}}},
        "evaluate": {"winRate": judge},
    }
    manifest = {"kind": "AlignmentJob", "metadata": {"name": "a"}, "spec": spec}
    found = reported(tmp_path, inputs, manifest).lineage
    assert [(each.role, each.uri, each.digest) for each in found.sources] == [
        ("model", "job://before", "sha256:base"),
        ("prompts", "pvc://data/prompts.jsonl", "sha256:prompts"),
        ("reward", "hf://a/reward", "sha256:reward"),
        ("reward.1", "hf://a/second", "sha256:second"),
        ("train.0", "", "sha256:rows"),
    ]
    assert [each.uri for each in found.parents] == ["job://before"]


def test_the_judge_of_a_feedback_is_a_source(tmp_path: Path) -> None:
    inputs, read = evaluated(tmp_path), {"labels": "sha256:labels"}
    path = inputs["tuned"] / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputDigests": read}))
    written(tmp_path / "stages", "labels", "feedback",
            {"judge": "sha256:judge", "prompts": "sha256:prompts"})  # fmt: skip
    step = {"judge": {"model": {"uri": "hf://a/judge"}}, "prompts": {"uri": "pvc://data/p.jsonl"}}
    spec = MANIFEST["spec"] | {"preferences": {"aiFeedback": step}}
    found = reported(tmp_path, inputs, MANIFEST | {"spec": spec}).lineage.sources
    assert {each.role: each.uri for each in found} == {
        "model": "hf://acme/small-model",
        "judge": "hf://a/judge",
        "prompts": "pvc://data/p.jsonl",
        "train.0": "file://data/train.jsonl",
    }


def test_a_job_that_measured_nothing_says_so(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages", lines=[])
    for role in ("evaluation", "tuned"):
        (inputs[role] / "record.json").unlink()
    found = reported(tmp_path, inputs)
    assert found.summary == ["No rows were held out, so the result was not measured."]
    assert found.comparisons == []


@pytest.mark.parametrize(
    ("gain", "error", "start"),
    [
        (0.25, 0.05, "Tuning was worth it."),
        (-0.25, 0.05, "Tuning was not worth it."),
        (0.25, 0.2, "Whether tuning was worth it is not clear."),
    ],
)
def test_tuning_was_worth_it_if_it_clearly_beats_examples_in_the_prompt(
    gain: float, error: float, start: str
) -> None:
    metrics = {
        "answerAccuracy": 0.75,
        "baseAnswerAccuracy": 0.25,
        "baseFewShotAnswerAccuracy": 0.75 - gain,
        "answerAccuracyFewShotGain": gain,
        "answerAccuracyFewShotGainError": error,
    }
    sentences = words.summary([compared(metrics)], [], None, (4, 200.0))
    assert sentences[2].startswith(start)
    assert sentences[:2] == [
        "Better: answers right rose from 25 % to 75 %.",
        "Nothing got clearly worse.",
    ]


@pytest.mark.parametrize(
    ("metric", "base", "tuned", "interval", "sentence"),
    [
        ("exactMatch", 0.501, 0.504, [0.001, 0.005], "exact match rose from 50.1 % to 50.4 %"),
        ("validationLoss", 1.00012, 1.00011, [-2e-5, -1e-6],
         "held-out loss fell from 1.00012 to 1.00011"),
        ("exactMatch", 0.5, 0.504, [-0.1, 0.2], "exact match stayed at 50 %"),
    ],
)  # fmt: skip
def test_a_clear_difference_is_not_said_to_be_none(
    metric: str, base: float, tuned: float, interval: list[float], sentence: str
) -> None:
    metrics = {metric: tuned, prefixed("base", metric): base}
    each = compared(metrics, {metric: {"differenceInterval": interval}})
    found = words.summary([each], [], None, None)
    clear = interval[0] > 0 or interval[1] < 0
    assert f"{'Better' if clear else 'No clear difference'}: {sentence}." in found


def test_a_difference_below_a_point_is_not_shown_as_0() -> None:
    each = compared({"exactMatch": 0.504, "baseExactMatch": 0.5})
    assert words.shown_difference(each.difference, each) == "+0.4 points"
    assert words.shown_interval((0.001, 0.012), each, plus=True) == "+0.1 to +1 points"
    assert words.shown_difference(0.0003, each) == "+0.03 points"
    assert words.shown_interval((-1e-17, 0.3), each) == "0 to 30 %"


def test_one_point_is_no_points_and_minus_is_one_sign() -> None:
    each = compared({"exactMatch": 0.49, "baseExactMatch": 0.5})
    assert words.shown_difference(-0.01, each) == "\u22121 point"
    assert words.shown_difference(0.02, each) == "+2 points"
    reward = compared({"reward": -1.5, "startReward": 1.5})
    assert (words.shown(-1.5, reward), words.shown(1.5, reward)) == ("\u22121.500", "1.500")
    assert words.shown(None, reward) == ABSENT


@pytest.mark.parametrize(
    ("increase", "said"),
    [(0.0, "did not change"), (0.1, "rose by 0.100 nats per token"),
     (-0.1, "fell by 0.100 nats per token")],
)  # fmt: skip
def test_the_loss_on_general_data_falls_only_if_it_does(increase: float, said: str) -> None:
    general = Forgetting(base_loss=3.0, loss=3.0 + increase, increase=increase, allowed=0.2)
    each = compared({"exactMatch": 0.5, "baseExactMatch": 0.5})
    (found,) = [line for line in words.summary([each], [], general, None) if "general" in line]
    assert found == f"The loss on general data {said}; the guard allows an increase of 0.200."


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_suite_is_named(tmp_path: Path, kind: str) -> None:
    suite = {"name": "words", kind: {"uri": "file://a.jsonl"}}
    manifest = MANIFEST | {"spec": MANIFEST["spec"] | {"evaluate": {"suites": [suite]}}}
    inputs = evaluated(tmp_path, metrics={"words/exactMatch": 0.5})
    (found,) = reported(tmp_path, inputs, manifest).suites
    assert (found.name, found.kind, found.metrics) == ("words", kind, ["words/exactMatch"])


def test_words_that_differ_are_marked_unless_nearly_all_do() -> None:
    parts = differing("It uses port 81 now.", "It uses port 80 now.")
    assert [part.text for part in parts if part.differs] == ["81"]
    assert "".join(part.text for part in parts) == "It uses port 81 now."
    assert differing("One thing.", "Quite another story") == [("One thing.", False)]
    assert differing("Same.", None) == [("Same.", False)]


def test_bars_are_on_one_scale_and_inside_the_picture() -> None:
    share = compared(
        {"exactMatch": 1.0, "baseExactMatch": 0.0}, {"exactMatch": {"interval": [0.8, 1]}}
    )
    found = Bars.of(share)
    assert found is not None
    assert [(bar.model, bar.x) for bar in found.bars] == [("base", 6.0), ("tuned", 144.0)]
    assert found.bars[1].low == pytest.approx(6 + 0.8 * 138, abs=0.1)
    assert Bars.of(compared({"exactMatch": 1.0, "baseExactMatch": 0.0})) is None
    equal = compared({"kl": 2.0}, {"kl": {"interval": [2.0, 2.0]}})
    found = Bars.of(equal)
    assert found is not None
    assert found.bars[0].x == 75.0
