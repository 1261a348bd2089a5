"""Hooks, workflows and the release script agree with the files that they repeat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import release_notes

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGELOG = """\
# Changelog

## Unreleased

## 0.2.0 (2027-01-15)

### Added

- One.

## 0.1.0

- Zero.
"""


def test_the_hooks_are_the_commands_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", _read("Makefile"), re.MULTILINE)
    assert recipe
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = _yaml(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix("env ") for hook in local["hooks"]]
    assert hooks == lint


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(path: Path) -> None:
    assert _yaml(path)["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_the_makefile_has(path: Path) -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)$", _read("Makefile"), re.MULTILINE))
    called = set(re.findall(r"run: make (\S+)", path.read_text("utf-8")))
    assert called <= targets


def test_ci_tests_the_pythons_that_the_package_names() -> None:
    classifiers = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', _read("pyproject.toml")
    )
    assert _yaml(WORKFLOWS[0])["jobs"]["fast"]["strategy"]["matrix"]["python"] == classifiers


def test_ci_fetches_the_chart_of_kuberay_that_the_script_names() -> None:
    steps = _yaml(WORKFLOWS[0])["jobs"]["kind"]["steps"]
    (reference,) = [step["with"]["ref"] for step in steps if "ref" in step.get("with", {})]
    assert f"KUBERAY_VERSION={reference.removeprefix('v')}\n" in _read("scripts/kind.sh")


def test_every_file_that_names_the_version_names_the_same() -> None:
    named = release_notes.versions(ROOT)
    assert len(named) == 4
    assert len({version for _, version in named}) == 1


@pytest.mark.parametrize(
    ("version", "notes"),
    [("0.2.0", "### Added\n\n- One."), ("0.1.0", "- Zero."), ("Unreleased", ""), ("0.2", "")],
)
def test_the_notes_are_the_section_of_the_version(version: str, notes: str) -> None:
    assert release_notes.section(CHANGELOG, version) == notes


def _read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def _yaml(path: Path | str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))
