"""Fuzz the readers with atheris, guided by the lines that an input reaches.

`python -m tests.fuzz.guided SECONDS` runs one process on `corpus/readers` and on what earlier runs
found. An input that breaks something is kept in `corpus/readers` as `failed-*`, once for each
message. `python -m tests.fuzz.guided merge` reduces the corpus to inputs that each reach new lines.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tuneyard_trainer.data", "tuneyard_trainer.preference"]):
    from tests.fuzz import readers

CORPUS = Path(__file__).parent / "corpus" / "readers"
FOUND = Path(__file__).parents[2] / ".fuzz_cache" / "readers"
PROGRAM = FOUND.parent / "readers.sh"
"""What libFuzzer starts to merge: a program, while this is a module."""
SMALL = 4096
"""The most bytes of an input in the corpus of the repository."""


def _try(data: bytes) -> None:
    """Run an input and keep it if it breaks something that no earlier one broke."""
    found = readers.problem(data)
    if found is None:
        return
    sort = re.sub(r"[\d.]+|'[^']*'", "", found)[:80]
    path = CORPUS / f"failed-{hashlib.sha256(sort.encode()).hexdigest()[:8]}"
    if not path.exists():
        path.write_bytes(data)
        print(f"{path.name}: {found}", file=sys.stderr, flush=True)


def _changed(data: bytes, max_size: int, seed: int) -> bytes:
    return readers.mutated(data, seed, lambda part: atheris.Mutate(part, max_size))[:max_size]


def _fuzz(arguments: list[str]) -> None:
    PROGRAM.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.fuzz.guided "$@"\n')
    PROGRAM.chmod(0o755)
    atheris.Setup([str(PROGRAM), *arguments], _try, custom_mutator=_changed)
    atheris.Fuzz()


def _run(*arguments: str) -> int:
    command = [sys.executable, "-m", "tests.fuzz.guided", *arguments]
    return subprocess.run(command, check=False).returncode


def main(what: str, *rest: str) -> int:
    """Fuzz for a number of seconds, or merge; return the exit code."""
    if what.startswith("-"):
        _fuzz([what, *rest])
    FOUND.mkdir(parents=True, exist_ok=True)
    CORPUS.mkdir(parents=True, exist_ok=True)
    if what == "merge":
        return _merge()
    for number, seed in enumerate(readers.seeds()):
        (FOUND / f"seed-{number}").write_bytes(seed)
    known = set(CORPUS.glob("failed-*"))
    code = _run(
        f"-max_total_time={what}",
        f"-max_len={readers.LONGEST}",
        "-timeout=60",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={CORPUS}/failed-",
        str(FOUND),
        str(CORPUS),
    )
    new = sorted(path.name for path in set(CORPUS.glob("failed-*")) - known)
    print(f"{len(new)} new failures: {' '.join(new)}")
    return code or bool(new)


def _merge() -> int:
    """Keep the small inputs that reach new lines, and those that failed once."""
    with tempfile.TemporaryDirectory() as folder:
        code = _run(
            "-merge=1", "-use_counters=0", f"-max_len={SMALL}", folder, str(CORPUS), str(FOUND)
        )
        if not code:
            for path in CORPUS.iterdir():
                if not path.name.startswith("failed-"):
                    path.unlink()
            for path in Path(folder).iterdir():
                shutil.copy(path, CORPUS / path.name[:12])
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
