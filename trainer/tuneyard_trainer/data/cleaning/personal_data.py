"""Personal data in a text: e-mail addresses, telephone numbers, cards, IBANs and access keys.

The patterns prefer to miss data over false alarms: numbers need their check digits, an issuer's
range or a country code, addresses a top-level domain, and keys the look of random characters.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tuneyard_trainer.logs.redaction import SECRET_FORMATS

IBAN_LENGTHS = {
    "AD": 24,
    "AE": 23,
    "AL": 28,
    "AT": 20,
    "AZ": 28,
    "BA": 20,
    "BE": 16,
    "BG": 22,
    "BH": 22,
    "BR": 29,
    "BY": 28,
    "CH": 21,
    "CR": 22,
    "CY": 28,
    "CZ": 24,
    "DE": 22,
    "DK": 18,
    "DO": 28,
    "EE": 20,
    "EG": 29,
    "ES": 24,
    "FI": 18,
    "FO": 18,
    "FR": 27,
    "GB": 22,
    "GE": 22,
    "GI": 23,
    "GL": 18,
    "GR": 27,
    "GT": 28,
    "HR": 21,
    "HU": 28,
    "IE": 22,
    "IL": 23,
    "IQ": 23,
    "IS": 26,
    "IT": 27,
    "JO": 30,
    "KW": 30,
    "KZ": 20,
    "LB": 28,
    "LC": 32,
    "LI": 21,
    "LT": 20,
    "LU": 20,
    "LV": 21,
    "MC": 27,
    "MD": 24,
    "ME": 22,
    "MK": 19,
    "MR": 27,
    "MT": 31,
    "MU": 30,
    "NL": 18,
    "NO": 15,
    "PK": 24,
    "PL": 28,
    "PS": 29,
    "PT": 25,
    "QA": 29,
    "RO": 24,
    "RS": 22,
    "SA": 24,
    "SC": 31,
    "SE": 24,
    "SI": 19,
    "SK": 24,
    "SM": 27,
    "ST": 25,
    "SV": 28,
    "TL": 23,
    "TN": 24,
    "TR": 26,
    "UA": 29,
    "VA": 22,
    "VG": 24,
    "XK": 20,
}
"""Characters of an IBAN by country (ISO 13616)."""

_EMAIL = re.compile(
    r"(?<![\w.+-])(?P<user>[A-Za-z0-9](?:[\w.+-]{0,62}[\w+-])?)@"
    r"(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"(?P<top>[A-Za-z]{2,24}))(?![\w@]|(?:\.\w+)*\()"
)
"""Code multiplies matrices by an @, often with the result of a method: q@k.to(device)."""
_TOP_LEVEL = frozenset(
    line
    for line in Path(__file__).with_name("top_level_domains.txt").read_text("ascii").splitlines()
    if not line.startswith("#")
) | {"corp", "home", "internal", "intranet", "lan", "local", "private"}
"""The top-level domains of the internet and those of private networks (RFC 6762, appendix G)."""
_CODE = re.compile(r"(?:self|cls)\.")
"""Starts of expressions: x@self.data."""
_REPOSITORIES = frozenset({"git", "hg"})
"""The users of servers of repositories: git@github.com."""
_RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)$", re.I)
"""Domains that are reserved for documentation and tests (RFC 2606)."""
_FILES = re.compile(r"\.(?:gif|jpe?g|png|service|socket|svg|webp)$", re.I)
"""Ends of the names of files that have an @: logo@2x.png, getty@tty1.service."""
_PHONE = re.compile(
    r"(?<![\w+.-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(\d{1,5}\))?(?:[ .-]?\d{1,5}+){2,6}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}"
    r"|\d{3}([.-])\d{3}\1\d{4}"
    r")(?![\w-]|\.\d)"
)
_CARD = re.compile(r"(?<![\w.-])(?:\d[ -]?){12,18}\d(?![\w-]|\.\d)")
_ISSUED = re.compile(
    r"4\d{15}(?:\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}"
)
"""The first digits and the lengths of the large issuers' cards. Visa's old cards of 13 digits are
left out: the bar codes of Germany and Japan have 13 digits and begin with 4, too."""
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
_KEY = re.compile(rf"(?<![\w-])(?:{'|'.join(SECRET_FORMATS)})(?![A-Za-z0-9])", re.DOTALL)
_CERTAIN = re.compile(r"(?:AKIA|ASIA)\w*\d|xox[abprs]-\d|eyJ|-----")
"""Starts of keys whose form decides: AWS draws its capital letters and digits from 32 characters,
and Slack's keys begin with a number."""
RANDOM_CHANGES = 0.25
"""Fewest changes between small letters, capitals and digits in a key, for each letter and digit.
Random hexadecimal digits have 0.47 and random letters 0.5; names and CSS classes have a few, at the
starts of their words."""
_PARTS = re.compile("[A-Za-z0-9]+")
_CLASSES = str.maketrans(string.ascii_letters + string.digits, "a" * 26 + "A" * 26 + "0" * 10)
"""Each small letter becomes a, each capital A, and each digit 0."""
_KEY_STARTS = (
    *("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox"),
    *("AIza", "ya29.", "AKIA", "ASIA", "eyJ", "-----BEGIN "),
)
_DIGIT = re.compile(r"\d")


