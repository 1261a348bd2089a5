"""Remove a deleted job's output: `python -m tuneyard_trainer.erase --plan P --job-uid UID`.

An output that another job has taken over is not changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tuneyard.api.plan import Plan, SourceInput
from tuneyard.errors import StageError
from tuneyard_trainer.pod.driver import FOLDER, located
from tuneyard_trainer.pod.log import Log
from tuneyard_trainer.running.failures import last_line
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.records import Store


def main(arguments: Sequence[str]) -> int:
    """Return 0 if no output of this job is left, 1 if removing it failed and can be retried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--job-uid", required=True)
    options = parser.parse_args(arguments)
    log = Log(sys.stdout)
    try:
        plan = Plan.model_validate_json(options.plan.read_text())
        with sources.as_stage_errors(SourceInput(uri=plan.output.uri, path="spec.output.uri")):
            store = Store(located(plan.output.uri), FOLDER / "store", options.job_uid)
            erased = store.erase(plan.job)
    except StageError as error:
        log("not-erased", reason=error.reason, message=str(error))
        return 1
    except Exception as error:
        log("not-erased", reason="EraseError", message=last_line(error))
        return 1
    log("erased" if erased else "nothing-of-this-job", uri=plan.output.uri)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
