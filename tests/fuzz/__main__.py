"""Fuzz at full size: `PYTHONPATH=tests python -m tests.fuzz manifests|posts RUNS SEED`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Iterator

from tests.fuzz import manifests, posts


def failures(kind: str, runs: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield each problem with the input that caused it."""
    if kind == "posts":
        logging.disable()  # aiohttp logs each malformed request
        for problem, request in asyncio.run(posts.problems(runs, seed)):
            yield problem, repr(request)
        return
    for text in manifests.texts(runs, seed):
        if problem := manifests.problem(text):
            yield problem, text


def main(kind: str, runs: str = "10000", seed: str = "1") -> int:
    """Run one kind of input; print one failure of each sort, and return the exit code."""
    print(f"fuzzing {kind}: {runs} runs, seed {seed}", flush=True)
    found: Counter[str] = Counter()
    for problem, text in failures(kind, int(runs), int(seed)):
        if not found[problem[:60]]:
            print(f"{problem[:500]}\n{text[:3000]}\n", flush=True)
        found[problem[:60]] += 1
    print(f"{sum(found.values())} of {runs} runs failed: {dict(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
