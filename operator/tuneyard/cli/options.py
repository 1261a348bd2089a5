"""The options that the commands for a cluster share: cluster, namespace and job."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tuneyard.cli.errors import needs_extra
from tuneyard.cli.jobs import KINDS, Kind
from tuneyard.manifests.explain import name_problem

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

NAMESPACE_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"

Command = Callable[..., Any]


class ClusterOptions(NamedTuple):
    """The options that select a cluster and a namespace. None: the kubeconfig decides."""

    kubeconfig: str | None
    context: str | None
    namespace: str | None

    def connect(self) -> Cluster:
        """Return the cluster. Raises RemoteError."""
        with needs_extra("operator", "talk to a cluster"):
            from tuneyard.cli.cluster import connect
        return connect(self.kubeconfig, self.context, self.namespace)


def _namespace(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(NAMESPACE_PATTERN, value):
        raise click.BadParameter(
            f"'{value}' cannot be the name of a namespace: use at most 63 lower-case letters, "
            "digits and dashes"
        )
    return value


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and (problem := name_problem(value)):
        raise click.BadParameter(problem)
    return value


def _kinds(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Kind, ...]:
    return tuple(KINDS.values()) if value is None else (KINDS[value],)


def for_cluster(command: Command) -> Command:
    """Add the shared options; the command gets them as `options` and `kinds`."""

    @click.option(
        "-n",
        "--namespace",
        metavar="NAME",
        callback=_namespace,
        help="Namespace. Default: the context's.",
    )
    @click.option(
        "--kind",
        "kinds",
        type=click.Choice(list(KINDS)),
        callback=_kinds,
        help="Use jobs of this kind only.",
    )
    @click.option("--context", metavar="NAME", help="Context of the kubeconfig.")
    @click.option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG or ~/.kube/config.")
    @wraps(command)
    def wrapped(
        kubeconfig: str | None, context: str | None, namespace: str | None, **arguments: Any
    ) -> Any:
        return command(options=ClusterOptions(kubeconfig, context, namespace), **arguments)

    return wrapped


job_name = click.argument("name", callback=_name)
optional_job_name = click.argument("name", required=False, callback=_name)
