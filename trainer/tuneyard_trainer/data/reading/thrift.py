"""Thrift's compact protocol, as far as the footers and page headers of Parquet files need it.

pyarrow's own access to the metadata of a column ends the process if the metadata contradicts
itself: a C++ exception has no handler there.
"""

from __future__ import annotations

from typing import Any

Struct = dict[int, Any]
"""Values by the number of their field."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Compact:
    """Reads values from bytes. Raises IndexError at their end, ValueError for another format."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def struct(self) -> Struct:
        """Return the next struct."""
        found: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # a boolean that is no field is a byte
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind in (_LIST, _SET):
            return self._list()
        if kind == _STRUCT:
            return self.struct()
        raise ValueError(f"a field of the unknown type {kind}")

    def _list(self) -> list[Any]:
        head = self._byte()
        size = self._unsigned() if head >> 4 == 15 else head >> 4
        return [self._value(head & 15) for _ in range(size)]

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _bytes(self, size: int) -> bytes:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise IndexError(size)
        return self._data[start : self._position]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
