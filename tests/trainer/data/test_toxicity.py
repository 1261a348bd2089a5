"""Toxic rows are found by the job's classifier, counted, and left out if the job says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.classifying import WINDOW, save_classifier
from tests.trainer.data.test_prepare import DATASET, Job, Row, chat, chats
from tuneyard.api.cleaning import Clean
from tuneyard.api.stage_settings import ToxicitySettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import passages
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.data.toxicity import Toxicity
from tuneyard_trainer.models import classifiers
from tuneyard_trainer.models.classifiers import Classifier
from tuneyard_trainer.worker import Interrupted

CPU = torch.device("cpu")
FIELD = "spec.data.clean.toxicity"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def loaded(folder: Path, *labels: str) -> Classifier:
    return Classifier.load(folder, labels or ("toxic",), CPU, FIELD)


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a classifier with another config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def toxicity(**changes: Any) -> ToxicitySettings:
    found: dict[str, Any] = {"labels": ["toxic"], "threshold": 0.5, "treatment": "drop"}
    return ToxicitySettings(**(found | changes))


def rude(count: int) -> list[Row]:
    return [chat(f"Which lamp has number {100 + i}?", "you are a vile lamp") for i in range(count)]


def test_a_classifier_larger_than_the_memory_is_refused_before_it_is_loaded(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(classifier / "model.safetensors").values()
    size = sum(4 * tensor.numel() for tensor in tensors)
    monkeypatch.setattr(classifiers, "memory_limit", lambda: size)
    assert loaded(classifier).labels == ("toxic",)
    monkeypatch.setattr(classifiers, "memory_limit", lambda: size - 1)
    monkeypatch.setattr(classifiers, "load_classifier", pytest.fail)
    with pytest.raises(StageError) as refused:
        loaded(classifier)
    assert refused.value.reason == "DoesNotFit"
    assert f"{FIELD}.classifier.uri" in refused.value.advice


# ---- the stage ----------------------------------------------------------------------------------


def test_toxic_rows_are_dropped_counted_and_shown(job: Job, classifier: Path) -> None:
    outcome = job.train(
        [*chats(3), *rude(4)], classifier=classifier, clean=Clean(), toxicity=toxicity()
    )
    total = outcome.details["ledger"]["total"]
    assert total["rows"]["filtered"] == {"toxicity.toxic": 4}
    assert total["tokens"]["filtered"]["toxicity.toxic"] > 40
    assert outcome.metrics["rows"] == 3
    found = outcome.details["cleaning"]["toxicity.toxic"]
    assert (found["action"], found["rows"], len(found["examples"])) == ("removed", 4, 3)
    first = found["examples"][0]
    assert first["where"] == "spec.data.train.0 train.0.jsonl row 4"
    assert first["text"].startswith(("toxic 0.", "toxic 1."))
    assert first["text"].endswith(": you are a vile lamp")


def test_rows_that_are_only_reported_are_trained_on(job: Job, classifier: Path) -> None:
    rule = toxicity(treatment="report")
    outcome = job.train([*chats(3), *rude(2)], classifier=classifier, clean=Clean(), toxicity=rule)
    total = outcome.details["ledger"]["total"]
    assert (total["rows"]["filtered"], total["changes"]) == ({}, {"toxicity.toxic": 2})
    assert outcome.metrics["rows"] == 5
    assert outcome.details["cleaning"]["toxicity.toxic"]["action"] == "reported"


def test_held_out_rows_are_judged_too(job: Job, classifier: Path) -> None:
    outcome = job.run(
        {"train.0": chats(4), "validation.0": [*chats(9)[6:], *rude(1)]},
        validation=[DATASET],
        classifier=classifier,
        clean=Clean(),
        toxicity=toxicity(),
    )
    assert outcome.metrics["heldOutRows"] == 3


def test_the_rows_are_the_same_however_they_are_batched(
    job: Job, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for pair in zip(chats(6), rude(6), strict=True) for row in pair]
    settings: Any = {"classifier": classifier, "clean": Clean(), "toxicity": toxicity()}
    job.train(rows, **settings)
    whole = job.files()
    monkeypatch.setattr(classifiers, "BATCH_TOKENS", 1)
    job.train(rows, **settings)
    assert {name: data for name, data in job.files().items() if name.endswith(".npy")} == {
        name: data for name, data in whole.items() if name.endswith(".npy")
    }


def test_a_stop_is_seen_between_two_batches_of_the_classifier(
    job: Job, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "BATCH_TOKENS", 1)
    checks = 0

    def stop() -> bool:
        nonlocal checks
        checks += 1
        return checks == 3

    with pytest.raises(Interrupted):
        job.train(chats(4), stop=stop, classifier=classifier, clean=Clean(), toxicity=toxicity())
    assert checks == 3


def test_a_label_that_the_classifier_lacks_is_refused_with_those_that_it_has(
    job: Job, classifier: Path
) -> None:
    with pytest.raises(StageError, match="the labels neutral, toxic") as caught:
        job.train(
            chats(3),
            classifier=classifier,
            clean=Clean(),
            toxicity=toxicity(labels=["toxic", "threat"]),
        )
    assert caught.value.reason == "UnknownLabel"
    assert caught.value.message.startswith("spec.data.clean.toxicity.labels names threat,")
    assert job.files() == {}


# ---- texts --------------------------------------------------------------------------------------


def test_each_turn_is_judged_by_itself_without_the_system_prompt() -> None:
    turns = (
        Message("system", "You are vile."),
        Message("user", "Who?"),
        Message("assistant", "You.", reasoning="They ask who."),
    )
    assert [*passages(Example(1, "chat", turns))] == ["Who?", "They ask who.", "You."]
    assert [*passages(Example(1, "text", (), text="A lamp."))] == ["A lamp."]


def test_a_row_that_another_rule_removed_is_not_judged(classifier: Path) -> None:
    example = Example(1, "chat", (Message("user", "vile"), Message("assistant", "vile")))
    removed = Cleaned(example, (Finding("length.maxWords", "removed", "vile"),))
    rule = Toxicity(loaded(classifier), toxicity())
    found = rule([removed, Cleaned(example)])
    assert found[0] is removed
    assert found[1].removed_by == "toxicity.toxic"


# ---- the classifier -----------------------------------------------------------------------------


def test_the_probabilities_are_those_of_the_model_alone(classifier: Path) -> None:
    """Batches of unequal lengths are padded, and the padding changes nothing. Of the two labels,
    the improbable one is compared: near 1, a probability hides what changes it."""
    texts = ["vile", "the red lamp is a lamp", "you are a stupid lamp and the lamp is red", "lamp"]
    for column, label in enumerate(("neutral", "toxic")):
        model = loaded(classifier, label)
        for text, verdict in zip(texts, model.verdicts(texts), strict=True):
            encoded = model.tokenizer(text, return_tensors="pt")
            logits = model.model(input_ids=encoded["input_ids"]).logits
            expected = float(logits.softmax(dim=1)[0, column])
            assert verdict.probability == pytest.approx(expected, rel=1e-4)
            assert verdict.label == label
            is_rude = "vile" in text or "stupid" in text
            assert (expected > 0.5) == (is_rude == (label == "toxic"))


@pytest.mark.parametrize("place", [0, 27, 28, 60, 119])
def test_a_rude_word_is_found_anywhere_in_a_long_text(classifier: Path, place: int) -> None:
    """A text of 120 words has several windows; the highest probability counts."""
    words = ["lamp"] * 120
    model = loaded(classifier)
    (clean,) = model.verdicts([" ".join(words)])
    assert clean.probability < 0.5
    words[place] = "vile"
    text = " ".join(words)
    (found,) = model.verdicts([text])
    assert found.probability > 0.5
    assert "vile" in text[found.start : found.end]
    assert found.end - found.start < WINDOW * len("lamp ")


def test_labels_that_exclude_each_other_share_one_and_others_do_not(
    classifier: Path, tmp_path: Path
) -> None:
    both = ("neutral", "toxic")
    (one,) = loaded(classifier, *both).verdicts(["the lamp"])
    assert one.label == "neutral"

    def several(config: dict[str, Any]) -> None:
        config["problem_type"] = "multi_label_classification"

    other = loaded(changed(classifier, tmp_path / "several", several), *both)
    (found,) = other.verdicts(["the lamp"])
    logit = float(other.model(**other.tokenizer("the lamp", return_tensors="pt")).logits[0, 0])
    assert found.label == "neutral"
    assert found.probability == pytest.approx(1 / (1 + 2.718281828459045**-logit), abs=1e-6)
    assert found.probability != pytest.approx(one.probability, abs=1e-6)


def test_a_regression_is_refused(classifier: Path, tmp_path: Path) -> None:
    def regression(config: dict[str, Any]) -> None:
        config["problem_type"] = "regression"

    with pytest.raises(StageError, match="no probabilities") as caught:
        loaded(changed(classifier, tmp_path / "other", regression))
    assert caught.value.reason == "ClassifierBroken"
    assert f"{FIELD}.classifier.uri" in caught.value.advice


def test_a_model_without_a_trained_head_is_refused(classifier: Path, tmp_path: Path) -> None:
    """transformers would give it a random one."""
    shutil.copytree(classifier, tmp_path / "headless")
    file = tmp_path / "headless" / "model.safetensors"
    weights = {name: w for name, w in load_file(file).items() if "classifier" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"lacks classifier\.bias") as caught:
        loaded(tmp_path / "headless")
    assert caught.value.reason == "ClassifierBroken"


def test_pickled_weights_and_models_without_a_tokenizer_are_refused(
    classifier: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    shutil.copytree(classifier, tmp_path / "mute", ignore=shutil.ignore_patterns("token*"))
    for name in ("pickle", "mute"):
        with pytest.raises(StageError) as caught:
            loaded(tmp_path / name)
        assert caught.value.reason == "ClassifierBroken"
        assert f"{FIELD}.classifier.uri" in caught.value.advice


def test_a_label_without_an_output_is_refused(classifier: Path, tmp_path: Path) -> None:
    def gap(config: dict[str, Any]) -> None:
        config["id2label"] = {"0": "neutral", "5": "toxic"}

    with pytest.raises(StageError, match="has 2 outputs and a label 5") as caught:
        loaded(changed(classifier, tmp_path / "gap", gap))
    assert caught.value.reason == "ClassifierBroken"


def test_a_config_without_a_padding_token_takes_the_tokenizers(
    classifier: Path, tmp_path: Path
) -> None:
    """Windows of different lengths are padded to one pass."""
    texts = ["vile", "the red lamp is a lamp"]
    expected = [verdict.probability for verdict in loaded(classifier).verdicts(texts)]
    for number, padding in enumerate((None, -1)):

        def without(config: dict[str, Any], padding: int | None = padding) -> None:
            config["pad_token_id"] = padding

        found = loaded(changed(classifier, tmp_path / str(number), without)).verdicts(texts)
        assert [verdict.probability for verdict in found] == pytest.approx(expected, abs=1e-5)


def test_outputs_that_are_not_finite_are_no_verdict(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"] += float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match="not finite"):
        loaded(tmp_path / "broken").verdicts(["the lamp"])


def test_a_roberta_has_two_positions_less_than_its_config_says(
    tmp_path: Path, classifier: Path
) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from tests.trainer.classifying import tokenizer

    made = tokenizer()
    made.model_max_length = 10**30
    config = RobertaConfig(
        vocab_size=len(made),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=20,
        pad_token_id=1,
        id2label={0: "neutral", 1: "toxic"},
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert model.window == 18
    assert len(model.verdicts(["lamp " * 50, "you"])) == 2
