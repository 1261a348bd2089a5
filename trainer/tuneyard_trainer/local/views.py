"""Two displays of a run: a live one on a terminal, log lines anywhere else.

Both receive the runner's events. Text from outside (messages, model output) is never parsed as
markup, and its control characters never reach a terminal.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tuneyard.api.plan import StageRecord
from tuneyard.api.suites import is_main
from tuneyard.errors import StageError
from tuneyard_trainer.reporting.formatting import count, duration, harmless, number
from tuneyard_trainer.reporting.results import headline, seconds_of
from tuneyard_trainer.running.waits import Waits

Clock = Callable[[], float]
"""Seconds since 1970."""

PACE_SECONDS = 60.0
"""The time over which a stage's pace is measured."""
LINE_SECONDS = 10.0
LINE_SHARE = 0.05
"""A progress line is due after LINE_SECONDS, or after LINE_SHARE of the stage's steps."""
REFRESH_HZ = 4
NAME_WIDTH = 10
STARTING = "starting"
"""The name that the terminal shows while no stage runs."""


class View(Protocol):
    """A display of the runner's events."""

    def note(self, level: str, text: str) -> None: ...

    def failed(self, error: StageError) -> None: ...

    def stage(self, name: str, state: str, record: StageRecord | None) -> None: ...

    def progress(self, event: Mapping[str, Any]) -> None: ...

    def wait(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Pace:
    """The pace of a stage, from its latest steps.

    A resumed run has no times of earlier steps, and the slow first step soon drops out.
    """

    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, now: float, step: int) -> None:
        if not self._marks or step > self._marks[-1][1]:
            self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[0][0] > PACE_SECONDS:
            self._marks.popleft()

    def seconds_left(self, now: float, total: int) -> float | None:
        """Return the seconds to the last step; None before two steps are done."""
        if len(self._marks) < 2 or not total:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        left = (total - last) * max(end - start, 0.0) / (last - first)
        return max(0.0, left - max(0.0, now - end))


@dataclass
class Running:
    """The running stage after the events so far."""

    name: str
    started: float
    step: int = 0
    total: int = 0
    message: str = ""
    message_since: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def add(self, event: Mapping[str, Any], now: float) -> None:
        """Add a progress event. A message is shown until the next metrics arrive."""
        if event["totalSteps"]:
            self.total = event["totalSteps"]
        if event["step"]:
            self.step = event["step"]
            self.pace.add(now, self.step)
        self.metrics.update(event["metrics"])
        if event["message"]:
            self.tell(event["message"], now)
        elif event["metrics"]:
            self.message = ""

    def tell(self, message: str, now: float) -> None:
        """Show a message with the time since it came."""
        if message != self.message:
            self.message, self.message_since = message, now


# ---- log lines ----------------------------------------------------------------------------------


