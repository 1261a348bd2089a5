"""The ledger: every row and every token that comes in has one outcome, whatever the rows are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.test_prepare import DATASET, Job, Row, chat, chats, long_chat
from tuneyard.errors import StageError
from tuneyard_trainer.data.ledger import Ledger
from tuneyard_trainer.data.prepared import Rows


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def added(amounts: Any) -> int:
    """The sum of all numbers below, but for what came in."""
    if isinstance(amounts, int):
        return amounts
    return sum(added(amount) for name, amount in amounts.items() if name != "in")


def random_rows(chance: random.Random, count: int) -> list[Row]:
    kinds = [
        lambda i: chat(f"Which lamp has number {i}?", f"The lamp {i}."),
        lambda i: chat(f"Which lamp has number {i}?", "It is red. " * chance.randint(1, 60)),
        lambda _: chat("Ask. " * chance.randint(1, 90), "Yes."),
        lambda _: chat("Which lamp?", "The red lamp."),
        lambda _: {"messages": []},
        lambda _: {"messages": [{"role": "assistant", "content": "No question."}]},
    ]
    weights = [6, 3, 2, 1, 1, 1]
    return [chance.choices(kinds, weights)[0](i) for i in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_the_outcomes_add_up_to_what_came_in(job: Job, seed: int) -> None:
    """For random rows, policies and splits, and each data set by itself."""
    chance = random.Random(seed)
    own = chance.random() < 0.5
    files = {f"train.{i}": chats(3) + random_rows(chance, 40) for i in range(2)}
    if own:
        files["validation.0"] = chats(3) + random_rows(chance, 20)
    outcome = job.run(
        files,
        train=[DATASET] * 2,
        validation=[DATASET] * own,
        validation_fraction=None if own else 0.3,
        max_length=64,
        on_overlength=chance.choice(["drop", "truncate", "split"]),
        on_invalid_row="skip",
    )
    ledger = outcome.details["ledger"]
    for entry in [*ledger["sources"], ledger["total"]]:
        assert added(entry["rows"]) == entry["rows"]["in"]
        assert added(entry["tokens"]) == entry["tokens"]["in"]
    total = ledger["total"]
    assert total["rows"]["in"] == total["read"] == sum(len(rows) for rows in files.values())
    for split, name in (("train", "trained"), ("validation", "heldOut")):
        rows = Rows.open(job.workdir, split)
        assert rows is not None
        assert total["tokens"][name] == len(rows.tokens)
        assert total["targets"][name] == rows.targets.sum()
        assert total["sequences"][name] == len(rows)
    assert job.data.summary["ledger"] == ledger


def test_each_outcome_is_counted_for_its_data_set(job: Job) -> None:
    broken = [{"messages": []}]
    outcome = job.run(
        {"train.0": chats(3) + broken, "train.1": [*chats(2), long_chat(100)]},
        train=[DATASET] * 2,
        max_length=64,
        on_overlength="drop",
        on_invalid_row="skip",
    )
    first, second = outcome.details["ledger"]["sources"]
    assert (first["role"], first["name"]) == ("train.0", "spec.data.train.0")
    assert first["rows"]["invalid"] == {"InvalidData": 1}
    assert (first["rows"]["trained"], first["rows"]["dropped"]) == (3, 0)
    assert (second["rows"]["trained"], second["rows"]["dropped"]) == (2, 1)
    assert second["rows"]["invalid"] == {}
    assert second["tokens"]["dropped"] > 100


def test_cut_tokens_and_pieces_without_a_target_are_counted_apart(job: Job) -> None:
    rows = [*chats(1), long_chat(100)]
    truncated = job.train(rows, max_length=64, on_overlength="truncate")
    total = truncated.details["ledger"]["total"]
    assert total["changes"] == {"truncated": 1}
    assert total["tokens"]["cut"] == truncated.metrics["longestRow"] - 64
    assert truncated.metrics["lostTokens"] == total["tokens"]["cut"]
    split = job.train([chat("Ask. " * 60, "lamp " * 30)], max_length=64, on_overlength="split")
    tokens = split.details["ledger"]["total"]["tokens"]
    assert tokens["contextOnly"] == tokens["in"] - tokens["trained"] > 0


def test_context_is_what_is_trained_on_without_loss(job: Job) -> None:
    outcome = job.train(chats(3))
    train = job.data.train
    assert outcome.metrics["contextTokens"] == len(train.tokens) - train.targets.sum() > 0
    assert outcome.metrics["lostTokens"] == outcome.metrics["filteredRows"] == 0
    assert outcome.metrics["readRows"] == 3


def test_a_ledger_that_does_not_balance_is_an_error() -> None:
    ledger = Ledger("train.0", "spec.data.train[0]")
    ledger.keep(10)
    with pytest.raises(ArithmeticError, match=r"spec.data.train\[0\] does not balance"):
        ledger.check()
    ledger.settle("trained", rows=1, tokens=9)
    with pytest.raises(ArithmeticError, match="1 rows and 10 tokens came in"):
        ledger.check()


def test_trees_without_a_reviewed_answer_are_counted(job: Job) -> None:
    def tree(number: int, *, reviewed: bool) -> Row:
        return {
            "message_id": str(number),
            "parent_id": None,
            "text": f"Which lamp is {number}?",
            "role": "prompter",
            "replies": [
                {
                    "message_id": f"{number}r",
                    "text": "The red one.",
                    "role": "assistant",
                    "replies": [],
                    "review_result": reviewed,
                }
            ],
        }

    trees = [tree(number, reviewed=number != 1) for number in range(3)]
    openassistant = DATASET.model_copy(update={"format": "openassistant"})
    outcome = job.train(trees, train=[openassistant])
    rows = outcome.details["ledger"]["total"]["rows"]
    assert (rows["in"], rows["filtered"], rows["trained"]) == (3, {"unreviewed": 1}, 2)


def test_answers_of_a_log_that_nobody_liked_are_counted(job: Job) -> None:
    log: list[Row] = []
    for number in range(4):
        prompt = f"Which lamp is {number}?"
        log += [
            {"event": "answer", "id": number, "prompt": prompt, "completion": "The red one."},
            {"event": "rating", "of": number, "thumbs": "down" if number == 1 else "up"},
        ]
    ledger = job.train(log).details["ledger"]["total"]
    rows = ledger["rows"]
    assert (ledger["read"], rows["in"]) == (8, 4)
    assert (rows["filtered"], rows["trained"]) == ({"notRatedUp": 1}, 3)


# ---- one prompt, one split ----------------------------------------------------------------------


def test_rows_with_one_prompt_are_on_one_side(job: Job) -> None:
    """A held-out answer to a prompt that is trained on measures memorization too."""
    rows = [
        chat(f"Which lamp has number {i}?{space}", f"The lamp {i} {word}.")
        for i in range(12)
        for word, space in (("is red", ""), ("is green", " "), ("is off", "\n"))
    ]
    outcome = job.train(rows, validation_fraction=0.25)
    held = {row["messages"][0]["content"].strip() for row in map(_parsed, _held(job))}
    assert outcome.metrics["heldOutRows"] == 9
    assert len(held) == 3


def test_rows_without_a_shared_prompt_are_split_as_in_0_2(job: Job) -> None:
    """The held-out rows were written by version 0.2 for the same rows, fraction and seed."""
    job.train(chats(60), validation_fraction=0.1)
    numbers = [_parsed(line)["messages"][1]["content"] for line in _held(job)]
    assert numbers == HELD_OUT_IN_0_2


def test_a_data_set_with_one_prompt_cannot_be_split(job: Job) -> None:
    rows = [chat("Write a poem.", f"The lamp {i}.") for i in range(5)]
    with pytest.raises(StageError, match="have the same prompt") as caught:
        job.train(rows, validation_fraction=0.2)
    assert caught.value.reason == "TooFewRows"
    assert "spec.data.validation.data" in caught.value.advice


def test_pretraining_on_conversations_is_split_by_rows(job: Job) -> None:
    """There the prompt is a target like any other token."""
    rows = [chat("Write a poem.", f"The lamp {i}.") for i in range(5)]
    outcome = job.train(rows, validation_fraction=0.2, method="pretrain")
    assert outcome.metrics["heldOutRows"] == 1


def _held(job: Job) -> list[str]:
    return (job.workdir / "validation.jsonl").read_text().splitlines()


def _parsed(line: str) -> Row:
    value: Row = json.loads(line)
    return value


HELD_OUT_IN_0_2 = [f"The lamp {number}." for number in (1, 21, 35, 37, 45, 51)]
