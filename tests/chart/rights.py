"""The operator's permissions, verb by verb. They repeat the chart's, so that a change of the chart
needs a change here."""

from __future__ import annotations

JOBS: dict[tuple[str, str], str] = {
    ("tuneyard.io", "finetunejobs"): "get list watch patch delete",
    ("tuneyard.io", "alignmentjobs"): "get list watch patch delete",
    ("tuneyard.io", "finetunejobs/status"): "patch",
    ("tuneyard.io", "alignmentjobs/status"): "patch",
    ("tuneyard.io", "finetunejobs/finalizers"): "update",
    ("tuneyard.io", "alignmentjobs/finalizers"): "update",
    ("ray.io", "rayjobs"): "list watch create delete",
    ("", "pods"): "get list watch",
    ("", "configmaps"): "get create patch delete",
    ("networking.k8s.io", "networkpolicies"): "get create patch delete",
    ("batch", "jobs"): "get list watch create patch delete",
    ("", "events"): "list create",
    ("kueue.x-k8s.io", "workloads"): "list watch",
}
"""In namespaces with jobs."""
REVIEWS = {("authentication.k8s.io", "tokenreviews"): "create"}
"""For the cluster."""
DISCOVERY = {
    ("apiextensions.k8s.io", "customresourcedefinitions"): "list watch",
    ("", "namespaces"): "list watch",
}
"""For the cluster, if all namespaces are served."""
OWN: dict[tuple[str, str, str], str] = {
    ("coordination.k8s.io", "leases", ""): "create",
    ("coordination.k8s.io", "leases", "tuneyard-operator"): "get update",
    ("", "secrets", ""): "create",
    ("", "secrets", "tuneyard-tls"): "get update",
}
"""In the operator's own namespace, by name; "": any."""

Right = tuple[str, str, str, str]
"""Group, resource, verb, name."""


def each(*tables: dict[tuple[str, str], str]) -> set[Right]:
    return {
        (group, resource, verb, "")
        for table in tables
        for (group, resource), verbs in table.items()
        for verb in verbs.split()
    }


def each_own() -> set[Right]:
    return {(*what, verb, name) for (*what, name), verbs in OWN.items() for verb in verbs.split()}  # type: ignore[misc]
