"""A script for a pod: it writes a Llama of about 0.8 billion random weights in float32 (3 GiB), the
tokenizer of tiny_model, and short rows to the data volume."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_model
from jobs import LAYERS
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path("/data/wide")


def model(vocabulary: int) -> LlamaForCausalLM:
    # Many layers of equal size and a small vocabulary: FSDP2 holds one or two layers whole.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.01,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
        )
    )


if __name__ == "__main__":
    tokenizer = tiny_model.tokenizer()
    model(len(tokenizer)).save_pretrained(FOLDER, max_shard_size="500MB")
    tokenizer.save_pretrained(FOLDER)
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(6) for b in range(6)]
    Path("/data/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
