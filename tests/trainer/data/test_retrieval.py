"""Contexts of retrieved passages: what each row's context holds, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.jobs import manifest, planned
from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.sources import DocumentFields, FieldMap
from tuneyard.api.stage_settings import DatasetSettings, PrepareSettings, RetrievalSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import prepare
from tuneyard_trainer.data.documents import Documents, cut, words
from tuneyard_trainer.data.encoding.tokenization import Encoder
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.data.reading.example import Example, Message, RowError
from tuneyard_trainer.data.retrieval import Contexts, PassageIndex, best
from tuneyard_trainer.evaluation.without_context import texts_without_context, tokenized
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import emit_nothing
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

NAMES = ["Ava", "Bolo", "Cito", "Dune", "Elko", "Fado", "Gira", "Hopi"]
TEXTS = {f"{name}.md": f"The {name} lamp costs {20 + i} euros." for i, name in enumerate(NAMES)}


def chat(question: str, answer: str, document: str = "") -> Example:
    turns = (Message("user", question), Message("assistant", answer))
    return Example(1, "chat", turns, document=document)


def about(index: int, document: bool = True) -> Example:
    name = NAMES[index % len(NAMES)]
    question, answer = f"What does the {name} cost? ({index})", f"It costs {20 + index % 8} euros."
    return chat(question, answer, f"{name}.md" if document else "")


def settings(**changes: Any) -> RetrievalSettings:
    defaults: dict[str, Any] = {
        "fields": DocumentFields(),
        "passages": 3,
        "gold_share": 1.0,
        "passage_words": 50,
        "cite": True,
    }
    return RetrievalSettings(**(defaults | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "documents" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path / "documents"


@pytest.fixture
def contexts(folder: Path, tiny_tokenizer: Any) -> Any:
    def made(max_length: int = 1000, seed: int = 0, **changes: Any) -> Contexts:
        encoder = Encoder(tiny_tokenizer, "assistant")
        return Contexts.read(folder, settings(**changes), encoder, max_length, seed, "documents")

    return made


def added(found: Contexts, examples: Sequence[Example]) -> list[Example]:
    rows = found.add(examples)
    assert not [row for row in rows if isinstance(row, RowError)]
    return [row for row in rows if isinstance(row, Example)]


def passages_of(example: Example) -> list[str]:
    *passages, question = example.messages[0].content.split("\n\n")
    assert question.startswith("Question: ")
    assert [each.split(" ")[0] for each in passages] == [
        f"[{number}]" for number in range(1, len(passages) + 1)
    ]
    return [each.split(" ", 1)[1] for each in passages]


# ---- passages and their ranks -------------------------------------------------------------------


def test_the_scores_are_those_of_bm25_in_lucene_form() -> None:
    """Against the formula, without bm25s: idf = ln(1 + (N - n + 0.5) / (n + 0.5))."""
    texts = [*TEXTS.values(), "Lamp lamp LAMP, and a long passage about other lamps.", "Euros."]
    counted = [Counter(words(text)) for text in texts]
    mean = sum(map(Counter.total, counted)) / len(texts)
    query = "Which lamp costs 23 euros, euros?"
    expected = []
    for counts in counted:
        score = 0.0
        for word in words(query):
            having = sum(word in each for each in counted)
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            count = counts[word]
            length = 1 - 0.75 + 0.75 * counts.total() / mean
            score += having and idf * count / (count + 1.5 * length)
        expected.append(score)
    np.testing.assert_allclose(PassageIndex(texts).scores(query), expected, rtol=1e-5)


def test_a_query_without_known_words_scores_nothing() -> None:
    index = PassageIndex(list(TEXTS.values()))
    assert not index.scores("zebra").any()
    assert not index.scores("?!").any()


def test_the_best_are_sorted_and_equal_ones_keep_their_order() -> None:
    scores = np.array([1, 3, 2, 3, 0, 3], dtype=np.float32)
    assert best(scores, 2) == [1, 3]
    assert best(scores, 4) == [1, 3, 5, 2]
    assert best(scores, 99) == [1, 3, 5, 2, 0, 4]
    assert best(scores, 0) == []


@pytest.mark.parametrize("count", [1, 9, 10, 11, 25])
def test_passages_hold_every_word_once_in_nearly_equal_numbers(count: int) -> None:
    text = "\n".join(f"word{number}" for number in range(count))
    parts = [part.split() for part in cut(text, 10)]
    assert [word for part in parts for word in part] == text.split()
    sizes = {len(part) for part in parts}
    assert max(sizes) <= 10
    assert max(sizes) - min(sizes) <= 1


def test_scripts_without_spaces_are_searched_by_character() -> None:
    assert words("東京 Tower") == ["東", "京", "tower"]


# ---- contexts -----------------------------------------------------------------------------------


def test_the_citation_names_the_passage_of_the_rows_document(contexts: Any) -> None:
    rows = added(contexts(), [about(index) for index in range(40)])
    numbers = []
    for index, row in enumerate(rows):
        found = passages_of(row)
        match = re.fullmatch(r"It costs \d+ euros\. \[(\d)\]", row.messages[-1].content)
        assert match
        numbers.append(int(match[1]))
        assert found[numbers[-1] - 1] == TEXTS[f"{NAMES[index % 8]}.md"]
        assert len(set(found)) == 3
    assert set(numbers) == {1, 2, 3}  # the right passage is not always in the same place


def test_without_the_right_passage_nothing_of_its_document_is_shown_or_cited(
    contexts: Any, folder: Path
) -> None:
    (folder / "Ava.md").write_text("The Ava lamp costs 20 euros. " * 30)  # several passages
    for row in added(contexts(gold_share=0.0), [about(index) for index in range(16)]):
        name = row.document.removesuffix(".md")
        assert len(passages_of(row)) == 3
        assert not [each for each in passages_of(row) if name in each]
        assert row.without_context
        assert row.messages[-1] == row.without_context.messages[-1]


def test_the_share_of_contexts_with_the_right_passage_is_kept_and_counted(contexts: Any) -> None:
    found = contexts(gold_share=0.8)
    rows = added(found, [about(index) for index in range(400)])
    cited = sum("[" in row.messages[-1].content for row in rows)
    assert 0.74 < cited / 400 < 0.86
    details = found.details()
    assert (details["withRightPassage"], details["rows"]) == (cited, 400)
    assert (details["documents"], details["namedDocuments"]) == (8, 400)


def test_without_cite_the_answers_stay_as_they_are(contexts: Any) -> None:
    for row in added(contexts(cite=False), [about(index) for index in range(8)]):
        assert row.without_context
        assert row.messages[-1] == row.without_context.messages[-1]


def test_equal_rows_have_equal_contexts_wherever_they_are(contexts: Any) -> None:
    rows = [about(index) for index in range(8)]
    moved = [replace(row, row=90 + row.row, file="other.jsonl") for row in reversed(rows)]
    first = added(contexts(gold_share=0.5), rows)
    second = added(contexts(gold_share=0.5), moved)
    assert [row.messages for row in first] == [row.messages for row in reversed(second)]
    other_seed = added(contexts(gold_share=0.5, seed=1), rows)
    assert [row.messages for row in first] != [row.messages for row in other_seed]


def test_bm25_finds_the_passage_of_rows_that_name_no_document(contexts: Any) -> None:
    found = contexts()
    rows = added(found, [about(index, document=False) for index in range(8)])
    for index, row in enumerate(rows):
        number = int(row.messages[-1].content[-2])
        assert passages_of(row)[number - 1] == TEXTS[f"{NAMES[index]}.md"]
    assert found.details()["namedDocuments"] == 0
    assert "which BM25 chose for 8 rows" in found.sentence


def test_plain_prompts_and_their_turns_get_the_same_context(contexts: Any) -> None:
    bare = replace(about(0), kind="completion", prompt="What?", completion="It.")
    (row,) = added(contexts(), [bare])
    assert row.prompt == row.messages[0].content
    assert row.completion == row.messages[1].content
    assert row.without_context == bare


def test_a_system_turn_stays_before_the_context(contexts: Any) -> None:
    bare = about(0)
    (row,) = added(
        contexts(), [replace(bare, messages=(Message("system", "Be brief."), *bare.messages))]
    )
    assert [turn.role for turn in row.messages] == ["system", "user", "assistant"]
    assert row.messages[0].content == "Be brief."


def test_the_worst_distractors_of_a_long_row_are_left_out_and_counted(
    contexts: Any, tiny_tokenizer: Any
) -> None:
    rows = [about(index) for index in range(8)]
    encoder = Encoder(tiny_tokenizer, "assistant")

    def longest(passages: int) -> int:
        return max(
            len(each.ids) for each in encoder.encode(added(contexts(passages=passages), rows))
        )

    limit = longest(2)
    assert limit < longest(4)
    found = contexts(max_length=limit, passages=4)
    short = added(found, rows)
    assert {len(passages_of(row)) for row in short} == {2}
    assert [row.messages for row in short] == [
        row.messages for row in added(contexts(max_length=limit, passages=4), rows)
    ]
    for index, row in enumerate(short):  # the right one stays
        assert TEXTS[f"{NAMES[index]}.md"] in passages_of(row)
    details = found.details()
    assert (details["shortenedContexts"], details["droppedPassages"]) == (8, 16)
    assert "16 distractors of 8 contexts were left out" in found.sentence


def test_one_passage_stays_however_long_the_row_is(contexts: Any) -> None:
    (row,) = added(contexts(max_length=8), [about(0)])
    assert len(passages_of(row)) == 1


# ---- what is refused ----------------------------------------------------------------------------


def test_a_document_that_does_not_exist_is_named_with_the_nearest_id(contexts: Any) -> None:
    (error,) = contexts().add([chat("What?", "That.", "Bola.md")])
    assert str(error) == "there is no document 'Bola.md'; the nearest id is 'Bolo.md'"


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (replace(about(0), messages=(*about(0).messages, *about(1).messages)), "user, assistant"),
        (Example(1, "text", text="The Ava lamp."), "a text"),
    ],
)
def test_a_row_without_one_question_and_one_answer_is_refused(
    contexts: Any, example: Example, found: str
) -> None:
    first, error, last = contexts().add([about(0), example, about(1)])
    assert isinstance(first, Example)
    assert isinstance(last, Example)
    assert "needs one question and one answer" in str(error)
    assert found in str(error)


def test_a_row_that_no_passage_matches_is_refused(contexts: Any) -> None:
    (error,) = contexts().add([chat("Quo vadis?", "Romam.")])
    assert "no passage shares a word" in str(error)


def read_documents(path: Path) -> Documents:
    return Documents.read(path, DocumentFields(), 50, "spec.data.retrieval.documents")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "row 2: the id 'a' is also that of"),
        ('{"text": "x"}', "row 1: id must be a text or a whole number, and it is None"),
        ('{"id": "a", "text": "?!"}', "row 1: text must be a text with words"),
        ('{"id": "a"', "row 1: "),
    ],
)
def test_a_broken_document_is_named_with_its_row(tmp_path: Path, lines: str, problem: str) -> None:
    (tmp_path / "documents.jsonl").write_text(lines)
    with pytest.raises(StageError) as error:
        read_documents(tmp_path / "documents.jsonl")
    assert error.value.reason == "InvalidData"
    assert f"documents.jsonl {problem}" in str(error.value)
    assert "spec.data.retrieval.documents.fields" in str(error.value.advice)


def test_rows_with_numbers_as_ids_are_documents(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"id": 7, "text": "x"}\n{"id": 8, "text": "y"}')
    assert read_documents(tmp_path / "documents.jsonl").owners == ("7", "8")


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/README.md").write_text("Not a document.")
    with pytest.raises(StageError, match="holds no files") as error:
        read_documents(tmp_path / "documents")
    assert error.value.reason == "EmptyData"


def test_a_single_document_leaves_no_distractors(
    tmp_path: Path, tiny_tokenizer: Any, contexts: Any, folder: Path
) -> None:
    for name in list(TEXTS)[1:]:
        (folder / name).unlink()
    with pytest.raises(StageError, match="distractors come from other documents"):
        contexts()
    assert contexts(passages=1).add([about(0)])


# ---- the stage ----------------------------------------------------------------------------------


def run_stage(
    tmp_path: Path, model: Path, files: dict[str, Any], documents: Path, **changes: Any
) -> tuple[StageOutcome, list[dict[str, Any]]]:
    inputs = {"model": model, "documents": documents}
    for role, rows in files.items():
        inputs[role] = tmp_path / f"{role}.jsonl"
        inputs[role].write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
    values: dict[str, Any] = {
        "method": "sft",
        "train": [dataset],
        "validation": [dataset] if "validation.0" in files else [],
        "validation_fraction": None,
        "max_length": 250,
        "on_overlength": "error",
        "on_invalid_row": "error",
        "train_on": "assistant",
        "system_prompt": "Be brief.",
        "chat_template": None,
        "seed": 0,
        "retrieval": settings(),
    }
    sources = {
        role: SourceInput(uri=f"file://{path}", path=f"spec.data.{role}.uri")
        for role, path in inputs.items()
    }
    found = PrepareSettings(**(values | changes))
    stage = PlannedStage(name="prepare", settings=found, inputs=sources, fingerprint="")
    reports: list[dict[str, Any]] = []
    (tmp_path / "work").mkdir(exist_ok=True)
    worker = Worker(0, 1, torch.device("cpu"), report=lambda **report: reports.append(report))
    return prepare.run(StageContext(stage, inputs, tmp_path / "work", worker)), reports


def questions(start: int, end: int) -> list[dict[str, Any]]:
    return [
        {
            "question": about(index).messages[0].content,
            "answer": about(index).messages[1].content,
            "document": about(index).document,
        }
        for index in range(start, end)
    ]


def test_the_stage_records_the_contexts_and_keeps_held_out_rows_without_them(
    tmp_path: Path, tiny_model_dir: Path, folder: Path
) -> None:
    files = {"train.0": questions(0, 6), "validation.0": questions(6, 10)}
    outcome, reports = run_stage(tmp_path, tiny_model_dir, files, folder)
    assert outcome.details["retrieval"] == {
        "documents": 8,
        "passages": 8,
        "rows": 10,
        "withRightPassage": 10,
        "namedDocuments": 10,
        "shortenedContexts": 0,
        "droppedPassages": 0,
    }
    assert outcome.details["datasets"][0]["unreadColumns"] == []
    assert any("10 of 10 contexts hold" in str(report.get("message")) for report in reports)
    lines = (tmp_path / "work/validation.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    assert all("[3]" in text["messages"][-2]["content"] for text in texts)
    bare = texts_without_context(texts)
    assert [text["messages"][-2]["content"] for text in bare] == [
        row["question"] for row in files["validation.0"]
    ]


def test_the_held_out_rows_without_contexts_are_those_of_a_stage_without_retrieval(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any, folder: Path
) -> None:
    files = {"train.0": questions(0, 6), "validation.0": questions(6, 10)}
    run_stage(tmp_path, tiny_model_dir, files, folder)
    lines = (tmp_path / "work/validation.jsonl").read_text().splitlines()
    bare = texts_without_context([json.loads(line) for line in lines])
    found = tokenized(bare, tiny_tokenizer, "assistant", 250)
    run_stage(tmp_path, tiny_model_dir, files, folder, retrieval=None)
    wanted = Prepared.open(tmp_path / "work").validation
    assert wanted is not None
    for name in ("tokens", "flat_mask", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_answers_of_a_log_name_their_documents_or_their_requests_do(
    tmp_path: Path, tiny_model_dir: Path, folder: Path
) -> None:
    log = []
    for index, row in enumerate(questions(0, 6)):
        named = {"document": row["document"]}
        asked = {"prompt": row["question"]}
        if index % 2:
            log.append({"event": "request", "id": f"r{index}", **asked, **named})
            asked, named = {"of": f"r{index}"}, {}
        log += [
            {"event": "answer", "id": index, "completion": row["answer"], **asked, **named},
            {"event": "rating", "of": index, "thumbs": "up"},
        ]
    outcome, _ = run_stage(tmp_path, tiny_model_dir, {"train.0": log}, folder)
    assert outcome.details["datasets"][0]["format"] == "feedback"
    found = outcome.details["retrieval"]
    assert (found["rows"], found["namedDocuments"], found["withRightPassage"]) == (6, 6, 6)
    assert outcome.details["datasets"][0]["unreadColumns"] == []


def test_without_retrieval_a_column_of_documents_is_named_as_unread(
    tmp_path: Path, tiny_model_dir: Path, folder: Path
) -> None:
    outcome, _ = run_stage(
        tmp_path, tiny_model_dir, {"train.0": questions(0, 6)}, folder, retrieval=None
    )
    assert outcome.details["datasets"][0]["unreadColumns"] == ["document"]
    assert "retrieval" not in outcome.details


def test_rows_that_do_not_fit_end_the_stage_or_are_skipped_and_counted(
    tmp_path: Path, tiny_model_dir: Path, folder: Path
) -> None:
    rows = [*questions(0, 5), questions(5, 6)[0] | {"document": "Fado"}]
    with pytest.raises(StageError) as error:
        run_stage(tmp_path, tiny_model_dir, {"train.0": rows}, folder)
    assert error.value.reason == "RetrievalMismatch"
    assert "1 of 6 rows do not fit spec.data.retrieval" in str(error.value)
    assert "train.0.jsonl row 6: there is no document 'Fado'" in str(error.value)
    assert "the nearest id is 'Fado.md'" in str(error.value)
    outcome, _ = run_stage(
        tmp_path, tiny_model_dir, {"train.0": rows}, folder, on_invalid_row="skip"
    )
    assert outcome.metrics["skippedRows"] == 1
    assert outcome.metrics["rows"] == 5


def test_a_job_measures_both_models_with_and_without_contexts(
    tmp_path: Path, tiny_model_dir: Path, folder: Path
) -> None:
    held_out = [row | {"expected": [row["answer"].split()[2]]} for row in questions(6, 10)]
    for name, rows in (("train", questions(0, 6)), ("validation", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "train": [{"uri": "file://train.jsonl"}],
        "validation": {"data": [{"uri": "file://validation.jsonl"}]},
        "retrieval": {"documents": {"uri": f"file://{folder}"}, "passages": 2},
    }
    plan = planned(manifest(tiny_model_dir, data=data))
    places = {"base_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    torchrun.run(plan, str(tmp_path / "out"), **places, emit=emit_nothing)
    metrics = json.loads((tmp_path / "out/stages/evaluate/evaluation.json").read_text())["metrics"]
    measured = {
        *("validationLoss", "validationPerplexity", "lossReduction", "questions"),
        *("answerAccuracy", "answerAccuracyGain"),
        *("baseValidationLoss", "baseValidationPerplexity", "baseAnswerAccuracy"),
    }
    assert metrics.keys() == {*measured, *(f"{name}WithoutContext" for name in measured)}
    assert metrics["questionsWithoutContext"] == 4
    assert metrics["validationLoss"] != metrics["validationLossWithoutContext"]
    report = (tmp_path / "out/result/report.html").read_text()
    assert "Held-out loss without context" in report
    assert "Answers right without context" in report
