"""Remove secrets from lines of a log: values of environment variables, and well-known formats."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
SHORTEST = 6
"""The shortest value of a variable that is replaced: shorter ones, such as `true`, are ordinary
words of a log."""

_SECRET_WORDS = {
    *("TOKEN", "TOKENS", "SECRET", "SECRETS", "KEY", "KEYS", "APIKEY", "SAS", "DSN", "COOKIE"),
    *("PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PWD", "CREDENTIAL", "CREDENTIALS", "SIGNATURE"),
    *("AUTHORIZATION", "CONNECTION"),
}
"""A variable is secret if a word of its name is one of these: AWS_SECRET_ACCESS_KEY is."""
_OWN_PREFIX = "TUNEYARD_SECRET_"
"""Starts the names of the variables that `SecretKeyRef` passes."""
_FOLDERS = ("PWD", "OLDPWD")

_URI_PASSWORD = re.compile(r"://[^\s/?#@:]*:([^\s/?#@]+)@")
SECRET_FORMATS = (
    r"hf_[A-Za-z0-9]{20,}",
    r"sk-[\w-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{30,}",
    r"github_pat_\w{30,}",
    r"glpat-[\w-]{20,}",
    r"xox[abprs]-[\w-]{10,}",
    r"AIza[\w-]{35}",
    r"ya29\.[\w-]{20,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
)
"""Formats of Hugging Face, OpenAI, GitHub, GitLab, Slack, Google, AWS, JSON web tokens and keys."""
_TOKENS = "|".join(SECRET_FORMATS)
_NAMES = (
    r"password|passwd|passphrase|secret|api[_-]?key|account[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|secret[_-]?key|(?:access|auth|refresh|session|security|id|hf|bearer)[_-]?token"
)
_PATTERNS = (
    (re.compile(_TOKENS), REDACTED),
    (re.compile(r"(?<=://)[^\s/?#@]+(?=@)"), REDACTED),
    (
        re.compile(
            r"([?&;](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId"
            rf"|signature|sig|token|key|{_NAMES})=)[^&\s\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
    (
        re.compile(
            r"(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|token)\s+)?)[^\s\"',]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (  # quoted, perhaps inside a JSON string, where \ precedes the quotes
        re.compile(
            rf"((?:{_NAMES})\\?[\"']?\s*[:=]\s*\\?([\"']))(?:(?!\\?\2).){{4,}}", re.IGNORECASE
        ),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(rf"((?:{_NAMES})[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]{{4,}}", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
)
"""Formats of secrets, with what replaces them."""


class Redactor:
    """Replaces secrets in whole lines: a secret that is split between two lines is not found."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: the variables of the process that writes the log."""
        found = {form for value in _secrets(environment) for form in _forms(value)}
        self._values = sorted(found, key=len, reverse=True)
        pattern = "|".join(map(re.escape, self._values))
        self._pattern = re.compile(pattern) if pattern else None

    def __call__(self, line: str) -> str:
        """Return a line without secrets."""
        if self._pattern:
            line = self._pattern.sub(REDACTED, line)
        for pattern, replacement in _PATTERNS:
            line = pattern.sub(replacement, line)
        return line

    def unfinished(self, line: str) -> str:
        """Return the last line of a process that ended while it wrote, without secrets and without
        the beginning of one."""
        line = self(line)
        cut = max((_overlap(line, value) for value in self._values), default=0)
        return line[: len(line) - cut] + REDACTED if cut else line


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        yield from _URI_PASSWORD.findall(value)
        if _is_secret(name):
            yield value
            yield from value.splitlines()
            yield from _leaves(value)


def _is_secret(name: str) -> bool:
    if name.startswith(_OWN_PREFIX):
        return True
    words = re.split(r"[^A-Z0-9]+", name.upper())
    # A variable such as AWS_WEB_IDENTITY_TOKEN_FILE holds a path.
    return name not in _FOLDERS and words[-1] != "FILE" and bool(_SECRET_WORDS.intersection(words))


def _leaves(value: str) -> Iterator[str]:
    """Yield the secrets of a JSON object, such as a service account's key."""
    try:
        content: Any = json.loads(value)
    except ValueError:
        return
    if isinstance(content, dict):
        for name, leaf in content.items():
            if isinstance(leaf, dict):
                yield from _leaves(json.dumps(leaf))
            elif isinstance(leaf, str) and _is_secret(name):
                yield leaf
                yield from leaf.splitlines()


def _forms(value: str) -> Iterator[str]:
    """Yield a secret as it appears in a line of a log: plain, in a URI, in JSON and in base64."""
    value = value.strip()
    if len(value) < SHORTEST:
        return
    if "\n" not in value:
        yield value
    yield from (quote(value), quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1])
    for encoded in (base64.b64encode(value.encode()), base64.urlsafe_b64encode(value.encode())):
        yield encoded.decode()
        yield encoded.decode().rstrip("=")


def _overlap(line: str, value: str) -> int:
    """Return how many of the line's last characters begin the value, if at least SHORTEST do."""
    lengths = range(min(len(value) - 1, len(line)), SHORTEST - 1, -1)
    return next((length for length in lengths if line.endswith(value[:length])), 0)
