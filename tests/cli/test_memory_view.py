"""`tuneyard plan --gpu`: the memory of a job, from the files of its model."""

from __future__ import annotations

import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.planning.models import CONFIGS, facts
from tuneyard.api.job_facts import Device, FitAnswer, JobFacts, RowFacts
from tuneyard.api.plan import Plan
from tuneyard.cli import gguf_header, main

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
metadata: {{name: support-bot}}
spec:
  model: {{uri: "{uri}"}}
  data: {{train: [{{uri: "file://rows.jsonl"}}], validation: {{fraction: 0.1}}}}
  adapter: {{{adapter}: {{}}}}
  output: {{uri: "file://out"}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the config of an 8B model in `model/`; lines are not wrapped."""
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIGS["8B"]))
    return tmp_path


def plan(folder: Path, *options: str, uri: str = "file://model", adapter: str = "lora") -> int:
    manifest = folder / "job.yaml"
    manifest.write_text(MANIFEST.format(uri=uri, adapter=adapter))
    return main.call(["plan", str(manifest), *options])


def test_a_row_for_each_stage_shows_its_bar_its_memory_and_its_parts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--gpu", "H100") == 0
    shown = capsys.readouterr().out.split("Memory of ")[1].splitlines()
    assert shown[0] == "one worker with H100: 74.8 GiB can be used"
    rows = {line.split()[0]: line.split() for line in shown[2:5]}
    assert list(rows) == ["sft", "evaluate", "export"]
    bar, gib, pod = rows["sft"][1:4]
    assert len(bar) == 16
    assert bar.count("#") == round(16 * float(gib) / 74.8)
    assert float(pod) > 3.0
    assert "weights 15.1," in " ".join(rows["sft"])
    assert rows["export"][1] == "3.3"
    assert "does not fit" not in "\n".join(shown)
    assert "of the pod's memory" not in "\n".join(shown)


def test_too_little_memory_of_the_pod_is_said_with_the_field(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder / "job.yaml"
    text = MANIFEST.format(uri="file://model", adapter="lora")
    manifest.write_text(f"{text}  compute: {{memory: 3Gi}}\n")
    assert main.call(["plan", str(manifest), "--gpu", "H100"]) == 0
    shown = capsys.readouterr().out
    assert "sft takes 3.5 GiB of the pod's memory (writing a checkpoint)" in shown
    assert "and compute.memory is 3Gi: set spec.compute.memory to 4Gi" in shown


def test_each_gpu_of_a_worker_is_a_device_with_a_process_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pods = []
    for compute in ("{}", "{workers: 2, gpusPerWorker: 4}"):
        manifest = folder / "job.yaml"
        text = MANIFEST.format(uri="file://model", adapter="lora")
        manifest.write_text(f"{text}  compute: {compute}\n")
        assert main.call(["plan", str(manifest), "--gpu", "H100"]) == 0
        shown = capsys.readouterr().out
        row = next(line for line in shown.splitlines() if line.startswith("sft  ") and "#" in line)
        pods.append(float(row.split()[3]))
    assert "each of 8 workers" in shown
    assert pods[1] == pytest.approx(pods[0] + 3 * 3.0)


def test_a_job_that_does_not_fit_is_told_what_would_make_it_fit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--gpu", "T4") == 0
    shown = capsys.readouterr().out
    assert "sft does not fit: it takes 17.3 GiB (gradient of the loss)" in shown
    ways = shown.split("To make the job fit:")[1].strip().splitlines()
    assert len(ways) >= 2
    assert any("spec." in way for way in ways)


def test_what_auto_will_choose_to_fit_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--gpu", "A100-40GB") == 0
    shown = capsys.readouterr().out
    assert "sft will use micro-batches of " in shown
    assert "does not fit" not in shown


def test_the_gpu_of_the_manifest_needs_no_option(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder / "job.yaml"
    unknown = "The memory is not known: compute.gpu 'a card of the future' is not described: name"
    for gpu, line in (
        ("H100", "Memory of one worker with H100"),
        ("a card of the future", unknown),
    ):
        text = MANIFEST.format(uri="file://model", adapter="lora")
        manifest.write_text(f"{text}  compute: {{gpu: {gpu}}}\n")
        assert main.call(["plan", str(manifest)]) == 0
        assert line in " ".join(capsys.readouterr().out.split())


def test_a_gpu_that_nobody_described_is_estimated_and_said_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--gpu", "100Gi") == 0
    assert "Nothing but the memory of this GPU is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("hf://org/model", "hf://org/model is not on this machine: pass its config.json with"),
        ("file://absent", "file://absent has no file absent on this machine: pass"),
        ("pkg://not_installed/x.gguf", "the package not_installed is not installed: pass"),
        ("pkg://json/../os.py", "the package json has no file '../os.py': pass"),
    ],
)
def test_without_the_models_files_one_line_says_so_and_how_to_get_them(
    folder: Path, capsys: pytest.CaptureFixture[str], uri: str, why: str
) -> None:
    assert plan(folder, "--gpu", "H100", uri=uri) == 0
    shown = capsys.readouterr().out
    assert f"The memory is not known: {why}" in shown
    assert "Memory of" not in shown


def test_a_config_json_is_read_in_the_place_of_the_models_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(folder / "model" / "config.json")
    assert plan(folder, "--gpu", "H100", "--model-config", config, uri="hf://org/model") == 0
    assert "Memory of one worker with H100" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "mamba"}', '{"model_type": "llama"}'])
def test_a_config_json_that_cannot_be_read_is_named_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "model" / "config.json").write_text(text)
    assert plan(folder, "--gpu", "H100") == 0
    assert "The memory is not known: " in capsys.readouterr().out


def test_an_unknown_gpu_is_refused_with_the_known_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--gpu", "TPU") == 2
    assert "name one of T4" in capsys.readouterr().err


def test_the_plan_as_json_does_not_depend_on_the_gpu(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(folder, "--json") == 0
    plain = capsys.readouterr().out
    assert plan(folder, "--json", "--gpu", "L4") == 0
    assert capsys.readouterr().out == plain


# ---- `tuneyard run` -----------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "fits"), [(64, True), (16, False)])
def test_a_run_prints_the_same_plan_and_decides_by_the_machines_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gib: int, fits: bool
) -> None:
    """`decide` is called by the trainer, with what it found before the training."""
    given: list[tuple[FitAnswer, list[str]]] = []
    known = JobFacts(
        model=facts("8B"), rows={"prepare": RowFacts(longest=900)}, device=Device(memory=gib << 30)
    )

    def run(plans: list[Plan], _: Path, decide: Any) -> int:
        given.extend(decide(plan, known) for plan in plans)
        given.extend(decide(plan, JobFacts(unknown_model="it is new")) for plan in plans)
        return 0

    module = types.ModuleType("tuneyard_trainer.local.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuneyard_trainer.local.run", module)
    manifest = folder / "job.yaml"
    manifest.write_text(MANIFEST.format(uri="file://model", adapter="lora"))
    assert main.call(["run", str(manifest)]) == 0
    (answer, lines), unknown = given
    assert lines[0].startswith("Memory of one worker with CPU: ")
    assert [line.split(":")[0] for line in lines[1:3]] == ["sft", "evaluate"]
    assert (answer.refusal is None) is fits
    if answer.refusal is not None:
        assert "run it on a machine with " in answer.refusal.advice
    assert unknown == (FitAnswer(), ["The memory of the job is not known: it is new."])


# ---- GGUF ---------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(fields: dict[str, Any], tensors: list[str]) -> bytes:
    """Return the header of a GGUF file: numbers as uint32, lists of texts as arrays."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, value in fields.items():
        content += string(name)
        if isinstance(value, int):
            content += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            content += struct.pack("<I", 8) + string(value)
        else:
            content += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    for name in tensors:
        content += string(name) + struct.pack("<IQQIQ", 2, 64, 37, 0, 0)
    return content


FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 176,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": [f"token {number}" for number in range(37)],
}


