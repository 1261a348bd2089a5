"""The chart as Helm renders it: its objects, its permissions and the values it refuses."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.chart import rights
from tests.chart.rendering import (
    EVERYTHING,
    FOLDER,
    NAMESPACE,
    PROFILE,
    ROOT,
    VARIANTS,
    Chart,
    Object,
    grants,
    kinds,
    one,
)
from tests.controller.metric_names import NAMES
from tuneyard import __version__
from tuneyard.api.compute import Compute
from tuneyard.cli import main
from tuneyard.manifests.crd import crds

Values = Mapping[str, Any]


@pytest.fixture(scope="module")
def chart(helm: Path) -> Chart:
    return Chart(helm)


@pytest.fixture(scope="module")
def schema() -> Object:
    text = (FOLDER / "values.schema.json").read_text(encoding="utf-8")
    value: Object = json.loads(text)
    return value


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_helm_lint_finds_no_fault(chart: Chart, values: Values) -> None:
    chart.run("lint", "--strict", str(FOLDER), values=values)


def test_the_chart_has_the_packages_version() -> None:
    head = yaml.safe_load((FOLDER / "Chart.yaml").read_text(encoding="utf-8"))
    assert (head["version"], head["appVersion"]) == (__version__, __version__)


def test_the_charts_crds_are_the_generated_ones() -> None:
    generated = {path.name: path.read_bytes() for path in (ROOT / "crds").iterdir()}
    assert {path.name: path.read_bytes() for path in (FOLDER / "crds").iterdir()} == generated


# ---- permissions ------------------------------------------------------------------------------


def test_the_operator_is_granted_these_permissions_and_no_others(chart: Chart) -> None:
    objects = chart.render({})
    everywhere = one(objects, "ClusterRole", f"{NAMESPACE}-tuneyard")
    assert set(grants(everywhere)) == rights.each(rights.JOBS, rights.REVIEWS, rights.DISCOVERY)
    assert set(grants(one(objects, "Role"))) == rights.each_own()


@pytest.mark.parametrize(
    "resource",
    ["rayjobs", "pods", "configmaps", "networkpolicies", "jobs", "events", "workloads"],
)
def test_the_readme_lists_the_verbs_of_a_job_s_objects(resource: str) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| (\w+)[^|]*\| ([\w, ]+) \|$", text, re.MULTILINE)
    (granted,) = (verbs for (_, name), verbs in rights.JOBS.items() if name == resource)
    assert dict(rows)[resource].replace(",", "") == granted


def test_without_policies_of_jobs_the_operator_neither_creates_nor_may_create_any(
    chart: Chart,
) -> None:
    objects = chart.render({"networkPolicy": {"jobs": False}})
    assert "--job-network-policies" not in _container(objects)["args"]
    granted = grants(one(objects, "ClusterRole", f"{NAMESPACE}-tuneyard"))
    assert not any(resource == "networkpolicies" for _, resource, _, _ in granted)
    assert one(objects, "NetworkPolicy"), "the operator's own stays"


def test_with_named_namespaces_it_has_no_permissions_on_jobs_elsewhere(chart: Chart) -> None:
    objects = chart.render(VARIANTS["namespaced"])
    everywhere = one(objects, "ClusterRole", f"{NAMESPACE}-tuneyard")
    assert set(grants(everywhere)) == rights.each(rights.REVIEWS)
    local = [
        role
        for role in objects
        if role["kind"] == "Role" and role["metadata"]["namespace"] != NAMESPACE
    ]
    assert [role["metadata"]["namespace"] for role in local] == ["team-a", "team-b"]
    for role in local:
        assert set(grants(role)) == rights.each(rights.JOBS)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_no_role_has_a_wildcard_or_lists_secrets_or_enters_pods(
    chart: Chart, values: Values
) -> None:
    for role in _of(chart.render(values), "Role", "ClusterRole"):
        for group, resource, verb, name in grants(role):
            assert "*" not in (group, resource, verb)
            assert verb not in ("impersonate", "bind", "escalate")
            assert not resource.startswith("pods/")
            if resource == "secrets":
                assert verb == "create" or (verb in ("get", "update") and name)
                assert role["kind"] == "Role"


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_binding_gives_a_role_of_the_chart_to_the_operator_alone(
    chart: Chart, values: Values
) -> None:
    objects = chart.render(values)
    roles = {
        (role["kind"], role["metadata"]["name"]) for role in _of(objects, "Role", "ClusterRole")
    }
    for binding in _of(objects, "RoleBinding", "ClusterRoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "tuneyard", "namespace": NAMESPACE}
        ]


def test_users_may_change_jobs_but_not_their_status(chart: Chart) -> None:
    objects = chart.render({})
    edit = one(objects, "ClusterRole", f"{NAMESPACE}-tuneyard-edit")
    assert {resource for _, resource, _, _ in grants(edit)} == {"finetunejobs", "alignmentjobs"}
    view = one(objects, "ClusterRole", f"{NAMESPACE}-tuneyard-view")
    assert {verb for _, _, verb, _ in grants(view)} == {"get", "list", "watch"}


def test_two_releases_do_not_share_an_object(chart: Chart) -> None:
    def names(objects: list[Object]) -> set[tuple[str, str, str]]:
        return {
            (o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects
        }

    first = names(chart.render(EVERYTHING, namespace="blue"))
    assert first.isdisjoint(names(chart.render(EVERYTHING, namespace="green")))
    assert first.isdisjoint(names(chart.render(EVERYTHING, name="other", namespace="blue")))


# ---- the Deployment ---------------------------------------------------------------------------


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_container_is_restricted(chart: Chart, values: Values) -> None:
    for deployment in _of(chart.render(values), "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_the_operators_command_accepts_its_arguments(chart: Chart) -> None:
    """The command itself parses them: a renamed option fails here and not in a cluster."""
    objects = chart.render({**VARIANTS["namespaced"], "concurrency": 4})
    container = _container(objects)
    command, *arguments = container["args"]
    parsed = main.tuneyard.commands[command]
    parent = main.tuneyard.make_context("tuneyard", [command])
    arguments = [_with_local_file(text) for text in arguments]
    context = parsed.make_context(command, arguments, parent=parent)
    names = {entry["name"] for entry in container["env"]}
    assert names <= {
        str(option.envvar) for option in parsed.params if isinstance(option, click.Option)
    }
    given = context.params
    assert given["namespaces"] == "team-a,team-b"
    assert given["image"] == f"tuneyard-trainer:{__version__}"
    assert given["progress_url"] == f"https://tuneyard.{NAMESPACE}.svc:8443"
    assert given["concurrency"] == 4
    assert given["job_network_policies"] is True
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"progress": given["progress_port"], "metrics": given["metrics_port"]}
    service = one(objects, "Service")["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    own = {name for _, _, _, name in grants(one(objects, "Role")) if name}
    assert own == {given["lease"], given["tls_secret"]}


def test_one_replica_is_alone_and_more_are_spread_and_protected(chart: Chart) -> None:
    alone = chart.render({"replicas": 1})
    assert "PodDisruptionBudget" not in kinds(alone)
    assert "topologySpreadConstraints" not in _pod(alone)
    two = chart.render({"replicas": 2})
    assert one(two, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    keys = [rule["topologyKey"] for rule in _pod(two)["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


def test_services_and_policies_select_the_operators_pods(chart: Chart) -> None:
    objects = chart.render(EVERYTHING)
    template = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        one(objects, "Service")["spec"]["selector"],
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "PodMonitor")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= template.items() for selector in selectors)
    assert template["team"] == "platform"


def test_labels_of_the_user_never_replace_the_charts(chart: Chart) -> None:
    objects = chart.render({"podLabels": {"app.kubernetes.io/name": "mine"}})
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == "tuneyard"


def test_objects_of_other_operators_are_off_by_default(chart: Chart) -> None:
    assert kinds(chart.render({})) == [
        "ClusterRole",
        "ClusterRole",
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]
    assert kinds(chart.render(VARIANTS["least"])) == ["ConfigMap", "Deployment", "Service"]


# ---- the network ------------------------------------------------------------------------------


def test_only_the_pods_of_jobs_may_post_progress(chart: Chart) -> None:
    progress, metrics = one(chart.render({}), "NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for port in progress["ports"]] == ["progress"]
    (peer,) = progress["from"]
    assert peer["podSelector"] == {
        "matchExpressions": [{"key": "tuneyard.io/job", "operator": "Exists"}]
    }
    assert peer["namespaceSelector"] == {}
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]


def test_only_served_namespaces_may_post_progress(chart: Chart) -> None:
    policy = one(chart.render(VARIANTS["namespaced"]), "NetworkPolicy")
    (expression,) = policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchExpressions"]
    assert expression == {
        "key": "kubernetes.io/metadata.name",
        "operator": "In",
        "values": ["team-a", "team-b"],
    }


def test_without_a_named_client_nobody_may_read_the_metrics(chart: Chart) -> None:
    """An empty `from` would allow every client."""
    policy = one(chart.render({"networkPolicy": {"metricsFrom": []}}), "NetworkPolicy")
    assert len(policy["spec"]["ingress"]) == 1


def test_the_operator_may_reach_only_dns_and_the_api_server(chart: Chart) -> None:
    names, server = one(chart.render(EVERYTHING), "NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert server == {
        "ports": [{"port": 6443, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
    }


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicaz": 2}, "replicaz"),
        ({"image": {"tagg": "1"}}, "tagg"),
        ({"networkPolicy": {"apiServer": {"port": 443}}}, "'port'"),
        ({"replicas": "two"}, "/replicas"),
        ({"replicas": -1}, "/replicas"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Team A"]}, "/watchNamespaces/0"),
        ({"image": {"tag": 1.2}}, "/image/tag"),
        ({"profiles": {"small": {"gpus": 1}}}, "gpus"),
        ({"profiles": {"small": {"gpusPerWorker": "1"}}}, "/profiles/small/gpusPerWorker"),
        ({"profiles": {"small": {"memory": "64GB"}}}, "/profiles/small/memory"),
        ({"profiles": {"small": {"profile": "large"}}}, "profile"),
        ({"tolerations": [{"efect": "NoSchedule"}]}, "efect"),
        ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(chart: Chart, values: Values, said: str) -> None:
    assert said in chart.refusal(values)


def test_every_value_is_described_and_no_other_is_accepted(schema: Object) -> None:
    defaults = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
    assert schema["properties"].keys() == defaults.keys() | {"global"}
    for path, node in _nodes(schema, ""):
        assert node.get("description"), path
        if "properties" in node:
            assert node["additionalProperties"] is False, path


def test_a_profile_accepts_the_fields_of_compute(schema: Object) -> None:
    """The chart has the API's schema, so that a wrong preset fails in Helm and not in the
    operator."""
    definition = crds()["tuneyard.io_finetunejobs.yaml"]
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    compute = _comparable(spec["properties"]["compute"])
    compute["properties"].pop("profile")
    profile = _comparable(schema["properties"]["profiles"]["additionalProperties"])
    assert profile["properties"] == compute["properties"]


def test_the_operator_reads_the_charts_profiles(chart: Chart, tmp_path: Path) -> None:
    from tuneyard.controller.settings import read_profiles

    objects = chart.render({"profiles": {"a100-small": PROFILE, "none": {}}})
    file = tmp_path / "profiles.yaml"
    file.write_text(one(objects, "ConfigMap", "tuneyard-profiles")["data"]["profiles.yaml"])
    expected = Compute.model_validate(PROFILE)
    assert read_profiles(file) == {"a100-small": expected, "none": Compute()}


def test_changed_profiles_restart_the_operator(chart: Chart) -> None:
    """The operator reads them only at its start."""

    def checksum(values: Values) -> str:
        template = one(chart.render(values), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/profiles"])

    assert checksum({}) == checksum({"replicas": 2})
    assert checksum({}) != checksum({"profiles": {"small": {}}})


def test_the_notes_report_missing_kuberay(chart: Chart) -> None:
    install = ("install", "tuneyard", str(FOLDER), "--dry-run=client", "--namespace", NAMESPACE)
    assert "KubeRay is not installed" in chart.run(*install, values={}).stdout


# ---- the dashboard ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(chart: Chart) -> Object:
    text = one(chart.render(EVERYTHING), "ConfigMap", "tuneyard-dashboard")["data"]["tuneyard.json"]
    value: Object = json.loads(text)
    return value


def test_the_dashboard_shows_series_that_the_operator_exports(board: Object) -> None:
    exported = {*NAMES, *(f"{name}_bucket" for name in NAMES)}
    queries = list(_queries(board))
    shown = {name for query in queries for name in re.findall(r"\btuneyard_\w+", query)}
    assert shown <= exported
    training = {name for name in exported if name.startswith("tuneyard_training_")}
    assert {name for name in training if not name.endswith("_bucket")} <= shown


def test_prometheus_accepts_the_dashboards_queries(
    board: Object, promtool: Path, tmp_path: Path
) -> None:
    rules = [
        {"record": "panel", "expr": target["expr"].replace("$__rate_interval", "5m")}
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    # Rules with the same name and label would be duplicates.
    numbered = [{**rule, "labels": {"query": str(index)}} for index, rule in enumerate(rules)]
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": numbered}]}))
    checked = subprocess.run(
        [str(promtool), "check", "rules", str(file)], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_the_dashboards_panels_do_not_overlap(board: Object) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        mine = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert mine.isdisjoint(cells), panel["title"]
        cells |= mine
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["targets"]


# ---- helpers ----------------------------------------------------------------------------------


def _of(objects: list[Object], *wanted: str) -> list[Object]:
    return [item for item in objects if item["kind"] in wanted]


def _pod(objects: list[Object]) -> Object:
    pod: Object = one(objects, "Deployment")["spec"]["template"]["spec"]
    return pod


def _container(objects: list[Object]) -> Object:
    (container,) = _pod(objects)["containers"]
    return dict(container)


def _with_local_file(argument: str) -> str:
    """Replace the path of a file in the pod: click checks that the file of `--profiles` exists."""
    return re.sub(r"/etc/tuneyard/\S+", str(FOLDER / "values.yaml"), argument)


def _nodes(node: Object, path: str) -> Iterator[tuple[str, Object]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _nodes(child, f"{path}/{name}")


def _comparable(node: Any) -> Any:
    """Return a schema without the keywords that only Kubernetes or only JSON Schema has."""
    if isinstance(node, list):
        return [_comparable(item) for item in node]
    if not isinstance(node, dict):
        return node
    left_out = {"default", "nullable", "description"}
    kept = {
        key: {name: _comparable(child) for name, child in value.items()}
        if key == "properties"
        else _comparable(value)
        for key, value in node.items()
        if key not in left_out and not key.startswith("x-kubernetes-")
    }
    return {key: value for key, value in kept.items() if key != "additionalProperties" or value}


def _queries(board: Object) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
