"""What earlier releases left behind can be read by this version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneyard import __version__
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.api.progress import Post

ROOT = Path(__file__).resolve().parents[2]
RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if (path / "crds").is_dir())


def test_the_release_that_upgrades_start_from_is_kept() -> None:
    assert "0.2.0" in [release.name for release in RELEASES]


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_plan_of_a_release_is_read_to_the_same_bytes(release: Path) -> None:
    text = (release / "plan.json").read_text(encoding="utf-8")
    assert Plan.model_validate_json(text).to_json() == text


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
@pytest.mark.parametrize("moment", ["running", "suspended", "succeeded"])
def test_a_job_of_a_release_is_read_with_its_status(release: Path, moment: str) -> None:
    value = json.loads((release / f"job-{moment}.json").read_text(encoding="utf-8"))
    job = FineTuneJob.model_validate(value)
    assert job.status
    assert (job.status.phase or "").lower() == moment
    assert job.status.attempts[-1].number == 1
    again = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert again["status"] == value["status"]


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_progress_post_of_a_release_is_read(release: Path) -> None:
    found = Post.model_validate_json((release / "post.json").read_text(encoding="utf-8"))
    assert found.tuneyard
    assert (found.tuneyard.attempt, found.tuneyard.step) == (1, 40)


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_stage_records_of_a_release_are_read(release: Path) -> None:
    records = [
        StageRecord.model_validate_json(path.read_text(encoding="utf-8"))
        for path in (release / "output").rglob("record.json")
    ]
    assert {record.stage for record in records} == {"prepare", "sft", "evaluate", "export"}
    assert {record.versions["tuneyard"] for record in records} == {release.name}


def test_the_recorded_crds_of_this_version_are_the_generated_ones() -> None:
    """A changed CRD needs another version, or the record made anew before the release."""
    recorded = Path(__file__).parent / __version__ / "crds"
    if not recorded.is_dir():
        pytest.skip(f"{__version__} is not recorded yet")
    for path in (ROOT / "crds").iterdir():
        assert (recorded / path.name).read_bytes() == path.read_bytes(), path.name
