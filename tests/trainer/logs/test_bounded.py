"""A kept log has a bounded size and says what is missing."""

from __future__ import annotations

import re

from tuneyard_trainer.logs.bounded import (
    HEAD_BYTES,
    LINE_BYTES,
    PENDING_BYTES,
    TAIL_BYTES,
    BoundedLog,
    Lines,
    shortened,
)

MARK = re.compile(r"\.\.\. (\d+) bytes in (\d+) lines were dropped \.\.\.")


def written(lines: int, log: BoundedLog | None = None, first: int = 0) -> BoundedLog:
    log = log or BoundedLog()
    for number in range(first, first + lines):
        log.add(f"line {number:010}")
    return log


def test_a_short_log_is_kept_whole() -> None:
    assert written(2).content == b"line 0000000000\nline 0000000001\n"


def test_a_long_log_keeps_its_head_and_its_tail_and_counts_the_rest() -> None:
    lines = 1_000_000
    kept = written(lines).content
    text = kept.decode().splitlines()
    assert HEAD_BYTES + TAIL_BYTES - 32 < len(kept) <= HEAD_BYTES + TAIL_BYTES + 64
    assert (text[0], text[-1]) == ("line 0000000000", f"line {lines - 1:010}")
    mark = next(line for line in text if line.startswith("..."))
    found = MARK.fullmatch(mark)
    assert found
    assert int(found[2]) == lines - (len(text) - 1)
    assert int(found[1]) == 16 * int(found[2])
    assert text.index(mark) == HEAD_BYTES // 16


def test_a_log_that_continues_another_counts_on() -> None:
    half = written(500_000)
    continued = written(500_000, BoundedLog(half.content), first=500_000)
    assert continued.content == written(1_000_000).content
    short = written(1, BoundedLog(written(1).content), first=1)
    assert short.content == written(2).content


def lines_of(*parts: bytes) -> list[str]:
    lines = Lines()
    found = [shortened(*line) for part in parts for line in lines.feed(part)]
    return found + ([shortened(*line) for line in lines.end()] if lines.has_pending else [])


def test_lines_may_be_split_anywhere() -> None:
    text = "erste Zeile\n\nzweite: \N{SNOWMAN}\nlast".encode()
    for at in range(len(text)):
        assert lines_of(text[:at], text[at:]) == text.decode().split("\n")


def test_of_a_progress_bar_the_last_text_is_kept() -> None:
    assert lines_of(b"a\r\n", b" 0%\r 50%", b"\r100%\nb") == ["a", "100%", "b"]
    bar = b"".join(b"\r%06d %s" % (number, b"#" * 100) for number in range(10_000))
    assert lines_of(bar, b"\n") == ["009999 " + "#" * 100]


def test_a_long_line_is_cut_and_says_so() -> None:
    (line,) = lines_of(b"x" * PENDING_BYTES, b"y" * PENDING_BYTES + b"\n")
    dropped = 2 * PENDING_BYTES - LINE_BYTES
    assert line == "x" * LINE_BYTES + f" ... {dropped} bytes of this line were dropped ..."
