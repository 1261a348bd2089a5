"""The trackers that follow a job: MLflow, TensorBoard."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import Field

from tuneyard.api.meta import Model, Rule
from tuneyard.api.sources import SecretKeyRef

TRACKER_URL_PATTERN = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"
"""Without a user name and a password: the URL is a part of the plan, which is no Secret."""

_TAG_NAME = r"^[-_./ a-zA-Z0-9]{1,250}$"
"""Names that every MLflow server accepts."""
TagValue = Annotated[str, Field(max_length=5000)]


class MlflowTracking(Model):
    """A run on an MLflow tracking server."""

    uri: str = Field(max_length=1024, pattern=TRACKER_URL_PATTERN)
    """URL of the tracking server, e.g. http://mlflow.mlflow:5000. A token goes into tokenSecret."""
    experiment: str | None = Field(default=None, min_length=1, max_length=250)
    """Experiment that the run belongs to; it is created if it does not exist. None: the job's
    name."""
    run_name: str | None = Field(default=None, min_length=1, max_length=250)
    """Name of the run. None: the job's name."""
    token_secret: SecretKeyRef | None = None
    """Bearer token of the server. Only the pod of the driver gets it. None: no token is sent."""
    tags: dict[str, TagValue] = Field(default={}, max_length=64)
    """Tags of the run, in addition to those that Tuneyard sets (`tuneyard.*`)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"!has(self.tags) || self.tags.all(name, name.matches('{_TAG_NAME}'))",
            holds=lambda mlflow: all(re.match(_TAG_NAME, name) for name in mlflow.tags),
            message="have a name that MLflow does not accept: use at most 250 letters, digits, "
            "spaces and -_./",
            path="tags",
            reads=("tags",),
        ),
    )


class TensorboardTracking(Model):
    """Event files for TensorBoard."""

    uri: str | None = Field(default=None, max_length=1024, pattern=r"^(pvc|file)://[^\s]+$")
    """Folder of the event files: pvc://CLAIM/PATH or file://PATH (relative to the manifest). Each
    job needs a folder of its own. None: `tensorboard` in the output."""


class Tracking(Model):
    """The trackers that get the job's metrics, settings and reports. They change neither the job's
    stages nor its result, and a tracker that does not respond stops nothing."""

    mlflow: MlflowTracking | None = None
    """MLflow. None: no run."""
    tensorboard: TensorboardTracking | None = None
    """TensorBoard. None: no event files."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.mlflow) || has(self.tensorboard)",
            holds=lambda tracking: tracking.mlflow is not None or tracking.tensorboard is not None,
            message="names no tracker: set mlflow or tensorboard, or remove tracking",
            reads=("mlflow", "tensorboard"),
        ),
    )
