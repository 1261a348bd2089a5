"""Augmented rows in prepared data: trained on only with their originals, and never held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data.test_prepare import DATASET, Job, Row, chat
from tests.trainer.judging.test_augment import lamp
from tuneyard.api.cleaning import Clean
from tuneyard.api.sources import DocumentFields
from tuneyard.api.stage_settings import ReplaySettings, RetrievalSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.augmentation import bare_reply, chosen
from tuneyard_trainer.data.mixing import mixed_weights
from tuneyard_trainer.worker import StageOutcome

LAMPS = [lamp(number) for number in range(10)]


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def of(row: Row, number: int, question: str = "", by: str = "template", **of: Any) -> Row:
    """Return an augmented row of the row with this number, from 0."""
    asked, answered = (turn["content"] for turn in row["messages"])
    origin = {"dataset": 0, "file": "train.0.jsonl", "row": number + 1, "example": number} | of
    new = chat(question or f"Question: {asked}", answered)
    return {**new, "augmented": {"by": by, "of": origin}}


def augmented(job: Job, rows: Sequence[Row], new: Sequence[Row], **changes: Any) -> StageOutcome:
    files = {"train.0": rows, "train.1": new}
    return job.run(files, train=[DATASET, DATASET], augmented=True, **changes)


def ledger_of(outcome: StageOutcome, source: int) -> dict[str, Any]:
    rows: dict[str, Any] = outcome.details["ledger"]["sources"][source]["rows"]
    return rows


def trained_questions(job: Job, tokenizer: Any) -> list[str]:
    """Return the questions of the training rows, in order."""
    texts = [tokenizer.decode(job.data.train.ids(row)) for row in range(len(job.data.train))]
    return [text.partition("user\n")[2].partition("<|im_end|>")[0] for text in texts]


def held_out_questions(job: Job) -> list[str]:
    rows = (json.loads(line) for line in (job.workdir / "validation.jsonl").open())
    return [row["messages"][0]["content"] for row in rows]


# ---- splits -------------------------------------------------------------------------------------


def test_no_augmented_row_is_held_out_and_none_is_made_from_a_held_out_row(
    job: Job, tiny_tokenizer: Any
) -> None:
    new = [of(row, number) for number, row in enumerate(LAMPS)]
    outcome = augmented(job, LAMPS, new, validation_fraction=0.3)
    held = held_out_questions(job)
    assert len(held) == 3
    assert not any(question.startswith("Question:") for question in held)
    questions = trained_questions(job, tiny_tokenizer)
    assert not {f"Question: {question}" for question in held} & set(questions)
    assert len(questions) == 7 + 7
    found = ledger_of(outcome, 1)
    assert (found["in"], found["filtered"]) == (10, {"originalHeldOut": 3})
    assert (found["trained"], found["heldOut"]) == (7, 0)
    assert outcome.metrics["augmentedRows"] == 7


def test_the_held_out_rows_are_those_of_the_job_without_augmentation(
    job: Job, tmp_path: Path, tiny_model_dir: Path
) -> None:
    new = [of(row, number) for number, row in enumerate(LAMPS)]
    augmented(job, LAMPS, new, validation_fraction=0.3)
    (tmp_path / "plain").mkdir()
    plain = Job(tmp_path / "plain", tiny_model_dir)
    plain.train(LAMPS, validation_fraction=0.3)
    assert held_out_questions(job) == held_out_questions(plain)


def test_a_new_question_that_a_held_out_row_asks_is_left_out(job: Job, tiny_tokenizer: Any) -> None:
    """A model may write the question of another row, which is held out."""
    plain = Job(job.folder / "plain", job.model)
    plain.folder.mkdir()
    plain.train(LAMPS, validation_fraction=0.3)
    (asked, *_) = held_out_questions(plain)
    trained = next(n for n, row in enumerate(LAMPS) if row["messages"][0]["content"] != asked)
    outcome = augmented(
        job, LAMPS, [of(LAMPS[trained], trained, f" {asked} ")], validation_fraction=0.3
    )
    left_out = ledger_of(outcome, 1)["filtered"]
    assert left_out in ({"promptHeldOut": 1}, {"originalHeldOut": 1})
    assert asked not in trained_questions(job, tiny_tokenizer)


def test_with_held_out_data_sets_their_questions_are_not_trained_on_either(job: Job) -> None:
    files = {
        "train.0": LAMPS[:3],
        "train.1": [
            of(LAMPS[0], 0, "Whose port is it?"),
            of(LAMPS[1], 1, "Which port has lamp 9?", "paraphrase"),
        ],
        "validation.0": LAMPS[9:],
    }
    outcome = job.run(files, train=[DATASET] * 2, validation=[DATASET], augmented=True)
    assert ledger_of(outcome, 1)["filtered"] == {"promptHeldOut": 1}
    assert held_out_questions(job) == ["Which port has lamp 9?"]


# ---- originals that are left out ----------------------------------------------------------------


def test_an_augmented_row_goes_with_an_original_that_is_removed_or_repeated(job: Job) -> None:
    rows = [
        lamp(0),
        lamp(0),
        chat("Ask.", "No."),
        {"messages": [{"role": "user", "content": "Alone?"}]},
        lamp(4),
    ]
    new = [of(rows[number], number) for number in (0, 1, 4) if number != 4]
    new += [of(rows[2], 2), of(lamp(4), 4, example=3)]  # the invalid row is no example
    outcome = augmented(
        job,
        rows,
        new,
        clean=Clean(duplicates="exact", min_words=5),
        on_invalid_row="skip",
    )
    found = ledger_of(outcome, 1)
    assert found["filtered"] == {"length.minWords": 1, "originalLeftOut": 1}
    assert found["trained"] == 2
    assert ledger_of(outcome, 0)["duplicate"] == {"exact": 1}


def test_an_augmented_row_goes_with_an_original_that_is_too_long(job: Job) -> None:
    rows = [lamp(0), chat("Ask.", "lamp " * 90)]
    new = [of(lamp(0), 0), of(chat("Ask.", "lamp."), 1, "What is it?")]
    outcome = augmented(job, rows, new, max_length=60, on_overlength="drop")
    assert ledger_of(outcome, 1)["filtered"] == {"originalLeftOut": 1}


def test_an_augmented_row_that_is_too_long_is_dropped_where_others_fail_the_stage(job: Job) -> None:
    new = [of(lamp(0), 0, "Which port? " * 40), of(lamp(1), 1)]
    outcome = augmented(job, LAMPS, new, max_length=60)
    assert ledger_of(outcome, 1)["dropped"] == 1
    assert outcome.metrics["augmentedRows"] == 1
    with pytest.raises(StageError, match="longer than 60 tokens"):
        augmented(job, [*LAMPS, chat("Which port? " * 40, "Ours.")], new, max_length=60)


def test_a_template_is_no_near_duplicate_of_its_original(job: Job) -> None:
    long = chat("Which of the many ports of the harbor has the old lamp number five?", "Port five.")
    outcome = augmented(job, [long, lamp(1)], [of(long, 0)], clean=Clean(duplicates="near"))
    assert outcome.metrics["augmentedRows"] == 1


# ---- what users see -----------------------------------------------------------------------------


def test_augmented_rows_are_a_source_of_their_own(job: Job) -> None:
    new = [of(LAMPS[0], 0), of(LAMPS[1], 1, "Lamp 1 is where?", "paraphrase")]
    outcome = augmented(job, LAMPS, new)
    mixture = outcome.details["mixture"]
    assert [part["share"] for part in mixture] == pytest.approx([10 / 12, 2 / 12])
    template, paraphrase = outcome.details["augmented"]
    assert (template["by"], template["rows"]) == ("template", 1)
    assert paraphrase["samples"] == [
        {
            "where": "train.0.jsonl row 2",
            "original": "Which port has lamp 1?",
            "question": "Lamp 1 is where?",
            "answer": "Lamp 1 has port 21.",
        }
    ]
    assert outcome.details["datasets"][1]["unreadColumns"] == []


def test_augmented_rows_are_searched_for_leaks_as_any(job: Job) -> None:
    words = "the quick brown fox jumps over the lazy dog and then runs away again"
    files = {
        "train.0": [lamp(0), lamp(1)],
        "train.1": [of(lamp(0), 0, f"Say {words} now")],
        "validation.0": [chat(f"Is it true that {words}?", "It is.")],
    }
    outcome = job.run(files, train=[DATASET] * 2, validation=[DATASET], augmented=True)
    (leak,) = outcome.details["leaks"]["examples"]
    assert "train.1" in leak["training"]


def test_without_augmentation_a_column_of_marks_is_not_read(job: Job) -> None:
    outcome = job.train([of(LAMPS[0], 0), *LAMPS])
    assert outcome.details["datasets"][0]["unreadColumns"] == ["augmented"]
    assert "augmented" not in outcome.details


def test_replayed_rows_keep_their_share_beside_augmented_ones(job: Job) -> None:
    files = {
        "train.0": LAMPS,
        "train.1": [chat(f"Say {n} words.", f"{n} words.") for n in range(20)],
        "train.2": [of(row, number) for number, row in enumerate(LAMPS)],
    }
    outcome = job.run(
        files,
        train=[DATASET] * 3,
        augmented=True,
        replay=ReplaySettings(datasets=1, share=0.2),
        validation_fraction=0.2,
    )
    shares = [part["share"] for part in outcome.details["mixture"]]
    assert shares == pytest.approx([0.4, 0.2, 0.4])
    assert ledger_of(outcome, 1)["heldOut"] == ledger_of(outcome, 2)["heldOut"] == 0


def test_a_temperature_counts_augmented_rows_as_a_data_set() -> None:
    counts, ones = [90, 50, 10], [1.0] * 3
    found = mixed_weights(counts, ones, temperature=2.0, replayed=1, share=0.2, augmented=True)
    parts = [weight * count for weight, count in zip(found, counts, strict=True)]
    assert parts == pytest.approx([75, 25, 25])


def test_an_augmented_row_has_the_passages_of_its_document(job: Job) -> None:
    rows = [{**lamp(number), "document": f"d{number}"} for number in range(4)]
    documents = [{"id": f"d{n}", "text": f"Lamp {n} has port {n + 20}."} for n in range(4)]
    new = [{**of(lamp(2), 2, "Where does lamp 2 go?"), "document": "d2"}]
    outcome = job.run(
        {"train.0": rows, "train.1": new, "documents": documents},
        train=[DATASET] * 2,
        augmented=True,
        retrieval=RetrievalSettings(
            fields=DocumentFields(), passages=2, gold_share=1.0, passage_words=50, cite=False
        ),
    )
    assert outcome.details["retrieval"]["namedDocuments"] == 5
    assert outcome.details["augmented"][0]["samples"][0]["original"] == "Which port has lamp 2?"


# ---- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "question"),
    [
        ("How heavy is it?", "How heavy is it?"),
        ("Question: How heavy is it?", "How heavy is it?"),
        ('**Rewritten message:** "How heavy is it?"', "How heavy is it?"),
        ("Sure! Here is the rewritten message:\n\nHow heavy is it?", "How heavy is it?"),
        ("Here's a paraphrase: \u201cHow heavy is it?\u201d", "How heavy is it?"),
        ("<think>It asks for the weight.</think>How heavy is it?", "How heavy is it?"),
        ("<think>It asks for", ""),
        ('"No" is what in French?', '"No" is what in French?'),
        ('Is "a" or "b" right: "c"', 'Is "a" or "b" right: "c"'),
        ("The message is short: why?", "The message is short: why?"),
    ],
)
def test_only_the_question_of_a_reply_is_taken(reply: str, question: str) -> None:
    assert bare_reply(reply) == question


def test_a_choice_of_rows_hardly_changes_with_other_rows() -> None:
    contents = [*range(1000)]
    every = np.ones(1000, dtype=bool)
    first = chosen(contents, every, 0.2, "0/inversion")
    assert first.sum() == 200
    more = chosen([*contents, 5000], np.ones(1001, dtype=bool), 0.2, "0/inversion")[:-1]
    assert (first != more).sum() <= 1
    assert chosen(contents, every, 1e-6, "0/inversion").sum() == 1
    assert not chosen([], every[:0], 0.5, "0/inversion").any()
