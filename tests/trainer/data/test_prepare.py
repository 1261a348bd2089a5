"""The prepare stage: its files, its errors and its metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import DatasetSettings, PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import batches, prepare, prepared
from tuneyard_trainer.data.batches import split_evenly, truncate
from tuneyard_trainer.data.encoding.tokenization import Encoded
from tuneyard_trainer.data.prepared import ARRAYS, Prepared, Rows, RowWriter
from tuneyard_trainer.data.splits import held_out
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

Row = dict[str, Any]
DATASET = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)


def settings(**changes: Any) -> PrepareSettings:
    defaults: Row = {
        "method": "sft",
        "train": [DATASET],
        "validation": [],
        "validation_fraction": None,
        "max_length": "auto",
        "on_overlength": "error",
        "on_invalid_row": "error",
        "train_on": "assistant",
        "system_prompt": None,
        "chat_template": None,
        "seed": 0,
    }
    return PrepareSettings(**(defaults | changes))


def chat(question: str, answer: str) -> Row:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chats(count: int) -> list[Row]:
    return [chat(f"Which lamp has number {i}?", f"The lamp {i}.") for i in range(count)]


def long_chat(words: int) -> Row:
    return chat("Ask.", "lamp " * words + "end")


Files = dict[str, Sequence[Row]]
FIELDS = {"toxicity": "clean.toxicity.classifier"}
"""The field of each input that is not named like its role."""


class Job:
    """A prepare stage on data sets that the test writes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.reports = folder, model, list[Row]()

    @property
    def workdir(self) -> Path:
        return self.folder / "work"

    def run(
        self,
        files: Files,
        *,
        stop: Callable[[], bool] = lambda: False,
        classifier: Path | None = None,
        **changes: Any,
    ) -> StageOutcome:
        """`files`: rows by role. `classifier`: the input `toxicity`. None: there is none."""
        inputs = {"model": self.model}
        if classifier is not None:
            inputs["toxicity"] = classifier
        for role, rows in files.items():
            inputs[role] = self.folder / f"{role}.jsonl"
            inputs[role].write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = PlannedStage(
            name="prepare",
            settings=settings(**changes),
            inputs={
                role: SourceInput(
                    uri=f"file://{path}", path=f"spec.data.{FIELDS.get(role, role)}.uri"
                )
                for role, path in inputs.items()
            },
            fingerprint="",
        )
        self.workdir.mkdir(exist_ok=True)
        worker = Worker(
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            report=lambda **report: self.reports.append(report),
            stop=stop,
        )
        return prepare.run(StageContext(stage, inputs, self.workdir, worker))

    def train(self, rows: Sequence[Row], **changes: Any) -> StageOutcome:
        return self.run({"train.0": rows}, **changes)

    @property
    def data(self) -> Prepared:
        return Prepared.open(self.workdir)

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.workdir.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.workdir)): path.read_bytes() for path in paths}


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def held_out_rows(job: Job) -> list[Row]:
    return [json.loads(line) for line in (job.workdir / "validation.jsonl").open()]


def all_ids(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(rows.ids(row).tolist()) for row in range(len(rows))]


# ---- columns ------------------------------------------------------------------------------------


def test_columns_that_nothing_reads_are_named_once_and_recorded(job: Job) -> None:
    rows = [row | {"source": "web", "note": ""} for row in chats(5)]
    outcome = job.train(rows)
    assert outcome.details["datasets"][0]["unreadColumns"] == ["source"]
    messages = [str(report.get("message")) for report in job.reports]
    (named,) = [message for message in messages if "source" in message]
    assert named.startswith("spec.data.train.0: nothing reads the column source")
    assert "note" not in named


def test_a_field_whose_column_no_row_has_is_reported(job: Job) -> None:
    job.train(chats(5), train=[DATASET.model_copy(update={"fields": FieldMap(system="rules")})])
    messages = [str(report.get("message")) for report in job.reports]
    assert "spec.data.train.0: no row has the columns of fields.system: rules" in messages


