"""A few hundred random inputs of each kind, and the inputs that failed once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.apiserver.test_admission import Jobs, Refused, cluster_with_crds, jobs
from tests.fuzz import admission, manifests, posts

__all__ = ["cluster_with_crds", "jobs"]

CORPUS = Path(__file__).parent / "corpus"
RUNS = int(os.environ.get("TUNEYARD_FUZZ_RUNS", "300"))
SEED = int(os.environ.get("TUNEYARD_FUZZ_SEED", "1"))


@pytest.mark.parametrize("path", sorted((CORPUS / "manifests").iterdir()), ids=lambda p: p.stem)
def test_a_manifest_that_once_caused_a_traceback_is_refused_with_its_field(path: Path) -> None:
    assert manifests.problem(path.read_text(encoding="utf-8")) is None


def test_random_manifests_are_rendered_or_refused_with_their_fields() -> None:
    print(f"{RUNS} runs of seed {SEED}")
    for number, text in enumerate(manifests.texts(RUNS, SEED)):
        problem = manifests.problem(text)
        assert problem is None, f"run {number} of seed {SEED}: {problem}\n{text}"


@pytest.mark.parametrize("path", sorted((CORPUS / "posts").iterdir()), ids=lambda p: p.stem)
def test_a_request_that_once_broke_the_status_server_is_refused(path: Path) -> None:
    assert asyncio.run(posts.problems_of([path.read_bytes()])) == []


def test_random_posts_are_stored_or_refused_and_the_server_serves_on() -> None:
    """No post is answered 500, changes a status to one that cannot be stored, or stops the
    server."""
    print(f"{RUNS} runs of seed {SEED}")
    assert asyncio.run(posts.problems(RUNS, SEED)) == []


def test_random_posts_reach_every_check() -> None:
    """Most random bytes would be refused by the first check, and prove nothing about the others."""
    statuses = asyncio.run(posts.statuses(300, 1))
    assert {200, 400, 401, 404, 408, 409, 413, 503} <= set(statuses)


@pytest.mark.apiserver
def test_the_api_server_accepts_exactly_the_random_manifests_that_validate_accepts(
    jobs: Jobs,
) -> None:
    print(f"{RUNS} runs of seed {SEED}")
    differences, num_accepted = [], 0
    for job in admission.requests(RUNS, SEED):
        mine, theirs = admission.refusal(job), None
        try:
            jobs.would_create(job)
        except Refused as refused:
            theirs = str(refused)
        num_accepted += not theirs
        if bool(mine) != bool(theirs) and not admission.is_stated(mine):
            differences.append(f"validate: {mine}\nserver: {theirs}\n{manifests.as_yaml(job)}")
    print(f"the API server accepted {num_accepted}")
    assert num_accepted > RUNS / 20, "refusals alone prove little"
    assert not differences, f"{len(differences)} of {RUNS}\n" + "\n".join(differences[:20])
