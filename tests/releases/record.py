"""Record what a release leaves behind, for tests that upgrade from it or downgrade to it.

    python -m tests.releases.record

Writes `tests/releases/VERSION/` for the version of this checkout: its CRDs; a job as the API server
holds it while it runs, suspended and succeeded; the job's plan, its Kubernetes objects and a
progress post; and the claim and the stage records of a short run of the quickstart, without its
weights. A folder that exists is replaced, which only the release's own checkout may do.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tests.status.simulation import INTERRUPTED, PLAN, SUCCESS, Simulation, new_job, post
from tuneyard import __version__
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.placement import placed
from tuneyard.rendering.rayjob import render
from tuneyard_trainer.running import torchrun

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


def main() -> None:
    """Write the folder of this version."""
    folder = FOLDER / __version__
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "crds", folder / "crds")
    for name, job in jobs().items():
        _write(folder / f"job-{name}.json", _plain(job))
    (folder / "plan.json").write_text(PLAN.to_json(), encoding="utf-8")
    rendered = render(placed(PLAN, profiles={}), new_job(), attempt=1)
    _write(folder / "config-map.json", rendered.config_map)
    _write(folder / "ray-job.json", rendered.ray_job)
    _write(folder / "post.json", _plain(post(1, 40)))
    _record_output(folder / "output")
    sys.stdout.write(f"wrote {folder.relative_to(ROOT)}\n")


def jobs() -> dict[str, BaseModel]:
    """Return a job with its status at three moments, by name."""
    running, suspended, succeeded = Simulation(), Simulation(), Simulation()
    for one in running, suspended, succeeded:
        one.run()
        one.post = post(1, 40)
        one.reconcile()
    suspended.edit(suspend=True)
    suspended.reconcile()
    suspended.end(INTERRUPTED, step=41)
    suspended.settle()
    succeeded.end(SUCCESS, step=100)
    succeeded.settle()
    return {"running": running.job, "suspended": suspended.job, "succeeded": succeeded.job}


def _record_output(folder: Path) -> None:
    """Run two steps of the quickstart and keep its small JSON files."""
    manifest = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    manifest["spec"]["training"] |= {"maxSteps": 2}
    manifest["spec"]["training"].pop("epochs", None)
    manifest["spec"]["evaluate"] = {"maxNewTokens": 4, "samples": 1}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        torchrun.run(
            plan_job(read(yaml.safe_dump(manifest))[0]),
            str(output),
            base_dir=ROOT / "examples",
            cache_dir=Path(scratch) / "cache",
            emit=lambda _: None,
        )
        for name in ("owner.json", "record.json"):
            for path in output.rglob(name):
                target = folder / path.relative_to(output)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def _plain(value: BaseModel) -> Any:
    return value.model_dump(mode="json", by_alias=True, exclude_none=True)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
