"""A model that no worker can hold: the pods' limit lies below its weights alone.

It takes about ten minutes and 12 GiB, so that CI leaves it out: `make test-sharded` runs it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import Platform
from tests.cluster.jobs import LAYERS, TRAINED, wide
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        os.environ.get("TUNEYARD_SHARDED") != "1",
        reason="takes ten minutes and 12 GiB: make test-sharded",
    ),
]

FOLDER = Path(__file__).parent
SCRIPTS = {name: (FOLDER / name).read_text() for name in ("jobs.py", "tiny_model.py")}
STEPS = 6

SIZE = """
import json, pathlib
files = pathlib.Path("/data/wide").glob("*.safetensors")
print(json.dumps({"bytes": sum(file.stat().st_size for file in files)}))
"""

ALONE = """
from pathlib import Path
from tuneyard.api.plan import Plan
from tuneyard_trainer.running import torchrun
plan = Plan.model_validate_json(Path("/config/plan.json").read_text())
torchrun.run(plan, "/models/alone", base_dir=Path("/data"), cache_dir=Path("/tmp"), emit=print)
"""
"""Run a plan in this process, as one worker whom nobody asks whether it fits."""

LOADS = """
import json
import torch
from transformers import AutoModelForCausalLM
tuned = AutoModelForCausalLM.from_pretrained("/models/shared/result/model")
base = AutoModelForCausalLM.from_pretrained("/data/wide")
ids = torch.tensor([[5, 6, 7]])
pairs = zip(tuned.named_parameters(), base.named_parameters(), strict=True)
changed = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
print(json.dumps({"finite": bool(tuned(ids).logits.isfinite().all()), "changed": changed}))
"""


@pytest.fixture(scope="module")
def limit(platform: Platform) -> int:
    """The limit of each pod: 95% of the bytes of the model's files."""
    platform.run("wide", (FOLDER / "wide_model.py").read_text(), SCRIPTS)
    size = int(json.loads(platform.run("size", SIZE).splitlines()[-1])["bytes"])
    sys.stdout.write(f"weights: {size:,} bytes, limit of each pod: {int(0.95 * size):,} bytes\n")
    return int(0.95 * size)


def test_one_worker_is_refused_with_what_would_fit(platform: Platform, limit: int) -> None:
    platform.apply(wide("one", workers=1, steps=STEPS, memory=limit))
    platform.wait("one", "Failed")
    status = platform.status("one")
    sys.stdout.write(json.dumps(status["failure"], indent=2) + "\n")
    assert status["failure"]["reason"] == "DoesNotFit"
    assert [attempt["reason"] for attempt in status["attempts"]] == ["DoesNotFit"]


def test_a_pod_that_trains_it_all_the_same_is_killed(platform: Platform, limit: int) -> None:
    text = yaml.safe_dump(wide("alone", workers=1, steps=STEPS, memory=limit))
    plan = plan_job(read(text.replace("pvc://", "file:///"))[0])
    files = {"plan.json": plan.model_dump_json(by_alias=True)}
    # Just below its need a process loses its libraries' pages again and again for many minutes.
    phase, log = platform.ended("alone", ALONE, files, memory=limit // 2)
    (pod,) = [pod for pod in platform.items("pods") if pod["metadata"]["name"] == "alone"]
    (container,) = pod["status"]["containerStatuses"]
    assert phase == "Failed"
    assert container["state"]["terminated"]["reason"] == "OOMKilled", log


def test_two_workers_share_it_lose_one_resume_evaluate_and_export(
    platform: Platform, limit: int
) -> None:
    platform.apply(wide("shared", workers=2, steps=STEPS, memory=limit))
    platform.until_step("shared", attempt=1, step=3)
    victim = platform.pods("shared", role="worker")[0]
    platform.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    platform.wait("shared", "Succeeded", 1500)

    status = platform.status("shared")
    sys.stdout.write(json.dumps(status, indent=2) + "\n")
    assert len(status["attempts"]) == 2
    assert [stage["state"] for stage in status["stages"]] == ["Succeeded"] * 4
    loaded: dict[str, Any] = json.loads(platform.run("loads", LOADS).strip().splitlines()[-1])
    assert loaded["finite"]
    trained = {f"model.layers.{layer}" for layer in range(LAYERS - TRAINED, LAYERS)}
    changed = {".".join(name.split(".")[:3]) for name in loaded["changed"]}
    assert trained <= changed <= {*trained, "model.norm.weight"}, "frozen layers stay as they were"
