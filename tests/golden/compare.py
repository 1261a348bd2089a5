"""Compare texts with the golden files of this folder.

`UPDATE_GOLDEN=1 pytest ...` rewrites the files; review the difference as an API change.
"""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parent


def assert_golden(name: str, text: str) -> None:
    """Compare `text` with the golden file `name`; raise AssertionError if they differ."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing: run this test with UPDATE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8")