@pytest.mark.parametrize("depth", [200, 201, 1000])
def test_messages_of_a_tree_too_deep_to_read_are_one_invalid_row(job: Job, depth: int) -> None:
    """A tree of 350 levels ended the stage with a RecursionError, also with onInvalidRow: skip."""
    rows = [
        {
            "message_id": f"{tree} {at}",
            "parent_id": f"{tree} {at - 1}" if at else None,
            "role": "assistant" if at % 2 else "prompter",
            "text": "so",
        }
        for tree, length in (("a", 4), ("b", depth), ("c", 4))
        for at in range(length)
    ]
    outcome = job.train(rows, on_invalid_row="skip", on_overlength="drop")
    (dataset,) = outcome.details["datasets"]
    assert dataset["format"] == "openassistant"
    assert dataset["skipped"] == int(depth > 200)


def test_rows_whose_columns_are_all_read_have_no_such_note(job: Job) -> None:
    outcome = job.train(chats(5))
    assert outcome.details["datasets"][0]["unreadColumns"] == []
    assert not [report for report in job.reports if "column" in str(report.get("message"))]


# ---- files ------------------------------------------------------------------------------------


def test_rows_have_the_ids_of_the_chat_template_and_the_answers_as_targets(
    job: Job, tiny_tokenizer: Any
) -> None:
    """Rows keep the order of the file."""
    outcome = job.train(chats(3))
    train = job.data.train
    for index, row in enumerate(chats(3)):
        expected = tiny_tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert train.ids(index).tolist() == expected
        answer = train.ids(index)[train.mask(index) == 1]
        assert tiny_tokenizer.decode(answer) == f"The lamp {index}.<|im_end|>"
    assert train.lengths.tolist() == [len(train.ids(i)) for i in range(3)]
    assert train.targets.tolist() == [int(train.mask(i).sum()) for i in range(3)]
    assert [array.dtype for array in (train.tokens, train.flat_mask)] == [np.int32, np.uint8]
    assert outcome.metrics["rows"] == outcome.metrics["sequences"] == 3
    assert outcome.metrics["tokens"] == train.lengths.sum()
    assert outcome.metrics["targetTokens"] == train.targets.sum()


def test_without_held_out_rows_there_are_no_validation_files(job: Job) -> None:
    """Training takes the absence of the files to mean that no rows are held out."""
    job.train(chats(3))
    assert job.data.validation is None
    names = {f"train.{array}.npy" for array in ARRAYS}
    tokenizer = {name for name in job.files() if name.startswith("tokenizer/")}
    assert set(job.files()) == names | {"data.json"} | tokenizer


def test_the_tokenizer_is_saved_with_the_template_of_the_job(job: Job) -> None:
    """Export and evaluation use the template of training."""
    template = "{% for m in messages %}{{ m['role'] + '=' + m['content'] + eos_token }}{% endfor %}"
    job.train(chats(2), chat_template=template)
    assert (job.workdir / "tokenizer" / "chat_template.jinja").read_text() == template
    assert job.data.summary["chatTemplate"] == template


def test_each_row_has_the_index_of_its_data_set(job: Job) -> None:
    """Training applies the weight of each row's data set."""
    second = DATASET.model_copy(update={"weight": 2.5})
    job.run({"train.0": chats(2), "train.1": chats(3)}, train=[DATASET, second])
    assert job.data.train.source.tolist() == [0, 0, 1, 1, 1]
    assert job.data.weights == [1.0, 2.5]


def test_the_same_inputs_give_the_same_bytes(job: Job, tmp_path: Path) -> None:
    """The output's digest decides whether training is skipped, so paths must not change it."""
    job.train(chats(20), validation_fraction=0.2)
    elsewhere = Job(tmp_path / "elsewhere", tmp_path / "model")
    elsewhere.folder.mkdir()
    shutil.copytree(job.model, elsewhere.model)
    elsewhere.train(chats(20), validation_fraction=0.2)
    assert elsewhere.files() == job.files()


def test_files_of_a_killed_run_are_removed(job: Job) -> None:
    """Files that the new run does not write are removed too."""
    job.train(chats(20), validation_fraction=0.2)
    (job.workdir / ".spool").mkdir()
    (job.workdir / ".spool" / "train.tokens.npy").write_bytes(b"half")
    (job.workdir / "tokenizer" / "chat_template.jinja").write_text("old")
    job.train(chats(5))
    files = job.files()
    again = Job(job.folder / "fresh", job.model)
    again.folder.mkdir()
    again.train(chats(5))
    assert files == again.files()


