"""Print the section of CHANGELOG.md for a release.

    python scripts/release_notes.py 0.2.0

Fails if the version is not the one in every file that names it, or if the section is missing or
empty. Needs the standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED_IN = {
    "pyproject.toml": r'^version = "(.+)"$',
    "operator/tuneyard/__init__.py": r'^__version__ = "(.+)"$',
    "charts/tuneyard/Chart.yaml": r"^(?:version|appVersion): (.+)$",
}
"""Regular expressions that find the version, by file; the chart names it twice."""


def versions(root: Path) -> list[tuple[str, str]]:
    """Return the file and the version for each place that names the version."""
    return [
        (name, version)
        for name, pattern in NAMED_IN.items()
        for version in re.findall(pattern, (root / name).read_text("utf-8"), re.MULTILINE)
    ]


def section(changelog: str, version: str) -> str:
    """Return the text below the heading `## VERSION`, with or without a date, up to the next one.

    Returns "" if there is no such heading or nothing below it.
    """
    heading = rf"^## {re.escape(version)}(?: [^\n]*)?\n"
    found = re.search(rf"{heading}(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def main(version: str) -> None:
    """Print the section. Raises SystemExit if the version or the section is wrong."""
    others = {f"{name} names {found}" for name, found in versions(ROOT) if found != version}
    if others:
        raise SystemExit(f"the release is {version}, but {', '.join(sorted(others))}")
    notes = section((ROOT / "CHANGELOG.md").read_text("utf-8"), version)
    if not notes:
        raise SystemExit(f"CHANGELOG.md has nothing under the heading '## {version}'")
    sys.stdout.write(f"{notes}\n")


if __name__ == "__main__":
    main(sys.argv[1])
