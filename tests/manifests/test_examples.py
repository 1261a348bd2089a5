"""The examples: valid manifests, existing files, and held-out rows that training never contains."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tuneyard.api.adapters import Adapter
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.manifests.manifest import Job, read

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
MANIFESTS = sorted(
    path
    for path in EXAMPLES.rglob("*.yaml")
    if "out" not in path.relative_to(EXAMPLES).parts  # a run writes its manifest beside its result
)
HELD_OUT = {
    DATA / "support/train.jsonl": DATA / "support/validation.jsonl",
    DATA / "workflow/train.jsonl": DATA / "workflow/validation.jsonl",
    DATA / "finance/ledger.csv.gz": DATA / "finance/held-out.csv.gz",
    DATA / "legal/clauses.csv": DATA / "legal/held-out.csv",
    DATA / "catalog/train.jsonl": DATA / "catalog/validation.jsonl",
}
MOST_SIMILAR = 0.4
"""Upper bound of the Jaccard similarity of the content words of a held-out and a training question.
A rewording that changes one word in four has 0.6."""
FUNCTION_WORDS = (
    "a am an and are at be can did do does for from get has have how i if in is it its long many "
    "may me much must my not of on or should that the them there this to was what when where which "
    "while who why will with would you your by"
)


def manifest_id(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


def jobs(path: Path) -> list[Job]:
    return read(path.read_text(encoding="utf-8"), manifest_id(path))


def uris(value: Any) -> Iterator[tuple[str, str]]:
    """Yield each `uri` in a manifest with the name of the field that holds it."""
    for name, part in value.items() if isinstance(value, Mapping) else ():
        for item in part if isinstance(part, list) else [part]:
            if isinstance(item, Mapping):
                if isinstance(item.get("uri"), str):
                    yield name, item["uri"]
                yield from uris(item)


def rows(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    if ".csv" in path.suffixes:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    return [json.loads(line) for line in text.splitlines()]


def question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    if "messages" in row:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        return question["content"], answer["content"]
    if "inputs" in row:
        return row["inputs"], row["targets"]
    return row["input"], row["output"]


def content_words(text: str) -> frozenset[str]:
    words = (word.strip(".") for word in re.findall(r"[a-z0-9.]+", text.lower()))
    return frozenset(words) - {"", *FUNCTION_WORDS.split()}


def similarity(one: str, other: str) -> float:
    a, b = content_words(one), content_words(other)
    return len(a & b) / len(a | b) if a | b else 1.0


def expected(row: Mapping[str, Any]) -> list[str]:
    value = row["expected"]
    return [value] if isinstance(value, str) else value


# ---- manifests --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=manifest_id)
def test_every_example_validates(path: Path) -> None:
    assert jobs(path)


@pytest.mark.parametrize("path", MANIFESTS, ids=manifest_id)
def test_every_example_starts_with_a_comment(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", MANIFESTS, ids=manifest_id)
def test_every_local_file_that_an_example_reads_exists(path: Path) -> None:
    for job in jobs(path):
        for field, uri in uris(job.model_dump(by_alias=True)["spec"]):
            if uri.startswith("file://") and field != "output":
                pattern = str(path.parent / uri.removeprefix("file://"))
                assert glob.glob(pattern), f"{field}: {uri}"  # noqa: PTH207 - the pattern holds ..


@pytest.mark.parametrize("path", MANIFESTS, ids=manifest_id)
def test_every_local_output_is_in_an_ignored_folder_beside_its_manifest(path: Path) -> None:
    for job in jobs(path):
        uri = job.spec.output.uri
        assert uri.startswith(("file://out/", "pvc://")), uri
        assert ".." not in uri


def test_no_two_examples_share_a_name_or_an_output_folder() -> None:
    found = [(path.parent, job) for path in MANIFESTS for job in jobs(path)]
    names = [job.metadata.name for _, job in found]
    outputs = [(folder, job.spec.output.uri) for folder, job in found]
    assert len(set(names)) == len(names)
    assert len(set(outputs)) == len(outputs)


def test_there_is_one_example_for_each_kind_of_adapter_and_one_for_full_fine_tuning() -> None:
    kinds = {}
    for path in (EXAMPLES / "adapters").glob("*.yaml"):
        (job,) = jobs(path)
        kinds[path.stem] = job.spec.adapter.kind if job.spec.adapter else "full"
    assert kinds == {kind: kind for kind in (*Adapter.members(), "full")}


def test_the_full_fine_tuning_example_freezes_layers() -> None:
    (job,) = jobs(EXAMPLES / "adapters/full.yaml")
    assert isinstance(job, FineTuneJob)
    assert job.spec.training.freeze
    assert job.spec.training.freeze.layers


def test_the_cluster_example_trains_as_the_quickstart_does() -> None:
    (cluster,), (quickstart,) = jobs(EXAMPLES / "cluster.yaml"), jobs(EXAMPLES / "quickstart.yaml")
    assert isinstance(cluster, FineTuneJob)
    assert isinstance(quickstart, FineTuneJob)
    assert cluster.spec.training == quickstart.spec.training
    assert cluster.spec.adapter == quickstart.spec.adapter
    assert cluster.spec.data.system_prompt == quickstart.spec.data.system_prompt


def test_the_readme_lists_every_example_and_nothing_else() -> None:
    linked = re.findall(r"\]\(([^)]+\.yaml)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(linked) == sorted(manifest_id(path) for path in MANIFESTS)


# ---- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*HELD_OUT, *HELD_OUT.values()], ids=manifest_id)
def test_every_row_has_a_question_and_an_answer(path: Path) -> None:
    for number, row in enumerate(rows(path), start=1):
        question, answer = question_and_answer(row)
        assert question.strip(), number
        assert answer.strip(), number


def test_triage_conversations_alternate_and_end_with_an_answer() -> None:
    for row in rows(DATA / "medical/triage.jsonl"):
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        assert row["conversations"][-1]["value"].startswith("Urgency: ")


def test_preferences_are_pairs_that_differ() -> None:
    for row in rows(DATA / "alignment/preferences.jsonl"):
        assert row.keys() == {"prompt", "chosen", "rejected"}
        assert row["chosen"] != row["rejected"]


def test_alignment_prompts_are_not_those_of_the_preferences() -> None:
    prompts = {row["prompt"] for row in rows(DATA / "alignment/prompts.jsonl")}
    assert prompts
    assert not prompts & {row["prompt"] for row in rows(DATA / "alignment/preferences.jsonl")}


def test_the_workflow_answers_are_json_objects_with_an_action() -> None:
    folder = DATA / "workflow"
    for row in rows(folder / "train.jsonl") + rows(folder / "validation.jsonl"):
        assert json.loads(question_and_answer(row)[1])["action"]


@pytest.mark.parametrize(("train", "held_out"), HELD_OUT.items(), ids=lambda path: path.parent.name)
def test_no_training_question_comes_twice_or_is_held_out(train: Path, held_out: Path) -> None:
    # A clause may be named and summarized: its instruction is part of the question.
    questions = [
        (row.get("instruction"), question_and_answer(row)[0].lower().strip(" ?.!"))
        for row in rows(train) + rows(held_out)
    ]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("held_out", HELD_OUT.values(), ids=lambda path: path.parent.name)
def test_an_expected_string_is_in_its_answer_and_not_in_its_question(held_out: Path) -> None:
    for row in rows(held_out):
        question, answer = question_and_answer(row)
        assert any(value.lower() in answer.lower() for value in expected(row)), row
        for value in expected(row):
            assert value.strip()
            assert value.lower() not in question.lower(), row


@pytest.mark.parametrize("folder", ["support", "finance", "legal"])
def test_every_held_out_answer_can_be_learned_from_training(folder: str) -> None:
    (train, held_out), *_ = (pair for pair in HELD_OUT.items() if pair[0].parent.name == folder)
    assert {question_and_answer(row)[1] for row in rows(held_out)} <= {
        question_and_answer(row)[1] for row in rows(train)
    }


def test_every_question_of_the_catalog_names_a_document_that_has_its_answer() -> None:
    folder = DATA / "catalog"
    held_out = {row["document"] for row in rows(folder / "validation.jsonl")}
    assert not held_out & {row["document"] for row in rows(folder / "train.jsonl")}
    for row in rows(folder / "train.jsonl") + rows(folder / "validation.jsonl"):
        text = (folder / "documents" / row["document"]).read_text("utf-8")
        assert content_words(question_and_answer(row)[1]) <= content_words(text)


def support() -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    train, held_out = next(iter(HELD_OUT.items()))
    return [question_and_answer(row) for row in rows(train)], rows(held_out)


def test_held_out_support_questions_are_worded_differently_from_every_training_question() -> None:
    train, held_out = support()
    for row in held_out:
        question, _ = question_and_answer(row)
        nearest = max((similarity(question, other), other) for other, _ in train)
        assert nearest[0] <= MOST_SIMILAR, (question, nearest)


def test_the_similarity_bound_catches_a_reworded_question() -> None:
    known = "How long does the battery run?"
    assert similarity("How long does the mower's battery run?", known) > MOST_SIMILAR
    assert similarity("When is support open?", known) == 0


def test_each_support_fact_is_taught_in_several_ways_and_asked_once() -> None:
    train, held_out = support()
    answers = [question_and_answer(row)[1] for row in held_out]
    assert len(set(answers)) == len(answers) >= 16
    assert {answer for _, answer in train} == set(answers)
    for answer in answers:
        assert sum(other == answer for _, other in train) >= 5, answer


def test_no_expected_support_string_fits_the_answer_of_another_fact() -> None:
    _, held_out = support()
    for row in held_out:
        own = question_and_answer(row)[1]
        for other in (question_and_answer(each)[1] for each in held_out):
            if other != own:
                assert not any(value.lower() in other.lower() for value in expected(row)), row


def test_the_support_rows_stay_short_so_that_the_quickstart_stays_quick() -> None:
    train, held_out = support()
    texts = train + [question_and_answer(row) for row in held_out]
    assert max(len(f"{question} {answer}".split()) for question, answer in texts) <= 24