def test_the_batch_size_does_not_change_the_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.train(chats(7))
    whole = job.files()
    monkeypatch.setattr(batches, "BATCH_ROWS", 2)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 50)
    job.train(chats(7))
    assert job.files() == whole


def test_in_pretraining_every_token_is_a_target(job: Job, tiny_tokenizer: Any) -> None:
    """A document is encoded as its tokens and the end of sequence."""
    job.train([{"text": "Ask the support desk."}], method="pretrain")
    train = job.data.train
    expected = tiny_tokenizer("Ask the support desk.")["input_ids"] + [tiny_tokenizer.eos_token_id]
    assert train.ids(0).tolist() == expected
    assert train.mask(0).tolist() == [0] + [1] * (len(expected) - 1)


def test_in_pretraining_on_conversations_the_questions_are_targets_too(job: Job) -> None:
    """The method takes precedence over trainOn."""
    job.train(chats(2), method="pretrain")
    assert job.data.train.targets.tolist() == (job.data.train.lengths - 1).tolist()


def test_progress_counts_the_rows_of_all_data_sets(job: Job) -> None:
    job.run({"train.0": chats(2), "validation.0": chats(3)}, validation=[DATASET])
    assert [report["step"] for report in job.reports if "step" in report] == [2, 5]


def test_a_stop_request_interrupts_between_batches(job: Job) -> None:
    """No data.json is written: the next attempt starts from the beginning."""
    with pytest.raises(Interrupted):
        job.train(chats(3), stop=lambda: True)
    assert not (job.workdir / "data.json").exists()


# ---- held-out rows ----------------------------------------------------------------------------


def test_a_fraction_of_the_rows_is_held_out(job: Job) -> None:
    """Every row is in exactly one split, and validation.jsonl holds the held-out rows."""
    outcome = job.train(chats(40), validation_fraction=0.1)
    validation = job.data.validation
    assert validation is not None
    train_ids, held_ids = all_ids(job.data.train), all_ids(validation)
    assert (len(train_ids), len(held_ids)) == (36, 4)
    assert (outcome.metrics["rows"], outcome.metrics["heldOutRows"]) == (36, 4)
    assert not set(train_ids) & set(held_ids)
    texts = held_out_rows(job)
    assert len(texts) == 4
    assert all(row in chats(40) for row in texts)
    assert not (job.workdir / ".spool").exists()


def test_the_split_depends_on_the_seed_and_the_rows_alone(job: Job) -> None:
    """The order of the file does not matter; another seed holds out other rows."""

    def held(rows: Sequence[Row], seed: int) -> set[str]:
        job.train(rows, validation_fraction=0.1, seed=seed)
        return {json.dumps(row) for row in held_out_rows(job)}

    first = held(chats(60), 0)
    assert held(chats(60)[::-1], 0) == first
    assert held(chats(60), 1) != first


def test_equal_rows_go_to_one_split(job: Job) -> None:
    """A held-out row that is also in training measures memorization."""
    job.train(chats(10) * 3, validation_fraction=0.3)
    validation = job.data.validation
    assert validation is not None
    assert len(validation) == 9
    assert not set(all_ids(job.data.train)) & set(all_ids(validation))


def test_rows_that_are_equal_after_truncation_go_to_one_split(job: Job) -> None:
    """Equality is decided by the tokens that training reads."""
    rows = [long_chat(40 + i) for i in range(8)] + chats(8)
    job.train(rows, validation_fraction=0.5, max_length=48, on_overlength="truncate")
    validation = job.data.validation
    assert validation is not None
    assert not set(all_ids(job.data.train)) & set(all_ids(validation))


def test_the_pieces_of_a_row_go_to_one_split(job: Job) -> None:
    rows = [chat(f"Number {i}?", f"{i} lamp " * 30) for i in range(6)]
    outcome = job.train(rows, validation_fraction=0.4, max_length=64, on_overlength="split")
    validation = job.data.validation
    assert validation is not None
    assert outcome.metrics["heldOutRows"] == len(held_out_rows(job)) == 2
    assert len(validation) > 2
    assert outcome.metrics["sequences"] == len(job.data.train) > outcome.metrics["rows"] == 4


