"""What the docs name exists: files that they link to, and paths in the guides to the code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("CONTRIBUTING.md", "ARCHITECTURE.md")
BASES = (ROOT, ROOT / "operator" / "tuneyard", ROOT / "trainer" / "tuneyard_trainer")
"""A guide writes a path from the repository's root, or from the root of a package."""
SOURCES = ("operator", "trainer", "tests")
CODE = (".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".jinja")
IGNORED = (".venv", ".tools", ".tuneyard-cache")
"""Folders that no checkout has."""

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"`([\w.<>-]+(?:/[\w.<>-]+)*/?)`")
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
_ANCHOR = re.compile(r"\]\(([^)#:\s]*)#([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _documents() -> list[Path]:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).exists()]


def _prose(path: Path) -> str:
    """The text outside of fenced blocks."""
    return _FENCED.sub("", path.read_text("utf-8"))


def _paths(text: str) -> Iterator[str]:
    """Each path into the repository, not those of a job's output such as `stages/sft/`."""
    for name in _PATH.findall(text):
        first, separator, _ = name.partition("/")
        is_code = name.endswith(CODE) and (separator or name.endswith(".py"))
        is_known = separator and any((base / first).is_dir() for base in BASES)
        if (is_code or is_known) and first not in IGNORED:
            yield name


def _exists(name: str) -> bool:
    """Whether a path exists. `<name>` stands for any name; a bare name may be in any folder."""
    pattern = re.sub(r"<\w+>", "*", name)
    if "/" in name:
        return any(True for base in BASES for _ in base.glob(pattern))
    return any(True for root in SOURCES for _ in (ROOT / root).rglob(pattern))


def test_every_relative_link_leads_to_a_file() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in _documents()
        for target in _LINK.findall(_prose(path))
        if not (path.parent / target).exists()
    ]
    assert broken == []


def _anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = (heading.lower().strip() for heading in _HEADING.findall(_prose(path)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_every_link_into_a_document_leads_to_a_heading() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}#{anchor}"
        for path in _documents()
        for target, anchor in _ANCHOR.findall(_prose(path))
        if anchor not in _anchors((path.parent / target) if target else path)
    ]
    assert broken == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_in_a_guide_exists(guide: str) -> None:
    names = set(_paths(_prose(ROOT / guide)))
    assert names, "the guide names no path that this test recognizes"
    assert sorted(name for name in names if not _exists(name)) == []
