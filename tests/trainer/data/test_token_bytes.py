"""Masks by the bytes of tokens: those of the offsets, or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuneyard_trainer.data.encoding.token_bytes import TokenBytes
from tuneyard_trainer.data.encoding.tokenization import _mask_by_offsets

TEXTS = [
    "<|im_start|>user\nWhich lamp?<|im_end|>\n<|im_start|>assistant\nThe lamp 12.<|im_end|>\n",
    "漢字 and ü😀 in one\n\n  row",
    "x\t\t  y   z",
]


def mask_of(found: TokenBytes, text: str, ids: list[int], span: tuple[int, int]) -> Any:
    return found.masks([text], [np.asarray(ids, np.int32)], [[span]])[0]


def by_both(tokenizer: Any, text: str, span: tuple[int, int]) -> tuple[Any, Any]:
    """Return the mask by bytes, and the mask by offsets."""
    found = TokenBytes.of(tokenizer)
    assert found is not None
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ours = mask_of(found, text, encoding.ids, span)
    return ours, _mask_by_offsets(encoding.offsets, [span])


@pytest.mark.parametrize("text", TEXTS)
def test_every_span_has_the_mask_of_the_offsets(tiny_tokenizer: Any, text: str) -> None:
    """Characters of several tokens and tokens of spaces are among them."""
    compared = 0
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            ours, theirs = by_both(tiny_tokenizer, text, (start, end))
            at_space = text[start].isspace() or text[end - 1].isspace()
            assert (ours is None) == at_space
            if ours is not None:
                assert np.array_equal(ours, theirs), text[start:end]
                compared += 1
    assert compared


def test_an_empty_span_is_left_to_the_offsets(tiny_tokenizer: Any) -> None:
    assert by_both(tiny_tokenizer, TEXTS[0], (5, 5))[0] is None


def test_tokens_of_another_text_are_left_to_the_offsets(tiny_tokenizer: Any) -> None:
    """A tokenizer that normalizes has the tokens of another text."""
    found = TokenBytes.of(tiny_tokenizer)
    assert found is not None
    ids = tiny_tokenizer("A red lamp.", add_special_tokens=False)["input_ids"]
    assert mask_of(found, "A red lamp.", ids, (2, 5)) is not None
    assert mask_of(found, "A Red lamp.", ids, (2, 5)) is None


def test_a_tokenizer_of_words_has_no_bytes() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "lamp": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend)) is None
