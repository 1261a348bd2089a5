"""The Kubernetes client of the command line."""

from __future__ import annotations

import json
import os
import ssl
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
import yaml
from kubernetes.client import ApiClient, ApiException, Configuration
from kubernetes.config import (
    ConfigException,
    list_kube_config_contexts,
    load_incluster_config,
    load_kube_config,
)

from tuneyard.api.meta import FINALIZER, GROUP, VERSION
from tuneyard.cli import jobs
from tuneyard.cli.errors import NotFoundError, RemoteError, UnreachableError
from tuneyard.cli.jobs import KINDS, Event, JobView, Kind, Object, Pod
from tuneyard.manifests.explain import closest

DEFAULT_FILE = "~/.kube/config"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_SECONDS, READ_SECONDS = 10, 60
PAGE = 500
"""Objects of one list response, the same as kubectl's."""
MERGE_PATCH = "application/merge-patch+json"
FOREGROUND = "foregroundDeletion"
"""Finalizer of Kubernetes' garbage collector, for `kubectl delete --cascade=foreground`."""


def connect(kubeconfig: str | None, context: str | None, namespace: str | None) -> Cluster:
    """Return the cluster of a kubeconfig, or of the pod that this process runs in. Send no request.

    `kubeconfig` None: KUBECONFIG, else the one in the home folder; `context` None: the current one;
    `namespace` None: the context's. Raises RemoteError.
    """
    files = kubeconfig or os.environ.get("KUBECONFIG") or DEFAULT_FILE
    exists = any(Path(file).expanduser().exists() for file in files.split(os.pathsep) if file)
    settings = Configuration()
    settings.retries = False  # urllib3 would log each; --watch and --follow retry themselves
    if not exists and kubeconfig is not None:
        raise RemoteError(f"the kubeconfig {kubeconfig} does not exist: correct --kubeconfig")
    default = _load(files, context, settings) if exists else _load_of_pod(files, settings)
    warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
    try:
        client = ApiClient(settings)
    except (OSError, ValueError) as error:  # unreadable certificates
        raise RemoteError(f"the kubeconfig {files} cannot be used: {error}") from error
    return Cluster(client, namespace or default)


def _load(files: str, context: str | None, settings: Configuration) -> str:
    """Read a kubeconfig into `settings`; return the context's namespace."""
    try:
        contexts, current = list_kube_config_contexts(files)
        chosen = _context(contexts, context) if context else current
        load_kube_config(files, chosen["name"], settings)
        return str(chosen["context"].get("namespace") or "default")
    except (ConfigException, yaml.YAMLError, OSError, ValueError) as error:
        message = f"the kubeconfig {files} cannot be used: {_one_line(error)}"
        raise RemoteError(message) from error
    except (TypeError, AttributeError, KeyError) as error:  # the client expects another structure
        message = f"the kubeconfig {files} cannot be used: its content is not a kubeconfig"
        raise RemoteError(message) from error


def _context(contexts: Sequence[Any], name: str) -> Any:
    names = [context["name"] for context in contexts]
    if name in names:
        return contexts[names.index(name)]
    match = closest(name, names)
    known = f"its contexts are {_first_five(names)}" if names else "it has no contexts"
    remedy = f"did you mean '{match}'?" if match else known
    raise RemoteError(f"the kubeconfig has no context '{name}': {remedy}")


def _load_of_pod(files: str, settings: Configuration) -> str:
    """Read the service account of this pod into `settings`; return the pod's namespace."""
    try:
        load_incluster_config(client_configuration=settings)
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (ConfigException, OSError) as error:
        raise RemoteError(
            f"there is no cluster: {files} does not exist, and this process does not run in a pod: "
            "set KUBECONFIG or give --kubeconfig FILE"
        ) from error


