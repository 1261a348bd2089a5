"""The operator's metrics: their names, and their values in a real Prometheus."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rig.ports import Reservation

from tests.controller.metric_names import NAMES
from tests.controller.running import Operator, wait_until
from tuneyard.api.status import JobStatus, Progress, StageStatus
from tuneyard.controller import metrics
from tuneyard.manifests.manifest import parse

if TYPE_CHECKING:
    from rig.plugin import Cluster

CRDS = Path(__file__).parents[2] / "crds"
NAMESPACE = "metrics"

JOB = {
    "apiVersion": "tuneyard.io/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "scraped", "namespace": NAMESPACE},
    "spec": {
        "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
        "output": {"uri": "pvc://models/scraped"},
    },
}


class Prometheus:
    """Queries of a running Prometheus server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query?"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def values(self, query: str) -> dict[str, float]:
        """Return a query's instant vector by the label `phase`; {}: no response yet."""
        try:
            url = self._url + urllib.parse.urlencode({"query": query})
            with self._opener.open(url, timeout=5) as answer:
                result: list[Any] = json.load(answer)["data"]["result"]
        except (urllib.error.URLError, OSError):
            return {}
        return {each["metric"].get("phase", ""): float(each["value"][1]) for each in result}


@contextmanager
def scraping(program: Path, target_port: int, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus server that scrapes 127.0.0.1:target_port every second."""
    config = folder / "prometheus.yml"
    target = {"targets": [f"127.0.0.1:{target_port}"]}
    job = {"job_name": "tuneyard", "scrape_interval": "1s", "static_configs": [target]}
    config.write_text(json.dumps({"scrape_configs": [job]}))
    with Reservation() as ports, (folder / "prometheus.log").open("ab") as log:
        port = ports.take()
        server = subprocess.Popen(
            [
                str(program),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            yield Prometheus(port)
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def operator(apiserver: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """An operator with one job, whose RayJob never runs: there is no KubeRay."""
    apiserver.define(CRDS)
    apiserver.kubectl("create", "namespace", NAMESPACE, check=False)
    apiserver.kubectl("create", "--filename=-", input=json.dumps(JOB))
    folder = tmp_path_factory.mktemp("operator")
    with Operator(apiserver.kubeconfig, folder, lease="metrics", namespaces=NAMESPACE) as operator:
        wait_until(lambda: operator.metric("tuneyard_jobs", kind="FineTuneJob") == 1.0)
        yield operator
        apiserver.kubectl("delete", "--namespace", NAMESPACE, "finetunejob", "--all")


def test_the_names_of_the_metrics_do_not_change() -> None:
    families = metrics.REGISTRY.collect()
    scraped = {each.name + ("_total" if each.type == "counter" else "") for each in families}
    assert scraped == NAMES


def test_a_jobs_training_series_are_removed_with_the_job() -> None:
    labels = ("default", "FineTuneJob", "went")
    progress = Progress(
        stage="sft",
        step=1,
        total_steps=4,
        percentage=25,
        # A metric of a suite is no series: its name is the manifest's.
        metrics={"loss": 0.5, "learningRate": 0.001, "sense/accuracy": 0.5, "code/pass@1": 0.1},
        last_updated_time="2026-01-01T00:00:00Z",
    )

    def series() -> dict[str, float]:
        return {
            sample.name: sample.value
            for family in metrics.REGISTRY.collect()
            for sample in family.samples
            if sample.labels.get("name") == "went"
        }

    metrics.set_progress(labels, JobStatus(progress=progress))
    assert series() == {
        "tuneyard_training_loss": 0.5,
        "tuneyard_training_learning_rate": 0.001,
        "tuneyard_training_progress_ratio": 0.25,
    }
    metrics.drop_progress(labels)
    assert series() == {}


@pytest.mark.apiserver
def test_promtool_finds_no_fault(operator: Operator, promtool: Path) -> None:
    exposition = operator.exposition()
    assert "tuneyard_reconcile_duration_seconds_bucket" in exposition
    check = [str(promtool), "check", "metrics"]
    done = subprocess.run(check, check=False, input=exposition, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.apiserver
def test_prometheus_scrapes_the_operator(
    operator: Operator, prometheus: Path, tmp_path: Path
) -> None:
    with scraping(prometheus, operator.metrics_port, tmp_path) as server:
        wait_until(lambda: server.values("up") == {"": 1.0})
        wait_until(lambda: server.values("tuneyard_leader") == {"": 1.0})
        wait_until(lambda: sum(server.values("tuneyard_jobs").values()) == 1.0)


def test_times_of_stages_that_are_no_times_count_as_unknown() -> None:
    """A driver reports them, and its image may be anybody's."""
    job = parse(JOB)
    reported = {"startedAt": "soon", "finishedAt": "2026-11-26T10:00:00Z", "state": "Succeeded"}
    stage = StageStatus.model_validate({"name": "sft", "kind": "sft", **reported})
    naive = stage.model_copy(update={"name": "next", "started_at": "2026-11-26T09:00:00"})
    metrics.count_change(job, JobStatus(), JobStatus(stages=[stage, naive]))


def test_the_duration_of_a_job_includes_the_attempts_that_its_status_does_not_list() -> None:
    job = parse(JOB)
    attempt = {"number": 102, "rayJob": "scraped-102", "startedAt": "2026-11-26T10:00:00Z"}
    times = {"runningAt": "2026-11-26T10:00:00Z", "finishedAt": "2026-11-26T10:01:00Z"}
    listed = {"attempts": [{**attempt, **times}], "droppedSeconds": 3600.0}
    before = duration_seconds()
    metrics.count_change(
        job, JobStatus(), JobStatus.model_validate({**listed, "phase": "Succeeded"})
    )
    assert duration_seconds() - before == 3660.0


def duration_seconds() -> float:
    labels = {"kind": "FineTuneJob", "method": "sft", "outcome": "Succeeded"}
    return metrics.REGISTRY.get_sample_value("tuneyard_job_duration_seconds_sum", labels) or 0.0


def test_reasons_that_a_driver_makes_up_are_one_series() -> None:
    """A series stays until the operator ends."""
    job = parse({**JOB, "metadata": {**JOB["metadata"], "uid": "u"}})

    def labels() -> set[str]:
        counted = (metrics.ATTEMPTS, metrics.JOB_SECONDS)
        samples = (sample for metric in counted for sample in metric.collect()[0].samples)
        return {sample.labels.get("reason") or sample.labels["outcome"] for sample in samples}

    before = labels()
    times = {"startedAt": "2030-01-01T00:00:00Z", "finishedAt": "2030-01-01T00:02:00Z"}
    for reason in ("Mine1", "Mine2", "OutOfMemory"):
        ended = {"number": 1, "rayJob": "scraped-1", "reason": reason, **times}
        failure = {"reason": reason, "message": ""}
        status = {"phase": "Failed", "failure": failure, "attempts": [ended]}
        metrics.count_change(job, None, JobStatus.model_validate(status))
    assert labels() - before == {"Other", "OutOfMemory"} - before


@pytest.mark.parametrize(
    ("started", "finished"),
    [
        ("9999-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("0001-01-01T00:00:00Z", "9999-01-01T00:00:00Z"),
    ],
)
def test_times_that_a_driver_makes_up_change_the_sums_by_no_more_than_a_year(
    started: str, finished: str
) -> None:
    job = parse({**JOB, "metadata": {**JOB["metadata"], "uid": "u"}})

    def total() -> float:
        samples = metrics.STAGE_SECONDS.collect()[0].samples
        return sum(sample.value for sample in samples if sample.name.endswith("_sum"))

    before = total()
    stage = {"name": "sft", "kind": "sft", "state": "Succeeded"}
    stages = [{**stage, "startedAt": started, "finishedAt": finished}]
    metrics.count_change(job, None, JobStatus.model_validate({"stages": stages}))
    assert 0 <= total() - before <= 366 * 24 * 3600
