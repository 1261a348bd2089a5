"""Sampled completions depend on weights, prompt and key alone."""

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
    """Return a sampler that gives the completions' tokens."""
    chosen = Sampling.model_validate({"max_new_tokens": 12} | settings)
    sample = sampling.TransformersSampler(model or tiny_llama(VOCABULARY), 3, (2,), chosen)
    return lambda prompts, keys: [sampled.tokens for sampled in sample(prompts, keys)]


def test_a_completion_depends_on_its_prompt_and_key_and_not_on_its_batch() -> None:
    together = sampler()(PROMPTS, KEYS)
    alone = [sampler()([prompt], [key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    in_reverse = sampler()(PROMPTS[::-1], KEYS[::-1])[::-1]
    assert together == alone == in_reverse
    assert sampler()(PROMPTS, [key + 1 for key in KEYS]) != together


def test_sampled_tokens_have_the_models_probabilities() -> None:
    """Chi-squared over 6 likely tokens of 4,000 completions of one token: below the 0.1% point."""
    model = tiny_llama(VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform
        probs = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    count = 4000
    completions = sampler(model, max_new_tokens=1)([[5, 6, 7]] * count, list(range(count)))
    tokens = torch.tensor([completion[0] for completion in completions])
    assert chi_squared(tokens, probs) < 22.5


def test_no_token_outside_the_nucleus_is_sampled() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]]).expand(1000, 4)
    keys = list(range(1000))
    draw = sampling.InverseCdfSampler(sampling.uniforms(keys, 1), Sampling(top_p=0.8))
    tokens = draw(None, logits).argmax(-1)
    assert set(tokens.tolist()) == {0, 1}


def test_the_smallest_and_largest_uniform_numbers_pick_the_first_and_last_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    ends = torch.tensor([[0.0], [1 - 1e-12]], dtype=torch.float64)
    assert sampling.pick_tokens(logits, ends).tolist() == [[1], [2]]


def test_a_temperature_near_zero_samples_greedily() -> None:
    model = tiny_llama(VOCABULARY)
    greedy = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False, eos_token_id=2
    )[0, 3:]
    cold = sampler(model, temperature=1e-4, max_new_tokens=5)([PROMPTS[0]] * 3, [1, 2, 3])
    assert cold == [tuple(greedy.tolist())] * 3


def test_a_completion_ends_with_its_first_stop_token() -> None:
    model = tiny_llama(VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[2] = 0.5 * model.lm_head.weight[10:].norm(dim=0)
    completions = sampler(model, max_new_tokens=64)([[5, 6]] * 40, list(range(40)))
    ended = [tokens for tokens in completions if tokens[-1] == 2]
    assert all(2 not in tokens[:-1] for tokens in completions)
    assert all(len(tokens) == 64 for tokens in completions if tokens[-1] != 2)
    assert ended


def test_the_models_own_generation_settings_are_ignored_and_restored() -> None:
    """A repetition penalty would sample from another distribution than the policy's."""
    model = tiny_llama(VOCABULARY)
    plain = sampler(model)(PROMPTS, KEYS)
    model.generation_config = GenerationConfig(repetition_penalty=50.0, suppress_tokens=[7, 8, 9])
    assert sampler(model)(PROMPTS, KEYS) == plain
    assert model.generation_config.repetition_penalty == 50.0


def test_stop_tokens_are_the_tokenizers_the_models_and_the_templates(
    tiny_tokenizer: Any,
) -> None:
    model = tiny_llama(VOCABULARY)
    model.generation_config.eos_token_id = [0, 7]
    assert sampling.stop_tokens(model, tiny_tokenizer) == (0, 2, 7)
    template = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    assert sampling.stop_tokens(model, tiny_tokenizer, template) == (0, 2, 3, 7)
    assert "<|pad|>" not in tiny_tokenizer.chat_template


def test_a_batch_is_as_large_as_its_cache_allows(monkeypatch: Any) -> None:
    """The tiny model caches 2 layers x 2 heads x 8 numbers x keys and values: 256 bytes a token."""
    model, cpu = tiny_llama(VOCABULARY), torch.device("cpu")
    assert sampling.batch_size(model, 1000, cpu) == sampling.CPU_BATCH
    monkeypatch.setattr(sampling, "CPU_CACHE_BYTES", 256 * 1000 * 3)
    assert sampling.batch_size(model, 1000, cpu) == 3
    assert sampling.batch_size(model, 10_000, cpu) == 1
    together = sampler(model)(PROMPTS, KEYS)
    monkeypatch.setattr(sampling, "CPU_CACHE_BYTES", 1)
    assert sampler(model)(PROMPTS, KEYS) == together
