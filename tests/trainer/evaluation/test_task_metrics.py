"""The metrics of answers, against scikit-learn's, rouge-score's and sacrebleu's."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import task_metrics
from tuneyard_trainer.evaluation.task_metrics import OTHER, Scores
from tuneyard_trainer.reinforcement import patterns

ANSWERS = ["The cat sat on the mat.", "It is raining today", "", "Paris, of course", "a dog runs"]
SINGLE = [
    ["A cat sat on a mat"],
    ["It rains today"],
    ["nothing"],
    ["Paris"],
    ["the dogs are running fast"],
]
SEVERAL = [[*texts, "It is raining here today", "the cat"] for texts in SINGLE]


def only(scores: Scores) -> list[float]:
    (values,) = scores.means.values()
    return values.tolist()


# ---- words --------------------------------------------------------------------------------------


def test_an_exact_match_ignores_case_punctuation_and_articles_as_squad_does() -> None:
    answers = ["The  Eiffel Tower!", "eiffel towers", "an U.S. state", "the theory"]
    references = [["eiffel tower"]] * 2 + [["US state"], ["ory", "Theory."]]
    assert only(task_metrics.exact_match(answers, references)) == [1.0, 0.0, 1.0, 1.0]


def test_the_f1_of_words_counts_each_word_as_often_as_it_occurs() -> None:
    answers = ["red red blue", "red", "", "", "green"]
    references = [["red blue blue"], ["blue", "red car"], [""], ["red"], ["blue"]]
    found = only(task_metrics.token_f1(answers, references))
    assert found == pytest.approx([2 * 2 / 6, 2 / 3, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("references", [SINGLE, SEVERAL])
def test_rouge_is_that_of_rouge_score_for_the_best_reference(references: list[list[str]]) -> None:
    found = task_metrics.rouge(ANSWERS, references).means
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind, values in found.items():
        expected = [
            max(scorer.score(text, answer)[kind].fmeasure for text in texts)
            for answer, texts in zip(ANSWERS, references, strict=True)
        ]
        assert values == pytest.approx(expected)
    assert found.keys() == {"rouge1", "rouge2", "rougeL"}


# ---- translations -------------------------------------------------------------------------------


def test_bleu_and_chrf_are_sacrebleus_for_one_and_for_several_references() -> None:
    uneven = [texts if number % 2 else texts[:1] for number, texts in enumerate(SEVERAL)]
    for references, streams in (
        (SINGLE, [[texts[0] for texts in SINGLE]]),
        (SEVERAL, [list(each) for each in zip(*SEVERAL, strict=True)]),
        (
            uneven,
            [
                [texts[place] if place < len(texts) else None for texts in uneven]
                for place in range(3)
            ],
        ),
    ):
        bleu, chrf = task_metrics.bleu(ANSWERS, references), task_metrics.chrf(ANSWERS, references)
        assert bleu.whole["bleu"] == sacrebleu.corpus_bleu(ANSWERS, streams).score  # type: ignore[arg-type]
        assert chrf.whole["chrf"] == sacrebleu.corpus_chrf(ANSWERS, streams).score  # type: ignore[arg-type]
        for number, (answer, texts) in enumerate(zip(ANSWERS, references, strict=True)):
            expected = sacrebleu.sentence_bleu(answer, texts).score
            assert bleu.means["sentenceBleu"][number] == expected
            expected = sacrebleu.sentence_chrf(answer, texts).score
            assert chrf.means["sentenceChrf"][number] == expected


# ---- forms --------------------------------------------------------------------------------------


def test_json_is_valid_if_the_whole_answer_is_and_satisfies_the_schema() -> None:
    schema = json.dumps({"type": "object", "required": ["city"]})
    answers = ['{"city": "Rome"}', '{"town": "Rome"}', 'Sure: {"city": "Rome"}', "[" * 100_000]
    nothing = [[""]] * 4
    assert only(task_metrics.json_valid(answers, nothing)) == [1.0, 1.0, 0.0, 0.0]
    (metric,) = task_metrics.task_metrics([], schema, None)
    assert only(metric(answers, nothing)) == [1.0, 0.0, 0.0, 0.0]


def test_numbers_that_json_lacks_are_no_json_and_none_ends_the_measurement() -> None:
    answers = ["NaN", '{"price": Infinity}', "-Infinity", "1e999", "1" + "0" * 400, "12.5"]
    nothing = [[""]] * len(answers)
    assert only(task_metrics.json_valid(answers, nothing)) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    (metric,) = task_metrics.task_metrics([], '{"type": "number", "multipleOf": 0.5}', None)
    assert only(metric(answers, nothing))[:4] == [0.0] * 4
    assert only(metric(answers, nothing))[-1] == 1.0


def test_a_pattern_of_a_schema_that_takes_for_ever_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    schema = json.dumps({"items": {"type": "string", "pattern": "^(a+)+$"}})
    (metric,) = task_metrics.task_metrics([], schema, None)
    answers = [json.dumps(["a" * 60 + "b"]), '["aaa"]', "[7]"]
    assert only(metric(answers, [[""]] * 3)) == [0.0, 1.0, 0.0]


def test_a_schema_that_refers_to_itself_ends_for_each_answer() -> None:
    with pytest.raises(StageError, match=r"evaluate\.answerSchema refers to itself without end"):
        task_metrics.task_metrics([], '{"$ref": "#"}', None)
    tree = json.dumps({"items": {"$ref": "#"}, "type": "array"})
    (metric,) = task_metrics.task_metrics([], tree, None)
    deep = "[" * 900 + "]" * 900
    assert only(metric(["[[], [[]]]", "[1]", deep], [[""]] * 3))[:2] == [1.0, 0.0]


def test_a_broken_schema_is_refused_with_its_field() -> None:
    with pytest.raises(StageError, match=r"evaluate\.answerSchema is not a valid JSON Schema"):
        task_metrics.task_metrics([], '{"type": 3}', None)


def test_a_pattern_is_searched_and_one_that_takes_for_ever_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (metric,) = task_metrics.task_metrics([], None, r"\bTN-\d{4}\b")
    assert only(metric(["It is TN-1234.", "TN-12345", ""], [[""]] * 3)) == [1.0, 0.0, 0.0]
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    (metric,) = task_metrics.task_metrics([], None, r"^(a+)+$")
    assert only(metric(["a" * 60 + "b", "aaa"], [[""]] * 2)) == [0.0, 1.0]


# ---- classes ------------------------------------------------------------------------------------


def test_classes_have_the_accuracy_macro_f1_and_table_of_scikit_learn() -> None:
    draw = np.random.default_rng(4)
    classes = ["billing", "refund", "shipping"]
    wanted = [classes[number] for number in draw.integers(0, 3, 60)]
    named = [[*classes, OTHER][number] for number in draw.integers(0, 4, 60)]
    answers = [f"This is {name}." if name != OTHER else "No idea" for name in named]
    found = task_metrics.classification(answers, [[each] for each in wanted])
    assert only(found) == [float(a == b) for a, b in zip(wanted, named, strict=True)]
    assert np.mean(only(found)) == pytest.approx(accuracy_score(wanted, named))
    expected = f1_score(wanted, named, labels=classes, average="macro", zero_division=0)
    assert found.whole["macroF1"] == pytest.approx(expected)
    table = confusion_matrix(wanted, named, labels=[*classes, OTHER])
    expected_table = {"classes": [*classes, OTHER], "counts": table[:3].tolist()}
    assert found.details == {"classification": expected_table}


def test_an_answer_without_words_names_no_class_of_a_letter_or_a_sign() -> None:
    """Without articles and punctuation, nothing is left of A, + and -."""
    references = [["A"], ["A"], ["A"], ["A"], ["B"], ["+"], ["-"], ["+"]]
    answers = ["", ".", "A", "It is A.", "b", "+", "-", "-"]
    found = task_metrics.classification(answers, references)
    assert only(found) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_classes_that_differ_by_case_are_one_class() -> None:
    found = task_metrics.classification(["spam", "Spam", "ham"], [["Spam"], ["spam"], ["Ham"]])
    assert only(found) == [1.0, 1.0, 1.0]
    assert found.details["classification"]["classes"] == ["Ham", "Spam", OTHER]


def test_thousands_of_classes_take_seconds_and_have_no_table() -> None:
    names = [f"product {number}" for number in range(1500)]
    started = time.monotonic()
    found = task_metrics.classification([f"It is {name}." for name in names], [[n] for n in names])
    assert time.monotonic() - started < 60
    assert found.whole["macroF1"] == 1.0
    assert found.details == {}


def test_an_answer_names_a_class_if_it_equals_it_or_contains_no_other() -> None:
    references = [["not spam"], ["spam"], ["fraud"], ["not spam"]]
    answers = ["Not spam.", "spam", "It is fraud or spam", "This is not spam, is it?"]
    found = task_metrics.classification(answers, references)
    assert only(found) == [1.0, 1.0, 0.0, 1.0]
    table = found.details["classification"]
    assert table["classes"] == ["fraud", "not spam", "spam", OTHER]
    assert table["counts"] == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 1, 0]]
