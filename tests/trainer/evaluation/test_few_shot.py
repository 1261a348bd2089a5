"""The base model asked with worked examples, against the tuned model without them."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.data.test_prepare import DATASET, Job
from tests.trainer.evaluation.measuring import ALONE, evaluate_stage
from tuneyard.errors import StageError
from tuneyard_trainer.data.texts import EXAMPLES
from tuneyard_trainer.evaluation import evaluate, held_out, part
from tuneyard_trainer.worker import StageContext, StageOutcome

COLORS = ["red", "blue", "green", "black", "white", "gray", "brown", "pink", "gold", "teal"]
SYSTEM = {"role": "system", "content": "Name colors."}


def chat(number: int, *, expected: bool = True) -> dict[str, Any]:
    turns = [
        SYSTEM,
        {"role": "user", "content": f"Which color has lamp {number}?"},
        {"role": "assistant", "content": f"It is {COLORS[number % 10]}."},
    ]
    return {"messages": turns} | ({"expected": [COLORS[number % 10]]} if expected else {})


def plain(number: int) -> dict[str, Any]:
    return {"prompt": f"Color of lamp {number}: ", "completion": COLORS[number % 10]}


class Asked:
    """Answers every question with a text, and notes what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.replies = {True: "It is nothing.", False: "It is nothing."}
        """By whether a question has examples."""
        monkeypatch.setattr(part, "continuations", self)

    def __call__(
        self, _model: Any, _tokenizer: Any, prompts: Sequence[str], **_: Any
    ) -> tuple[str, ...]:
        self.prompts += prompts
        return tuple(self.replies[prompt.count("lamp") > 1] for prompt in prompts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    tiny_llama(VOCABULARY, initializer_range=0.1).save_pretrained(tmp_path / "tuned" / "weights")
    return Job(tmp_path, tiny_model_dir)


def prepared(job: Job, train: list[Any], validation: list[Any], **changes: Any) -> None:
    files = {"train.0": train} | ({"validation.0": validation} if validation else {})
    job.run(files, validation=[DATASET] if validation else [], **changes)


def evaluated(job: Job, **settings: Any) -> StageOutcome:
    folder = job.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    inputs = {"model": job.model, "tuned": job.folder / "tuned", "data": job.workdir}
    return evaluate.run(StageContext(evaluate_stage(**settings), inputs, folder, ALONE))


def rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.workdir / EXAMPLES).read_text().splitlines()]


# ---- examples -----------------------------------------------------------------------------------


def test_examples_are_training_rows_whose_prompts_are_not_held_out(job: Job) -> None:
    train = [chat(number) for number in range(20)]
    other = chat(4) | {"messages": [*chat(4)["messages"][:2], chat(5)["messages"][2]]}
    prepared(job, train, [chat(3), other, chat(30)])
    found = [row["messages"][1]["content"] for row in rows(job)]
    kept = {*range(20)} - {3, 4}
    assert {*found} == {f"Which color has lamp {number}?" for number in kept}
    prepared(job, train[::-1], [chat(3), other, chat(30)])
    again = [row["messages"][1]["content"] for row in rows(job)]
    assert again == found, "their order does not depend on that of the rows"


def test_no_examples_are_kept_of_documents_or_without_held_out_rows(job: Job) -> None:
    prepared(job, [chat(1), chat(2)], [])
    assert not (job.workdir / EXAMPLES).exists()
    texts = [{"text": f"Lamp {number} is {color}."} for number, color in enumerate(COLORS)]
    prepared(job, texts[:8], texts[8:], method="pretrain")
    assert not (job.workdir / EXAMPLES).exists()


# ---- questions ----------------------------------------------------------------------------------


def test_the_base_model_alone_is_asked_with_the_same_examples_before_each_question(
    job: Job, asked: Asked, tiny_tokenizer: Any
) -> None:
    prepared(job, [chat(number) for number in range(10)], [chat(20), chat(21)])
    outcome = evaluated(job, fewShot=2, samples=0)
    assert len(asked.prompts) == 6, "two questions: tuned, base, base with examples"
    shown = [row["messages"] for row in rows(job)[:2]]
    for prompt, number in zip(asked.prompts[4:], (20, 21), strict=True):
        places = [
            prompt.index(text) for turns in shown for text in (t["content"] for t in turns[1:])
        ]
        assert places == sorted(places)
        assert places[-1] < prompt.index(f"lamp {number}?")
        assert prompt.count("Name colors.") == 1
        assert prompt.count("lamp ") == 3
    assert all(prompt.count("lamp ") == 1 for prompt in asked.prompts[:4])
    assert outcome.metrics["fewShotExamples"] == 2
    few, none = (len(tiny_tokenizer(asked.prompts[at])["input_ids"]) for at in (5, 3))
    assert outcome.metrics["fewShotTokens"] == pytest.approx(few - none, abs=1)


