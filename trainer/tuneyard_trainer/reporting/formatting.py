"""Numbers, durations and text as people read them."""

from __future__ import annotations

import math
import unicodedata

ABSENT = "\N{EN DASH}"


def duration(seconds: float) -> str:
    """The two largest units: "0.4 s", "12 s", "1 min 12 s", "2 h 5 min", "3 d 4 h"."""
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
    """A count with thousands separated; one decimal below 10 where there is a fraction."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if value < 10 and value % 1 else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Four significant digits, without exponents where people expect none."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 3 - int(math.log10(max(abs(value), 1))))
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """A change to the whole unit, with a real minus sign."""
    rounded = round(value)
    sign = "\N{MINUS SIGN}" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):,}"


def size(num_bytes: float) -> str:
    """Binary units: "812 MiB", "1.4 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(num_bytes, 1))) // 10, len(units) - 1)
    value = num_bytes / 1024**power
    return f"{value:,.{int(power > 0 and value < 10)}f} {units[power]}"


def harmless(text: str) -> str:
    """Text of unknown origin without what could steer a terminal or turn its direction of writing:
    control characters but line ends and tabs, and bidirectional overrides, become U+FFFD."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _steers(character) else character
        for character in text.replace("\r\n", "\n")
    )


def _steers(character: str) -> bool:
    kind = unicodedata.category(character)
    return (kind == "Cc" and character not in "\n\t") or (
        kind == "Cs" or unicodedata.bidirectional(character) in _OVERRIDES
    )


_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
