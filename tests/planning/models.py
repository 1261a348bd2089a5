"""Models whose memory the tests plan."""

from __future__ import annotations

from typing import Any

from tests.planning.jobs import job, manifest
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.model_config import facts_of
from tuneyard.api.model_facts import ModelFacts
from tuneyard.planning.fit import Job
from tuneyard.planning.hardware import gpu_of
from tuneyard.planning.memory.lengths import Lengths
from tuneyard.planning.plan import plan_job

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
CONFIGS = {
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
HELD_OUT = {"data__validation": {"fraction": 0.1}}


def facts(name: str) -> ModelFacts:
    """Return the facts of a model of this size."""
    return facts_of(CONFIGS[name])


def planned(name: str, gpu: str, devices: int = 1, **changes: Any) -> Job:
    """Return a fine-tuning of a model on GPUs. `changes`: as in `tests.planning.jobs`."""
    plan = plan_job(job(**changes))
    return Job(plan, facts(name), gpu_of(gpu), devices, Lengths.of(plan, facts(name)))


def aligned(name: str, gpu: str, optimize: dict[str, Any], **spec: Any) -> Job:
    """Return an alignment of a model on a GPU."""
    value = {
        "apiVersion": manifest("minimal")["apiVersion"],
        "kind": "AlignmentJob",
        "metadata": {"name": "aligned"},
        "spec": {
            "model": {"uri": "file://model"},
            "optimize": optimize,
            "output": {"uri": "file://out"},
            **spec,
        },
    }
    plan = plan_job(AlignmentJob.model_validate(value))
    return Job(plan, facts(name), gpu_of(gpu), 1, Lengths.of(plan, facts(name)))
