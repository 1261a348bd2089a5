"""A run on an MLflow tracking server."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tuneyard.api.plan import Plan, PlannedStage, StageRecord
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard.api.tracking import MlflowTracking
from tuneyard.errors import StageError
from tuneyard_trainer.machine import environment
from tuneyard_trainer.running.failures import last_line
from tuneyard_trainer.tracking import facts
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step
from tuneyard_trainer.tracking.tracker import Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

REQUEST_SECONDS = 10
"""The timeout of one request."""
MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""MLflow's limits on one request."""
MOST_REFUSAL = 300
"""The most characters of a refusal that are shown."""
ID_TAG = "tuneyard.id"
_TOKEN = "MLFLOW_TRACKING_TOKEN"  # noqa: S105  a name
_INSTEAD_OF_TOKEN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Variables that MLflow's client prefers to the token."""
_SENDABLE = re.compile(r"[!-~]+")
"""Tokens that a header can have."""


class MlflowRun:
    """The run of a job. Every method may raise any error of MLflow's client; after an error the run
    has to be opened again."""

    name = "mlflow"
    title = "MLflow"

    def __init__(self, settings: MlflowTracking, plan: Plan, attempt: int) -> None:
        self._settings, self._plan, self._attempt = settings, plan, attempt
        self._experiment = settings.experiment or plan.job.name
        self.place = f"{settings.uri.rstrip('/')} experiment {self._experiment}"
        self._client: MlflowClient | None = None
        self._run = self._secret = ""
        self._newest: dict[str, int] = {}
        """By metric: the last step that the server has."""

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Give MLflow's client its settings, which it reads from the environment alone, and the
        token. Raises StageError SecretMissing."""
        values = {
            _TOKEN: "",  # that of this environment is for another server
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread retries, and says so
        }
        if self._settings.token_secret:
            self._secret = self._token()
            values |= {_TOKEN: self._secret, **dict.fromkeys(_INSTEAD_OF_TOKEN, "")}
        with environment(values):
            yield

    def _token(self) -> str:
        secret = self._settings.token_secret
        assert secret is not None
        token = (os.environ.get(secret.variable) or os.environ.get(_TOKEN) or "").strip()
        if not token:
            raise StageError(
                "SecretMissing",
                f"tracking.mlflow names the token {secret.name}/{secret.key}, and neither "
                f"{secret.variable} nor {_TOKEN} is set.",
                advice="Set one of them, or remove spec.tracking.mlflow.tokenSecret.",
            )
        if not _SENDABLE.fullmatch(token):
            raise StageError(
                "SecretMissing",
                f"tracking.mlflow names the token {secret.name}/{secret.key}, and its value has "
                "line breaks, spaces or characters that are not ASCII, which no header can have.",
                advice=f"Put the token alone into key {secret.key} of Secret {secret.name}.",
            )
        return token

    def open(self, state: TrackerState) -> str:
        """Find or create the run with the state's id, as running. Return its page's URL."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(self._settings.uri)
        experiment = client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else None
        if number is None:
            number = client.create_experiment(self._experiment)
        found = client.search_runs([number], f"tags.`{ID_TAG}` = '{state.id}'", max_results=1)
        run = found[0] if found else self._create(number, state.id)
        self._run = run.info.run_id
        if run.info.status != "RUNNING":
            client.update_run(self._run, status="RUNNING")
        known = client.get_run(self._run).data
        self._newest = {metric.key: metric.step for metric in known.to_proto().metrics}
        self._add_facts(known.params)
        return f"{self._settings.uri.rstrip('/')}/#/experiments/{number}/runs/{self._run}"

    def _create(self, experiment: str, id: str) -> Run:  # noqa: A002
        name = self._settings.run_name or self._plan.job.name
        return self._opened.create_run(
            experiment, run_name=name, tags={**self._settings.tags, ID_TAG: id}
        )

    def _add_facts(self, known: Mapping[str, str]) -> None:
        """Add the parameters that the run does not have: MLflow changes none. Set the tags."""
        from mlflow.entities import Param, RunTag

        missing = [
            Param(name, value)
            for name, value in facts.parameters(self._plan).items()
            if name not in known
        ]
        for some in _sliced(missing, MOST_PARAMETERS):
            self._opened.log_batch(self._run, params=some, synchronous=True)
        tags = [RunTag(*item) for item in facts.tags(self._plan, self._attempt).items()]
        self._opened.log_batch(self._run, tags=tags, synchronous=True)

    def add_steps(self, stage: str, steps: Sequence[Step]) -> None:
        """Add the metrics of steps, as `STAGE/METRIC`, except those that the server has."""
        self._add(
            (f"{stage}/{name}", value, each.step)
            for each in steps
            for name, value in each.metrics.items()
        )

    def add_record(self, stage: PlannedStage, record: StageRecord) -> None:
        """Add the metrics of a finished stage, as `STAGE/final/METRIC`, its digests and its
        versions. Those of an evaluation are added as such."""
        from mlflow.entities import RunTag

        if stage.kind not in EVALUATION_KINDS:
            self._add(
                (f"{stage.name}/final/{name}", value, 0) for name, value in record.metrics.items()
            )
        tags = [RunTag(*item) for item in facts.stage_tags(stage, record).items()]
        self._opened.log_batch(self._run, tags=tags, synchronous=True)

    def add_evaluation(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an evaluation, as `STAGE/METRIC`."""
        self._add((f"{stage}/{name}", value, 0) for name, value in metrics.items())

    def add_file(self, path: Path, folder: str | None) -> None:
        """Add an artifact to a folder. None: to none."""
        self._opened.log_artifact(self._run, str(path), folder)

    def flush(self) -> None:
        """Every request is answered already."""

    def end(self, status: Status) -> None:
        """End the run."""
        self._opened.set_terminated(self._run, status)

    def explain(self, error: Exception) -> str:
        """Return what is wrong."""
        import requests
        import urllib3

        causes = _causes(error)
        timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError)
        if any(isinstance(cause, timeouts) for cause in causes):
            return f"does not respond within {REQUEST_SECONDS} s"
        if any(isinstance(cause, requests.ConnectionError) for cause in causes):
            return "cannot be reached"
        said = last_line(error)
        if self._secret:  # a server may repeat what it refuses
            said = said.replace(self._secret, "(token)")
        return f"refuses a request: {said[:MOST_REFUSAL]}"

    def close(self) -> None:
        """Nothing is open between two requests."""

    def _add(self, metrics: Iterable[tuple[str, float, int]]) -> None:
        """Add metrics (name, value, step) in this order, except those of steps that the server has.
        Their finite values alone: MLflow's chart ends at another."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new: list[Metric] = []
        for given, value, step in metrics:
            name = facts.allowed_name(given)  # a task of lm-evaluation-harness has pass@1
            if step > self._newest.get(name, -1) and math.isfinite(value):
                new.append(Metric(name, value, now, step))
                self._newest[name] = step
        for some in _sliced(new, MOST_METRICS):
            self._opened.log_batch(self._run, metrics=some, synchronous=True)

    @property
    def _opened(self) -> MlflowClient:
        assert self._client is not None
        return self._client


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error with those that led to it."""
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


T = TypeVar("T")


def _sliced(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Yield the items, at most so many at once."""
    for start in range(0, len(items), most):
        yield items[start : start + most]
