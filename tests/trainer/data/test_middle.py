"""Documents whose middle part comes last, by the published order of the parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.conftest import tokenizer_of_bytes
from tests.trainer.data.test_prepare import DATASET, Job, Row, chats
from tuneyard.api.sources import FillInTheMiddle, FillMarkers
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.middle import Markers, MiddleFiller
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.example import Example

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
WORDS = "The lamp has a red reset button behind the cover, and a warranty of two years. "


def coder() -> Any:
    """A tokenizer with the markers of Qwen2.5-Coder."""
    tokenizer = tokenizer_of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": list(NAMES)})
    return tokenizer


CODER = coder()
FILES = Encoder(CODER, "all")


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    """A job whose model has markers."""
    model = tmp_path / "coder"
    shutil.copytree(tiny_model_dir, model)
    CODER.save_pretrained(model)
    return Job(tmp_path, model)


def documents(count: int, words: str = WORDS) -> list[Row]:
    return [{"text": f"Lamp {i}. {words}"} for i in range(count)]


def filled(**changes: Any) -> dict[str, Any]:
    return {"method": "pretrain", "fill_in_the_middle": FillInTheMiddle(**changes)}


def filler(max_length: int = 256, **changes: Any) -> MiddleFiller:
    wanted = FillInTheMiddle(**changes)
    return MiddleFiller(CODER, wanted, Markers.of(CODER, wanted), max_length, seed=0)


def parts_of(text: str) -> tuple[str, str, str]:
    """Prefix, middle and suffix, read from the text of a sequence by the formulas of the paper."""
    prefix, suffix, middle = NAMES
    body = text.removesuffix("<|im_end|>")
    if body.startswith(prefix + suffix):  # spm: the prefix and the middle cannot be told apart
        after, _, before = body.removeprefix(prefix + suffix).partition(middle)
        return "", before, after
    before, _, rest = body.removeprefix(prefix).partition(suffix)
    after, _, between = rest.partition(middle)
    return before, between, after


def texts(rows: Rows) -> list[str]:
    return [CODER.decode(rows.ids(row)) for row in range(len(rows))]


def is_changed(text: str) -> bool:
    return text.startswith(NAMES[0])


@given(
    text=st.text(st.characters(exclude_categories=("Cs",)), min_size=3, max_size=60),
    mode=st.sampled_from(["psm", "spm", "both"]),
)
def test_the_parts_are_the_document_again_whatever_its_characters(text: str, mode: str) -> None:
    (encoded,) = FILES.encode([Example(row=1, kind="text", text=text)])
    assert isinstance(encoded, Encoded)
    (piece,) = filler(rate=1.0, mode=mode).pieces(text, [encoded])
    found = CODER.decode(piece.ids)
    assert is_changed(found)
    before, between, after = parts_of(found)
    assert before + between + after == text
    assert piece.mask.tolist() == [0] + [1] * (len(piece.ids) - 1)
    assert piece.ids[-1] == CODER.eos_token_id


def test_about_the_rate_of_the_sequences_is_changed_and_the_rest_is_as_it_was(job: Job) -> None:
    outcome = job.run({"train.0": documents(200)}, **filled(rate=0.3))
    changed = [is_changed(text) for text in texts(job.data.train)]
    assert 40 <= sum(changed) <= 80
    counts = outcome.details["fillInTheMiddle"]["sequences"]
    assert counts == {"changed": sum(changed), "asItWas": 200 - sum(changed)}


def test_both_orders_are_mixed_in_halves(job: Job) -> None:
    job.run({"train.0": documents(200)}, **filled(rate=1.0))
    spm = [text.startswith(NAMES[0] + NAMES[1]) for text in texts(job.data.train)]
    assert 75 <= sum(spm) <= 125


def test_a_document_is_cut_in_the_same_places_in_every_run(job: Job) -> None:
    rows = documents(20)
    job.run({"train.0": rows}, **filled())
    once = texts(job.data.train)
    job.run({"train.0": list(reversed(rows))}, **filled())
    assert sorted(texts(job.data.train)) == sorted(once)


def test_each_piece_of_a_long_document_gets_a_gap_of_its_own_and_no_text_is_lost(job: Job) -> None:
    long = "".join(f"Lamp {i} has a red button. " for i in range(120))
    job.run({"train.0": [{"text": long}]}, on_overlength="split", max_length=128, **filled(rate=1))
    found = texts(job.data.train)
    assert len(found) > 5
    assert all(is_changed(text) for text in found)
    assert int(job.data.train.lengths.max()) <= 128
    assert "".join("".join(parts_of(text)) for text in found) == long


def test_held_out_documents_have_no_gap_and_their_gaps_are_a_set_of_its_own(job: Job) -> None:
    job.run({"train.0": documents(40)}, validation_fraction=0.25, **filled(rate=1.0))
    data = job.data
    assert data.validation is not None
    assert data.gaps is not None
    assert not any(is_changed(text) for text in texts(data.validation))
    assert all(is_changed(text) for text in texts(data.train))
    held_out = [json.loads(line)["text"] for line in (job.workdir / "validation.jsonl").open()]
    assert len(data.gaps) == len(held_out) == 10
    for row, (text, document) in enumerate(zip(texts(data.gaps), held_out, strict=True)):
        before, between, after = parts_of(text)
        targets = CODER.decode(data.gaps.ids(row)[data.gaps.mask(row) == 1])
        gap = targets.removesuffix("<|im_end|>")
        assert before + between + after == document
        assert between.endswith(gap) if text.startswith(NAMES[0] + NAMES[1]) else gap == between
        assert 0 < len(gap) < len(document)


def test_held_out_files_of_their_own_have_gaps_too(job: Job) -> None:
    job.run(
        {"train.0": documents(4), "validation.0": documents(3, "Another text.")},
        validation=[DATASET],
        **filled(rate=1.0),
    )
    assert job.data.gaps is not None
    assert len(job.data.gaps) == 3
    assert job.data.validation is not None
    assert not any(is_changed(text) for text in texts(job.data.validation))


def test_without_the_setting_nothing_is_changed_and_there_are_no_gaps(job: Job) -> None:
    job.run({"train.0": documents(20)}, method="pretrain", validation_fraction=0.5)
    assert not any(is_changed(text) for text in texts(job.data.train))
    assert job.data.gaps is None


def test_a_document_that_holds_a_marker_stays_as_it_is(job: Job) -> None:
    outcome = job.run(
        {"train.0": [{"text": f"The token {NAMES[1]} ends the prefix."}, *documents(1)]},
        **filled(rate=1.0),
    )
    assert outcome.details["fillInTheMiddle"]["sequences"] == {"changed": 1, "unclear": 1}


def test_conversations_are_not_cut(job: Job) -> None:
    outcome = job.run({"train.0": chats(3)}, **filled(rate=1.0))
    assert outcome.details["fillInTheMiddle"]["sequences"] == {}


def test_the_ledger_counts_the_markers(job: Job) -> None:
    outcome = job.run({"train.0": documents(10)}, **filled(rate=1.0))
    tokens = outcome.details["ledger"]["total"]["tokens"]
    assert tokens["added"] >= 30  # three markers each
    assert tokens["in"] + tokens["added"] == tokens["trained"]


def test_markers_of_the_manifest_are_used(job: Job) -> None:
    markers = FillMarkers(prefix="<|im_start|>", suffix="<|pad|>", middle=NAMES[0])
    job.run({"train.0": documents(3)}, **filled(rate=1.0, mode="psm", markers=markers))
    assert all(text.startswith("<|im_start|>") for text in texts(job.data.train))


def test_a_model_without_markers_is_refused_with_tokens_that_could_be_some(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    job = Job(tmp_path, tiny_model_dir)
    with pytest.raises(StageError) as error:
        job.run({"train.0": documents(3)}, **filled())
    assert error.value.reason == "MarkersMissing"
    assert "spec.data.fillInTheMiddle.markers: '<|im_start|>'" in str(error.value)


def test_a_marker_that_is_no_token_of_the_model_is_refused(job: Job) -> None:
    markers = FillMarkers(prefix="<P>", suffix=NAMES[1], middle=NAMES[2])
    with pytest.raises(StageError, match="'<P>' is no special token") as error:
        job.run({"train.0": documents(3)}, **filled(markers=markers))
    assert error.value.reason == "MarkersMissing"


def test_a_held_out_document_longer_than_a_sequence_has_its_gap_in_its_start(job: Job) -> None:
    """Documents are often longer than a sequence: without this, there was nothing to measure."""
    outcome = job.train(
        documents(12, WORDS * 9),
        validation_fraction=0.5,
        max_length=64,
        on_overlength="split",
        **filled(),
    )
    assert outcome.details["fillInTheMiddle"]["gaps"] == 6
    gaps = job.data.gaps
    assert gaps is not None
    assert 32 < gaps.lengths.min() <= gaps.lengths.max() <= 64
    assert (gaps.targets > 1).all()


def test_truncated_documents_have_room_for_a_gap(job: Job) -> None:
    outcome = job.train(
        documents(12, WORDS * 9), max_length=64, on_overlength="truncate", **filled(rate=1.0)
    )
    assert outcome.details["fillInTheMiddle"]["sequences"] == {"changed": 12}
    assert job.data.train.lengths.max() <= 64
    for row, document in enumerate(documents(12, WORDS * 9)):
        start = "".join(parts_of(CODER.decode(job.data.train.ids(row))))
        assert document["text"].startswith(start)


def test_held_out_documents_are_not_counted_among_the_sequences(job: Job) -> None:
    rows = [*documents(10), *({"text": "ab" + str(i)} for i in range(10))]
    outcome = job.train(rows, validation_fraction=0.5, **filled())
    assert sum(outcome.details["fillInTheMiddle"]["sequences"].values()) == len(job.data.train)
