"""The export writes exactly the trained tensors, and never holds a whole model in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.trainer import exporting
from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.adapters import Adapter, Bottleneck, Ia3, Lora, PrefixTuning, PromptTuning
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import ExportSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, weight_files
from tuneyard_trainer.models.base import META, load_base
from tuneyard_trainer.models.files import SINGLE
from tuneyard_trainer.reporting import export
from tuneyard_trainer.worker import StageContext, Worker

CPU = torch.device("cpu")
ADAPTERS = [
    Adapter(lora=Lora(rank=4, alpha=8)),
    Adapter(ia3=Ia3()),
    Adapter(prefix=PrefixTuning(length=3)),
    Adapter(prompt=PromptTuning(length=3)),
    Adapter(bottleneck=Bottleneck(size=6)),
]


@pytest.fixture
def inputs(tmp_path: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    """A base in bfloat16 with its tokenizer, and a folder for the trained weights."""
    nn.Module.to(tiny_llama(VOCABULARY), torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "tuned").mkdir()
    return {"model": tmp_path / "model", "tuned": tmp_path / "tuned"}


def exported(inputs: Mapping[str, Path], *, merge: bool = False) -> tuple[Path, Mapping[str, Any]]:
    """Run the stage, and return its folder and its metrics."""
    stage = PlannedStage(
        name="export", settings=ExportSettings(merge=merge), inputs={}, fingerprint="sha256:0"
    )
    folder = inputs["tuned"].parent / "result"
    folder.mkdir(exist_ok=True)
    outcome = export.run(StageContext(stage, inputs, folder, Worker(0, 1, CPU)))
    return folder, outcome.metrics


def train_adapter(inputs: Mapping[str, Path], adapter: Adapter, tokenizer: Any) -> Path:
    base = load_base(inputs["model"], dtype=torch.float32, device=CPU)
    model = adapters.attach(base, adapter, seed=0, tokenizer=tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    adapters.save(model, inputs["tuned"] / "weights")
    return inputs["tuned"] / "weights"


def train_whole(inputs: Mapping[str, Path], kind: Any = LlamaForCausalLM) -> dict[str, Tensor]:
    """Write float32 weights that bfloat16 cannot hold, and return them."""
    config = tiny_llama(VOCABULARY).config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kind(config).save_pretrained(inputs["tuned"] / "weights")
    return load_file(inputs["tuned"] / "weights" / SINGLE)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_an_adapter_is_copied_to_the_byte_beside_its_tokenizer(
    adapter: Adapter, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    weights = train_adapter(inputs, adapter, tiny_tokenizer)
    folder, metrics = exported(inputs)
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        assert (folder / "adapter" / name).read_bytes() == (weights / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template
    assert metrics["adapterTensors"] == len(load_file(weights / adapters.WEIGHTS))
    assert "modelTensors" not in metrics


def test_a_merged_model_loads_in_the_bases_precision_with_its_tokenizer(
    inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    weights = train_adapter(inputs, ADAPTERS[0], tiny_tokenizer)
    folder, metrics = exported(inputs, merge=True)
    found = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = load_base(inputs["model"], dtype=torch.float32, device=CPU)
    merge: Any = PeftModel.from_pretrained(base, weights)
    expected = nn.Module.to(merge.merge_and_unload(), torch.bfloat16).state_dict()
    assert found.dtype is torch.bfloat16
    assert all(torch.equal(tensor, expected[n]) for n, tensor in found.state_dict().items())
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert metrics["modelTensors"] == len(load_file(folder / "model" / SINGLE))
    assert 0 < metrics["mergedWeightDifference"] < 1e-5


def test_a_fully_tuned_model_is_rounded_once_to_the_bases_precision(
    inputs: dict[str, Path],
) -> None:
    trained = train_whole(inputs)
    folder, metrics = exported(inputs)
    found = load_file(folder / "model" / SINGLE)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name].bfloat16()) for name in trained)
    assert metrics == {"modelTensors": len(trained), "bytes": metrics["bytes"]}
    nn.Module.to(
        LlamaForCausalLM.from_pretrained(inputs["tuned"] / "weights"), torch.bfloat16
    ).save_pretrained(folder / "expected")
    for name in (SINGLE, "config.json", "generation_config.json"):
        expected = (folder / "expected" / name).read_bytes()
        assert (folder / "model" / name).read_bytes() == expected, name


def test_a_reward_model_stays_a_classifier_with_its_head(inputs: dict[str, Path]) -> None:
    trained = train_whole(inputs, LlamaForSequenceClassification)
    folder, metrics = exported(inputs)
    found = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert torch.equal(found.score.weight, trained["score.weight"].bfloat16())
    assert metrics["modelTensors"] == len(trained)


# ---- wrong weights ------------------------------------------------------------------------------


def refusal(inputs: Mapping[str, Path], *, merge: bool = False) -> StageError:
    with pytest.raises(StageError) as caught:
        exported(inputs, merge=merge)
    return caught.value


def test_a_byte_that_changes_on_the_way_to_the_disk_is_noticed(
    inputs: dict[str, Path], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = weight_files.write

    def damaged(folder: Path, *given: Any, **named: Any) -> Any:
        digests = write(folder, *given, **named)
        data = bytearray((folder / SINGLE).read_bytes())
        data[-100] ^= 4
        (folder / SINGLE).write_bytes(bytes(data))
        return digests

    monkeypatch.setattr(weight_files, "write", damaged)
    train_adapter(inputs, ADAPTERS[0], tiny_tokenizer)
    assert refusal(inputs, merge=True).reason == "ExportMismatch"
    (inputs["tuned"] / "weights" / adapters.CONFIG).unlink()
    train_whole(inputs)
    error = refusal(inputs)
    assert error.reason == "ExportMismatch"
    assert error.retryable


def test_an_adapter_that_is_copied_wrongly_is_noticed(
    inputs: dict[str, Path], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_adapter(inputs, ADAPTERS[0], tiny_tokenizer)
    copy = shutil.copytree

    def damaged(source: Path, target: Path) -> None:
        copy(source, target)
        with (target / adapters.WEIGHTS).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")

    monkeypatch.setattr(shutil, "copytree", damaged)
    error = refusal(inputs)
    assert error.reason == "ExportMismatch"
    assert adapters.WEIGHTS in str(error)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_an_adapter_of_another_base_is_refused(
    adapter: Adapter, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    train_adapter(inputs, adapter, tiny_tokenizer)
    tiny_llama(VOCABULARY, hidden_size=48, head_dim=12).save_pretrained(inputs["model"])
    assert refusal(inputs).reason == "AdapterBroken"


def test_trained_weights_that_are_not_finite_are_refused(
    inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    for weights, file in (
        (train_adapter(inputs, ADAPTERS[0], tiny_tokenizer), adapters.WEIGHTS),
        (inputs["tuned"] / "weights", SINGLE),
    ):
        if file == SINGLE:
            (weights / adapters.CONFIG).unlink()
            train_whole(inputs)
        held = load_file(weights / file)
        held[max(held)].view(-1)[-1] = float("nan")
        save_file(held, weights / file, metadata={"format": "pt"})
        assert refusal(inputs).reason == "WeightsNotFinite"


def test_a_tuned_model_that_lacks_a_tensor_is_refused(inputs: dict[str, Path]) -> None:
    held = train_whole(inputs)
    del held["model.norm.weight"]
    save_file(held, inputs["tuned"] / "weights" / SINGLE, metadata={"format": "pt"})
    assert refusal(inputs).reason == "WeightsMissing"


# ---- memory -------------------------------------------------------------------------------------

CONSTANT_BYTES = 128 << 20
"""Memory beside the largest tensor: blocks in float32 and float64, and what libraries keep."""


def write_random(folder: Path, model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Write weights for a model without memory, one random tensor at a time."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    states = model.state_dict() if isinstance(model, LlamaForCausalLM) else None
    tensors = states or get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    filled = {
        n: noise.repeat(-(-t.numel() // noise.numel()))[: t.numel()].reshape(t.shape)
        for n, t in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(filled, folder / name, metadata={"format": "pt"})


def write_big(folder: Path) -> tuple[Path, Path]:
    """Write a base of 151 million parameters in bfloat16 (302 MB), in one file, and a LoRA."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with META:
        model = LlamaForCausalLM(config)
    base, adapter = folder / "big", folder / "big-adapter"
    write_random(base, model, SINGLE, torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    skeleton = load_base(base, dtype=torch.bfloat16, device=META)
    lora = Adapter(lora=Lora(rank=16, targets="all-linear"))
    adapted: Any = adapters.attach(skeleton, lora, seed=0, tokenizer=None)  # type: ignore[arg-type]
    write_random(adapter, adapted, adapters.WEIGHTS, torch.float32)
    adapted.peft_config["default"].save_pretrained(adapter)
    return base, adapter


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a step is read from Linux's /proc")
def test_an_export_takes_the_memory_of_a_tensor_and_loading_the_model_more_than_all_of_it(
    inputs: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_adapter = train_adapter(inputs, ADAPTERS[0], tiny_tokenizer)
    big, adapter = write_big(tmp_path)
    command = [sys.executable, exporting.__file__, inputs["model"], tiny_adapter, big, adapter]
    done = subprocess.run([*map(str, command), str(tmp_path)], check=True, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    bound = found["tensor"] + CONSTANT_BYTES
    assert bound < 0.6 * found["model"]
    assert found["merged"] < bound, found
    assert found["whole"] < bound, found
    assert found["loaded"] > 2 * found["model"] * 0.95 > bound, found