@pytest.mark.parametrize(
    ("hashes", "fraction", "count"),
    [
        (range(100), 0.05, 5),
        (range(3), 0.01, 1),
        (range(3), 0.99, 2),
        (range(2), 0.5, 1),
        ([7] * 99 + [8], 0.01, 1),
        ([7] * 50 + [8] * 40, 0.05, 40),
        ([1, 1, 2, 2, 3, 3], 0.5, 2),
    ],
)
def test_at_least_one_row_is_held_out_and_never_all(
    hashes: Sequence[int], fraction: float, count: int
) -> None:
    """Equal rows go to one split, so the count may be smaller than the fraction."""
    held = held_out(np.array(hashes, dtype=np.uint64), fraction)
    assert held.sum() == count
    for value in set(hashes):
        members = held[np.array(hashes) == value]
        assert members.all() or not members.any()


def test_a_data_set_of_equal_rows_cannot_be_split(job: Job) -> None:
    """No row would be left for training."""
    with pytest.raises(StageError, match="all 5 training rows are equal") as caught:
        job.train(chats(1) * 5, validation_fraction=0.2)
    assert caught.value.reason == "TooFewRows"
    with pytest.raises(StageError, match="there is one training row"):
        job.train([{"text": "A whole book."}], method="pretrain", validation_fraction=0.2)


def test_held_out_data_sets_are_not_trained_on(job: Job) -> None:
    """The rows keep their order and their field `expected`."""
    held = [{"prompt": "Which lamp?", "completion": "Red.", "expected": ["red"]}]
    outcome = job.run({"train.0": chats(3), "validation.0": held}, validation=[DATASET])
    assert (outcome.metrics["rows"], outcome.metrics["heldOutRows"]) == (3, 1)
    assert held_out_rows(job) == [{**chat("Which lamp?", "Red."), "expected": ["red"]}]
    assert outcome.details["contaminated"] == 0


def test_held_out_rows_that_are_also_in_training_are_counted_and_reported(job: Job) -> None:
    """A validation data set of the user is kept unchanged, with a warning."""
    outcome = job.run({"train.0": chats(5), "validation.0": chats(8)[3:]}, validation=[DATASET])
    assert outcome.details["contaminated"] == 2
    assert any("2 of 5 held-out rows" in str(report.get("message")) for report in job.reports)