@pytest.mark.parametrize("tied", [True, False])
def test_the_header_of_a_gguf_file_gives_the_config(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(FIELDS, ["token_embd.weight"] + ([] if tied else ["output.weight"])))
    config = gguf_header.config_of(path)
    assert config["tie_word_embeddings"] is tied
    assert config["vocab_size"] == 37
    assert config["num_key_value_heads"] == 2
    assert config["model_type"] == "llama"


@pytest.mark.parametrize("size", [0, 3, 20, 60, 200])
def test_a_truncated_gguf_file_is_named_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    (folder / "cut.gguf").write_bytes(gguf(FIELDS, ["token_embd.weight"])[:size])
    assert plan(folder, "--gpu", "H100", uri="file://cut.gguf") == 0
    assert "cut.gguf is no GGUF file that can be read" in capsys.readouterr().out


def test_the_memory_of_a_job_under_trl_is_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MANIFEST.format(uri="file://model", adapter="lora") + "  training: {engine: trl}\n"
    (folder / "job.yaml").write_text(text)
    assert main.call(["plan", str(folder / "job.yaml"), "--gpu", "H100"]) == 0
    shown = capsys.readouterr().out
    assert "Memory of" in shown
    assert "is not known" not in shown


def test_a_config_that_is_nested_too_deeply_is_not_known(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model" / "config.json").write_text("[" * 100_000)
    assert plan(folder, "--gpu", "H100") == 0
    assert "config.json cannot be read as JSON: pass its config.json" in capsys.readouterr().out
