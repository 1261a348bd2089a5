"""Comparisons of finished jobs: which job is better, what differs, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.comparison.outputs import QUESTIONS, write_output
from tests.trainer.finished import MANIFEST
from tuneyard.api.comparison import Comparison, MetricRow
from tuneyard.api.report import VERSION
from tuneyard.errors import ManifestError
from tuneyard_trainer.comparison.compare import compare
from tuneyard_trainer.comparison.job_result import Named, read_job
from tuneyard_trainer.comparison.units import unit_of
from tuneyard_trainer.evaluation.items import Items

REPORT = {"job": {"name": "b", "kind": "FineTuneJob", "baseModel": "", "method": ""}, "summary": []}
LOSSES = np.random.default_rng(1).gamma(4, 0.5, 40)
NOISE = np.random.default_rng(2).normal(0, 0.05, 40)


def compared(*folders: Path) -> Comparison:
    return compare([Named(str(folder), str(folder)) for folder in folders])


def row(found: Comparison, metric: str = "validationLoss") -> MetricRow:
    return next(each for each in found.metrics if each.metric == metric)


def refused(*folders: Path) -> list[str]:
    with pytest.raises(ManifestError) as error:
        compared(*folders)
    return [str(fault) for fault in error.value.faults]


def job(root: Path, name: str, change: float = 0.0, **options: Any) -> Path:
    """Write a job whose losses are those of the others plus a change."""
    options.setdefault("losses", [*(LOSSES + change + (NOISE if change else 0))])
    return write_output(root / name, name, **options)


# ---- which is better ----------------------------------------------------------------------------


def test_a_job_is_best_if_the_paired_difference_is_clear_although_the_intervals_overlap(
    tmp_path: Path,
) -> None:
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", -0.1))
    loss = row(found)
    (difference,) = loss.differences
    first, second = loss.intervals
    assert first is not None
    assert second is not None
    assert second[1] > first[0]  # without pairing nothing is clear
    assert (difference.basis, difference.items) == ("paired", 40)
    assert (difference.better, loss.best) == (1, 1)
    assert (
        found.sentences[0]
        == "b is better than a on validationLoss, the only metric that was compared."
    )
    assert found.sentences[1].startswith("b is better on validationLoss by 0.10")
    assert "40 items)" in found.sentences[1]


def test_a_higher_value_is_not_better_if_lower_is(tmp_path: Path) -> None:
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", 0.1))
    assert row(found).best == 0


def test_no_job_is_best_without_a_clear_difference(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).normal(0, 0.3, 40)
    other = job(tmp_path, "b", losses=[*(LOSSES + noise - noise.mean())])
    found = compared(job(tmp_path, "a"), other)
    assert row(found).best is None
    assert row(found).differences[0].better is None
    assert found.sentences[0] == "No clear difference between a and b on 1 metric."
    assert not any("better" in sentence for sentence in found.sentences)


def test_of_three_jobs_the_best_is_better_than_each_other_one(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", -0.3), job(tmp_path, "c", -0.1)]
    found = compared(*jobs)
    assert row(found).best == 1
    assert found.sentences[0] == "b is best on validationLoss, the only metric that was compared."
    assert "better than a by 0.3" in found.sentences[1]
    assert "and than c by 0.2" in found.sentences[1]
    ahead = compared(jobs[0], jobs[1], job(tmp_path, "d", -0.3))
    assert row(ahead).best is None  # b and d are equal
    assert "On validationLoss none is best" in ahead.sentences[1]


def test_of_many_jobs_a_sentence_names_the_nearest_or_those_that_lead(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"j{number}", -0.1 * number) for number in range(6)]
    found = compared(*jobs)
    assert row(found).best == 5
    assert found.sentences[1].startswith(
        "j5 is best on validationLoss: better than each other job, than j4 by 0.10"
    )
    tied = compared(*jobs, job(tmp_path, "k", -0.5))
    assert row(tied).best is None
    assert "On validationLoss none is clearly better than j5 and k." in tied.sentences
    assert len(row(tied).differences) == 21


def test_the_difference_of_rights_is_that_of_flipped_answers(tmp_path: Path) -> None:
    a = job(tmp_path, "a", right=[0.0] * 20 + [1.0] * 20)
    b = job(tmp_path, "b", right=[1.0] * 36 + [0.0] * 4)
    accuracy = row(compared(a, b), "answerAccuracy")
    assert accuracy.best == 1
    assert accuracy.differences[0].value == pytest.approx(0.4)
    assert accuracy.values == pytest.approx([0.5, 0.9])


def test_few_items_make_no_job_better(tmp_path: Path) -> None:
    few = [*LOSSES[:9]]
    a, b = job(tmp_path, "a", losses=few), job(tmp_path, "b", losses=[loss / 9 for loss in few])
    found = compared(a, b)
    assert row(found).best is None
    assert any("validationLoss: the items are fewer than 10" in note for note in found.notes)


# ---- the same rows ------------------------------------------------------------------------------


def test_rows_are_paired_by_their_content_and_not_by_their_number(tmp_path: Path) -> None:
    turned = job(tmp_path, "b", losses=[*(LOSSES - 0.1)[::-1]], questions=QUESTIONS[::-1])
    (difference,) = row(compared(job(tmp_path, "a"), turned)).differences
    assert (difference.basis, difference.items) == ("paired", 40)
    assert difference.interval == pytest.approx((-0.1, -0.1))


def test_only_the_shared_rows_are_compared_and_the_others_are_named(tmp_path: Path) -> None:
    other = [*QUESTIONS[:30], *(f"Other {number}?" for number in range(10))]
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", -0.1, questions=other))
    assert row(found).differences[0].items == 30
    (note,) = (note for note in found.notes if "different rows" in note)
    assert "a 40 (digest " in note
    assert "30 of them are held out by all" in note


def test_jobs_with_other_rows_are_not_called_better(tmp_path: Path) -> None:
    other = [f"Other {number}?" for number in range(40)]
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", -1.5, questions=other))
    (difference,) = row(found).differences
    assert (difference.basis, difference.better) == ("otherRows", None)
    assert difference.interval is not None
    assert difference.interval[1] < 0
    assert row(found).best is None
    assert any("validationLoss of a and b is of other rows" in note for note in found.notes)
    assert found.sentences[0] == "validationLoss of a and b cannot be compared; the notes say why."


def test_losses_per_token_of_other_tokenizers_are_not_compared(tmp_path: Path) -> None:
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", -1.0, tokens=17, base="sha256:other"))
    (difference,) = row(found).differences
    assert (difference.basis, difference.value, difference.better) == ("otherUnit", None, None)
    assert any("counts other tokens" in note for note in found.notes)
    assert any(
        "different base models: a from hf://acme/small-model (digest base)" in note
        for note in found.notes
    )


def test_the_loss_of_a_training_on_preferences_is_not_one_per_token(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a", right=[1.0] * 40), job(tmp_path, "b", right=[1.0] * 40)
    trained = b / "stages/sft/record.json"
    trained.write_text(trained.read_text().replace('"kind":"sft"', '"kind":"dpo"'))
    for name in ("record.json", "evaluation.json"):
        path = b / "stages/evaluate" / name
        value = json.loads(path.read_text())
        for part in (value["metrics"], value.get("items", {}), value.get("evidence", {})):
            part.pop("validationLoss", None)
        path.write_text(json.dumps(value))
    found = compared(a, b)
    assert row(found).values[1] is None
    assert "Only a has validationLoss." in found.notes
    (b / "stages/evaluate/record.json").unlink()
    (b / "stages/evaluate/evaluation.json").unlink()
    (difference,) = row(compared(a, b)).differences
    assert (difference.basis, difference.better) == ("otherUnit", None)


def test_without_the_held_out_rows_the_intervals_are_unpaired_and_a_note_says_so(
    tmp_path: Path,
) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b", -0.1)
    (b / "stages/prepare/validation.jsonl").unlink()
    found = compared(a, b)
    (difference,) = row(found).differences
    assert (difference.basis, difference.better) == ("unpaired", None)
    assert any("by unpaired intervals" in note for note in found.notes)


# ---- what cannot be compared --------------------------------------------------------------------


def test_times_on_other_devices_are_not_compared_and_one_worker_is_one(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    for folder, details in (
        (a, {"device": "cpu", "workers": 1}),
        (b, {"device": "H200", "workers": 2}),
    ):
        path = folder / "stages/sft/record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"details": details}))
    (note,) = [note for note in compared(a, b).notes if "devices" in note]
    assert "a on cpu (1 worker) and b on H200 (2 workers)." in note


def measured_by(folder: Path, metric: str, value: float, **inputs: str) -> None:
    """Add a metric of 20 prompts to an evaluation, whose inputs also have these digests; a role's
    dot is written as __."""
    ids = [f"prompts.jsonl row {number}" for number in range(1, 21)]
    items = Items(ids=tuple(ids), tuned_N=np.linspace(value, value + 1, 20), base_N=None,
                  higher_is_better=True)  # fmt: skip
    for name in ("record.json", "evaluation.json"):
        path = folder / "stages/evaluate" / name
        found = json.loads(path.read_text())
        found["metrics"][metric] = value + 0.5
        (found.get("details") or found)["evidence"][metric] = items.summary()
        if "items" in found:
            found["items"][metric] = items.values()
        else:
            given = {role.replace("__", "."): digest for role, digest in inputs.items()}
            found["inputDigests"] |= {"prompts": "sha256:prompts", **given}
        path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("metric", "role"),
    [
        ("reward", "reward"),
        ("reward", "reward__0"),
        ("independentReward", "reward__independent"),
        ("winRate", "judge"),
        ("winRate", "start"),
    ],
)
def test_a_metric_of_another_judge_or_reward_makes_no_job_better(
    tmp_path: Path, metric: str, role: str
) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    measured_by(a, metric, 0.0, **{role: "sha256:one"})
    measured_by(b, metric, 9.0, **{role: "sha256:one"})
    assert row(compared(a, b), metric).base is None  # a random choice is no base model
    (same,) = row(compared(a, b), metric).differences
    assert (same.basis, same.better) == ("paired", 1)
    measured_by(b, metric, 9.0, **{role: "sha256:other"})
    found = compared(a, b)
    (other,) = row(found, metric).differences
    assert (other.basis, other.value, other.better) == ("otherUnit", None, None)
    assert any(f"{metric} of a and b has other units," in note for note in found.notes)


def test_a_reward_of_another_rule_or_check_makes_no_job_better(tmp_path: Path) -> None:
    terms = [{"weight": 2.0, "rule": {"exactMatch": "answer"}}]
    first = {"evaluate": {"answerPattern": "a+"}, "rewardTerms": terms}
    jobs = [
        job(tmp_path, "a", spec=first),
        job(tmp_path, "b", spec=first),
        job(tmp_path, "c", spec={
            "evaluate": {"answerPattern": ".*"}, "rewardTerms": [terms[0] | {"weight": 3.0}],
        }),
    ]  # fmt: skip
    for metric in ("reward", "patternMatch"):
        for number, folder in enumerate(jobs):
            measured_by(folder, metric, 9.0 * number)
    found = compared(*jobs)
    for metric in ("reward", "patternMatch"):
        assert [each.basis for each in row(found, metric).differences] == [
            "paired",
            "otherUnit",
            "otherUnit",
        ]


def test_a_check_of_a_suite_is_that_of_this_suite() -> None:
    def of(pattern: str) -> str:
        answers = {"uri": "file://a", "answerPattern": pattern}
        suites = [{"name": "other", "answers": {}}, {"name": "words", "answers": answers}]
        return unit_of("words/patternMatch", {"spec": {"evaluate": {"suites": suites}}}, {})

    assert of("a") == of("a")
    assert of("a") != of("b")
    assert unit_of("words/accuracy", {}, {"judge": "sha256:1"}) == ""
    assert unit_of("patternMatch", {"spec": 3}, {}) == "None"


def test_a_metric_of_one_job_and_a_job_without_an_evaluation_are_named(tmp_path: Path) -> None:
    a = job(tmp_path, "a", right=[1.0] * 40)
    found = compared(a, job(tmp_path, "b"), job(tmp_path, "c", evaluated=False))
    assert row(found, "answerAccuracy").values == [1.0, None, None]
    assert row(found, "answerAccuracy").best is None
    assert "Only a has answerAccuracy." in found.notes
    assert any(note.startswith("c has no evaluation") for note in found.notes)


def test_a_job_that_failed_before_it_trained_is_said_to_have_no_model(tmp_path: Path) -> None:
    failed = job(tmp_path, "b", evaluated=False, exported=False)
    shutil.rmtree(failed / "stages/sft")
    found = compared(job(tmp_path, "a"), failed)
    assert any(note.startswith("b has not trained a model") for note in found.notes)
    assert not any("b has no evaluation" in note for note in found.notes)
    assert row(found).values[1] is None


def test_a_job_that_missed_a_gate_is_compared(tmp_path: Path) -> None:
    found = compared(job(tmp_path, "a"), job(tmp_path, "b", -0.1, exported=False))
    assert row(found).best == 1
    assert found.jobs[1].name == "b"  # of its folder
    assert any("its manifest is not in the output" in note for note in found.notes)
    assert (found.jobs[1].sentence, found.jobs[1].method) == ("", "")  # not known, so not said


def test_the_settings_are_those_that_the_job_ran_with_and_not_those_of_its_changed_manifest(
    tmp_path: Path,
) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b"), job(tmp_path, "c", exported=False)]
    changed = MANIFEST | {"spec": MANIFEST["spec"] | {"training": {"learningRate": 0.5}}}
    found = compare([Named(str(each), str(each), changed) for each in jobs])
    rates = {each.field: each.values for each in found.settings}["spec.training.learningRate"]
    assert rates == ["auto", "auto", "0.5"]  # the last one has exported no manifest


def test_a_job_that_missed_a_gate_has_the_name_of_the_owner_of_its_output(tmp_path: Path) -> None:
    missed = job(tmp_path, "b", exported=False)
    (missed / "owner.json").write_text(json.dumps({"job": {"name": "support", "kind": "x"}}))
    assert compared(job(tmp_path, "a"), missed).jobs[1].label == "support"


def test_the_settings_of_an_earlier_run_are_not_those_of_the_last_one(tmp_path: Path) -> None:
    rate = {"training": {"learningRate": 0.5}}
    earlier = job(tmp_path, "b", -0.1, spec=rate)
    assert compared(job(tmp_path, "a"), earlier).settings != []
    (earlier / "result/EARLIER_RUN.md").write_text("# The model of an earlier run")
    found = compared(tmp_path / "a", earlier)
    assert found.settings == []
    assert any("b: its manifest is not in the output" in note for note in found.notes)
    assert row(found).best == 1


def test_the_faults_of_all_outputs_are_raised_at_once(tmp_path: Path) -> None:
    a, none = job(tmp_path, "a"), tmp_path / "none"
    none.mkdir()
    damaged = job(tmp_path, "damaged")
    (damaged / "stages/evaluate/evaluation.json").write_text('{"metrics": ')
    link = tmp_path / "link"
    link.symlink_to(a)
    faults = refused(a, none, damaged, link)
    assert [fault.partition(": ")[0] for fault in faults] == [str(none), str(damaged), str(link)]
    assert "is not the output of a job" in faults[0]
    assert "stages/evaluate/evaluation.json is damaged" in faults[1]
    assert f"is the same output as {a}" in faults[2]


def test_a_report_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    newer = {"version": VERSION + 1, "kind": "Report", "somethingNew": []}
    (b / "result/report.json").write_text(json.dumps(newer))
    (fault,) = refused(a, b)
    assert f"report.json has version {VERSION + 1}" in fault
    assert "use the version of tuneyard that wrote it" in fault


def test_a_model_that_changed_after_its_evaluation_is_refused(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    record = b / "stages/sft/record.json"
    record.write_text(record.read_text().replace("sha256:b", "sha256:new"))
    (fault,) = refused(a, b)
    assert "tuned changed after the evaluation" in fault


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stages/evaluate/evaluation.json", "[]"),
        ("stages/evaluate/evaluation.json", "[" * 100_000),
        ("stages/sft/record.json", "{}"),
        ("result/job.yaml", "a: [b"),
        ("result/job.yaml", "spec: {model: 3}"),
        ("result/report.json", '{"version": 1}'),
        ("stages/evaluate/evaluation.json", '{"items": {"validationLoss": {}}}'),
        ("stages/evaluate/record.json", '{"details": 3}'),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    (b / name).write_text(content)
    (fault,) = refused(a, b)
    assert name.rpartition("/")[2] in fault or "the files of its stages cannot be read" in fault


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result/report.json", REPORT | {"metrics": {"\x1b]0;broken\x07\n\u202e": "high"}}),
        ("stages/\x1b[2J.begun.json", {}),
        ("stages/\x1b[2J/record.json", {"stage": 3}),
    ],
)
def test_names_in_an_output_do_not_control_the_terminal(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    (b / name).parent.mkdir(exist_ok=True)
    (b / name).write_text(json.dumps(content))
    (fault,) = refused(a, b)
    assert "\ufffd" in fault
    assert not set("\x1b\x07\n\u202e") & set(fault)


@pytest.mark.parametrize(
    "items",
    [
        {"ids": ["row 1"], "tuned": [1.0, 2.0]},
        {"ids": ["row 1"], "tuned": ["high"]},
        {"tuned": None},
        {},
        {"ids": ["row 1"], "tuned": [10**400]},
        {"ids": ["row 1"], "tuned": [1.0], "weight": [0.0]},
        {"ids": ["row 1"], "tuned": [1e308], "weight": [10.0]},
        {"ids": ["row 1", "row 99"], "tuned": [1.0, None], "weight": [1.0]},
    ],
)
def test_items_that_are_no_items_are_not_paired(tmp_path: Path, items: dict[str, Any]) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    report = read_job(Named("b", str(b))).report
    (b / "result/report.json").write_text(report.to_json())
    path = b / "stages/evaluate/evaluation.json"
    value = json.loads(path.read_text())
    value["items"]["validationLoss"] = items
    path.write_text(json.dumps(value))
    assert row(compared(a, b)).differences[0].basis == "unpaired"


def test_one_job_or_more_than_eight_are_refused(tmp_path: Path) -> None:
    a = job(tmp_path, "a")
    assert refused(a) == ["one job is not a comparison: name at least two jobs"]
    many = [shutil.copytree(a, tmp_path / f"copy-{number}") for number in range(9)]
    assert refused(*many) == ["9 jobs are more than 8: compare fewer at a time"]


# ---- settings, cost and answers -----------------------------------------------------------------


def test_only_the_settings_that_differ_are_listed(tmp_path: Path) -> None:
    a = job(tmp_path, "a", spec={"training": {"learningRate": 0.001, "epochs": 3}})
    training, place = {"learningRate": 0.002, "epochs": 3}, {"uri": "file://b", "merge": False}
    b = job(tmp_path, "b", spec={"training": training, "adapter": None, "output": place})
    found = {each.field: each.values for each in compared(a, b).settings}
    assert found == {
        "spec.training.learningRate": ["0.001", "0.002"],
        "spec.adapter": ["{lora: {rank: 8, alpha: 16, targets: all-linear}}", None],
    }


def test_the_cost_of_each_job_is_compared(tmp_path: Path) -> None:
    a = job(tmp_path, "a", training={"trainingSeconds": 60.0})
    b = job(tmp_path, "b", training={"trainingSeconds": 108.0, "tokens": 1.0})
    found = compared(a, b)
    costs = {each.name: each.values for each in found.costs}
    assert costs["trainingSeconds"] == [60, 108]
    assert costs["tokens"] == [18000, 1]
    assert costs["peakMemoryBytes"] == [1.5 * 2**30, 1.5 * 2**30]
    assert "b took 1.8 times as long to train as a (1 min 48 s and 1 min)." in found.sentences
    assert "The peak memory is about equal (1.5 GiB)." in found.sentences


def sample(prompt: str, tuned: str, **more: Any) -> dict[str, Any]:
    given = {"reference": "30 months.", "expected": ["30 months"], "base": "I am a model."}
    return {"prompt": prompt, "tuned": tuned, **given, **more}


def test_the_answers_to_one_prompt_are_side_by_side(tmp_path: Path) -> None:
    a = job(tmp_path, "a", samples=[sample("How long?", "30 months"), sample("Same?", "No")])
    b = job(
        tmp_path, "b", samples=[sample("Same?", "No"), sample("How long?", "A year"),
                                sample("Mine?", "Yes")],
    )  # fmt: skip
    asked = {each.prompt: each for each in compared(a, b).answers}
    assert list(asked) == ["How long?", "Same?", "Mine?"]
    first = asked["How long?"]
    assert [each and (each.text, each.right) for each in first.completions] == [
        ("30 months", True),
        ("A year", False),
    ]
    assert (first.differ, first.worse) == (True, True)
    assert (asked["Same?"].differ, asked["Same?"].worse) == (False, False)
    assert asked["Mine?"].completions[0] is None
    assert first.base is not None
    assert first.base.text == "I am a model."


def test_jobs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    a = write_output(tmp_path / "one", "same", losses=[*LOSSES])
    b = write_output(tmp_path / "two", "same", losses=[*LOSSES])
    assert [each.label for each in compared(a, b).jobs] == ["same (one)", "same (two)"]


def test_the_same_outputs_give_the_same_document_and_are_not_changed(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b", -0.1)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert compared(a, b).to_json() == compared(a, b).to_json()
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_copy_of_the_result_alone_is_compared_by_unpaired_intervals(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b", -1.5)
    for folder in (a, b):
        report = read_job(Named("job", str(folder))).report
        (folder / "result/report.json").write_text(report.to_json())
    copy = shutil.copytree(b / "result", tmp_path / "copied [1]*")
    loss = row(compared(a, copy))
    assert (loss.differences[0].basis, loss.differences[0].better) == ("unpaired", 1)
    assert loss.items == [40, 40]


def test_an_output_in_an_object_store_is_read_with_and_without_a_report(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    a, b, url = job(tmp_path, "a"), job(tmp_path, "b", -0.1), "memory://models/b"
    store = fsspec.filesystem("memory")
    named = [Named(str(a), str(a)), Named(url, url)]
    try:
        store.put(str(b), "/models/b", recursive=True)
        anew = compare(named)
        report = read_job(Named("b", str(b))).report
        store.pipe("/models/b/result/report.json", report.to_json().encode())
        found = compare(named)
    finally:
        store.rm("/models", recursive=True)
    assert row(found).best == 1
    assert row(found).differences[0].basis == "paired"
    assert found.jobs[1].output == url
    assert anew.to_json() == found.to_json()
    assert anew.curves[1].curves[0].training  # of the file in the store


def test_outputs_of_one_path_in_two_stores_are_told_apart(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    output = write_output(tmp_path / "models/b", "same", losses=[*LOSSES])
    store = fsspec.filesystem("memory")
    try:
        store.put(str(output), f"{output}", recursive=True)
        uris = [f"memory:/{output}", f"file://{output}"]
        found = compare([Named(uri, uri) for uri in uris])
    finally:
        store.rm("/", recursive=True)
    assert [each.label for each in found.jobs] == [f"same ({uri})" for uri in uris]