def test_without_a_chat_template_held_out_rows_keep_prompt_and_completion(
    job: Job, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    shutil.copytree(job.model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    base = Job(tmp_path, tmp_path / "base")
    held = [{"prompt": "The lamp is", "completion": " red."}]
    base.run({"train.0": held * 2, "validation.0": held}, validation=[DATASET])
    assert held_out_rows(base) == held
    assert base.data.train.ids(0)[-1] == tiny_tokenizer.eos_token_id


# ---- rows that are too long -------------------------------------------------------------------


def test_overlong_rows_end_the_stage_by_default(job: Job) -> None:
    """The message counts all and quotes the first three; the stage leaves no files."""
    rows = [*chats(2), *[long_chat(100)] * 4]
    with pytest.raises(StageError) as caught:
        job.train(rows, max_length=64)
    error = caught.value
    assert error.reason == "RowTooLong"
    assert "4 of 6 rows are longer than 64 tokens" in error.message
    assert error.message.count("row ") == 3
    assert "row 3: " in error.message
    assert "row 6: " not in error.message
    assert "spec.data.onOverlength" in error.advice
    assert "spec.data.maxLength" in error.advice
    assert job.files() == {}


def test_skipping_invalid_rows_does_not_skip_overlong_rows(job: Job) -> None:
    """onInvalidRow and onOverlength are separate fields."""
    with pytest.raises(StageError) as caught:
        job.train([*chats(2), long_chat(100)], max_length=64, on_invalid_row="skip")
    assert caught.value.reason == "RowTooLong"


def test_overlong_rows_are_dropped_and_counted(job: Job) -> None:
    """longestRow includes the dropped rows."""
    outcome = job.train([*chats(2), long_chat(100)], max_length=64, on_overlength="drop")
    assert len(job.data.train) == outcome.metrics["rows"] == 2
    assert outcome.metrics["droppedRows"] == 1
    assert outcome.metrics["longestRow"] > 100
    assert job.data.summary["datasets"][0]["lengths"]["64"] == 2


def test_dropping_all_rows_is_an_error(job: Job) -> None:
    """The message counts the dropped rows."""
    with pytest.raises(
        StageError, match="no row is left for train: 0 skipped, 2 dropped"
    ) as caught:
        job.train([long_chat(100)] * 2, max_length=64, on_overlength="drop")
    assert caught.value.reason == "EmptyData"


def test_truncated_rows_keep_their_start(job: Job) -> None:
    """The targets of the start stay; the stop token is cut off."""
    outcome = job.train([*chats(1), long_chat(100)], max_length=64, on_overlength="truncate")
    assert outcome.metrics["truncatedRows"] == 1
    assert job.data.train.lengths[1] == 64
    assert job.data.train.mask(1)[-1] == 1
    assert job.data.max_length == 64


def test_a_row_without_targets_after_truncation_is_invalid(job: Job) -> None:
    """With onInvalidRow skip the row is skipped and counted."""
    long_question = chat("Ask. " * 60, "Yes.")
    changes = {"max_length": 64, "on_overlength": "truncate"}
    with pytest.raises(
        StageError, match="row 2: none of the first 64 tokens carries loss"
    ) as caught:
        job.train([*chats(1), long_question], **changes)
    assert caught.value.reason == "NoTargets"
    outcome = job.train([*chats(1), long_question], on_invalid_row="skip", **changes)
    assert (outcome.metrics["skippedRows"], outcome.metrics["truncatedRows"]) == (1, 0)
    assert len(job.data.train) == 1


def test_the_pieces_of_a_document_hold_all_its_tokens(job: Job, tiny_tokenizer: Any) -> None:
    """The pieces in order are the document and its end of sequence. Every token but the first of
    each piece is a target."""
    text = "The lamp has a red button. " * 40
    outcome = job.train([{"text": text}], method="pretrain", max_length=64, on_overlength="split")
    train = job.data.train
    whole = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    assert train.tokens.tolist() == whole
    assert len(train) == -(-len(whole) // 64) > 2
    assert train.lengths.max() - train.lengths.min() <= 1
    assert train.targets.tolist() == (train.lengths - 1).tolist()
    assert outcome.metrics["splitRows"] == outcome.metrics["rows"] == 1


def test_pieces_without_targets_are_left_out_and_counted(job: Job) -> None:
    """The first piece of a long question holds no target."""
    outcome = job.train([chat("Ask. " * 60, "lamp " * 30)], max_length=64, on_overlength="split")
    train = job.data.train
    assert outcome.metrics["contextOnlyPieces"] >= 1
    assert (train.targets > 0).all()
    assert outcome.metrics["splitRows"] == 1


@pytest.mark.parametrize("length", [65, 100, 128, 129, 640, 641])
def test_pieces_are_even_and_complete(length: int) -> None:
    """There are as few pieces as possible, and every target stays except at a piece's start."""
    ids = np.arange(length, dtype=np.int32)
    mask = (ids % 3 > 0).astype(np.uint8)
    pieces = split_evenly(Encoded(ids, mask), 64)
    assert len(pieces) == -(-length // 64)
    assert max(len(piece.ids) for piece in pieces) <= 64
    assert min(len(piece.ids) for piece in pieces) >= 32
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == ids.tolist()
    starts = {int(piece.ids[0]) for piece in pieces}
    expected = [0 if i in starts else int(mask[i]) for i in range(length)]
    assert np.concatenate([piece.mask for piece in pieces]).tolist() == expected
    assert mask[1] == 1, "split_evenly must not change the row"
    assert truncate(Encoded(ids, mask), 64)[0].ids.tolist() == ids[:64].tolist()


# ---- lengths ----------------------------------------------------------------------------------


def test_the_auto_length_is_at_most_the_models_context(job: Job) -> None:
    """The tiny model has 256 positions."""
    job.train(chats(2))
    assert job.data.max_length == 256


def test_the_auto_length_is_1024_without_a_known_limit(job: Job, tmp_path: Path) -> None:
    """Tokenizers without a limit state 1e30 tokens."""
    shutil.copytree(job.model, tmp_path / "endless")
    (tmp_path / "endless" / "config.json").write_text('{"model_type": "llama"}')
    config = tmp_path / "endless" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 1e30}))
    endless = Job(tmp_path, tmp_path / "endless")
    endless.train(chats(2))
    assert endless.data.max_length == 1024


def test_a_length_beyond_the_context_is_refused(job: Job) -> None:
    """The message states both numbers."""
    with pytest.raises(StageError, match=r"maxLength is 512 tokens.*holds 256") as caught:
        job.train(chats(2), max_length=512)
    assert caught.value.reason == "MaxLength"


# ---- rows that the template refuses -----------------------------------------------------------

NEEDS_LAMP = (
    "{% for m in messages %}"
    "{% if 'lamp' not in m['content'] and m['role'] == 'user' and m['content'] != '?' %}"
    "{{ raise_exception('ask about lamps only') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)


def test_rows_that_the_template_refuses_are_counted_and_quoted(job: Job) -> None:
    """The message includes the template's own message."""
    rows = [chats(1)[0], *[chat("Which port?", "The red one.")] * 5]
    with pytest.raises(StageError, match="ask about lamps only") as caught:
        job.train(rows, chat_template=NEEDS_LAMP)
    assert caught.value.reason == "ChatTemplate"
    assert "5 of 6 rows" in caught.value.message
    assert "spec.data.chatTemplate" in caught.value.advice
    assert "spec.data.train.0 train.0.jsonl row 2: " in caught.value.message
    assert job.files() == {}


def test_rows_that_the_template_refuses_are_skipped_on_request(job: Job) -> None:
    """The stage counts them, and its details quote the first."""
    rows = [chats(1)[0], chat("Which port?", "The red one.")]
    outcome = job.train(rows, chat_template=NEEDS_LAMP, on_invalid_row="skip")
    assert (outcome.metrics["rows"], outcome.metrics["skippedRows"]) == (1, 1)
    (fault,) = outcome.details["faults"]["spec.data.train.0"]["ChatTemplate"]
    assert fault.startswith("train.0.jsonl row 2: ")


def test_skipping_all_rows_is_an_error(job: Job) -> None:
    """The message quotes a skipped row."""
    with pytest.raises(StageError, match="ask about lamps only") as caught:
        job.train([chat("Which port?", "Red.")], chat_template=NEEDS_LAMP, on_invalid_row="skip")
    assert caught.value.reason == "EmptyData"


def test_rows_without_any_target_are_refused(job: Job) -> None:
    """A generation block that is never rendered leaves no target."""
    never = NEEDS_LAMP + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(StageError, match="2 of 2 rows have no token that carries loss") as caught:
        job.train(chats(2), chat_template=never)
    assert caught.value.reason == "NoTargets"


def test_broken_rows_and_refused_rows_are_counted_together(job: Job) -> None:
    """skippedRows covers rows that cannot be read and rows that the template refuses."""
    rows = [{"messages": []}, *chats(2), chat("Which port?", "Red.")]
    outcome = job.train(rows, chat_template=NEEDS_LAMP, on_invalid_row="skip")
    assert outcome.metrics["skippedRows"] == 2
    summary = job.data.summary["datasets"][0]
    assert (summary["rows"], summary["kept"], summary["skipped"]) == (4, 2, 2)
    assert summary["format"] == "messages"


# ---- reading prepared data --------------------------------------------------------------------


def test_a_folder_without_a_finished_stage_is_refused(tmp_path: Path) -> None:
    """data.json is written last: without it the arrays may be incomplete."""
    with RowWriter(tmp_path, "train") as writer:
        writer.append(np.arange(3, dtype=np.int32), np.ones(3, np.uint8), 0)
    with pytest.raises(StageError) as caught:
        Prepared.open(tmp_path)
    assert caught.value.reason == "NotPrepared"


def test_appended_rows_are_read_back(tmp_path: Path) -> None:
    """The files are plain .npy files whose header states the final number of tokens."""
    generator = np.random.default_rng(0)
    rows = [
        generator.integers(0, 1 << 30, n).astype(np.int32) for n in generator.integers(1, 9, 99)
    ]
    with RowWriter(tmp_path, "train") as writer:
        for index, ids in enumerate(rows):
            writer.append(ids, (ids % 2).astype(np.uint8), index % 3)
    assert len(writer) == 99
    back = Rows.open(tmp_path, "train")
    assert back is not None
    assert all_ids(back) == [tuple(ids.tolist()) for ids in rows]
    assert back.source.tolist() == [index % 3 for index in range(99)]
    assert back.targets.tolist() == [int((ids % 2).sum()) for ids in rows]
    assert np.load(tmp_path / "train.tokens.npy").shape == (sum(map(len, rows)),)
    assert Rows.open(tmp_path, "validation") is None


def test_targets_are_counted_row_by_row_over_several_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", 4)
    lengths = [1, 300, 7, 2, 5, 1, 1, 600, 3, 4]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    mask = np.ones(offsets[-1], dtype=np.uint8)
    mask[offsets[:-1]] = 0
    rows = Rows(mask.astype(np.int32), mask, offsets, np.zeros(len(lengths), dtype=np.int16))
    assert rows.targets.tolist() == [length - 1 for length in lengths]


# ---- general data -------------------------------------------------------------------------------


def test_general_data_is_neither_trained_on_nor_held_out_and_has_ledgers_of_its_own(
    job: Job,
) -> None:
    general = [chat(f"Which desk has number {i}?", f"The desk {i}.") for i in range(4)]
    watched = [chat(f"Which door has number {i}?", f"The door {i}.") for i in range(3)]
    outcome = job.run(
        {
            "train.0": chats(20),
            "general.0": general,
            "guard.0": watched[:2],
            "guard.1": watched[2:],
        },
        validation_fraction=0.2,
        general=[DATASET],
        guard=[DATASET, DATASET],
    )
    data = job.data
    assert data.validation
    assert data.general
    assert data.guard
    assert (len(data.general), len(data.guard)) == (4, 3)
    own = {*all_ids(data.train), *all_ids(data.validation)}
    assert len(own) == 20
    assert not own & {*all_ids(data.general), *all_ids(data.guard)}
    ledger = outcome.details["ledger"]
    rows = {each["name"]: each["rows"] for each in ledger["sources"]}
    assert rows["spec.data.general.0"]["general"] == 4
    assert [rows[f"spec.data.guard.{i}"]["guard"] for i in (0, 1)] == [2, 1]
    for name in ("spec.data.general.0", "spec.data.guard.0"):
        assert not {"trained", "heldOut"} & {key for key, count in rows[name].items() if count}
    assert rows["spec.data.train.0"]["trained"] + rows["spec.data.train.0"]["heldOut"] == 20
    assert outcome.metrics["rows"] + outcome.metrics["heldOutRows"] == 20
    assert outcome.metrics["sequences"] == len(data.train)
    assert data.weights == [1.0], "general data has no weight in an epoch"


def test_general_data_is_no_worked_example_and_leaves_the_other_files_as_they_were(
    job: Job,
) -> None:
    rows = {"train.0": chats(20)}
    job.run(rows, validation_fraction=0.2)
    plain = job.files()
    general = [chat(f"Which desk has number {i}?", f"The desk {i}.") for i in range(4)]
    job.run({**rows, "general.0": general}, validation_fraction=0.2, general=[DATASET])
    found = job.files()
    assert {name for name in found if name not in plain} == {f"general.{a}.npy" for a in ARRAYS}
    assert {name for name in plain if found[name] != plain[name]} == {"data.json"}
    job.run(rows, validation_fraction=0.2)
    assert job.files() == plain, "what an earlier run left is removed"


def test_general_data_without_a_usable_row_is_named(job: Job) -> None:
    with pytest.raises(StageError) as failure:
        job.run(
            {"train.0": chats(4), "guard.0": [long_chat(2000)]},
            guard=[DATASET],
            on_overlength="drop",
        )
    assert failure.value.reason == "EmptyData"
    assert "no row is left for guard" in failure.value.message
    assert "spec.data.guard.0" in failure.value.advice
