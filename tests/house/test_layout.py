"""The source roots `operator/` and `trainer/` hold packages and are no packages themselves."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("root", ["operator", "trainer"])
def test_a_source_root_is_not_a_package(root: str) -> None:
    """A top-level `operator` package would shadow the standard library's."""
    assert not (ROOT / root / "__init__.py").exists()
    assert [path.name for path in (ROOT / root).glob("*.py")] == []


def test_no_package_is_named_operator() -> None:
    packages = [*ROOT.glob("operator/tuneyard/**/operator"), *ROOT.glob("trainer/**/operator")]
    assert packages == []
    assert not (ROOT / "tests" / "operator").exists()


def test_python_imports_the_standard_librarys_operator_from_the_checkout() -> None:
    code = "import operator; operator.itemgetter; print(operator.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


def test_the_wheel_holds_both_packages_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "operator/tuneyard",
        "trainer/tuneyard_trainer",
    ]


@pytest.mark.parametrize("name", ["tuneyard", "tuneyard_trainer"])
def test_every_package_has_a_docstring(name: str) -> None:
    for init in ROOT.glob(f"*/{name}/**/__init__.py"):
        assert init.read_text().lstrip().startswith('"""'), f"{init} has no docstring"
