"""Random changes of values and of texts; the same generator gives the same changes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Slot = tuple[Any, Any]
"""A container (a mapping or a list), and the key or index of one of its values."""

ODD: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, 10**30),
    *(math.inf, -math.inf, math.nan),
    *("", " ", "0", "-1", "1e999", "auto", "null", "yes", "~", "1Gi", "-", "a/b", "../..", "\n"),
    *("\x00", "\ufeff", "\ud800", "\U0001f600", "\u202e", "{x}", "{", "%s", "${HOME}", "x" * 5000),
    *("hf://", "hf://a", "pvc://", "pvc:///", "pvc://A_B/x", "s3://", "file://", "file:///etc"),
    *("job://", "job://x", "https://", "https://[::1", "https://a:b/", "pkg://x/y.gguf", "x://y"),
    *([], {}, [[]], [{}], {"": {}}, {"a": {"b": []}}, [None], ["a", 1, None]),
)
_PIECES = ("&a ", "*a", "!!int ", "!x ", "<<: ", "? ", "\t", "- ", ": ", "{", "[", '"', "'", "#")
_MORE_PIECES = (
    "|\n",
    ">\n",
    "---\n",
    "...\n",
    "%YAML 9\n",
    "\x00",
    "\u2028",
    "\ud800",
    "0o9",
    "-0x",
)


def mutated_value(random_: random.Random, value: Any, others: Sequence[Any]) -> Any:
    """Return a copy of a value with one to four changes. `others`: values to take parts from."""
    value = copy.deepcopy(value)
    for _ in range(random_.choice((1, 1, 1, 2, 3, 4))):
        slots = list(_slots(value))
        if slots:
            random_.choice(_CHANGES)(random_, random_.choice(slots), others)
    return value


def mutated_text(random_: random.Random, text: str) -> str:
    """Return a text with one to four changes of its characters and lines."""
    for _ in range(random_.randint(1, 4)):
        begin = random_.randint(0, len(text))
        end = min(len(text), begin + random_.choice((0, 1, 1, 5, 40)))
        piece = random_.choice((*_PIECES, *_MORE_PIECES, text[begin:end] * 2, "", "\n"))
        text = text[:begin] + piece + text[end:]
    return text


def _slots(value: Any) -> Iterator[Slot]:
    """Yield each place in a value, the outermost ones first."""
    if not isinstance(value, dict | list):
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        part = value[key]
        yield value, key
        yield from _slots(part)


def _replace(random_: random.Random, slot: Slot, _: Sequence[Any]) -> None:
    slot[0][slot[1]] = copy.deepcopy(random_.choice(ODD))


def _remove(random_: random.Random, slot: Slot, _: Sequence[Any]) -> None:
    del slot[0][slot[1]]


def _rename(random_: random.Random, slot: Slot, _: Sequence[Any]) -> None:
    owner, key = slot
    if isinstance(owner, dict):
        name = random_.choice((f"{key}x", str(key)[:-1], str(key).upper(), "", "a.b", "\ud800"))
        owner[name] = owner.pop(key)


def _transplant(random_: random.Random, slot: Slot, others: Sequence[Any]) -> None:
    """Take the value of the same field, or of any field, from another manifest."""
    found = list(_slots(random_.choice(others)))
    same = [place for place in found if place[1] == slot[1]]
    owner, key = random_.choice(same if same and random_.random() < 0.8 else found)
    slot[0][slot[1]] = copy.deepcopy(owner[key])


def _add(random_: random.Random, slot: Slot, others: Sequence[Any]) -> None:
    """Add a field of another manifest, or an item once more."""
    owner, key = slot
    if isinstance(owner, list):
        owner.insert(random_.randint(0, len(owner)), copy.deepcopy(owner[key]))
        return
    found = [place for place in _slots(random_.choice(others)) if isinstance(place[0], dict)]
    other, name = random_.choice(found)
    owner[name] = copy.deepcopy(other[name])


def _tweak(random_: random.Random, slot: Slot, _: Sequence[Any]) -> None:
    owner, key = slot
    value = owner[key]
    if isinstance(value, str):
        owner[key] = mutated_text(random_, value)
    elif isinstance(value, bool) or value is None:
        owner[key] = random_.choice((str(value), 1, [value]))
    elif isinstance(value, int | float):
        owner[key] = random_.choice((-value, value + 1, value * 1000, value / 3, str(value)))
    else:
        owner[key] = [value] if isinstance(value, dict) else {"0": value}


_CHANGES: Sequence[Callable[[random.Random, Slot, Sequence[Any]], None]] = (
    *(_replace, _remove, _rename, _transplant, _transplant, _add, _tweak),
)
