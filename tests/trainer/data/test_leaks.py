"""The leak check: held-out text in the training rows is found, with the span that matches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data.test_cleaning import STORY, story
from tests.trainer.data.test_prepare import DATASET, Job, Row, chat, chats
from tuneyard.errors import StageError
from tuneyard_trainer.data import leaks as module
from tuneyard_trainer.data.cleaning.words import WordHashes, WordRows, grams, words
from tuneyard_trainer.data.leaks import Leaks, find_leaks
from tuneyard_trainer.data.texts import Texts

SPAN = STORY.lower().replace(",", "").replace(".", "").split()[:20]


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def noise(seed: int, count: int = 40) -> list[Row]:
    """Rows of random words, which have no long sequence in common."""
    chance = random.Random(seed)
    return [
        chat(f"Story {chance.randint(0, 1 << 30)}?", story(chance, chance.randint(20, 60)))
        for _ in range(count)
    ]


def found(folder: Path, held_out: Sequence[Row], training: Sequence[Row]) -> Leaks:
    with Texts(folder / "held") as held, Texts(folder / "training") as rest:
        for row in held_out:
            held.append(row)
        for row in training:
            rest.append(row)
    return find_leaks(held, rest, np.ones(len(rest), np.bool_))


def test_a_planted_leak_is_found_with_the_span_that_matches(tmp_path: Path) -> None:
    held_out, training = noise(1), noise(2)
    span = " ".join(SPAN)
    held_out[7] = chat("What?", f"He said that {span} before noon came around here today.")
    training[23] = chat("Where?", f"We saw how {span.upper()}, twice!")
    (leak,) = found(tmp_path, held_out, training).shown
    assert (leak.held_out, leak.training, leak.kind) == (7, 23, "overlap")
    assert (leak.span_words, leak.row_words) == (20, 30)
    assert leak.span == span


def test_twelve_words_are_no_leak_and_thirteen_are_one(tmp_path: Path) -> None:
    for size, expected in ((12, 0), (13, 1)):
        planted = chat("What?", " ".join(SPAN[:size]))
        other = chat("Where is it then?", "see " + " ".join(SPAN[:size]) + " so they all said then")
        assert found(tmp_path, [*noise(1), planted], [*noise(2), other]).overlap == expected


def test_a_near_copy_of_a_short_row_is_found(tmp_path: Path) -> None:
    """It has fewer than 13 words in sequence in common with its copy."""
    held_out = [*noise(1), chat("Which lamp hangs over the door?", "The red lamp hangs there.")]
    training = [*noise(2), chat("which lamp hangs over the door", "The RED lamp hangs there!")]
    (leak,) = found(tmp_path, held_out, training).shown
    assert (leak.held_out, leak.training, leak.kind) == (40, 40, "near")
    assert leak.span == "which lamp hangs over the door the red lamp hangs there"


def test_rows_are_compared_by_content_and_not_by_position(tmp_path: Path) -> None:
    held_out = noise(1)
    shuffled = held_out[::-1]
    assert found(tmp_path, held_out, [*noise(2), *shuffled]).rows == len(held_out)
    assert found(tmp_path, held_out, noise(2, 400)).rows == 0


def test_a_phrase_that_occurs_in_training_often_is_no_leak(tmp_path: Path) -> None:
    """As in the paper: more than 10 times."""
    phrase = " ".join(SPAN)

    def with_phrase(rows: list[Row], count: int) -> list[Row]:
        for number, row in enumerate(rows[:count]):
            row["messages"][1]["content"] += f" {len(rows)}x{number} {phrase}"
        return rows

    held_out = with_phrase(noise(1), 1)
    assert found(tmp_path, held_out, with_phrase(noise(2, 60), 10)).rows == 1
    assert found(tmp_path, held_out, with_phrase(noise(2, 60), 11)).rows == 0
    many = with_phrase(noise(1), 11)
    assert found(tmp_path, many, with_phrase(noise(2, 60), 1)).rows == 0


def test_a_shared_system_prompt_is_no_leak(tmp_path: Path) -> None:
    def prompted(rows: list[Row]) -> list[Row]:
        system = {"role": "system", "content": STORY}
        return [{"messages": [system, *row["messages"]]} for row in rows]

    assert found(tmp_path, prompted(noise(1, 5)), prompted(noise(2, 5))).rows == 0


def test_a_question_under_two_system_prompts_is_named_only_if_its_row_is_found_by_its_words(
    tmp_path: Path,
) -> None:
    """Thirteen words of it, or nearly all words of the row."""

    def under(system: str, question: str, answer: str) -> Row:
        turn = {"role": "system", "content": system}
        return {"messages": [turn, *chat(question, answer)["messages"]]}

    short, long = "Which lamp hangs over the door?", " ".join(SPAN)
    red, blue = "The red lamp hangs there.", "A blue lantern with two candles."
    for question, answers, expected in (
        (short, (red, blue), 0),
        (short, (red, red), 1),
        (long, (red, blue), 1),
    ):
        held_out = [*noise(1), under("Be kind.", question, answers[0])]
        training = [*noise(2), under("Be brief.", question, answers[1])]
        assert found(tmp_path, held_out, training).rows == expected


def test_a_conversation_and_its_continuation_are_named_from_thirteen_words_on(
    tmp_path: Path,
) -> None:
    for words_before, expected in ((8, 0), (20, 1)):
        start = chat("Go on.", " ".join(SPAN[:words_before]))["messages"]
        continued: Row = {"messages": [*start, *chat("And then?", STORY[::-1])["messages"]]}
        found_rows = found(tmp_path, [*noise(1), {"messages": start}], [*noise(2), continued]).rows
        assert found_rows == expected


def test_secrets_in_a_span_are_not_shown(tmp_path: Path) -> None:
    row = chat("Who?", "hf_" + "Ab3" * 11 + " " + " ".join(SPAN))
    (leak,) = found(tmp_path, [row], [row]).shown
    assert "ab3ab3" not in leak.span.lower()
    shown = (
        "Mail ada.lovelace@engines.org the key sk-proj-Zz9Zz9Zz9Zz9Zz9Zz9Zz9 or ring +49 30 901820"
    )
    row = chat("Who?", shown + " " + " ".join(SPAN))
    (leak,) = found(tmp_path, [row], [row]).shown
    for secret in ("lovelace", "zz9zz9", "901820"):
        assert secret not in leak.span


def test_the_batch_size_does_not_change_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = noise(1)
    training = [*noise(2), *held_out[3:9]]
    whole = found(tmp_path, held_out, training)
    assert whole.rows == 6
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    assert found(tmp_path, held_out, training) == whole


def test_sequences_are_those_of_each_row_alone() -> None:
    """Against a plain loop; words without spaces, as in Chinese, count one by one."""
    texts = ["a b c d", "", "e f", "水火土 g", "a b c"]
    known = WordHashes()
    rows = [words(text) for text in texts]
    assert rows[3] == ["水", "火", "土", "g"]
    result = grams(WordRows.of(rows, known), 3)
    plain = [tuple(row[i : i + 3]) for row in rows for i in range(len(row) - 2)]
    assert np.diff(result.offsets.astype(int)).tolist() == [max(0, len(row) - 2) for row in rows]
    by_hash: dict[int, tuple[str, ...]] = {}
    for key, sequence in zip(result.hashes.tolist(), plain, strict=True):
        assert by_hash.setdefault(key, sequence) == sequence
    assert len(by_hash) == len(set(plain))


# ---- in the stage -------------------------------------------------------------------------------


def planted(job: Job, **changes: Any) -> Any:
    leak = chat("Which lamp?", " ".join(SPAN))
    files = {
        "train.0": [*chats(6), chat("And which one?", "So " + " ".join(SPAN))],
        "validation.0": [*chats(9)[6:], leak],
    }
    return job.run(files, validation=[DATASET], **changes)


def test_leaks_are_named_in_the_record_and_the_log(job: Job) -> None:
    outcome = planted(job)
    leaks = outcome.details["leaks"]
    assert (leaks["checked"], leaks["rows"], outcome.metrics["leakedRows"]) == (4, 1, 1)
    (example,) = leaks["examples"]
    assert example["heldOut"] == "spec.data.validation.0 validation.0.jsonl row 4"
    assert example["training"] == "spec.data.train.0 train.0.jsonl row 7"
    assert example["span"] == " ".join(SPAN)
    (message,) = [r["message"] for r in job.reports if "held-out rows" in str(r.get("message"))]
    assert message.startswith("1 of 4 held-out rows have text that is also in the training data.")
    assert job.data.summary["leaks"] == leaks


def test_leaks_end_the_stage_if_the_job_says_so(job: Job) -> None:
    with pytest.raises(
        StageError, match=r"row 4 is in spec.data.train.0 train.0.jsonl row 7"
    ) as caught:
        planted(job, leaks="error")
    assert caught.value.reason == "DataLeak"
    assert "spec.data.leaks: warn" in caught.value.advice
    assert job.files() == {}


def test_leaks_are_not_searched_if_the_job_says_so(job: Job) -> None:
    outcome = planted(job, leaks="off")
    assert "leaks" not in outcome.details
    assert "leakedRows" not in outcome.metrics


def test_a_fraction_of_different_rows_has_no_leaks(job: Job) -> None:
    """And `leaks: error` accepts it; the rows of one prompt are on one side."""
    outcome = job.train(noise(5, 30), validation_fraction=0.2, leaks="error", max_length=256)
    assert outcome.details["leaks"] == {
        "checked": 6,
        "rows": 0,
        "overlap": 0,
        "near": 0,
        "examples": [],
    }


def test_near_copies_between_the_splits_of_one_data_set_are_found(job: Job) -> None:
    """Their prompts differ, so that the split does not keep them together."""
    rows = [
        chat(f"Story {i} {end}", row["messages"][1]["content"])
        for i, row in enumerate(noise(5, 20))
        for end in ("?", "please")
    ]
    outcome = job.train(rows, validation_fraction=0.3)
    assert 0 < outcome.metrics["leakedRows"] <= outcome.metrics["heldOutRows"]
    (first, *_) = outcome.details["leaks"]["examples"]
    assert first["heldOut"].startswith("spec.data.train.0 train.0.jsonl row ")
    assert first["heldOut"] != first["training"]
