"""A real API server with the CRDs: it sets defaults and refuses the manifests that the reader
refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.manifests.manifests import (
    ABSENT,
    BROKEN_RULES,
    LORA,
    MINIMAL,
    PPO,
    VALID,
    BrokenField,
    BrokenRule,
    Manifest,
    broken_fields,
    changed,
)
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import GROUP, VERSION
from tuneyard.errors import ManifestError
from tuneyard.manifests.crd import crds
from tuneyard.manifests.manifest import parse, read

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

FOLDER = Path(__file__).parents[2] / "crds"
NAMESPACE = "admission"
PLURALS = {crd["spec"]["names"]["kind"]: crd["spec"]["names"]["plural"] for crd in crds().values()}

Job = dict[str, Any]


class Refused(Exception):  # noqa: N818 - an expected response, not an error
    """The API server's refusal: the field and the message of each cause."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["message"])
        self.causes = {
            (cause.get("field", ""), cause.get("message", ""))
            for cause in answer.get("details", {}).get("causes", [])
        }


class Jobs:
    """The jobs of one namespace on a real API server."""

    def __init__(self, kubeconfig: Path) -> None:
        from kubernetes import client, config

        self._api = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))

    def create(self, manifest: Manifest) -> Job:
        return self._call("create", manifest)

    def would_create(self, manifest: Manifest) -> Job:
        """Return the job that the API server would store; nothing is stored."""
        return self._call("create", manifest, dry_run="All")

    def replace(self, job: Job) -> Job:
        return self._call("replace", job, name=job["metadata"]["name"])

    def replace_status(self, job: Job) -> Job:
        return self._call("replace", job, "_status", name=job["metadata"]["name"])

    def _call(self, verb: str, body: Job, suffix: str = "", **arguments: Any) -> Job:
        from kubernetes.client import ApiException

        method = getattr(self._api, f"{verb}_namespaced_custom_object{suffix}")
        try:
            job: Job = method(
                group=GROUP,
                version=VERSION,
                namespace=NAMESPACE,
                plural=PLURALS[body["kind"]],
                body=body,
                field_validation="Strict",
                **arguments,
            )
        except ApiException as error:
            raise Refused(json.loads(error.body)) from error
        return job


@pytest.fixture(scope="module")
def cluster_with_crds(apiserver: Cluster) -> Iterator[Cluster]:
    apiserver.define(FOLDER)
    if apiserver.kubectl("get", "namespace", NAMESPACE, check=False).returncode:
        apiserver.kubectl("create", "namespace", NAMESPACE)
    yield apiserver
    apiserver.kubectl("delete", "--namespace", NAMESPACE, "--all", "finetunejobs,alignmentjobs")


@pytest.fixture(scope="module")
def jobs(cluster_with_crds: Cluster) -> Jobs:
    return Jobs(cluster_with_crds.kubeconfig)


@pytest.fixture
def planned(jobs: Jobs, request: pytest.FixtureRequest) -> Job:
    """A stored job that has been planned, by its status."""
    job = jobs.create(changed(request.param, {"metadata": {"generateName": "planned-"}}))
    return jobs.replace_status({**job, "status": {"planDigest": "sha256:0"}})


