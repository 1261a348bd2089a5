"""A tiny classifier that calls texts with two rude words toxic."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

RUDE = ("vile", "stupid")
"""Either word makes a text toxic; the other words of the world are one unknown token each."""
WINDOW = 32
"""Tokens that the classifier reads."""
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_PLAIN = ("the", "lamp", "red", "is", "you", "are", "a", "and", "who", "what")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, with [CLS] before and [SEP] behind each text."""
    words = {word: index for index, word in enumerate((*_SPECIAL, *RUDE, *_PLAIN))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=WINDOW
    )


def save_classifier(folder: Path) -> Path:
    """Train a classifier with the labels neutral and toxic, and write it to a folder."""
    config = BertConfig(
        vocab_size=len(_SPECIAL) + len(RUDE) + len(_PLAIN),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=WINDOW,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )
    chance = random.Random(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(80):
            batch = _examples(chance)
            loss = torch.nn.functional.cross_entropy(
                model(input_ids=batch[0], attention_mask=batch[1]).logits, batch[2]
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _examples(chance: random.Random) -> tuple[Any, Any, Any]:
    """Return 32 texts of 2 to WINDOW tokens, half of them with a rude word: ids, mask, labels."""
    ids_NL = torch.zeros(32, WINDOW, dtype=torch.long)
    labels_N = torch.arange(32) % 2
    for row, label in enumerate(labels_N.tolist()):
        length = chance.randint(1, WINDOW - 2)
        words = [chance.choice((1, *range(6, 6 + len(_PLAIN)))) for _ in range(length)]
        if label:
            words[chance.randrange(length)] = chance.choice((4, 5))
        ids_NL[row, : length + 2] = torch.tensor([2, *words, 3])
    return ids_NL, (ids_NL > 0).long(), labels_N
