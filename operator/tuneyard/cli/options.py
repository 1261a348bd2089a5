"""What every verb for a cluster takes: which cluster, which namespace, which job."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tuneyard.api.meta import NAME_LENGTH, NAME_PATTERN
from tuneyard.cli.errors import RemoteError
from tuneyard.cli.jobs import KINDS, Kind

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

NAMESPACE_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"

Command = Callable[..., Any]


class Where(NamedTuple):
    """What the user said of the cluster to talk to; None: the kubeconfig says it."""

    kubeconfig: str | None
    context: str | None
    namespace: str | None

    def connect(self) -> Cluster:
        try:
            from tuneyard.cli.cluster import connect
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("tuneyard"):
                raise
            raise RemoteError(
                f"{error.name} is not installed: install tuneyard[operator] to talk to a cluster"
            ) from error
        return connect(self.kubeconfig, self.context, self.namespace)


def _namespace(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(NAMESPACE_PATTERN, value):
        raise click.BadParameter(f"'{value}' is no name of a namespace")
    return value


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None or (re.fullmatch(NAME_PATTERN, value) and len(value) <= NAME_LENGTH):
        return value
    raise click.BadParameter(
        f"'{value}' is no name of a job: at most {NAME_LENGTH} lower-case letters, digits and "
        "dashes, starting with a letter"
    )


def _kinds(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Kind, ...]:
    return tuple(KINDS.values()) if value is None else (KINDS[value],)


def for_cluster(command: Command) -> Command:
    """Adds the options that all verbs share; the command gets them as `where` and `kinds`."""

    @click.option(
        "-n", "--namespace", metavar="NAME", callback=_namespace, help="Default: the context's."
    )
    @click.option(
        "--kind",
        "kinds",
        type=click.Choice(list(KINDS)),
        callback=_kinds,
        help="Jobs of this kind only.",
    )
    @click.option("--context", metavar="NAME", help="The kubeconfig's context to use.")
    @click.option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, ~/.kube/config.")
    @wraps(command)
    def wrapped(
        kubeconfig: str | None, context: str | None, namespace: str | None, **arguments: Any
    ) -> Any:
        return command(where=Where(kubeconfig, context, namespace), **arguments)

    return wrapped


job_name = click.argument("name", callback=_name)
optional_job_name = click.argument("name", required=False, callback=_name)
