"""Quantities as Kubernetes writes them: "500m", "4", "16Gi"."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

QUANTITY_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
Quantity = Annotated[str, Field(max_length=32, pattern=QUANTITY_PATTERN)]
"""A Kubernetes quantity, as a string: "500m", "16Gi"."""

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}


def quantity_value(quantity: str) -> float:
    """Return the number that a quantity stands for: 0.5 for "500m", 1024.0 for "1Ki"."""
    digits = quantity.rstrip("mkKMGTPi")
    return float(digits) * _UNITS[quantity[len(digits) :]]