class Kind(NamedTuple):
    """One kind of personal data."""

    name: str
    may_hold: Callable[[str], bool]
    """Whether a text may hold such data: a fast check that is true too often."""
    spans: Callable[[str], Iterator[tuple[int, int]]]
    """Yields the start and the end of each place."""

    @property
    def placeholder(self) -> str:
        """The text in place of the data."""
        return f"[{self.name.upper()}]"

    def first(self, text: str) -> tuple[int, int] | None:
        """Return the start and the end of the first place. None: the text has none."""
        return next(self.spans(text), None) if self.may_hold(text) else None

    def replaced(self, text: str) -> str:
        """Return the text with the placeholder in each place."""
        if not self.may_hold(text):
            return text
        parts, end = [], 0
        for start, stop in self.spans(text):
            parts += [text[end:start], self.placeholder]
            end = stop
        return "".join([*parts, text[end:]])


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text):
        domain = match["domain"]
        if match["top"].lower() not in _TOP_LEVEL or match["user"].lower() in _REPOSITORIES:
            continue
        if not (_RESERVED.search(domain) or _FILES.search(domain) or _CODE.match(domain)):
            yield match.span()


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in _PHONE.finditer(text):
        if 8 <= sum(map(str.isdigit, match[0])) <= 15:  # ITU-T E.164 allows 15
            yield match.span()


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        if _ISSUED.fullmatch(digits) and is_luhn(digits):
            yield match.span()


def is_luhn(digits: str) -> bool:
    """Return whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    doubled = (divmod(2 * int(digit), 10) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(map(sum, doubled))) % 10 == 0


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        length = IBAN_LENGTHS.get(match[0][:2])
        places = [index for index, character in enumerate(match[0]) if character != " "]
        if length is None or len(places) < length:
            continue
        end = places[length - 1] + 1
        if text[match.start() + end :][:1].isalnum():  # it is the start of something longer
            continue
        if is_iban(match[0][:end].replace(" ", "")):
            yield match.start(), match.start() + end


def is_iban(characters: str) -> bool:
    """Return whether the check digits of an IBAN are right (ISO 7064, modulo 97)."""
    moved = characters[4:] + characters[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _keys(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _KEY.finditer(text) if _is_key(match[0]))


def _is_key(text: str) -> bool:
    """Return whether a text with the start of a key is one, and no name or CSS class."""
    if _CERTAIN.match(text):
        return True
    # Those of Hugging Face have 34 letters, often without a digit.
    complete = len(text) > 32 if text.startswith("hf_") else _has_digit(text)
    return complete and _looks_random(text)


def _looks_random(text: str) -> bool:
    """Return whether the letters and digits of a text have RANDOM_CHANGES within its parts."""
    parts = [part.translate(_CLASSES) for part in _PARTS.findall(text)]
    changes = sum(before != after for part in parts for before, after in pairwise(part))
    return changes >= RANDOM_CHANGES * sum(map(len, parts))


def _may_have_key(text: str) -> bool:
    return any(start in text for start in _KEY_STARTS)


def _may_have_address(text: str) -> bool:
    return "@" in text


def _has_digit(text: str) -> bool:
    return _DIGIT.search(text) is not None


KINDS = (
    Kind("key", _may_have_key, _keys),
    Kind("email", _may_have_address, _emails),
    Kind("iban", _has_digit, _ibans),
    Kind("card", _has_digit, _cards),
    Kind("phone", _has_digit, _phones),
)
"""The kinds in the order of the search: a card number may look like a telephone number."""


def without_personal_data(text: str) -> str:
    """Return the text with a placeholder for each piece of personal data."""
    for kind in KINDS:
        text = kind.replaced(text)
    return text
