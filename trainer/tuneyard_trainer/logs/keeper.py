"""The helper process that keeps the log of one process: `python -m tuneyard_trainer.logs.keeper`.

It reads the files that the watched process writes its log to, and replaces the kept log in the
output at intervals, while this attempt owns the output. It ends after the watched process.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tuneyard.api.pods import DRIVER_LOG, STALE_ATTEMPT, log_file
from tuneyard.errors import StageError
from tuneyard_trainer import drain
from tuneyard_trainer.logs.bounded import BoundedLog, Lines, shortened
from tuneyard_trainer.logs.redaction import Redactor
from tuneyard_trainer.storage.records import Store

POLL_SECONDS = 1.0
"""The interval of reading. It bounds how far the lines of standard output and of standard error are
out of order."""
SAVE_SECONDS = 30.0
"""The interval of writing to the output: the most that a lost node takes from the log."""
END_TRIES, END_SECONDS = 3, 2.0
"""Tries of the last write, and the time between them."""
MOST_END_SECONDS = 60
"""When the helper is killed, counted from the end of the watched process."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""How the lines begin that Ray writes into a worker's log for its own log monitor."""


class Keeper:
    """The kept log of one process."""

    def __init__(
        self, store: Store, name: str, attempt: int, files: Sequence[Path], redact: Redactor
    ) -> None:
        """`name`: `driver` or `worker-RANK`. `files`: what the process writes its log to."""
        self._store, self._name, self._attempt = store, name, attempt
        self._redact = redact
        self._files = [(file.open("rb"), Lines()) for file in files]
        self._log = BoundedLog()
        self._continues = False
        """Whether the log of an earlier process of this attempt has been put before this one."""
        self._has_changed = self._has_warned = False
        self.is_stale = False
        """Whether a newer attempt or job owns the output: nothing is written any more."""

    def read(self) -> None:
        """Read what the process has written since the last call."""
        for file, lines in self._files:
            while data := file.read(1 << 20):
                self._add(
                    shortened(self._redact(_plain(line)), lacks) for line, lacks in lines.feed(data)
                )

    def end(self) -> None:
        """Read and write the rest, after the process has ended."""
        self.read()
        for _, lines in self._files:
            if lines.has_pending:
                self._add(
                    shortened(self._redact.unfinished(_plain(line)), lacks)
                    for line, lacks in lines.end()
                )
        for tries_left in reversed(range(END_TRIES)):
            if self.save() or self.is_stale or not tries_left:
                return
            time.sleep(END_SECONDS)

    def save(self) -> bool:
        """Write the log to the output if it has changed. Return False if that failed."""
        if not self._has_changed:
            return True
        try:
            if not self._continues:
                self._continue_former()
            self._store.write_log(self._name, self._log.content, self._attempt)
        except Exception as error:  # of any store: training goes on without a kept log
            self.is_stale = isinstance(error, StageError) and error.reason == STALE_ATTEMPT
            self._warn(error)
            return False
        self._has_changed = False
        return True

    def _continue_former(self) -> None:
        log = BoundedLog(self._store.log(self._name, self._attempt))
        log.extend(self._log.content)
        self._log, self._continues = log, True

    def _add(self, lines: Iterable[str]) -> None:
        for line in lines:
            if not line.startswith(_RAY_MARKS):
                self._log.add(line)
                self._has_changed = True

    def _warn(self, error: Exception) -> None:
        """Print the first failure for the watched process to log it."""
        if self._has_warned or self.is_stale:
            return
        self._has_warned = True
        where = f"{self._store.uri}/{log_file(self._attempt, self._name)}"
        reason = " ".join(str(error).split()) or type(error).__name__
        _print(self._redact(f"the log cannot be kept in {where} ({reason}); training goes on"))


def _print(text: str) -> None:
    with suppress(OSError):  # the watched process has ended
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _plain(line: str) -> str:
    """Return a line without the terminal's control sequences: they could split a secret."""
    return _CONTROL.sub("", _ANSI.sub("", line))


def main(arguments: Sequence[str]) -> int:
    """Keep a log until the parent process closes standard input or ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="a folder or an fsspec URL")
    parser.add_argument("--job-uid", help="the uid of the job")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--name", required=True, help="driver, or worker-RANK")
    parser.add_argument("--parent", type=int, required=True, help="the watched process")
    parser.add_argument("--drain", type=Path, help="the folder of the pod's preStop hook")
    parser.add_argument("files", nargs="*", type=Path, help="what the process writes its log to")
    options = parser.parse_args(arguments)
    # Ray ends a job with SIGTERM to all its processes, 3 s before SIGKILL: time for the rest
    # of the log. The end of the parent process ends this one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _keep(options)
    except Exception as error:
        _print(f"the log cannot be kept: {error}")
        return 1
    return 0


def _keep(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        if options.drain:  # the pod waits until the log is complete
            stack.enter_context(drain.registered(options.drain, lambda: None))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tuneyard-log-"))
        store = Store(options.output, Path(scratch), options.job_uid)
        redact = Redactor(os.environ)
        keeper = Keeper(store, options.name, options.attempt, options.files, redact)
        _watch(keeper, options.parent)
        signal.alarm(MOST_END_SECONDS)  # a store that does not answer must not hold the pod
        keeper.end()
        if options.name == DRIVER_LOG and not keeper.is_stale:
            with suppress(Exception):  # the next attempt tries again
                store.remove_old_logs(options.attempt)


def _watch(keeper: Keeper, parent: int) -> None:
    """Return when the parent process has closed standard input or has ended."""
    saved_at = time.monotonic()
    while not keeper.is_stale:
        ended, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if ended or os.getppid() != parent:
            return
        keeper.read()
        if time.monotonic() - saved_at >= SAVE_SECONDS:
            keeper.save()
            saved_at = time.monotonic()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
