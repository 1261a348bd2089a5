"""Parse YAML text to plain values with their line numbers.

Scalars are read as kubectl reads them (sigs.k8s.io/yaml), so a manifest has the same meaning on one
machine and on a cluster: `yes`, `no`, `on` and `off` are booleans as in YAML 1.1, `2e-4` is a
number, `017` is octal, dates and base-60 numbers are strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from tuneyard.errors import Fault

Path = tuple[str | int, ...]
"""The path of a value in a document: mapping keys and list indices."""

MAX_BYTES = 1 << 20
"""Longest manifest that is read; etcd refuses objects of more than 1.5 MiB."""
MAX_NODES = 50_000
"""Most values of a document, with aliases expanded. Large manifests have a few thousand; nine
levels of nine aliases each, a common attack, have 400 million."""


@dataclass(frozen=True)
class Document:
    """The value of one document, and the lines of its parts."""

    value: Any
    line: int | None = None
    """Its first line, from 1. None: it was not read from text."""
    lines: Mapping[Path, int] = field(default_factory=dict)
    """The line of each key and list item, from 1."""
    texts: Mapping[Path, str] = field(default_factory=dict)
    """The source text of each unquoted scalar."""

    def line_of(self, path: Path) -> int | None:
        """Return the line of a field, or of its nearest parent in the text."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return self.line


def dotted(path: Path) -> str:
    """Return a path as text: `spec.data.train[0].uri`, `metadata.labels["a.b/c"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part):
            text += f".{part}"
        else:
            text += f'["{part}"]'
    return text.removeprefix(".")


def load(text: str, source: str | None = None) -> tuple[list[Document], list[Fault]]:
    """Return the documents that are not empty and the faults of the YAML, both in document order.

    Documents before a syntax error are returned with it.
    """
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        message = (
            f"the manifest has {size} bytes, and the limit is {MAX_BYTES}: put data in files and "
            "name them by uri"
        )
        return [], [Fault("", message, None, source)]
    documents: list[Document] = []
    faults: list[Fault] = []
    try:
        for node in _nodes(text):
            reading = _Reading(source)
            value = reading.value(node, ())
            faults += reading.faults
            if value is not None:
                line = node.start_mark.line + 1
                documents.append(Document(value, line, reading.lines, reading.texts))
    except yaml.YAMLError as error:
        faults.append(_syntax_fault(error, text, source))
    except RecursionError:
        faults.append(Fault("", "the YAML is nested too deeply: flatten it", None, source))
    except _Refusal as refusal:
        faults.append(refusal.fault)
    return documents, faults


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's parser with kubectl's rules for unquoted scalars."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON", "yYtToO"),
    ("bool", r"n|N|no|No|NO|false|False|FALSE|off|Off|OFF", "nNfFoO"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?(0[bB][01_]+|0[oO]?[0-7_]+|0[xX][0-9a-fA-F_]+|[1-9][0-9_]*|0)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _nodes(text: str) -> Iterator[yaml.Node]:
    loader = _Loader(text)
    while loader.check_node():
        node = loader.get_node()
        if node is not None:
            yield node


class _Refusal(Exception):  # noqa: N818 - it carries a fault and is not an error itself
    """Raised to stop reading a document."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class _Reading:
    """The conversion of one document from nodes to a value."""

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.lines: dict[Path, int] = {}
        self.texts: dict[Path, str] = {}
        self.faults: list[Fault] = []
        self._count = 0
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            message = f"more than {MAX_NODES} values with aliases expanded: remove aliases"
            raise _Refusal(self._fault((), message, node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is parent for parent in self._open):
            raise _Refusal(self._fault(path, "the alias contains itself: remove it", node))
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = item.start_mark.line + 1
            items.append(self.value(item, (*path, index)))
        return items

    def _mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        written: dict[str, int] = {}
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                value = self._merge(value_node, path) | value
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            line = key_node.start_mark.line + 1
            if key in written:
                message = f"'{key}' is set twice (first on line {written[key]}): remove one"
                self.faults.append(self._fault((*path, key), message, key_node))
                continue
            written[key] = self.lines[(*path, key)] = line
            value[key] = self.value(value_node, (*path, key))
        return value

    def _merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """Return the value of a `<<` key: a mapping, or a list of mappings, the first of which
        takes precedence."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                message = "<< takes a mapping or a list of mappings: change its value to one"
                self.faults.append(self._fault(path, message, part))
                continue
            merged = self.value(part, path) | merged
        return merged

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        """Return a key. None: it is `<<`, or it is not a string."""
        if node.tag == _TAG + "merge":
            return None
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            return self._whole(node, path)
        if isinstance(node, yaml.ScalarNode):
            message = f"the key {node.value or 'null'} is not a string: write '{node.value}'"
        else:
            message = "a key must be a string: quote text with braces or brackets"
        self.faults.append(self._fault(path, message, node))
        return None

    def _whole(self, node: yaml.ScalarNode, path: Path) -> str:
        """Return a text without halves of characters, which escapes can write: no file, terminal or
        API server takes them."""
        text = str(node.value)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if any("\ud800" <= character <= "\udfff" for character in text):
            message = "an escape between \\uD800 and \\uDFFF is not a character: remove it"
            self.faults.append(self._fault(path, message, node))
        return whole

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        if node.style is None:
            self.texts[path] = node.value
        if node.tag == _TAG + "str":
            return self._whole(node, path)
        try:
            return _SCALAR_VALUES[node.tag.removeprefix(_TAG)](node.value)
        except KeyError:
            message = f"the tag {node.tag.replace(_TAG, '!!')} is not supported: remove it"
        except ValueError:
            tag = node.tag.replace(_TAG, "!!")
            message = f"'{node.value}' is not of the type {tag}: correct it, or remove {tag}"
        self.faults.append(self._fault(path, message, node))
        return node.value

    def _fault(self, path: Path, message: str, node: yaml.Node) -> Fault:
        return Fault(dotted(path), message, node.start_mark.line + 1, self.source)


def _integer(text: str) -> int | float:
    digits = text.replace("_", "")
    if re.fullmatch(r"[-+]?0[0-7]+", digits):
        return int(digits, 8)
    return int(digits, 0)


def _real(text: str) -> int | float:
    """Return a number; a whole one is an integer in any notation, as after a round trip by JSON."""
    plain = text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
    value = float(plain)
    return int(value) if value.is_integer() and abs(value) < 1e21 else value


_SCALAR_VALUES: Mapping[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() in ("y", "yes", "true", "on"),
    "int": _integer,
    "float": _real,
}


def _syntax_fault(error: yaml.YAMLError, text: str, source: str | None) -> Fault:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        message = f"YAML does not allow the character {chr(error.character)!r}: remove it"
        return Fault("", message, line, source)
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return Fault("", f"not valid YAML: {error}", None, source)
    problem = getattr(error, "problem", None) or "cannot be read"
    message = f"not valid YAML at column {mark.column + 1}: {problem}"
    line_text = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    if "\t" in line_text[: mark.column + 1]:
        message += ": indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        message += ": quote a value that contains ': '"
    return Fault("", message, mark.line + 1, source)
