"""Compare the planned memory of training on the CPU with real peaks, in cgroups of their own.

    .venv/bin/python benchmarks/memory_cgroup.py               all runs, as root
    .venv/bin/python benchmarks/memory_cgroup.py full lora     runs whose name starts so

Each run trains a Llama of random weights for two steps, each of two micro-batches, in a process of
its own with the environment of a pod. The cgroup's limit is the planned memory and 15%: a run that
needs more is killed. With --below each run is repeated under 15% less than planned, where it should
be killed. Whether it fits is not decided there. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneyard.rendering.rayjob import CPU_ENVIRONMENT

GIB = 1 << 30
TOLERANCE = 0.15
ROOT = Path("/sys/fs/cgroup")
WORDS = [f"w{number}" for number in range(200)]
"""Each is one token."""
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Run:
    """A configuration."""

    name: str
    length: int = 512
    """Tokens of each row; with DPO of a prompt with each of its completions."""
    rows: int = 8
    """Rows of a step, or pairs."""
    training: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    dpo: bool = False
    prompt: float = 0.5
    """The prompt's share of a row of DPO. The plan counts all tokens as such with a loss."""


LORA: dict[str, Any] = {"lora": {}}
RECOMPUTED = {"gradientCheckpointing": True}
RUNS = (
    Run("full"),
    Run("full, recomputed", training=RECOMPUTED),
    Run("full, 512 tokens at a time", rows=2, training={"microBatchTokens": 512}),
    Run("full, half of the layers frozen", training={"freeze": {"layers": "0-3"}}),
    Run("full, wider", rows=4, training={"microBatchTokens": 1024}, model={"hidden_size": 1024}),
    Run("lora", adapter=LORA),
    Run("lora, recomputed", adapter=LORA, training=RECOMPUTED),
    Run("lora, rows of 2048", length=2048, rows=2, adapter=LORA),
    Run("lora, 128,256 words", rows=4, adapter=LORA, model={"vocab_size": 128256}),
    Run("full, trl", training={"engine": "trl"}),
    Run("lora, trl", training={"engine": "trl"}, adapter=LORA),
    Run("lora, dpo", rows=4, adapter=LORA, dpo=True, prompt=0.05),
    Run("lora, dpo, half of each row a prompt", rows=4, adapter=LORA, dpo=True),
)


def manifest(run: Run, folder: Path) -> dict[str, Any]:
    """Return the job of a run, whose files are in `folder`."""
    training = {"maxSteps": 2, "batchSize": run.rows, "learningRate": 1e-4, **run.training}
    adapter = {"adapter": run.adapter} if run.adapter else {}
    rows = [{"uri": f"file://{folder}/rows.jsonl"}]
    spec: dict[str, Any] = {
        "model": {"uri": f"file://{folder}/model"},
        **adapter,
        "output": {"uri": f"file://{folder}/out"},
    }
    if run.dpo:
        spec["preferences"] = {"data": rows, "maxLength": run.length}
        spec["optimize"] = {"dpo": {"training": training}}
    else:
        data = {"train": rows, "maxLength": run.length}
        spec |= {"method": "pretrain", "data": data, "training": training}
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob" if run.dpo else "FineTuneJob",
        "metadata": {"name": "memory"},
        "spec": spec,
    }


