"""Kubernetes quantities."""

from __future__ import annotations

from tuneyard.api.quantity import quantity_value


def test_a_quantity_has_the_value_of_its_digits_and_unit() -> None:
    found = [quantity_value(text) for text in ("500m", "4", "1.5", "2k", "1Ki", "3Gi")]
    assert found == [0.5, 4.0, 1.5, 2000.0, 1024.0, 3 * 2.0**30]
