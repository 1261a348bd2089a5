"""Rewards: rules, reward models, weighted sums; an error, never 0, if scoring is impossible."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.trainer.conftest import VOCABULARY
from tuneyard.api.alignment import RuleReward
from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.rewards import Attempt
from tuneyard_trainer.running.runner import is_model

CPU = torch.device("cpu")
CHAT = ChatSettings(system_prompt=None, chat_template=None)


def prompt(text: str = "Which port?", number: int = 1, **row: Any) -> Prompt:
    return Prompt(({"role": "user", "content": text},), f"p.jsonl row {number}", row)


def rule(prompts: list[Prompt], **kind: Any) -> rewards.Reward:
    term = RewardTerm(rule=RuleReward.model_validate(kind))
    return rewards.load([term], {}, CHAT, prompts, CPU)


def classifier(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "num_labels": 1,
        "pad_token_id": 2,  # the stop token: with it transformers scores one token too early
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- rules --------------------------------------------------------------------------------------


def test_an_exact_match_ignores_case_and_white_space_only() -> None:
    given = prompt(answer="The left one")
    reward = rule([given], exact_match="answer")
    texts = [" the  LEFT\none ", "the left", "", "The left one."]
    assert reward([Attempt(given, text) for text in texts]).tolist() == [1, 0, 0, 0]


def test_a_list_of_texts_and_a_number_can_be_matched() -> None:
    listed, numbered = prompt(answer=["four", "4"]), prompt(answer=4)
    reward = rule([listed, numbered], exact_match="answer")
    assert reward([Attempt(listed, "Four"), Attempt(numbered, "4")]).tolist() == [1, 1]


def test_a_prompt_without_the_field_is_named_in_the_error_before_sampling() -> None:
    with pytest.raises(StageError, match=r"1 of 2 prompts .* 'answer'.*row 7 has label") as found:
        rule([prompt(answer="x"), prompt(number=7, label="x")], exact_match="answer")
    assert found.value.reason == "RewardFieldMissing"
    with pytest.raises(StageError, match="no field"):
        rule([prompt(answer=None)], exact_match="answer")


def test_a_schema_accepts_valid_json_without_other_text() -> None:
    schema = '{"type": "object", "required": ["port"], "properties": {"port": {"type": "integer"}}}'
    reward = rule([], json_schema=schema)
    texts = ['{"port": 2}', '{"port": "2"}', 'Sure: {"port": 2}', "{", "[" * 100_000, "2"]
    assert reward([Attempt(prompt(), text) for text in texts]).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("schema", ["{nonsense", '{"type": "strange"}'])
def test_an_invalid_schema_is_refused_before_sampling(schema: str) -> None:
    with pytest.raises(StageError) as found:
        rule([], json_schema=schema)
    assert found.value.reason == "BadSchema"


def test_a_schema_never_makes_the_trainer_fetch_anything() -> None:
    reward = rule([], json_schema='{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(StageError, match="reference to another schema") as found:
        reward([Attempt(prompt(), "{}")])
    assert found.value.reason == "BadSchema"


# ---- reward models ------------------------------------------------------------------------------


def learned(path: Path, chat: ChatSettings = CHAT) -> Any:
    return rewards.load([RewardTerm(role="reward")], {"reward": path}, chat, [], CPU)


def test_a_reward_model_scores_the_stop_token_after_prompt_and_completion(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Compared with one row at a time, without padding."""
    reward = learned(classifier(tmp_path, tiny_tokenizer))
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    attempts = [Attempt(prompt(), "Left."), Attempt(prompt("Who wrote it?"), "The team of all.")]
    scores = reward(attempts)
    for attempt, score in zip(attempts, scores, strict=True):
        text = tiny_tokenizer.apply_chat_template(
            list(attempt.prompt.messages), tokenize=False, add_generation_prompt=True
        )
        ids = tiny_tokenizer(text + attempt.completion + "<|im_end|>", return_tensors="pt")[
            "input_ids"
        ]
        assert ids[0, -1] == 2
        with torch.no_grad():
            expected = model.score(model.model(input_ids=ids)[0])[0, -1, 0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_score_does_not_depend_on_the_batch(tmp_path: Path, tiny_tokenizer: Any) -> None:
    reward = learned(classifier(tmp_path, tiny_tokenizer))
    attempts = [Attempt(prompt(), "so " * count) for count in range(1, 9)]
    together = reward(attempts)
    alone = torch.cat([reward([attempt]) for attempt in attempts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert reward([]).shape == (0,)


def test_the_output_of_a_reward_stage_uses_the_chat_template_of_the_job(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    classifier(tmp_path / "weights", tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    template = (
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    reward = learned(tmp_path, ChatSettings(system_prompt=None, chat_template=template))
    ids = reward.encode(Attempt(prompt(), "Left."))
    assert tiny_tokenizer.decode(ids) == "Which port?<|im_end|>A:Left.<|im_end|>"


def test_without_a_chat_template_only_a_reward_stages_output_gets_a_stop_token(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    plain = copy.copy(tiny_tokenizer)
    plain.chat_template = None
    classifier(tmp_path / "weights", plain)
    plain.save_pretrained(tmp_path / "tokenizer")
    attempt = Attempt(prompt(), "Left.")
    assert plain.decode(learned(tmp_path).encode(attempt)) == "Which port?Left.<|im_end|>"
    assert plain.decode(learned(tmp_path / "weights").encode(attempt)) == "Which port?Left."


def test_without_a_chat_template_a_conversation_is_scored_with_all_its_turns(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """In the format in which the rows of a reward stage are written, and without its stop token for
    any other classifier."""
    plain = copy.copy(tiny_tokenizer)
    plain.chat_template = None
    classifier(tmp_path / "weights", plain)
    plain.save_pretrained(tmp_path / "tokenizer")
    roles = ("system", "user", "assistant", "user")
    turns = tuple({"role": role, "content": f"{i}?"} for i, role in enumerate(roles))
    attempt = Attempt(Prompt(turns, "p.jsonl row 2", {}), "Left.")
    text = "\n\nSystem: 0?\n\nHuman: 1?\n\nAssistant: 2?\n\nHuman: 3?\n\nAssistant: Left."
    assert plain.decode(learned(tmp_path).encode(attempt)) == f"{text}<|im_end|>"
    assert plain.decode(learned(tmp_path / "weights").encode(attempt)) == text
    assert learned(tmp_path)([attempt]).isfinite().all()


def test_an_encoder_classifier_scores_too(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    scores = learned(tmp_path)([Attempt(prompt(), "Left."), Attempt(prompt(), "Right. Or left?")])
    assert scores.isfinite().all()
    assert scores[0] != scores[1]


def test_a_sum_of_rewards_is_weighted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    given = prompt(answer="left")
    terms = [
        RewardTerm(weight=2.0, role="reward"),
        RewardTerm(weight=-0.5, rule=RuleReward(exact_match="answer")),
    ]
    path = classifier(tmp_path, tiny_tokenizer)
    both = rewards.load(terms, {"reward": path}, CHAT, [given], CPU)
    attempts = [Attempt(given, "left"), Attempt(given, "right")]
    expected = 2 * learned(path)(attempts) - 0.5 * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(both(attempts), expected)


def test_every_reward_role_is_a_model() -> None:
    assert all(is_model(role) for role in ("model", "judge", "reward", "reward.0", "reward.12"))
    assert not any(is_model(role) for role in ("prompts", "train.0", "preferences.1", "data"))


# ---- errors -------------------------------------------------------------------------------------


def test_a_reward_that_is_not_finite_names_the_prompt() -> None:
    prompts = [prompt(number=n) for n in (3, 4, 9)]
    fine = torch.tensor([1.0, 2.0, 3.0])
    assert rewards.finite(fine, prompts) is fine
    for broken in (math.nan, math.inf):
        with pytest.raises(StageError, match=r"2 of 3 completions is not finite.*row 4") as found:
            rewards.finite(torch.tensor([1.0, broken, broken]), prompts)
        assert found.value.reason == "NonFiniteReward"


def test_a_classifier_without_its_head_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    classifier(tmp_path, tiny_tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"score\.weight") as found:
        learned(tmp_path)
    assert found.value.reason == "RewardHeadMissing"


def test_a_classifier_of_classes_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(StageError, match="3 outputs") as found:
        learned(classifier(tmp_path, tiny_tokenizer, num_labels=3))
    assert found.value.reason == "RewardNotScalar"


def test_a_reward_model_with_another_tokenizer_is_refused(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    with pytest.raises(StageError, match="has 50 tokens") as found:
        learned(classifier(tmp_path, tiny_tokenizer, vocab_size=50))
    assert found.value.reason == "RewardTokenizerMismatch"


def test_a_completion_longer_than_the_reward_models_context_is_refused_not_cut(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    reward = learned(classifier(tmp_path, tiny_tokenizer, max_position_embeddings=24))
    with pytest.raises(StageError, match="context is 24") as found:
        reward([Attempt(prompt(number=5), "so many words " * 9)])
    assert found.value.reason == "RewardContextTooShort"


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(StageError) as found:
        learned(tmp_path)
    assert found.value.reason == "RewardModelBroken"
    with pytest.raises(StageError) as found:
        learned(tiny_model_dir)
    assert found.value.reason == "RewardHeadMissing"
