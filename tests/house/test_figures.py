"""The figures of a package small enough to count by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.house.figures import ROOT, Spread

FILES = {
    "tuneyard/__init__.py": "",
    "tuneyard/cli.py": "from tuneyard.lower import a\n\n\ndef f():\n    import tuneyard.errors\n",
    "tuneyard/errors.py": "",
    "tuneyard/lower/__init__.py": "",
    "tuneyard/lower/a.py": "import tuneyard.lower.b\n",
    "tuneyard/lower/b.py": "import tuneyard.lower.a\nimport tuneyard.errors\nimport os\n",
}
EXPECTED = """\
| Python files | 6 | 2 |
| lines | 9 | 4 |
| wings | 1 | 0 |
| floors | 3 | 1 |
| circles | 1 | 0 |
| arrows | 5 | 0 |
| arrows between wings | 2 | 0 |
| pairs of wings with arrows | 2 | 0 |
| functions | 1 | 2 |
| lines a function: median, p90, longest | 2, 2, 2 | 2.5, 3, 3 |
"""


def test_a_folder_is_measured_as_counted_by_hand(tmp_path: Path) -> None:
    """In a process of its own: the packages' names are those of the installed ones."""
    for name, text in FILES.items():
        _write(tmp_path / "operator" / name, text)
    _write(tmp_path / "trainer/tuneyard_trainer/__init__.py", "")
    nested = "@staticmethod\ndef outer():\n    def inner():\n        return 1\n"
    _write(tmp_path / "trainer/tuneyard_trainer/worker.py", nested)
    command = [sys.executable, "-m", "tests.house.figures", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert EXPECTED in done.stdout


def test_nine_tenths_are_no_longer_than_p90() -> None:
    lengths = {str(length): length for length in range(1, 11)}
    assert Spread.of(lengths) == Spread(median=5.5, p90=9, longest=10, where="10")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
