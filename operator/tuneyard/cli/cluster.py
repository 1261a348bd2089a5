"""The only place of the command line that talks to Kubernetes."""

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

from tuneyard.api.meta import GROUP, VERSION
from tuneyard.cli import jobs
from tuneyard.cli.errors import NotFoundError, RemoteError, UnreachableError
from tuneyard.cli.jobs import KINDS, Event, Found, Kind, Object, Pod
from tuneyard.manifests.explain import closest

DEFAULT_FILE = "~/.kube/config"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_SECONDS, READ_SECONDS = 10, 60
PAGE = 500
"""Objects of one answer, as kubectl asks for."""
MERGE_PATCH = "application/merge-patch+json"


def connect(kubeconfig: str | None, context: str | None, namespace: str | None) -> Cluster:
    """The cluster of a kubeconfig, or the one that this process runs in. No request is made yet.

    `kubeconfig` None: KUBECONFIG, else the user's own; `context` None: the current one; `namespace`
    None: the context's. Raises RemoteError.
    """
    files = kubeconfig or os.environ.get("KUBECONFIG") or DEFAULT_FILE
    exists = any(Path(file).expanduser().exists() for file in files.split(os.pathsep) if file)
    settings = Configuration()
    settings.retries = False  # urllib3 would log each; who watches tries again by himself
    if not exists and kubeconfig is not None:
        raise RemoteError(f"the kubeconfig {kubeconfig} does not exist: correct --kubeconfig")
    default = _load(files, context, settings) if exists else _load_own(files, settings)
    warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
    try:
        client = ApiClient(settings)
    except (OSError, ValueError) as error:  # certificates that cannot be read
        raise RemoteError(f"the kubeconfig {files} cannot be used: {error}") from error
    return Cluster(client, namespace or default)


def _load(files: str, context: str | None, settings: Configuration) -> str:
    """Reads a kubeconfig into `settings`; returns the context's namespace."""
    try:
        contexts, current = list_kube_config_contexts(files)
        chosen = _context(contexts, context) if context else current
        load_kube_config(files, chosen["name"], settings)
        return str(chosen["context"].get("namespace") or "default")
    except (ConfigException, yaml.YAMLError, OSError, ValueError) as error:
        message = f"the kubeconfig {files} cannot be used: {_line(error)}"
        raise RemoteError(message) from error
    except (TypeError, AttributeError, KeyError) as error:  # not the shape that the client expects
        message = f"the kubeconfig {files} cannot be used: it does not look like a kubeconfig"
        raise RemoteError(message) from error


def _context(contexts: Sequence[Any], name: str) -> Any:
    names = [context["name"] for context in contexts]
    if name in names:
        return contexts[names.index(name)]
    match = closest(name, names)
    remedy = f"did you mean '{match}'?" if match else f"it has {_few(names) or 'none'}"
    raise RemoteError(f"the kubeconfig has no context '{name}': {remedy}")


def _load_own(files: str, settings: Configuration) -> str:
    """Reads what Kubernetes gives a pod into `settings`; returns the pod's namespace."""
    try:
        load_incluster_config(client_configuration=settings)
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (ConfigException, OSError) as error:
        raise RemoteError(
            f"no cluster to talk to: {files} does not exist and this is no pod of a cluster: "
            "set KUBECONFIG or give --kubeconfig FILE"
        ) from error