class LineView:
    """Writes `TIME LEVEL STAGE key=value ...`, one event a line, and progress when it is due."""

    def __init__(self, stream: IO[str], clock: Clock) -> None:
        self._stream, self._clock = stream, clock
        self._running: Running | None = None
        self._shown = (0.0, 0)
        self._message = ""
        self._waits = Waits(self._waited)

    def note(self, level: str, text: str) -> None:
        self._write(level, self._running.name if self._running else "run", {"message": text})

    def failed(self, error: StageError) -> None:
        values = {
            "reason": error.reason,
            "message": error.message,
            "advice": error.advice or None,
            "retryable": error.retryable,
        }
        self._waits.end()
        self._write("error", self._running.name if self._running else "run", values)

    def stage(self, name: str, state: str, record: StageRecord | None) -> None:
        self._waits.end()
        self._running = Running(name, self._clock()) if state == "Running" else None
        self._shown, self._message = (self._clock(), 0), ""
        values: dict[str, object] = {"state": state}
        if record is not None:
            values |= {"reused": record.reused or None, "seconds": seconds_of(record)}
            values |= {**record.metrics, "digest": record.digest}
        self._write("info", name, values)

    def progress(self, event: Mapping[str, Any]) -> None:
        if not event["stage"]:
            self._write("info", "run", {"message": event["message"]})
            return
        now = self._clock()
        if self._running is None or self._running.name != event["stage"]:
            self._running, self._shown = Running(event["stage"], now), (now, 0)
        self._running.add(event, now)
        if self._is_due(event, now):
            self._shown, self._message = (now, event["step"]), event["message"] or self._message
            self._write("info", event["stage"], self._values(self._running, event, now))
        self._waits.follow(event)

    def wait(self, event: Mapping[str, Any]) -> None:
        self._waits.follow(event)

    def close(self) -> None:
        self._waits.end()

    def _waited(self, message: str, seconds: float) -> None:
        stage = self._running.name if self._running else "run"
        self._write("info", stage, {"waiting": message, "seconds": math.floor(seconds)})

    def _is_due(self, event: Mapping[str, Any], now: float) -> bool:
        """Return whether a progress line is due: for a new message, an evaluation, the first and
        the last step; otherwise by time or by share of the stage."""
        if event["message"] and event["message"] != self._message:
            return True
        time, shown = self._shown
        step, total = event["step"], event["totalSteps"]
        measured = {"validationLoss", "generalLoss", "heldOutReward"} & event["metrics"].keys()
        on_suites = any("/" in name for name in event["metrics"])
        if measured or on_suites or (step and not shown):
            return True
        share = LINE_SHARE * total if step < total else 1
        return now - time >= LINE_SECONDS or bool(total and step - shown >= share)

    def _values(self, running: Running, event: Mapping[str, Any], now: float) -> dict[str, object]:
        values: dict[str, object] = {}
        if event["step"]:
            values["step"] = event["step"]
        if event["totalSteps"]:
            values["totalSteps"] = event["totalSteps"]
        values |= event["metrics"]
        left = running.pace.seconds_left(now, event["totalSteps"])
        if left is not None and event["step"]:
            values["etaSeconds"] = round(left)
        if event["message"]:
            values["message"] = event["message"]
        return values

    def _write(self, level: str, stage: str, values: Mapping[str, object]) -> None:
        moment = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        parts = [moment.strftime("%Y-%m-%dT%H:%M:%SZ"), level, stage]
        parts += [f"{key}={_value(value)}" for key, value in values.items() if value is not None]
        self._stream.write(" ".join(parts) + "\n")
        self._stream.flush()


_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f]+")


