"""Regular expressions of a manifest over what a model wrote: those of `re`, with a time for each
search.

Some patterns take exponential time, and a search by `re` cannot be stopped. The package `regex` can
stop it; it would read some texts that `re` takes as they are, such as `{e}` and `[[:x:]]`, as
syntax of its own, so these are escaped.
"""

from __future__ import annotations

import re
from typing import Any

import regex

SECONDS = 1.0
"""The longest search in one text, which then finds nothing."""

_TOKEN = re.compile(
    r"\\N\{|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?!\d+\}|\d*,\d*\})",
    re.DOTALL,
)
"""An escape, a set, or a brace that begins no repetition."""
_BRACKET = re.compile(r"\\.|\[", re.DOTALL)


class Pattern:
    """A regular expression of `re` whose searches end."""

    def __init__(self, text: str) -> None:
        """Raises re.error for a text that is no regular expression."""
        flags = re.compile(text).flags & (re.ASCII | re.LOCALE | re.VERBOSE)
        self._found = regex.compile(text if flags & re.VERBOSE else _TOKEN.sub(_plain, text))

    def is_in(self, text: str) -> bool:
        """Return whether the pattern is found in a text."""
        try:
            return self._found.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            return False

    def findall(self, text: str) -> list[Any]:
        """Return all matches in a text as `re.findall` does."""
        try:  # `findall` of `regex` returns a tuple for some patterns with one group
            matches = [*self._found.finditer(text, timeout=SECONDS)]
        except TimeoutError:
            return []
        if self._found.groups > 1:
            return [match.groups("") for match in matches]
        return [match[self._found.groups] or "" for match in matches]


def _plain(token: re.Match[str]) -> str:
    """Return a token of a pattern without the syntax that only `regex` knows."""
    text = token[0]
    if text == "{":
        return r"\{"
    return "[" + _BRACKET.sub(_escaped, text[1:]) if text.startswith("[") else text


def _escaped(found: re.Match[str]) -> str:
    return r"\[" if found[0] == "[" else found[0]