def write_files(run: Run, folder: Path) -> None:
    """Write the model, its tokenizer and the rows of a run."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**MODEL, **run.model})).save_pretrained(folder / "model")
    special = ["<unk>", "<eos>", "<pad>"]
    words = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    prompt = int(run.prompt * run.length)
    answer = run.length - prompt - 1
    rows = [
        {"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)}
        if run.dpo
        else {"text": text(run.length - 1)}
        for _ in range(2 * run.rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- inside the cgroup --------------------------------------------------------------------------


def train(folder: Path) -> None:
    """Run the stages up to the one that trains, and print the peak of its memory."""
    import torch
    import yaml

    from tuneyard.manifests.manifest import read
    from tuneyard.planning.plan import plan_job
    from tuneyard_trainer.running.runner import PlanRunner, StageInputs
    from tuneyard_trainer.storage.records import Store
    from tuneyard_trainer.worker import Worker

    torch.set_num_threads(os.cpu_count() or 1)
    plan = plan_job(read(yaml.safe_dump(json.loads((folder / "job.json").read_text())))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:2]})
    stage = plan.stages[1].name
    store = Store(str(folder / "out"), folder / "scratch")
    store.claim(plan.job, attempt=1)

    records = PlanRunner(
        stage_inputs=StageInputs(plan, store, folder, folder / "cache"),
        worker=Worker(rank=0, world_size=1, device=torch.device("cpu")),
        emit=lambda _: None,  # nobody decides: it trains as planned, although it may not fit
    ).run()
    _print(measured=int(records[stage].metrics["peakMemoryBytes"]))


def _print(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


# ---- outside of it ------------------------------------------------------------------------------


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """Yield the folder of a new cgroup with this limit, without swap, in version 1 or 2."""
    one = ROOT / "memory"
    group = (one if one.is_dir() else ROOT) / f"tuneyard-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        if one.is_dir():
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "memory.swappiness").write_text("0")
        else:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.rmdir()


def trained(folder: Path, limit: int) -> tuple[int, dict[str, Any]]:
    """Train under a limit. Return the exit code, and what was printed until then."""
    command = [sys.executable, __file__, "--train", str(folder)]
    with cgroup(limit) as group:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **CPU_ENVIRONMENT},
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    printed: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        printed |= json.loads(line)
    return done.returncode, printed


def planned(run: Run, folder: Path) -> tuple[int, str]:
    """Return the planned bytes of a run's training stage, and the moment that takes them."""
    import yaml

    from tuneyard.api.job_facts import Device, JobFacts, RowFacts
    from tuneyard.api.model_config import facts_of
    from tuneyard.manifests.manifest import read
    from tuneyard.planning.decision import decide
    from tuneyard.planning.plan import plan_job

    plan = plan_job(read(yaml.safe_dump(manifest(run, folder)))[0])
    model = facts_of(json.loads((folder / "model/config.json").read_text()))
    device = Device(memory=64 * GIB)
    rows = {stage: RowFacts(longest=run.length) for stage in ("prepare", "pairs")}
    decision = decide(plan, JobFacts(model=model, rows=rows, device=device))
    if decision is None:
        raise RuntimeError(f"the model of {run.name} is not described")
    stage = decision.estimate.stages[0]
    return stage.total_bytes, stage.moment


def measured(run: Run, *, below: bool) -> str:
    """Return a run's row of the table. `below`: whether it is repeated under a smaller limit."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-memory-") as text:
        folder = Path(text)
        subprocess.run([sys.executable, __file__, "--write", run.name, text], check=True)
        (folder / "job.json").write_text(json.dumps(manifest(run, folder)))
        size, moment = planned(run, folder)
        peak = _peak(folder, int((1 + TOLERANCE) * size))
        above = "killed" if peak is None else "runs"
        peak = peak or _peak(folder, 64 * GIB) or 0
        less = ""
        if below:
            killed = _peak(folder, int((1 - TOLERANCE) * size)) is None
            less = "killed" if killed else "runs"
    cells = (
        run.name,
        f"{size / GIB:.2f}",
        f"{peak / GIB:.2f}",
        f"{size / peak - 1:+.1%}",
        above,
        less,
        moment,
    )
    return f"| {' | '.join(cells)} |"


def _peak(folder: Path, limit: int) -> int | None:
    """Return the peak of a run under a limit. None: it was killed. An earlier run's output goes."""
    for name in ("out", "scratch"):
        shutil.rmtree(folder / name, ignore_errors=True)
    code, printed = trained(folder, limit)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with {code}")
    return printed.get("measured") if code == 0 else None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="how the names of the runs start")
    parser.add_argument("--below", action="store_true", help="repeat each run under 15%% less")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return
    if options.write:
        name, folder = options.write
        write_files(next(run for run in RUNS if run.name == name), Path(folder))
        return
    wanted = [run for run in RUNS if not options.names or run.name.startswith(tuple(options.names))]
    sys.stdout.write(
        "| run | planned, GiB | measured, GiB | difference | under 15% more | under 15% less "
        "| planned moment |\n|---|---:|---:|---:|---|---|---|\n"
    )
    for run in wanted:
        sys.stdout.write(measured(run, below=options.below) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
