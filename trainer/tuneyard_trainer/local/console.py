"""The terminal output of a run: progress on standard error, the result on standard output."""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from tuneyard.api.gates import VERDICT_WORDS, GateResult
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.api.pods import stage_folder
from tuneyard.errors import StageError
from tuneyard_trainer.local.views import Clock, LineView, LiveView, RecordedView, View
from tuneyard_trainer.reporting.comparison_rows import ComparisonRow
from tuneyard_trainer.reporting.formatting import ABSENT, clipped
from tuneyard_trainer.reporting.results import Results, Sample
from tuneyard_trainer.worker import Interrupted

FILE_WIDTH = 100
"""The columns of the result if standard output is not a terminal."""
SHOWN_CHARACTERS = 600
"""The most characters of a prompt or completion that are shown; the report shows all of them."""
VERDICT_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}
GATE_STYLES = {
    "pass": "green",
    "breach": "red",
    "insufficientEvidence": "yellow",
    "missing": "red",
}


class Console:
    """Shows a run: a live display on a terminal; log lines on a pipe, a dumb terminal or with
    NO_COLOR.

    A context manager: its end, also by Ctrl-C, restores the terminal.
    """

    def __init__(
        self, *, out: IO[str] | None = None, err: IO[str] | None = None, clock: Clock = time.time
    ) -> None:
        out, err = _tolerant(out or sys.stdout), _tolerant(err or sys.stderr)
        self._out = _rich(out)
        terminal = _rich(err)
        self._view: View = (
            LiveView(terminal, clock)
            if terminal.is_interactive and not os.environ.get("NO_COLOR")
            else LineView(err, clock)
        )
        self._clock = clock
        self._plan: Plan | None = None
        self._events: deque[Mapping[str, Any]] = deque()
        self._showing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._view.close()

    # ---- while it runs --------------------------------------------------------------------------

    def start(self, plan: Plan) -> None:
        """Show the stages of the plan and the planner's notes."""
        self._plan = plan
        _describe(plan, self._view)

    def record(self, stream: IO[str]) -> None:
        """Write the log lines of the run to this stream too, from now on."""
        log = LineView(stream, self._clock)
        if self._plan:
            _describe(self._plan, log)
        self._view = RecordedView(self._view, log)

    def note(self, text: str) -> None:
        """Show a line of information. Any thread may call this."""
        self._view.note("info", text)

    def warn(self, text: str) -> None:
        """Show a warning. Any thread may call this."""
        self._view.note("warning", text)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event of the runner. A signal handler may call this too: an event that arrives
        while another is being shown is shown after it."""
        self._events.append(event)
        if self._showing:
            return
        self._showing = True
        try:
            while self._events:
                self._show(self._events.popleft())
        finally:
            self._showing = False

    def _show(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "stage":
            value = event.get("record")
            record = StageRecord.model_validate(value) if value else None
            self._view.stage(event["stage"], event["state"], record)
        elif event["type"] == "progress":
            self._view.progress(event)
        elif event["type"] == "wait":
            self._view.wait(event)

    # ---- the result -----------------------------------------------------------------------------

    def summary(
        self,
        records: Mapping[str, StageRecord],
        output: str,
        folder: Path,
        skipped_all: bool = False,
    ) -> None:
        """Show the result. `output`: the job's output as a path or URI; `folder`: the exported
        folder if the output is a path; `skipped_all`: whether every stage was done before."""
        self._view.close()
        name = self._plan.job.name if self._plan else "the job"
        results = Results.of(records)
        if skipped_all:
            self._print(Text(f"Nothing to do: every stage of {name} is already done."))
        self._print()
        if results.comparisons:
            self._print(_comparison_table(results.heading, results.comparisons))
            self._print()
        self._print(_facts_table(results.facts))
        for warning in results.warnings:
            self._print(Text(f"Warning: {warning}", style="yellow"))
        if results.samples:
            self._print()
            self._print(_samples_table(results.samples))
        if results.gates:
            self._print()
            self._print(_gates_table(results.gates))
        self._print()
        exported = f"{output.rstrip('/')}/{stage_folder('export')}"
        self._print(_facts_table(_places(records, exported if "://" in output else _near(folder))))

    def failure(self, error: StageError) -> None:
        """Show why the run failed and what to change."""
        self._view.failed(error)
        self._view.close()

    def interrupted(self, stopped: Interrupted) -> None:
        """Show that the run was stopped and how to continue it."""
        self._view.close()
        after = f" after step {stopped.step}" if stopped.step else ""
        text = f"Stopped in {stopped.stage}{after}. Run the same command to continue."
        self._view.note("warning", text)

    def _print(self, value: Text | Table | None = None) -> None:
        self._out.print("" if value is None else value)


def _describe(plan: Plan, view: View) -> None:
    stages = ", ".join(stage.name for stage in plan.stages)
    view.note("info", f"{plan.job.kind} {plan.job.name}: {stages}")
    for note in plan.notes:
        view.note("info", note)


def _tolerant(stream: IO[str]) -> IO[str]:
    """Make a stream write "?" for characters that its encoding lacks: models use any script."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def _rich(stream: IO[str]) -> RichConsole:
    console = RichConsole(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


# ---- tables -------------------------------------------------------------------------------------


def _comparison_table(heading: str, lines: tuple[ComparisonRow, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(heading)
    for title in ("Base", "Tuned", "Change"):
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        style = VERDICT_STYLES[line.verdict]
        table.add_row(
            line.label, line.base, Text(line.tuned, style="bold"), Text(line.change, style=style)
        )
    return table


def _gates_table(gates: tuple[GateResult, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("Gate", "Verdict", "Value", "95% interval", "Bound"):
        table.add_column(title)
    for gate in gates:
        words = VERDICT_WORDS[gate.verdict]
        table.add_row(
            gate.metric if gate.is_required else f"{gate.metric} (advisory)",
            Text(words, style=GATE_STYLES[gate.verdict]),
            gate.measured,
            gate.interval or ABSENT,
            gate.bound,
        )
    return table


def _facts_table(facts: tuple[tuple[str, str], ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(label, Text(value))
    return table


def _samples_table(samples: tuple[Sample, ...]) -> Table:
    compared = any(sample.base is not None for sample in samples)
    table = Table(box=box.ROUNDED, show_lines=True)
    for title in ("Prompt", *(("Base",) if compared else ()), "Tuned", "Reference"):
        table.add_column(title, ratio=1, overflow="fold")
    for sample in samples:
        base = [_completion(sample, sample.base)] if compared else []
        table.add_row(
            _clipped(sample.prompt),
            *base,
            _completion(sample, sample.tuned),
            _clipped(sample.reference),
        )
    return table


def _completion(sample: Sample, completion: str | None) -> Text:
    if completion is None:
        return Text(ABSENT)
    right = sample.is_right(completion)
    text = _clipped(completion)
    if right is None:
        return text
    mark = Text("✔ ", style="green") if right else Text("✘ ", style="red")
    return mark.append_text(text)


def _clipped(text: str) -> Text:
    return Text(clipped(text, SHOWN_CHARACTERS))


def _places(records: Mapping[str, StageRecord], at: str) -> tuple[tuple[str, str], ...]:
    """Return the files that the export stage wrote; `at`: its folder."""
    record = next((r for r in records.values() if r.kind == "export"), None)
    if record is None:
        return ()
    places = []
    if "adapterTensors" in record.metrics:
        places.append(("Adapter", f"{at}/adapter"))
    if "modelTensors" in record.metrics:
        places.append(("Model", f"{at}/model"))
    return (
        *places,
        ("Report", f"{at}/report.html"),
        ("Model card", f"{at}/README.md"),
        ("Curves", f"{at}/loss.png"),
    )


def _near(folder: Path) -> str:
    """Return a folder below the working directory as a relative path."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)
