"""Answers as functions of weights, prompt and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from tests.trainer.chance import chi_squared
from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.alignment import Sampling
from tuneyard_trainer.generation import sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
KEYS = [101, 102, 103, 104]


def sampler(model: Any = None, **settings: Any) -> Callable[..., list[tuple[int, ...]]]:
    """The answers' tokens."""
    chosen = Sampling.model_validate({"max_new_tokens": 12} | settings)
    answer = sampling.TransformersSampler(model or tiny_llama(VOCABULARY), 3, (2,), chosen)
    return lambda prompts, keys: [sampled.tokens for sampled in answer(prompts, keys)]


def test_an_answer_depends_on_its_prompt_and_key_and_not_on_its_batch() -> None:
    together = sampler()(PROMPTS, KEYS)
    alone = [sampler()([prompt], [key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    backwards = sampler()(PROMPTS[::-1], KEYS[::-1])[::-1]
    assert together == alone == backwards
    assert sampler()(PROMPTS, [key + 1 for key in KEYS]) != together


def test_sampled_tokens_have_the_models_probabilities() -> None:
    """Chi-squared over 6 likely tokens of 4,000 answers of one token: below the 0.1% point."""
    model = tiny_llama(VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform
        probs = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    count = 4000
    answers = sampler(model, max_new_tokens=1)([[5, 6, 7]] * count, list(range(count)))
    tokens = torch.tensor([answer[0] for answer in answers])
    assert chi_squared(tokens, probs) < 22.5


def test_no_token_outside_the_nucleus_is_ever_drawn() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]]).expand(1000, 4)
    keys = list(range(1000))
    draw = sampling.InverseCdfSampler(sampling.uniforms(keys, 1), Sampling(top_p=0.8))
    drawn = draw(None, logits).argmax(-1)
    assert set(drawn.tolist()) == {0, 1}


def test_the_extremes_of_a_uniform_number_draw_the_first_and_the_last_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    ends = torch.tensor([[0.0], [1 - 1e-12]], dtype=torch.float64)
    assert sampling.drawn(logits, ends).tolist() == [[1], [2]]


def test_temperature_sharpens() -> None:
    model = tiny_llama(VOCABULARY)
    greedy = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False, eos_token_id=2
    )[0, 3:]
    cold = sampler(model, temperature=1e-4, max_new_tokens=5)([PROMPTS[0]] * 3, [1, 2, 3])
    assert cold == [tuple(greedy.tolist())] * 3


def test_an_answer_ends_with_its_stop_token_and_nothing_after_it() -> None:
    model = tiny_llama(VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[2] = 0.5 * model.lm_head.weight[10:].norm(dim=0)
    answers = sampler(model, max_new_tokens=64)([[5, 6]] * 40, list(range(40)))
    ended = [answer for answer in answers if answer[-1] == 2]
    assert all(2 not in answer[:-1] for answer in answers)
    assert all(len(answer) == 64 for answer in answers if answer[-1] != 2)
    assert ended


def test_the_models_own_generation_settings_change_nothing_and_survive() -> None:
    """A repetition penalty would sample from another distribution than the one that is trained."""
    model = tiny_llama(VOCABULARY)
    plain = sampler(model)(PROMPTS, KEYS)
    model.generation_config = GenerationConfig(repetition_penalty=50.0, suppress_tokens=[7, 8, 9])
    assert sampler(model)(PROMPTS, KEYS) == plain
    assert model.generation_config.repetition_penalty == 50.0


def test_answers_stop_at_the_tokenizers_the_models_and_the_templates_tokens(
    tiny_tokenizer: Any,
) -> None:
    model = tiny_llama(VOCABULARY)
    model.generation_config.eos_token_id = [0, 7]
    assert sampling.stop_tokens(model, tiny_tokenizer) == (0, 2, 7)
    template = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    assert sampling.stop_tokens(model, tiny_tokenizer, template) == (0, 2, 3, 7)
    assert "<|pad|>" not in tiny_tokenizer.chat_template


def test_as_many_answers_at_once_as_their_caches_have_room(monkeypatch: Any) -> None:
    """The tiny model keeps 2 layers x 2 heads x 8 numbers x keys and values: 256 bytes a token."""
    model, cpu = tiny_llama(VOCABULARY), torch.device("cpu")
    assert sampling.at_once(model, 1000, cpu) == sampling.CPU_ANSWERS
    monkeypatch.setattr(sampling, "CPU_CACHE_BYTES", 256 * 1000 * 3)
    assert sampling.at_once(model, 1000, cpu) == 3
    assert sampling.at_once(model, 10_000, cpu) == 1
    together = sampler(model)(PROMPTS, KEYS)
    monkeypatch.setattr(sampling, "CPU_CACHE_BYTES", 1)
    assert sampler(model)(PROMPTS, KEYS) == together