def test_plain_examples_stand_before_a_plain_question_and_its_answer_ends_at_the_next_one(
    tmp_path: Path, job: Job, asked: Asked, tiny_tokenizer: Any
) -> None:
    job.model = shutil.copytree(job.model, tmp_path / "without-template")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    (job.model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(job.model)
    asked.replies[True] = "teal\n\nColor of lamp 99: red"
    prepared(job, [plain(number) for number in range(8)], [plain(19), plain(29)])
    metrics = evaluated(job, fewShot=1, metrics=["exactMatch"]).metrics
    example = rows(job)[0]
    wanted = f"{example['prompt']}{example['completion']}\n\nColor of lamp 19: "
    assert asked.prompts[4] == wanted
    assert metrics["baseFewShotExactMatch"] == 1.0
    assert metrics["exactMatchFewShotGain"] == -1.0
    assert metrics["baseExactMatch"] == metrics["exactMatch"] == 0.0


def test_the_gain_over_examples_has_its_standard_error(job: Job, asked: Asked) -> None:
    asked.replies[False] = "It is red."
    prepared(job, [chat(n) for n in range(10)], [chat(20), chat(21), chat(30), chat(40)])
    metrics = evaluated(job, fewShot=3).metrics
    assert metrics["answerAccuracy"] == metrics["answerAccuracyFewShotGain"] == 0.75
    assert metrics["baseFewShotAnswerAccuracy"] == 0.0
    error = math.sqrt(0.75 * 0.25 / 4)
    assert metrics["answerAccuracyFewShotGainError"] == pytest.approx(error)


def test_all_answers_are_kept_with_the_intervals_of_each_model_and_samples_are_a_few(
    job: Job, asked: Asked
) -> None:
    asked.replies[False] = "It is red."
    prepared(job, [chat(n) for n in range(10)], [chat(20), chat(21), chat(30), chat(40)])
    outcome = evaluated(job, fewShot=3, samples=1)
    kept = json.loads((job.folder / "evaluation/evaluation.json").read_text())
    assert [each["where"] for each in kept["answers"]] == [f"row {n}" for n in range(1, 5)]
    assert all(each["fewShot"] != each["tuned"] for each in kept["answers"])
    assert outcome.details["samples"] == kept["samples"] == kept["answers"][:1]
    assert "answers" not in outcome.details, "a record stays small"
    evidence = outcome.details["evidence"]
    assert evidence["answerAccuracy"]["baseInterval"] == evidence["answerAccuracy"]["interval"]
    prompted = evidence["baseFewShotAnswerAccuracy"]
    assert (prompted["value"], prompted["items"]) == (0.0, 4)
    assert prompted["interval"][0] == 0.0 < prompted["interval"][1]


def test_rows_without_expected_texts_are_compared_by_the_words_of_their_answers(
    job: Job, asked: Asked
) -> None:
    prepared(job, [chat(n) for n in range(10)], [chat(20, expected=False)])
    metrics = evaluated(job, fewShot=1, samples=0).metrics
    assert {"tokenF1", "baseTokenF1", "baseFewShotTokenF1"} <= metrics.keys()
    assert "baseFewShotAnswerAccuracy" not in metrics


def test_fewer_examples_are_shown_if_the_context_is_short_and_none_is_an_error(
    job: Job, asked: Asked, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(job, [chat(number) for number in range(10)], [chat(20)])
    evaluated(job)
    plain_tokens = len(tiny_tokenizer(asked.prompts[-1])["input_ids"])
    each = evaluated(job, fewShot=1).metrics["fewShotTokens"]
    room = plain_tokens + int(2.5 * each)
    monkeypatch.setattr(held_out, "context_length", lambda _: room + 6)  # maxNewTokens is 6
    assert evaluated(job, fewShot=8).metrics["fewShotExamples"] == 2
    monkeypatch.setattr(held_out, "context_length", lambda _: plain_tokens + 6)
    with pytest.raises(StageError, match=r"no training row can stand before") as caught:
        evaluated(job, fewShot=8)
    assert caught.value.reason == "NoExamples"
    assert "Remove evaluate.fewShot" in caught.value.advice