class Cluster:
    """A cluster and a namespace in it. Every method raises RemoteError."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client, self.namespace = client, namespace

    @property
    def host(self) -> str:
        return str(self._client.configuration.host)

    # ---- jobs -----------------------------------------------------------------------------------

    def list_jobs(self, kinds: Sequence[Kind], *, everywhere: bool = False) -> list[JobView]:
        """Return the jobs of these kinds, oldest first. `everywhere`: of all namespaces."""
        items = [
            jobs.read_job(kind, item)
            for kind in kinds
            for item in self._pages(_jobs_path(kind, None if everywhere else self.namespace))
        ]
        return sorted(items, key=lambda job: (job.created, job.name))

    def find(self, name: str, kinds: Sequence[Kind]) -> JobView:
        """Return the job with this name. Raises NotFoundError, which suggests a similar name."""
        matches = [job for kind in kinds if (job := self._get(kind, name))]
        if len(matches) == 1:
            return matches[0]
        if matches:
            options = " or ".join(f"--kind {kind}" for kind in KINDS)
            raise RemoteError(
                f"namespace {self.namespace} has a FineTuneJob and an AlignmentJob '{name}': "
                f"add {options}"
            )
        kind = kinds[0].name if len(kinds) == 1 else "job"
        raise NotFoundError(
            f"there is no {kind} '{name}' in namespace {self.namespace}{self._hint(name, kinds)}"
        )

    def refresh(self, job: JobView) -> JobView | None:
        """Return the job's current state. None: it was deleted; a new job may have its name."""
        now = self._get(job.kind, job.name, job.namespace)
        return now if now and now.uid == job.uid else None

    def set_policy(self, job: JobView, **policy: bool) -> JobView:
        """Change the run policy of a job, but not of a new job with its name."""
        path = f"{_jobs_path(job.kind, job.namespace)}/{quote(job.name, safe='')}"
        body = {"metadata": {"uid": job.uid}, "spec": {"runPolicy": policy}}
        return jobs.read_job(job.kind, self._json("PATCH", path, body=body))

    def delete(self, job: JobView) -> None:
        """Delete a job, but not a new job with its name."""
        path = f"{_jobs_path(job.kind, job.namespace)}/{quote(job.name, safe='')}"
        self._json("DELETE", path, body={"preconditions": {"uid": job.uid}})

    def release(self, job: JobView) -> tuple[str, ...]:
        """Remove the operator's and the garbage collector's finalizers from a job that is being
        deleted; return the finalizers that are left."""
        path = f"{_jobs_path(job.kind, job.namespace)}/{quote(job.name, safe='')}"
        left = tuple(name for name in job.finalizers if name not in (FINALIZER, FOREGROUND))
        # The list cannot have grown since it was read: a job that is being deleted gets no new one.
        body = {"metadata": {"uid": job.uid, "finalizers": list(left)}}
        try:
            self._json("PATCH", path, body=body)
        except NotFoundError:  # the operator was faster
            return ()
        return left

    def _get(self, kind: Kind, name: str, namespace: str | None = None) -> JobView | None:
        path = f"{_jobs_path(kind, namespace or self.namespace)}/{quote(name, safe='')}"
        try:
            return jobs.read_job(kind, self._json("GET", path))
        except NotFoundError:
            return None

    def _hint(self, name: str, kinds: Sequence[Kind]) -> str:
        """Return the end of the message: a name to use instead. "": the jobs cannot be listed."""
        try:
            names = list(dict.fromkeys(job.name for job in self.list_jobs(kinds)))
        except RemoteError:
            return ""
        if not names:
            return ", and no other job: add -n NAMESPACE, or list all with `tuneyard status -A`"
        match = closest(name, names)
        return f": did you mean '{match}'?" if match else f": its jobs are {_first_five(names)}"

    # ---- objects of a job -----------------------------------------------------------------------

    def events(self, job: JobView) -> list[Event]:
        """Return the events of a job, oldest first."""
        path = f"/api/v1/namespaces/{quote(job.namespace, safe='')}/events"
        query = {"fieldSelector": f"involvedObject.uid={job.uid}"}
        events = (jobs.read_event(item) for item in self._pages(path, query))
        return sorted(events, key=lambda event: event.time)

    def pods(self, job: JobView) -> list[Pod]:
        """Return the existing pods of all attempts of a job."""
        path = f"/api/v1/namespaces/{quote(job.namespace, safe='')}/pods"
        labels = {f"{GROUP}/kind": job.kind.name, f"{GROUP}/job": job.name}
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())}
        return [jobs.read_pod(item) for item in self._pages(path, query)]

    def log(
        self, job: JobView, pod: Pod, *, follow: bool = False, since: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield the lines of a pod's log, each with its time (RFC 3339).

        `since`: the first second to read. A lost connection ends the lines like the log's end.
        """
        namespace, name = quote(job.namespace, safe=""), quote(pod.name, safe="")
        query = {"container": pod.container, "timestamps": "true", "follow": str(follow).lower()}
        if since:
            query["sinceTime"] = since
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
        response = self._send("GET", path, query, stream=True, endless=follow)
        try:
            for line in _lines(response):
                stamp, _, text = line.partition(" ")
                yield stamp, text
        finally:
            response.close()

    # ---- requests -------------------------------------------------------------------------------

    def _pages(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[Object]:
        query = {**(query or {}), "limit": str(PAGE)}
        while True:
            page = self._json("GET", path, query)
            yield from page.get("items") or ()
            query["continue"] = page["metadata"].get("continue") or ""
            if not query["continue"]:
                return

    def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> Any:
        response = self._send(method, path, query or {}, body)
        try:
            return json.loads(response.data)
        except ValueError as error:
            raise RemoteError(
                f"{self.host} does not respond like a Kubernetes API server: choose another "
                "cluster with --context or --kubeconfig"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        *,
        stream: bool = False,
        endless: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Return the response with its body unread. `endless`: wait for data without a limit."""
        headers = {"Accept": "*/*" if stream else "application/json"}
        if body is not None:
            headers["Content-Type"] = MERGE_PATCH if method == "PATCH" else "application/json"
        try:
            request = self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            timeout = (CONNECT_SECONDS, None if endless else READ_SECONDS)
            result = self._client.call_api(*request, _request_timeout=timeout)
        except ConfigException as error:  # expired credentials are renewed here
            raise RemoteError(f"no credentials for {self.host}: {_one_line(error)}") from error
        except (ApiException, urllib3.exceptions.HTTPError, ssl.SSLError, OSError) as error:
            raise self._unreachable(error) from error
        if 200 <= result.status <= 299:
            response: urllib3.BaseHTTPResponse = result.response
            return response
        raise self._refusal(result.status, result.read(), path)

    def _unreachable(self, error: Exception) -> UnreachableError:
        text = error.reason if isinstance(error, ApiException) else str(error)
        reason = " ".join(str(text).split()).rpartition("): ")[2]
        return UnreachableError(
            f"the API server {self.host} cannot be reached ({reason}): check the network, or "
            "choose another cluster with --context or --kubeconfig"
        )

    def _refusal(self, code: int, body: bytes, path: str) -> RemoteError:
        """Return the error for a response that is not successful."""
        try:
            status = json.loads(body)
            message = str(status["message"])
        except (ValueError, TypeError, KeyError):
            status, message = {}, body.decode(errors="replace").strip()[:300]
        if code == 401:
            return RemoteError(f"{self.host} does not accept your credentials: log in again")
        if code == 403:
            return RemoteError(f"permission denied: {message}: ask your platform team for access")
        if code == 404 and not (status.get("details") or {}).get("name") and GROUP in path:
            return RemoteError(
                f"{self.host} does not have Tuneyard's CRDs: install the chart, or the CRDs alone "
                "with `tuneyard crds` and `kubectl apply --server-side -f crds`"
            )
        if code == 404:
            return NotFoundError(message)
        if code == 429 or code >= 500:
            return UnreachableError(
                f"the API server {self.host} is not available ({code}): {message}"
            )
        return RemoteError(f"the API server refused the request: {message}")


def _jobs_path(kind: Kind, namespace: str | None) -> str:
    scope = f"namespaces/{quote(namespace, safe='')}/" if namespace else ""
    return f"/apis/{GROUP}/{VERSION}/{scope}{kind.plural}"


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[str]:
    """Yield the lines of a response without line ends, as soon as they arrive."""
    rest = b""
    try:
        for chunk in response.stream():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
    except (urllib3.exceptions.HTTPError, OSError):
        return
    if rest:
        yield rest.decode(errors="replace")


def _first_five(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
