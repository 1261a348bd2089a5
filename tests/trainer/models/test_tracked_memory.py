"""The planned memory of a step against torch's memory trackers, on small models.

benchmarks/memory_plan.py does the same for models of up to 70B.
"""

from __future__ import annotations

import pytest

from benchmarks.memory_plan import planned
from benchmarks.tracked_memory import Step, tracked

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "tie_word_embeddings": False,
}
STEPS = {
    "full": Step(CONFIG, "full", "sft", rows=2, width=256),
    "full, recomputed": Step(CONFIG, "full", "dpo", rows=2, width=256, checkpointing=True),
    "LoRA, packed": Step(CONFIG, "lora", "sft", rows=2, width=256, masked=True),
    "QLoRA, recomputed": Step(CONFIG, "qlora", "ppo", rows=2, width=256, checkpointing=True),
    "full, sharded": Step(CONFIG, "full", "sft", rows=2, width=256, gpus=4),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_planned_memory_of_a_step_is_that_of_torchs_tracker(name: str) -> None:
    plan, found = planned(STEPS[name]), tracked(STEPS[name])
    assert plan.parameters == pytest.approx(found.parameters, rel=0.03)
    assert plan.gradients == pytest.approx(found.gradients, rel=0.03)
    assert plan.activations == pytest.approx(found.activations, rel=0.05)