def test_the_crds_are_structural(cluster_with_crds: Cluster) -> None:
    """The API server stores a schema that is not structural, with a condition that reports it."""
    for crd in crds().values():
        name = crd["metadata"]["name"]
        stored = json.loads(cluster_with_crds.kubectl("get", "crd", name, "-o", "json").stdout)
        conditions = {each["type"]: each["status"] for each in stored["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}


@pytest.mark.parametrize("name", ["ftj", "aj", "tuneyard"])
def test_short_names_and_the_category_find_the_jobs(cluster_with_crds: Cluster, name: str) -> None:
    cluster_with_crds.kubectl("get", name, "--namespace", NAMESPACE)


@pytest.mark.parametrize("manifest", VALID.values(), ids=VALID)
def test_a_valid_manifest_is_admitted_and_means_the_same_with_its_defaults(
    jobs: Jobs, manifest: Manifest
) -> None:
    stored = jobs.would_create(manifest)
    assert stored["spec"]["compute"]["gpuResource"] == "nvidia.com/gpu"
    assert parse(stored).spec == parse(manifest).spec


def test_null_is_kept_where_it_has_a_meaning(jobs: Jobs) -> None:
    stored = jobs.would_create(changed(MINIMAL, {"spec.training.optimizer.maxGradientNorm": None}))
    assert stored["spec"]["training"]["optimizer"]["maxGradientNorm"] is None


def test_null_elsewhere_is_absence(jobs: Jobs) -> None:
    stored = jobs.would_create(changed(MINIMAL, {"spec.training.seed": None}))
    assert stored["spec"]["training"]["seed"] == 0


@pytest.mark.parametrize("broken", BROKEN_RULES, ids=lambda broken: broken.name)
def test_a_broken_rule_is_refused_with_the_same_remedy(jobs: Jobs, broken: BrokenRule) -> None:
    with pytest.raises(Refused) as caught:
        jobs.would_create(broken.manifest)
    ((path, message),) = caught.value.causes
    assert path == broken.path
    assert message.endswith(broken.message)


BROKEN_FIELDS = list(broken_fields(crds()))


@pytest.mark.parametrize("broken", BROKEN_FIELDS, ids=lambda broken: broken.name)
def test_a_manifest_that_the_reader_refuses_is_refused_at_the_same_field(
    jobs: Jobs, broken: BrokenField
) -> None:
    with pytest.raises(Refused) as caught:
        jobs.would_create(broken.manifest)
    if broken.path.endswith(".nonsense"):
        assert f'unknown field "{broken.path}"' in str(caught.value)
    elif "-type-" in broken.name:  # The message alone names a type that `not` excludes.
        assert broken.path in str(caught.value)
    else:
        assert broken.path in {path for path, _ in caught.value.causes}


@pytest.mark.parametrize("name", ["a" * 41, "1st", "a.b"])
def test_a_name_that_leaves_no_room_for_the_attempt_is_refused(jobs: Jobs, name: str) -> None:
    with pytest.raises(Refused, match="use at most 40 lower-case letters, digits and dashes"):
        jobs.would_create(changed(MINIMAL, {"metadata.name": name}))


# ---- changes of a job


def changes() -> dict[str, tuple[Manifest, str, dict[str, Any]]]:
    """Return by name: a manifest, the changed field of the spec, and the change."""
    return {
        "model": (LORA, "model", {"spec.model.revision": "other"}),
        "method": (MINIMAL, "method", {"spec.method": "pretrain"}),
        "data": (LORA, "data", {"spec.data.train[0].limit": 5}),
        "adapter": (LORA, "adapter", {"spec.adapter.lora.rank": 4}),
        "adapter-removed": (LORA, "adapter", {"spec.adapter": ABSENT}),
        "adapter-added": (MINIMAL, "adapter", {"spec.adapter": {"ia3": {}}}),
        "training": (LORA, "training", {"spec.training.seed": 8}),
        "learning-rate": (LORA, "training", {"spec.training.learningRate": "auto"}),
        "evaluate": (LORA, "evaluate", {"spec.evaluate.samples": 1}),
        "output": (LORA, "output", {"spec.output.uri": "pvc://models/other"}),
        "compute": (LORA, "compute", {"spec.compute.workers": 8}),
        "preferences": (PPO, "preferences", {"spec.preferences.aiFeedback.disagreement": "drop"}),
        "reward": (PPO, "rewardModel", {"spec.rewardModel.train.margin": 1}),
        "optimize": (PPO, "optimize", {"spec.optimize.ppo.rollouts": 1}),
        "rounds": (PPO, "rounds", {"spec.rounds": 3}),
    }


@pytest.mark.parametrize(
    ("planned", "field", "change"), changes().values(), ids=changes(), indirect=["planned"]
)
def test_a_planned_job_keeps_its_spec(
    jobs: Jobs, planned: Job, field: str, change: dict[str, Any]
) -> None:
    with pytest.raises(Refused) as caught:
        jobs.replace(changed(planned, change))
    assert {(path, message.partition(": ")[2]) for path, message in caught.value.causes} == {
        (
            f"spec.{field}",
            f"spec.{field} cannot change once the job is planned, only spec.runPolicy can: create "
            "a job with another name",
        )
    }


@pytest.mark.parametrize("planned", [MINIMAL, LORA, PPO], indirect=True)
def test_a_planned_job_can_be_suspended_and_queued_elsewhere(jobs: Jobs, planned: Job) -> None:
    policy = {"suspend": True, "queue": "other", "workloadPriority": "low"}
    stored = jobs.replace({**planned, "spec": {**planned["spec"], "runPolicy": policy}})
    assert stored["spec"]["runPolicy"]["suspend"] is True
    assert stored["metadata"]["generation"] == planned["metadata"]["generation"] + 1


@pytest.mark.parametrize("planned", [LORA], indirect=True)
def test_a_planned_job_can_be_labeled_and_written_back_unchanged(jobs: Jobs, planned: Job) -> None:
    stored = jobs.replace(changed(planned, {"metadata.labels": {"team": "a"}}))
    assert stored["metadata"]["generation"] == planned["metadata"]["generation"]


def test_a_job_that_is_not_planned_may_change(jobs: Jobs) -> None:
    job = jobs.create(changed(MINIMAL, {"metadata": {"generateName": "unplanned-"}}))
    stored = jobs.replace(changed(job, {"spec.training.epochs": 1}))
    assert stored["spec"]["training"]["epochs"] == 1


STATUS = {
    "phase": "Running",
    "conditions": [
        {
            "type": "Running",
            "status": "True",
            "reason": "Training",
            "message": "",
            "lastTransitionTime": "2026-11-21T00:00:00Z",
            "observedGeneration": 1,
        }
    ],
    "observedGeneration": 1,
    "stages": [{"name": "sft", "kind": "sft", "state": "Running", "metrics": {"loss": 1.5}}],
    "progress": {
        "stage": "sft",
        "step": 5,
        "totalSteps": 10,
        "percentage": 50,
        "estimatedRemainingSeconds": 90,
        "metrics": {"loss": 1.25, "validationLoss": 1.5},
        "lastUpdatedTime": "2026-11-21T00:00:00Z",
    },
    "attempts": [{"number": 1, "rayJob": "job-1", "startedAt": "2026-11-21T00:00:00Z"}],
    "result": {"uri": "file://out", "digest": "sha256:0"},
    "failure": {"reason": "OutOfMemory", "message": "m", "advice": "a"},
}


@pytest.mark.parametrize("planned", [MINIMAL], indirect=True)
def test_a_status_is_written_through_its_subresource_only(jobs: Jobs, planned: Job) -> None:
    written = jobs.replace_status(
        changed({**planned, "status": STATUS}, {"spec.runPolicy.suspend": True})
    )
    assert written["spec"] == planned["spec"]
    assert written["metadata"]["generation"] == planned["metadata"]["generation"]
    again = jobs.replace({**written, "status": {"phase": "Failed"}})
    status = parse(again).status
    assert status is not None
    assert (status.phase, status.progress and status.progress.percentage) == ("Running", 50)


@pytest.mark.parametrize("planned", [MINIMAL], indirect=True)
def test_kubectl_get_shows_the_progress_of_a_job(
    cluster_with_crds: Cluster, jobs: Jobs, planned: Job
) -> None:
    jobs.replace_status({**planned, "status": STATUS})
    name = planned["metadata"]["name"]
    shown = cluster_with_crds.kubectl("get", "ftj", name, "--namespace", NAMESPACE).stdout
    heads, values = (line.split() for line in shown.splitlines())
    assert heads == [
        *("NAME", "PHASE", "STAGE", "PROGRESS%", "LOSS", "HELD-OUT", "ETA(S)", "AGE"),
    ]
    assert values[:-1] == [name, "Running", "sft", "50", "1.25", "1.5", "90"]


def test_kubectl_explain_shows_a_fields_description(cluster_with_crds: Cluster) -> None:
    text = cluster_with_crds.kubectl("explain", "finetunejob.spec.data.onOverlength").stdout
    assert "ENUM:\n    error\n    drop\n    truncate\n    split" in text
    assert "Treatment of a longer row" in text


# ---- YAML in kubectl and in the reader

SCALARS = [
    *("2e-4", "2E-4", "1e0", ".5", "5.", "+1", "0x1", "0b1", "010", "0o7", "1_0.5", "-0", "089"),
    *("yes", "Yes", "y", "on", "off", "n", "True", "~", "null", "''", '"1"', "auto", "!!str 1"),
    *("2026-11-21", "1:30", ".inf", "1e", "0x", ".", "1.2.3", "0777777", "=", "+.5", "1_000"),
    *("[1", "*nowhere", "{<<: 1}"),
]
FIELDS = [
    *("training.learningRate", "training.maxSteps", "training.seed", "training.dropout"),
    *("training.keepBest", "model.revision", "data.systemPrompt", "adapter.lora.targets"),
]


def test_kubectl_and_the_reader_parse_every_scalar_alike(
    cluster_with_crds: Cluster, tmp_path: Path
) -> None:
    texts = {
        f"s-{number}": yaml.safe_dump(
            changed(MINIMAL, {"metadata.name": f"s-{number}", f"spec.{field}": "HERE"})
        ).replace("HERE", scalar)
        for number, (field, scalar) in enumerate(product(FIELDS, SCALARS))
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    # One object a line; kubectl names refused objects on stderr only.
    shown = "jsonpath={.metadata.name} {.spec}{'\\n'}"
    command = ("create", "--dry-run=server", "--namespace", NAMESPACE, "-o", shown)
    answer = cluster_with_crds.kubectl(*command, "-f", str(tmp_path), check=False)
    by_server = dict(line.split(" ", 1) for line in answer.stdout.splitlines())
    for name, text in texts.items():
        job = read_or_none(text)
        if job is None or name not in by_server:
            assert (job is None) == (name not in by_server), text
        else:
            stored = {**MINIMAL, "spec": json.loads(by_server[name])}
            assert parse(stored).spec == job.spec, text


def read_or_none(text: str) -> FineTuneJob | AlignmentJob | None:
    try:
        return read(text)[0]
    except ManifestError:
        return None