class Cluster:
    """One cluster and the namespace to look at. Every method raises RemoteError."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client, self.namespace = client, namespace

    @property
    def host(self) -> str:
        return str(self._client.configuration.host)

    # ---- jobs -----------------------------------------------------------------------------------

    def list_jobs(self, kinds: Sequence[Kind], *, everywhere: bool = False) -> list[Found]:
        """All jobs of these kinds, of this or every namespace, oldest first."""
        items = [
            jobs.found(kind, item)
            for kind in kinds
            for item in self._pages(_jobs_path(kind, None if everywhere else self.namespace))
        ]
        return sorted(items, key=lambda job: (job.created, job.name))

    def find(self, name: str, kinds: Sequence[Kind]) -> Found:
        """The job of this name. Raises NotFoundError, with the name that was probably meant."""
        matches = [job for kind in kinds if (job := self._get(kind, name))]
        if len(matches) == 1:
            return matches[0]
        if matches:
            words = " or ".join(f"--kind {word}" for word in KINDS)
            raise RemoteError(
                f"'{name}' names a FineTuneJob and an AlignmentJob in namespace {self.namespace}: "
                f"add {words}"
            )
        kind = kinds[0].name if len(kinds) == 1 else "job"
        raise NotFoundError(
            f"there is no {kind} '{name}' in namespace {self.namespace}{self._hint(name, kinds)}"
        )

    def refresh(self, job: Found) -> Found | None:
        """The same job now; None: it is gone, though another may have its name."""
        now = self._get(job.kind, job.name, job.namespace)
        return now if now and now.uid == job.uid else None

    def set_policy(self, job: Found, **policy: bool) -> Found:
        """Changes the run policy of this very job."""
        path = f"{_jobs_path(job.kind, job.namespace)}/{quote(job.name, safe='')}"
        body = {"metadata": {"uid": job.uid}, "spec": {"runPolicy": policy}}
        return jobs.found(job.kind, self._json("PATCH", path, body=body))

    def delete(self, job: Found) -> None:
        """Asks for the deletion of this very job."""
        path = f"{_jobs_path(job.kind, job.namespace)}/{quote(job.name, safe='')}"
        self._json("DELETE", path, body={"preconditions": {"uid": job.uid}})

    def _get(self, kind: Kind, name: str, namespace: str | None = None) -> Found | None:
        path = f"{_jobs_path(kind, namespace or self.namespace)}/{quote(name, safe='')}"
        try:
            return jobs.found(kind, self._json("GET", path))
        except NotFoundError:
            return None

    def _hint(self, name: str, kinds: Sequence[Kind]) -> str:
        """What was probably meant; "" where that cannot be found out."""
        try:
            names = list(dict.fromkeys(job.name for job in self.list_jobs(kinds)))
        except RemoteError:
            return ""
        if not names:
            return ", nor any other: add -n NAMESPACE, or list all with `tuneyard status -A`"
        match = closest(name, names)
        return f": did you mean '{match}'?" if match else f": there are {_few(names)}"

    # ---- what belongs to a job ------------------------------------------------------------------

    def events(self, job: Found) -> list[Event]:
        """Events about a job, oldest first."""
        path = f"/api/v1/namespaces/{quote(job.namespace, safe='')}/events"
        query = {"fieldSelector": f"involvedObject.uid={job.uid}"}
        return sorted((jobs.event(item) for item in self._pages(path, query)), key=lambda e: e.time)

    def pods(self, job: Found) -> list[Pod]:
        """A job's pods that still exist, of all attempts."""
        path = f"/api/v1/namespaces/{quote(job.namespace, safe='')}/pods"
        labels = {f"{GROUP}/kind": job.kind.name, f"{GROUP}/job": job.name}
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())}
        return [jobs.pod(item) for item in self._pages(path, query)]

    def log(
        self, job: Found, pod: Pod, *, follow: bool = False, since: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """The lines of a pod's log, each with its time (RFC 3339). `since`: only from then on, to
        the second. A connection that breaks off ends it like the log's own end."""
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
            answer = self._json("GET", path, query)
            yield from answer.get("items") or ()
            query["continue"] = answer["metadata"].get("continue") or ""
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
                f"{self.host} does not answer like a Kubernetes API server"
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
        """The answer, whose body is not read yet. `endless`: there may be nothing to read for any
        time."""
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
            answer = self._client.call_api(*request, _request_timeout=timeout)
        except ConfigException as error:  # credentials are fetched anew when they run out
            raise RemoteError(f"no credentials for {self.host}: {_line(error)}") from error
        except (ApiException, urllib3.exceptions.HTTPError, ssl.SSLError, OSError) as error:
            raise self._unreachable(error) from error
        if 200 <= answer.status <= 299:
            response: urllib3.BaseHTTPResponse = answer.response
            return response
        raise self._refusal(answer.status, answer.read(), path)

    def _unreachable(self, error: Exception) -> UnreachableError:
        text = error.reason if isinstance(error, ApiException) else str(error)
        reason = " ".join(str(text).split()).rpartition("): ")[2]
        return UnreachableError(
            f"the API server {self.host} cannot be reached ({reason}): check the network, or "
            "choose another cluster with --context or --kubeconfig"
        )

    def _refusal(self, code: int, body: bytes, path: str) -> RemoteError:
        """Why the API server did not do what it was asked."""
        try:
            status = json.loads(body)
            message = str(status["message"])
        except (ValueError, TypeError, KeyError):
            status, message = {}, body.decode(errors="replace").strip()[:300]
        if code == 401:
            return RemoteError(f"{self.host} does not accept your credentials: log in again")
        if code == 403:
            return RemoteError(
                f"you may not do that: {message}: ask your platform team for the right"
            )
        if code == 404 and not (status.get("details") or {}).get("name") and GROUP in path:
            return RemoteError(
                f"{self.host} does not know Tuneyard's jobs: install the chart, or the resources "
                "alone with `tuneyard crds` and `kubectl apply --server-side -f crds`"
            )
        if code == 404:
            return NotFoundError(message)
        if code == 429 or code >= 500:
            return UnreachableError(
                f"the API server {self.host} cannot answer now ({code}): {message}"
            )
        return RemoteError(f"the API server refused: {message}")


def _jobs_path(kind: Kind, namespace: str | None) -> str:
    scope = f"namespaces/{quote(namespace, safe='')}/" if namespace else ""
    return f"/apis/{GROUP}/{VERSION}/{scope}{kind.plural}"


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[str]:
    """Lines as they come, without their ends."""
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


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
