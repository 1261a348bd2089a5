"""What sharding requires of a model, under a process group that is played: each worker loads its
part, and no worker answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.trainer.conftest import tiny_llama
from tests.trainer.rows import train_stage
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import TrainSettings
from tuneyard.errors import StageError
from tuneyard.planning.memory.stages import RENAMED
from tuneyard_trainer.models import policies

CPU = torch.device("cpu")


@contextmanager
def workers(count: int) -> Iterator[None]:
    """While active, this process is rank 0 of so many."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model and returns its folder."""

    def save(model: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return folder

    return save


def load(folder: Path, tokenizer: Any, count: int, **settings: Any) -> nn.Module:
    """Load a policy as rank 0 of `count` workers that share it."""
    chosen = train_stage(**settings).settings
    assert isinstance(chosen, TrainSettings)
    with workers(count):
        return policies.load(
            {"model": folder},
            chosen.adapter,
            chosen,
            device=CPU,
            precision=torch.float32,
            tokenizer=tokenizer,
            shards=count,
        )


# ---- parts --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 400, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LORA = {"adapter": Adapter.model_validate({"lora": {}})}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(GPT2LMHeadModel, GPT2Config(**SMALL)), (BloomForCausalLM, BloomConfig(**SMALL))],
)
def test_a_model_whose_layers_have_no_plan_is_refused_since_it_would_be_gathered_whole(
    architecture: Any, config: Any, saved: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    folder = saved(architecture(config))
    with pytest.raises(StageError) as refused:
        load(folder, tiny_tokenizer, 2, **LORA)
    assert refused.value.reason == "NotSharded"
    assert f"no FSDP plan for the layers of {architecture.__name__}" in refused.value.message
    obstacle = policies.sharding_obstacle(folder, 2, is_trained=False)
    assert obstacle is not None
    assert obstacle in refused.value.message


def test_opt_is_sharded(saved: Callable[..., Path], tiny_tokenizer: Any) -> None:
    folder = saved(OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)))
    load(folder, tiny_tokenizer, 2, **LORA)
    assert policies.sharding_obstacle(folder, 2, is_trained=False) is None


def test_experts_are_shared_unevenly_under_lora_and_not_trained_themselves(
    saved: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    """`auto` then keeps the model whole."""
    config = Qwen3MoeConfig(
        **SMALL,
        head_dim=8,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    folder = saved(Qwen3MoeForCausalLM(config))
    model = load(folder, tiny_tokenizer, 3, **LORA)
    (experts, *_) = (p for name, p in model.named_parameters() if name.endswith("down_proj"))
    assert isinstance(experts.data, DTensor)
    assert experts.data.to_local().shape[0] == 3
    assert policies.sharding_obstacle(folder, 3, is_trained=False) is None
    with pytest.raises(StageError) as refused:
        load(folder, tiny_tokenizer, 3)
    assert refused.value.reason == "NotSharded"
    obstacle = policies.sharding_obstacle(folder, 3, is_trained=True)
    assert obstacle is not None
    assert "the files of Qwen3MoeForCausalLM have other tensors than its layers" in obstacle
    assert obstacle in refused.value.message


MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, intermediate_size=64)),
        (MixtralForCausalLM, MixtralConfig(**SMALL, **MIXTURE)),
    ],
)
def test_full_fine_tuning_refuses_a_model_whose_files_have_other_tensors(
    architecture: Any, config: Any, saved: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    folder = saved(architecture(config))
    with pytest.raises(StageError) as refused:
        load(folder, tiny_tokenizer, 2)
    assert refused.value.reason == "NotSharded"
    assert config.model_type in RENAMED
    obstacle = policies.sharding_obstacle(folder, 2, is_trained=True)  # so that auto does not shard
    assert obstacle is not None
    assert obstacle in refused.value.message
    assert policies.sharding_obstacle(folder, 2, is_trained=False) is None


# ---- tied weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "count"), [(401, 2), (400, 3)])
def test_full_fine_tuning_refuses_tied_weights_that_the_workers_cannot_divide_evenly(
    vocabulary: int, count: int, saved: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    folder = saved(tiny_llama(vocabulary))
    with pytest.raises(StageError) as refused:
        load(folder, tiny_tokenizer, count)
    assert refused.value.reason == "NotSharded"
    assert f"the {vocabulary} rows of model.embed_tokens.weight" in refused.value.message
    assert "compute.workers" in refused.value.advice
    assert policies.sharding_obstacle(folder, count, is_trained=True)  # so that auto does not shard


@pytest.mark.parametrize(
    ("vocabulary", "tied", "settings"),
    [
        (400, True, {}),
        (401, False, {}),
        (401, True, LORA),
        (401, True, {"freeze": {"embeddings": True}}),
    ],
)
def test_tied_weights_that_stay_the_same_memory_or_are_not_trained_are_sharded(
    vocabulary: int,
    tied: bool,
    settings: dict[str, Any],
    saved: Callable[..., Path],
    tiny_tokenizer: Any,
) -> None:
    folder = saved(tiny_llama(vocabulary, tie_word_embeddings=tied))
    load(folder, tiny_tokenizer, 2, **settings)
    is_trained = not settings
    assert policies.sharding_obstacle(folder, 2, is_trained=is_trained) is None
