"""Random manifests for a real API server: it accepts what `tuneyard validate` accepts, and no more.

Stated exceptions:

- `metadata` is Kubernetes' own: only the name is checked by Tuneyard too.
- `apiVersion` and `kind` choose the API server's path, so a request has the right ones.
- The API server accepts a mapping as an item of `targets`, and white space beyond ASCII in a URI.
  The operator reports such a job as malformed.
- It refuses whole numbers beyond 64 bits in fields without an upper bound, and validate accepts
  them. They are rare here: seeds 1 and 20261126 have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.fuzz import manifests
from tuneyard.api.meta import API_VERSION
from tuneyard.errors import ManifestError
from tuneyard.manifests.manifest import read

Object = dict[str, Any]


def requests(runs: int, seed: int) -> Iterator[Object]:
    """Yield random jobs with changes in their spec alone."""
    for number, value in enumerate(manifests.values(runs, seed)):
        kind = "AlignmentJob" if value.get("kind") == "AlignmentJob" else "FineTuneJob"
        job = {
            "apiVersion": API_VERSION,
            "kind": kind,
            "metadata": {"name": f"fuzz-{number}"},
        }
        if "spec" in value:
            job["spec"] = value["spec"]
        if _is_json(job):
            yield job


def _is_json(job: Object) -> bool:
    """Return whether a job can be sent: JSON has neither NaN nor halves of characters."""
    try:
        json.dumps(job, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def is_stated(mine: str | None) -> bool:
    """Return whether validate refuses a job for a reason that is one of the stated exceptions."""
    is_target = mine is not None and ".targets[" in mine and "is not a string" in mine
    return is_target or (mine is not None and "contains white space" in mine)


def refusal(job: Object) -> str | None:
    """Return why `tuneyard validate` refuses a job; None: it accepts it."""
    try:
        read(manifests.as_yaml(job))
    except ManifestError as error:
        return str(error)
    return None
