"""The Job that prepares the data of an attempt before its RayJob exists."""

from __future__ import annotations

from typing import Any

import yaml

from tests.golden.compare import assert_golden
from tests.planning.jobs import job
from tests.rendering.test_rayjob import REPORTING, rendered, worker
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.pods import PREPARE_OPTION
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.placement import placed
from tuneyard.rendering.rayjob import render_preparation

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def preparation(made: FineTuneJob) -> dict[str, Any]:
    plan = placed(plan_job(made), profiles={})
    return render_preparation(plan, made, attempt=2, reporting=REPORTING)


def pod(made: FineTuneJob) -> dict[str, Any]:
    spec: dict[str, Any] = preparation(made)["spec"]["template"]["spec"]
    return spec


def test_the_rendered_job_is_frozen() -> None:
    text = yaml.safe_dump(preparation(job("support-bot")), sort_keys=False, width=4096)
    assert_golden("rayjobs/support-bot-prepare.yaml", text)


def test_its_pod_is_a_worker_s_without_gpus_on_any_node() -> None:
    made = job("support-bot", compute__nodeSelector={"accelerator": "a100"})
    mine, theirs = pod(made), worker(rendered(made))
    assert (mine["securityContext"], mine["restartPolicy"]) == (
        theirs["securityContext"],
        theirs["restartPolicy"],
    )
    (container,), (other,) = mine["containers"], theirs["containers"]
    for field in ("securityContext", "lifecycle", "image"):
        assert container[field] == other[field]
    limits, of_worker = container["resources"]["limits"], other["resources"]["limits"]
    assert limits == {name: of_worker[name] for name in ("cpu", "memory")}
    assert container["resources"]["requests"] == limits
    assert "nodeSelector" not in mine
    assert "tolerations" not in mine
    assert mine["automountServiceAccountToken"] is False
    assert {v["mountPath"] for v in other["volumeMounts"]} <= {
        v["mountPath"] for v in container["volumeMounts"]
    }


def test_it_runs_the_driver_of_its_attempt_and_is_never_retried_by_kubernetes() -> None:
    (container,) = pod(job("support-bot"))["containers"]
    command = container["command"]
    assert command[-1] == PREPARE_OPTION
    assert command[command.index("--attempt") + 1] == "2"
    assert preparation(job("support-bot"))["spec"]["backoffLimit"] == 0


def test_only_prepare_queue_puts_it_into_a_queue() -> None:
    queued = job("support-bot", runPolicy__queue="team-a", runPolicy__workloadPriority="high")
    labels = preparation(queued)["metadata"]["labels"]
    assert not {QUEUE, PRIORITY} & labels.keys()
    policy = {"queue": "team-a", "prepareQueue": "cpus", "workloadPriority": "high"}
    changes = {f"runPolicy__{name}": value for name, value in policy.items()}
    found = preparation(job("support-bot", **changes))
    assert found["metadata"]["labels"][QUEUE] == "cpus"
    assert found["metadata"]["labels"][PRIORITY] == "high"
    assert QUEUE not in found["spec"]["template"]["metadata"]["labels"]


def test_a_job_whose_rows_an_endpoint_writes_has_its_key_before_there_are_gpus() -> None:
    (container,) = pod(job("augmented"))["containers"]
    found = {each["name"]: each.get("valueFrom") for each in container["env"]}
    key = {"secretKeyRef": {"name": "writer", "key": "token"}}
    assert found["TUNEYARD_SECRET_WRITER_TOKEN"] == key
