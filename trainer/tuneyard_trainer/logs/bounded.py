"""A log of bounded size: its head and its tail are kept, and a line says how much is missing."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

HEAD_BYTES = 256 << 10
TAIL_BYTES = 768 << 10
"""A log keeps its first 256 KiB and its last 768 KiB, in whole lines."""
LINE_BYTES = 16 << 10
"""The longest line that is kept whole."""
PENDING_BYTES = 64 << 10
"""The longest part of a line that is held in memory. It is longer than LINE_BYTES, so that a secret
at the end of what is kept is recognized."""
LONGEST_SECRET = 4 << 10
"""The end of a longer part is not kept, as it may hold the beginning of a secret."""

_MARK = re.compile(rb"^\.\.\. (\d+) bytes in (\d+) lines were dropped \.\.\.\n", re.MULTILINE)


class BoundedLog:
    """The kept lines of a log."""

    def __init__(self, former: bytes = b"") -> None:
        """`former`: the `content` of an earlier log, which this one continues."""
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._head_bytes = self._tail_bytes = 0
        self._dropped_bytes = self._dropped_lines = 0
        head, tail = former, b""
        if mark := _MARK.search(former):
            head, tail = former[: mark.start()], former[mark.end() :]
        self.extend(head)
        if mark:
            self._head_bytes = HEAD_BYTES  # the head is full
            self._dropped_bytes, self._dropped_lines = int(mark[1]), int(mark[2])
        self.extend(tail)

    def extend(self, text: bytes) -> None:
        """Add the lines of a text."""
        for line in text.splitlines(keepends=True):
            self._add(line)

    def add(self, line: str) -> None:
        """Add a line, without its line end."""
        self._add(line.encode(errors="replace") + b"\n")

    def _add(self, line: bytes) -> None:
        if not self._tail and self._head_bytes + len(line) <= HEAD_BYTES:
            self._head.append(line)
            self._head_bytes += len(line)
            return
        self._tail.append(line)
        self._tail_bytes += len(line)
        while self._tail_bytes > TAIL_BYTES:
            dropped = self._tail.popleft()
            self._tail_bytes -= len(dropped)
            self._dropped_bytes += len(dropped)
            self._dropped_lines += 1

    @property
    def content(self) -> bytes:
        """The kept lines."""
        mark = b""
        if self._dropped_lines:
            dropped = f"{self._dropped_bytes} bytes in {self._dropped_lines} lines"
            mark = f"... {dropped} were dropped ...\n".encode()
        return b"".join([*self._head, mark, *self._tail])


class Lines:
    """Cuts the bytes of a log into lines. Of a line that a carriage return overwrites, such as a
    progress bar, the last text is kept."""

    def __init__(self) -> None:
        self._pending = b""
        self._skipped = 0
        """Bytes of the pending line that are not held."""

    def feed(self, data: bytes) -> Iterator[tuple[str, int]]:
        """Yield each line that has ended, without its line end, and how many bytes it lacks at its
        end."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._append(part)
            yield from self.end()
        self._append(rest)

    def end(self) -> Iterator[tuple[str, int]]:
        """Yield the pending line, if there is one."""
        text, skipped = self._pending.rstrip(b"\r"), self._skipped
        self._pending, self._skipped = b"", 0
        yield text[text.rfind(b"\r") + 1 :].decode(errors="replace"), skipped

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def _append(self, part: bytes) -> None:
        data = self._pending + part
        if start := data[:-1].rfind(b"\r") + 1:
            data, self._skipped = data[start:], 0
        self._pending = data[:PENDING_BYTES]
        self._skipped += len(data) - len(self._pending)


def shortened(line: str, lacks: int) -> str:
    """Return a line without secrets, cut to LINE_BYTES. `lacks`: the bytes that it lacks."""
    if lacks:
        line, lacks = line[:-LONGEST_SECRET], lacks + len(line[-LONGEST_SECRET:])
    lacks += len(line[LINE_BYTES:])
    line = line[:LINE_BYTES]
    return f"{line} ... {lacks} bytes of this line were dropped ..." if lacks else line