def _value(value: object) -> str:
    """Return a value as text: a number or an unambiguous word bare, other text as a JSON string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    text = harmless(str(value))
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class RecordedView:
    """Shows events in one view, and writes them as log lines."""

    def __init__(self, shown: View, log: LineView) -> None:
        self._views: tuple[View, View] = (shown, log)

    def note(self, level: str, text: str) -> None:
        for view in self._views:
            view.note(level, text)

    def failed(self, error: StageError) -> None:
        for view in self._views:
            view.failed(error)

    def stage(self, name: str, state: str, record: StageRecord | None) -> None:
        for view in self._views:
            view.stage(name, state, record)

    def progress(self, event: Mapping[str, Any]) -> None:
        for view in self._views:
            view.progress(event)

    def wait(self, event: Mapping[str, Any]) -> None:
        for view in self._views:
            view.wait(event)

    def close(self) -> None:
        for view in self._views:
            view.close()


# ---- terminal -----------------------------------------------------------------------------------


class LiveView:
    """Shows a line for each finished stage and below them the running stage, redrawn in place."""

    def __init__(self, console: RichConsole, clock: Clock) -> None:
        self._console, self._clock = console, clock
        self._running: Running | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None

    def note(self, level: str, text: str) -> None:
        style = "yellow" if level == "warning" else "dim"
        with self._paused():
            self._console.print(Text(harmless(text), style=style))

    def failed(self, error: StageError) -> None:
        where = f" {self._running.name}" if self._running else ""
        self.close()
        self._console.print(Text(f"✘{where}: {error.reason}", style="bold red"))
        self._console.print(Text(harmless(error.message)))
        if error.advice:
            self._console.print(Text(harmless(error.advice), style="cyan"))

    def stage(self, name: str, state: str, record: StageRecord | None) -> None:
        self.close()
        if record is not None:
            self._console.print(_finished(name, state, record))
        if state == "Running":
            self._running = Running(name, self._clock())
            self._open()

    def progress(self, event: Mapping[str, Any]) -> None:
        if not event["stage"]:
            self.note("info", event["message"] or "")
            return
        if self._running is None or self._running.name != event["stage"]:
            self.stage(event["stage"], "Running", None)
        if self._running is not None:
            self._running.add(event, self._clock())

    def wait(self, event: Mapping[str, Any]) -> None:
        if self._running is None:
            self._running = Running(STARTING, self._clock())
            self._open()
        self._running.tell(event["message"], self._clock())

    def close(self) -> None:
        """Remove the running stage's lines and show the cursor again."""
        self._hide()
        self._running = None

    def _open(self) -> None:
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_HZ,
            transient=True,
        )
        self._live.start()

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Stop the live display while text is printed: both move the cursor."""
        self._hide()
        yield
        if self._running is not None:
            self._open()

    def _render(self) -> RenderableType:
        running = self._running
        if running is None:
            return Text("")
        now = self._clock()
        first = Table.grid(padding=(0, 1), expand=bool(running.total))
        first.add_column(width=1)
        first.add_column(min_width=NAME_WIDTH, no_wrap=True)
        cells: list[RenderableType] = [self._spinner, Text(running.name, style="bold")]
        if running.total:
            first.add_column(ratio=1)
            first.add_column(no_wrap=True, justify="right")
            bar = ProgressBar(total=running.total, completed=running.step)
            cells += [bar, Text(_position(running, now))]
        else:
            first.add_column(no_wrap=True)
            cells.append(Text(_position(running, now), style="dim"))
        first.add_row(*cells)
        below = Text(" " * (NAME_WIDTH + 3) + _status(running, now), style="dim")
        below.truncate(self._console.width, overflow="ellipsis")
        return Group(first, below)


def _position(running: Running, now: float) -> str:
    elapsed = duration(math.floor(now - running.started))
    if not running.total:
        return f"{count(running.step)} done · {elapsed}" if running.step else elapsed
    left = running.pace.seconds_left(now, running.total)
    eta = f"{duration(math.ceil(left))} left" if left is not None else elapsed
    return f"{count(running.step)}/{count(running.total)}  {eta:>14}"


_SHOWN_METRICS = {
    "reward": "reward",
    "heldOutReward": "held out",
    "heldOutIndependentReward": "independent",
    "kl": "KL",
}
"""The metrics of reinforcement learning on the line of the running stage, and their labels."""


def _status(running: Running, now: float) -> str:
    if running.message:
        message = harmless(running.message).replace("\n", " ")
        elapsed = math.floor(now - running.message_since)
        return f"{message} · {duration(elapsed)}" if elapsed else message
    metrics, parts = running.metrics, []
    if "loss" in metrics:
        parts.append(f"loss {number(metrics['loss'])}")
    if "validationLoss" in metrics:
        base = metrics.get("baseValidationLoss")
        beside = f" (base {number(base)})" if base is not None else ""
        parts.append(f"held out {number(metrics['validationLoss'])}{beside}")
    if "generalLoss" in metrics:
        increase = metrics.get("generalLossIncrease")
        beside = f" ({increase:+.2f})" if increase is not None else ""
        parts.append(f"general {number(metrics['generalLoss'])}{beside}")
    parts += [f"{name} {number(metrics[name])}" for name in filter(is_main, metrics)]
    parts += [
        f"{_SHOWN_METRICS[name]} {number(metrics[name])}"
        for name in _SHOWN_METRICS
        if name in metrics
    ]
    if "tokensPerSecond" in metrics:
        parts.append(f"{count(metrics['tokensPerSecond'])} tokens/s")
    if "epoch" in metrics:
        parts.append(f"epoch {metrics['epoch']:.2f}")
    return " · ".join(parts)


def _finished(name: str, state: str, record: StageRecord) -> Table:
    skipped = state == "Skipped"
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(min_width=NAME_WIDTH, no_wrap=True)
    line.add_column(min_width=10, no_wrap=True)
    line.add_column()
    metrics = headline(record.kind, record.metrics, record.details)
    took = "reused" if record.reused else duration(seconds_of(record))
    if skipped:
        took = "done before"
    line.add_row(
        Text("✔", style="green"),
        Text(name, style="" if skipped else "bold"),
        Text(took, style="dim"),
        Text(" · ".join(metrics), style="dim" if skipped else ""),
    )
    return line
