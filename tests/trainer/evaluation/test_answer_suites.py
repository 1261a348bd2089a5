"""Suites of answers: prompts of a file, answered by both models and compared with their targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.evaluation.measuring import ALONE, evaluate_stage, measured
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import evaluate, task_metrics
from tuneyard_trainer.evaluation.suites import answers
from tuneyard_trainer.evaluation.suites.rows import read_items
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.worker import StageContext, StageOutcome

FIELD = "spec.evaluate.suites[0].answers.uri"
USER = {"role": "user", "content": "Who?"}


@pytest.mark.parametrize(
    ("row", "prompt", "targets"),
    [
        ({"prompt": "Who?", "target": "We"}, [USER], ("We",)),
        ({"question": "Who?", "answer": 4}, [USER], ("4",)),
        ({"prompt": "Who?", "targets": ["We", 2.5]}, [USER], ("We", "2.5")),
        ({"prompt": "Who?", "target": None, "expected": "We"}, [USER], ("We",)),
        ({"messages": [USER], "target": "We"}, [USER], ("We",)),
        (
            {"messages": [USER, {"role": "assistant", "content": "They"}], "target": "We"},
            [USER],
            ("We",),
        ),
        (
            {"system": "Be brief.", "prompt": "Who?", "target": "We"},
            [{"role": "system", "content": "Be brief."}, USER],
            ("We",),
        ),
    ],
)
def test_a_row_asks_a_text_or_a_conversation_and_has_one_target_or_several(
    row: dict[str, Any], prompt: list[Any], targets: tuple[str, ...]
) -> None:
    found = answers.parse(row, needs_target=True)
    assert list(found.prompt.messages) == prompt
    assert found.targets == targets


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Who?"}, "the row has prompt; expected: prompt (a text, or messages) and"),
        ({"target": "We"}, "no turn is by a user; the row has target"),
        ({"prompt": "Who?", "target": []}, "target is an empty list"),
        ({"prompt": "Who?", "target": " "}, "it holds ' '"),
        ({"prompt": "Who?", "answer": {"text": "We"}}, "answer is a text, a number, or a list"),
        ({"prompt": "Who?", "target": True}, "it holds True"),
        ({"prompt": "Who?", "target": float("nan")}, "it holds nan"),
        ({"messages": [USER, USER], "target": "We"}, "turn 2 is by user and follows user"),
    ],
)
def test_a_row_without_a_prompt_or_a_target_is_named(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    file = lines(tmp_path / "suite.jsonl", [{"prompt": "Who?", "target": "We"}, row])
    parse = partial(answers.parse, needs_target=True)
    with pytest.raises(StageError) as refused:
        read_items(file, parse, None, FIELD, answers.EXPECTED)
    assert refused.value.reason == "InvalidData"
    start = f"{FIELD}: 1 of 2 rows are no items of this suite. suite.jsonl row 2: "
    assert refused.value.message.startswith(start)
    assert said in refused.value.message


def lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---- the stage ----------------------------------------------------------------------------------

ROWS = [
    {"prompt": "Where is the lamp?", "target": ["the desk", "a shelf"]},
    {"messages": [{"role": "user", "content": "Who asks?"}], "target": "the team"},
    {"prompt": "What is red?", "target": "the button"},
]
TOKENS = 5


@pytest.fixture
def given(tmp_path: Path, inputs: dict[str, Path]) -> dict[str, Path]:
    """The inputs of an evaluation on a suite of answers alone."""
    return {
        "model": inputs["model"],
        "tuned": inputs["tuned"],
        "suite.0": lines(tmp_path / "capitals.jsonl", ROWS),
    }


def evaluated(
    folder: Path, given: dict[str, Path], suite: dict[str, Any] | None = None, **changes: Any
) -> StageOutcome:
    folder.mkdir(exist_ok=True)
    settings = {
        "metrics": ["exactMatch", "tokenF1", "chrf", "classification"],
        "answerSchema": None,
        "answerPattern": ".",
        "maxNewTokens": TOKENS,
    }
    shape = {"name": "capitals", "kind": "answers", "limit": None}
    suites = [shape | {"answers": settings | changes.pop("answers", {})} | (suite or {})]
    stage = evaluate_stage(**({"suites": suites} | changes))
    return evaluate.run(StageContext(stage, given, folder, ALONE))


def greedy(folder: Path, tokenizer: Any, rows: Sequence[Any]) -> list[str]:
    """Return the answers that transformers' own generation gives, one prompt at a time."""
    model: Any = load_base(folder, dtype=torch.float32, device=torch.device("cpu"), shards=1).eval()
    found = []
    for row in rows:
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = output[0, ids["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def test_both_models_answer_greedily_with_their_template_and_the_metrics_compare_the_targets(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    found = evaluated(tmp_path / "out", given)
    result = measured(tmp_path / "out")
    tokenizer = load_tokenizer(given["model"])
    expected = {
        "tuned": greedy(given["tuned"] / "weights", tokenizer, ROWS),
        "base": greedy(given["model"], tokenizer, ROWS),
    }
    kept = result["suiteAnswers"]["capitals"]
    assert {name: kept[name] for name in expected} == expected
    assert kept["id"] == [f"capitals.jsonl row {n}" for n in (1, 2, 3)]
    assert kept["prompt"] == ["Where is the lamp?", "Who asks?", "What is red?"]
    assert kept["targets"] == [["the desk", "a shelf"], ["the team"], ["the button"]]
    for metric in (task_metrics.token_f1, task_metrics.chrf, task_metrics.classification):
        scores = {name: metric(each, kept["targets"]) for name, each in expected.items()}
        for name, value in scores["tuned"].metrics.items():
            base = scores["base"].metrics[name]
            assert found.metrics[f"capitals/{name}"] == pytest.approx(value)
            assert found.metrics[f"capitals/base{name[0].upper()}{name[1:]}"] == pytest.approx(base)
            assert found.metrics[f"capitals/{name}Change"] == pytest.approx(value - base)
        for name, values in scores["tuned"].means.items():
            assert result["items"][f"capitals/{name}"]["tuned"] == pytest.approx(values.tolist())
    assert {"capitals/exactMatch", "capitals/patternMatch"} <= found.metrics.keys()
    assert found.metrics == result["metrics"]
    facts = found.details["suites"]["capitals"]
    assert facts["items"] == 3
    assert set(facts["classification"]) == {"tuned", "base"}
    assert "capitals/chrf" not in result["items"], "it is no mean of single answers"


def test_a_model_that_repeats_the_targets_is_right_and_only_targets_are_compared(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    said = greedy(given["tuned"] / "weights", load_tokenizer(given["model"]), ROWS)
    rows = [{**row, "target": ["none", text]} for row, text in zip(ROWS, said, strict=True)]
    lines(given["suite.0"], [*rows[:2], {**rows[2], "target": "something else"}])
    gates = [{"metric": "capitals/exactMatch", "notWorseThanBaseBy": 0.9, "minItems": 3}]
    found = evaluated(tmp_path / "out", given, gates=gates)
    assert found.metrics["capitals/exactMatch"] == pytest.approx(2 / 3)
    items = measured(tmp_path / "out")["items"]["capitals/exactMatch"]
    assert items["tuned"] == [1.0, 1.0, 0.0]
    assert found.details["gates"][0]["verdict"] in ("pass", "insufficientEvidence")


def test_the_limit_and_a_missing_comparison_hold_for_answers_too(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    metrics = evaluated(tmp_path / "out", given, {"limit": 2}, compareWithBase=False).metrics
    assert measured(tmp_path / "out")["suiteAnswers"]["capitals"].keys() == {
        "id",
        "prompt",
        "targets",
        "tuned",
    }
    assert len(measured(tmp_path / "out")["items"]["capitals/tokenF1"]["tuned"]) == 2
    assert not any("base" in name or "Change" in name for name in metrics)


def test_metrics_of_the_form_of_an_answer_need_no_target(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    lines(given["suite.0"], [{"prompt": "Write JSON."}])
    form = {"metrics": ["json"], "answerSchema": '{"type": "object"}'}
    metrics = evaluated(tmp_path / "out", given, answers=form).metrics
    assert {"capitals/jsonValid", "capitals/schemaValid"} <= metrics.keys()


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"prompt": "the lamp " * 500, "target": "x"}, {}, "row 1: the prompt has "),
        ({"prompt": "Who?"}, {}, "row 1: the row has prompt; expected"),
        (
            {"prompt": "Who?", "target": "We"},
            {"answerSchema": '{"type": 3}'},
            "spec.evaluate.suites[0].answers.answerSchema is not a valid JSON Schema",
        ),
    ],
)
def test_rows_and_schemas_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
    given: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(evaluate.policies, "load_for_inference", pytest.fail)
    lines(given["suite.0"], [row])
    with pytest.raises(StageError) as refused:
        evaluated(tmp_path / "out", given, answers=changes)
    assert said in refused.value.message


def test_a_prompt_that_the_chat_template_refuses_is_named(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    lines(given["suite.0"], [ROWS[0], {"system": "Be brief.", "prompt": "Who?", "target": "We"}])
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}"
        "{% endif %}{{ messages[0]['content'] }}"
    )
    chat = {"systemPrompt": None, "chatTemplate": template}
    with pytest.raises(StageError) as refused:
        evaluated(tmp_path / "out", given, chat=chat)
    assert refused.value.reason == "InvalidData"
    assert "1 of 2 rows" in refused.value.message
    assert "capitals.jsonl row 2: " in refused.value.message
    assert np.char.count(refused.value.message, "row 1:") == 0
