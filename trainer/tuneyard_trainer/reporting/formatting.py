"""Numbers, durations and text of unknown origin, formatted for people."""

from __future__ import annotations

import math
import re

ABSENT = "\N{EN DASH}"


def duration(seconds: float) -> str:
    """Return the two largest units: "0.4 s", "12 s", "1 min 12 s", "2 h 5 min", "3 d 4 h"."""
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds % 1 else f"{seconds:.0f} s"
    whole = round(seconds)
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60))
    parts = [(name, value) for name, value in (*units, ("s", whole % 60))]
    first = next(index for index, (_, value) in enumerate(parts) if value)
    return " ".join(f"{value} {name}" for name, value in parts[first : first + 2] if value)


def count(value: float) -> str:
    """Return a count with thousands separators; a fraction below 10 keeps one decimal."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if value < 10 and value % 1 else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return four significant digits; an exponent appears below 0.001 and from a million."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 3 - int(math.log10(max(abs(value), 1))))
    return f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """Return a share from 0 to 1 as whole percent."""
    return ABSENT if share is None else f"{100 * share:.0f} %"


def signed(value: float) -> str:
    """Return a change as a whole number with its sign: U+2212 for minus, "±" for zero."""
    rounded = round(value)
    sign = "\N{MINUS SIGN}" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):,}"


def size(num_bytes: float) -> str:
    """Return bytes in binary units: "812 MiB", "1.4 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(num_bytes, 1))) // 10, len(units) - 1)
    value = num_bytes / 1024**power
    return f"{value:,.{int(power > 0 and value < 10)}f} {units[power]}"


def clipped(text: str, limit: int) -> str:
    """Return `harmless` text without surrounding white space, cut with "…" after `limit`
    characters."""
    text = harmless(text.strip())
    return text if len(text) <= limit else f"{text[:limit]}…"


def harmless(text: str) -> str:
    """Return text of unknown origin with U+FFFD for every character that could control a terminal
    or change the writing direction: control characters other than line feeds and tabs, surrogates
    and bidirectional controls. CRLF becomes a line feed."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
