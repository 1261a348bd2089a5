"""A reverse proxy in front of an API server that fails on demand, for tests of the operator.

    with FaultProxy(cluster.kubeconfig, tmp_path) as proxy:
        proxy.add(Answer(409), on("PATCH", r"/finetunejobs/[^/]+/status$"), times=2)
        proxy.on_write = kill_at(5, operator.kill, reached=True)
        start_operator(proxy.kubeconfig)

The proxy runs in a thread of its own and speaks TLS, as API servers do. A caller's bearer token is
passed on; a caller without one acts as the user of the kubeconfig behind the proxy. Watches pass
through unbuffered.

Verbs are HTTP's methods, but a GET that watches is a WATCH.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import aiohttp
import yaml
from aiohttp import web
from yarl import URL

from tests.tls import write_certificate

START_SECONDS = 20
LINE_BYTES = 16 << 20
"""The longest line of a watch: objects have up to 1.5 MiB."""
NUM_VERSIONS = 50
"""Number of versions of an object or list that are kept, to be served as stale."""

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Requests for a review or by the clock: neither is a step of the operator's work.
NO_STEPS = re.compile(r"/leases(/|$)|/tokenreviews$|/(self)?subjectaccessreviews$")
HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True)
class Request:
    """One request as the proxy received it."""

    verb: str
    """GET, WATCH, POST, PUT, PATCH or DELETE."""
    path: str
    """Without the query."""
    query: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def is_write(self) -> bool:
        """Whether it is a step of the operator's work: neither a Lease renewal nor a token
        review."""
        return self.verb in WRITES and not NO_STEPS.search(self.path)

    def json(self) -> Any:
        """Return the body of an object or a patch."""
        return json.loads(self.body)


Predicate: TypeAlias = Callable[[Request], bool]


def anything(request: Request) -> bool:
    return True


def creates(plural: str, name: str) -> Predicate:
    """Match the creation of an object: a POST, or a server-side apply, whose path has its name."""
    pattern = re.compile(f"/{plural}(/{name})?$")

    def matches(request: Request) -> bool:
        if request.verb not in ("POST", "PATCH") or not pattern.search(request.path):
            return False
        return bool(request.json()["metadata"]["name"] == name)

    return matches


def on(verb: str, path: str = "") -> Predicate:
    """Match requests with this verb whose path contains the pattern."""
    pattern = re.compile(path)
    return lambda request: verb == request.verb and bool(pattern.search(request.path))


# ---- faults -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An error response; the API server does not get the request."""

    code: int
    """409, 429, 500, ..."""
    reason: str = ""
    retry_after: int | None = None
    """Seconds, in the header Retry-After."""


@dataclass(frozen=True)
class Cut:
    """A broken connection: `before` the server gets the request, or `after` it has responded."""

    when: Literal["before", "after"]
    then: Callable[[], None] = lambda: None
    """Called at that moment in the proxy's thread: for example `process.kill`."""


@dataclass(frozen=True)
class Delay:
    """A delay of the request and of each chunk of a watch."""

    seconds: float


@dataclass(frozen=True)
class Gone:
    """The API server's error to a watch that its resource version is too old."""


@dataclass(frozen=True)
class Stale:
    """A response with an older version that passed through this proxy, if there is one."""

    versions: int = 1
    """Number of versions back; fewer if fewer are known."""


Fault: TypeAlias = Answer | Cut | Delay | Gone | Stale
WriteHook: TypeAlias = Callable[[int, str, str], Fault | None]


def kill_at(number: int, kill: Callable[[], None], *, reached: bool) -> WriteHook:
    """Return a hook that calls `kill` at the n-th write: before the API server gets it or, with
    `reached`, after it and before the response is sent back."""

    def hook(n: int, method: str, path: str) -> Fault | None:
        if n != number:
            return None
        return Cut("after" if reached else "before", then=kill)

    return hook


@dataclass
class _Rule:
    fault: Fault
    when: Predicate
    times: int | None


# ---- the proxy ----------------------------------------------------------------------------------


class FaultProxy:
    """The proxy: a context manager. Its certificate and kubeconfig are written to `folder`."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._upstream = _Upstream(kubeconfig, folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []
        self._requests: list[Request] = []
        self._num_writes = 0
        self._watches: dict[asyncio.Transport, Request] = {}
        self._versions = _Versions()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._problem: BaseException | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self.kubeconfig = folder / "fault-proxy.kubeconfig"
        """The kubeconfig of the operator under test."""
        self.on_write: WriteHook | None = None
        """Called with (n, method, path) for each write, from 1; it returns the fault of the
        write."""

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_SECONDS) or self._problem:
            raise RuntimeError("the proxy did not start") from self._problem
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)

    def add(self, fault: Fault, when: Predicate, times: int | None = 1) -> None:
        """Apply the fault to the next `times` requests that match; None: to all. Of several faults
        that match, the oldest is applied."""
        with self._lock:
            self._rules.append(_Rule(fault, when, times))

    def heal(self) -> None:
        """Remove all faults and the hook."""
        with self._lock:
            self._rules.clear()
        self.on_write = None

    def drop_watches(self, when: Predicate = anything) -> int:
        """Break every running watch that matches; return their number."""
        with self._lock:
            dropped = [each for each, request in self._watches.items() if when(request)]
        for transport in dropped:
            self._loop.call_soon_threadsafe(transport.abort)
        return len(dropped)

    def requests(self, when: Predicate = anything) -> list[Request]:
        """Return all requests so far that match, in order, with and without a fault."""
        with self._lock:
            return [request for request in self._requests if when(request)]

    def count(self, verb: str, path: str = "") -> int:
        return len(self.requests(on(verb, path)))

    @property
    def num_writes(self) -> int:
        """Number of requests that are writes (`Request.is_write`)."""
        return self._num_writes

    # ---- in the proxy's thread --------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._problem = error
            raise
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        certificate, key = write_certificate(self._folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        async with self._upstream.opened():
            server = web.Server(self._handle, handler_cancellation=True)
            runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
                port = runner.addresses[0][1]
                self._upstream.write_kubeconfig(self.kubeconfig, port, certificate)
                self._ready.set()
                await self._stop.wait()
            finally:
                await runner.cleanup()

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        body = await incoming.content.read()
        watches = incoming.method == "GET" and incoming.query.get("watch") in ("1", "true", "True")
        verb = "WATCH" if watches else incoming.method
        request = Request(verb, incoming.path, dict(incoming.query), body)
        fault = self._note(request)
        match fault:
            case Answer():
                return _refusal(fault)
            case Gone():
                return _gone()
            case Cut("before"):
                fault.then()
                return _cut(incoming)
            case Stale() if old := self._versions.older(request, fault.versions):
                return web.Response(body=old, content_type="application/json")
            case Delay() if verb != "WATCH":
                await asyncio.sleep(fault.seconds)
        try:
            return await self._pass_on(incoming, request, fault, body)
        except aiohttp.ClientError:  # the API server is down: its clients lose their connections
            return _cut(incoming)

    async def _pass_on(
        self, incoming: web.BaseRequest, request: Request, fault: Fault | None, body: bytes
    ) -> web.StreamResponse:
        verb = request.verb
        async with self._upstream.send(incoming, body) as answer:
            if verb == "WATCH" and answer.status == 200:
                lag = fault.seconds if isinstance(fault, Delay) else 0.0
                return await self._stream(incoming, request, answer, lag)
            content = await answer.read()
            if answer.status < 300:
                self._versions.note_answer(request, content)
            if isinstance(fault, Cut):
                fault.then()
                return _cut(incoming)
            return web.Response(body=content, status=answer.status, headers=_headers(answer))

    def _note(self, request: Request) -> Fault | None:
        """Record the request and return its fault; None: none."""
        with self._lock:
            self._requests.append(request)
            self._num_writes += request.is_write
            number = self._num_writes
            rule = next((each for each in self._rules if each.when(request)), None)
            if rule is not None and rule.times is not None:
                rule.times -= 1
                if rule.times == 0:
                    self._rules.remove(rule)
        hooked = None
        if request.is_write and self.on_write is not None:
            hooked = self.on_write(number, request.verb, request.path)
        return hooked or (rule.fault if rule else None)

    async def _stream(
        self,
        incoming: web.BaseRequest,
        request: Request,
        answer: aiohttp.ClientResponse,
        lag: float,
    ) -> web.StreamResponse:
        outgoing = web.StreamResponse(status=answer.status, headers=_headers(answer))
        await outgoing.prepare(incoming)
        transport = incoming.transport
        if transport is None:
            raise ConnectionResetError
        with self._lock:
            self._watches[transport] = request
        try:
            async for line in answer.content:
                if lag:
                    await asyncio.sleep(lag)
                await outgoing.write(line)
                self._versions.note_event(request, line)
            await outgoing.write_eof()
        finally:
            with self._lock:
                self._watches.pop(transport, None)
        return outgoing


class _Versions:
    """The versions of objects and lists that passed through the proxy, oldest first."""

    def __init__(self) -> None:
        self._known: dict[str, list[bytes]] = {}

    def older(self, request: Request, versions: int) -> bytes | None:
        known = self._known.get(_subject(request), []) if request.verb == "GET" else []
        return known[max(0, len(known) - 1 - versions)] if known else None

    def note_answer(self, request: Request, content: bytes) -> None:
        if request.verb in ("GET", "PUT", "PATCH"):
            self._note(_subject(request), content)
        elif request.verb == "POST":
            with suppress(ValueError, KeyError, TypeError):
                name = json.loads(content)["metadata"]["name"]
                self._note(f"{request.path}/{name}", content)

    def note_event(self, request: Request, line: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError):
            changed = json.loads(line)["object"]
            path = _path_of(request.path, changed["metadata"])
            self._note(path, json.dumps(changed).encode())

    def _note(self, subject: str, content: bytes) -> None:
        known = self._known.setdefault(subject, [])
        if not known or _version(known[-1]) != _version(content):
            known.append(content)
            del known[:-NUM_VERSIONS]


def _subject(request: Request) -> str:
    """Return the key of an object or list: the path, for a list with its selectors."""
    which = {key: request.query[key] for key in sorted(request.query) if key.endswith("Selector")}
    path = request.path.removesuffix("/status")
    return f"{path}?{which}" if which else path


def _path_of(collection: str, metadata: Mapping[str, str]) -> str:
    """Return the object's path; the watched collection may span all namespaces."""
    namespace = metadata.get("namespace")
    if namespace and "/namespaces/" not in collection:
        above, _, plural = collection.rpartition("/")
        collection = f"{above}/namespaces/{namespace}/{plural}"
    return f"{collection}/{metadata['name']}"


def _version(content: bytes) -> object:
    try:
        return json.loads(content)["metadata"]["resourceVersion"]
    except (ValueError, KeyError, TypeError):
        return content


# ---- the API server behind it -------------------------------------------------------------------


class _Upstream:
    """The real API server, reached as the kubeconfig's user or with the caller's token."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        context = _named(config["contexts"], config["current-context"])["context"]
        self._cluster = _named(config["clusters"], context["cluster"])["cluster"]
        self._user = _named(config["users"], context["user"])["user"]
        self._namespace = context.get("namespace", "default")
        self._folder = folder

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        bare, known = self._tls(), self._tls()
        certificate = self._file(self._user, "client-certificate")
        if certificate:
            known.load_cert_chain(certificate, self._file(self._user, "client-key"))
        headers = {"Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._sessions = []
        for context in (bare, known):
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=0),
                timeout=timeout,
                headers=headers,
                read_bufsize=LINE_BYTES,
                auto_decompress=False,
            )
            self._sessions.append(session)
        try:
            yield
        finally:
            for session in self._sessions:
                await session.close()

    @asynccontextmanager
    async def send(
        self, incoming: web.BaseRequest, body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # With a client certificate, API servers would ignore the token.
        bare, known = self._sessions
        headers = {
            key: value
            for key, value in incoming.headers.items()
            if key.lower() not in HOP_BY_HOP | {"accept-encoding"}
        }
        session = bare if "Authorization" in headers else known
        if session is known and "token" in self._user:
            headers["Authorization"] = f"Bearer {self._user['token']}"
        url = self._cluster["server"].rstrip("/") + incoming.raw_path
        async with session.request(
            incoming.method,
            URL(url, encoded=True),
            data=body or None,
            headers=headers,
            allow_redirects=False,
        ) as answer:
            yield answer

    def write_kubeconfig(self, path: Path, port: int, certificate: Path) -> None:
        cluster = {
            "server": f"https://127.0.0.1:{port}",
            "certificate-authority": str(certificate),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": cluster}],
            "users": [{"name": "proxy", "user": self._user}],
            "contexts": [
                {
                    "name": "proxy",
                    "context": {"cluster": "proxy", "user": "proxy", "namespace": self._namespace},
                }
            ],
        }
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._file(self._cluster, "certificate-authority"))

    def _file(self, holder: Mapping[str, str], key: str) -> str | None:
        """Return the path of a file that a kubeconfig names or contains."""
        if data := holder.get(f"{key}-data"):
            path = self._folder / f"fault-proxy-{key}"
            path.write_bytes(base64.b64decode(data))
            return str(path)
        return holder.get(key)


def _named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(entry for entry in entries if entry["name"] == name)


# ---- answers ------------------------------------------------------------------------------------


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {key: value for key, value in answer.headers.items() if key.lower() not in HOP_BY_HOP}


def _cut(incoming: web.BaseRequest) -> web.StreamResponse:
    if incoming.transport is not None:
        incoming.transport.abort()
    raise ConnectionResetError("cut by the test")


def _refusal(fault: Answer) -> web.Response:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    body = _status(fault.code, fault.reason or REASONS.get(fault.code, "InternalError"))
    return web.json_response(body, status=fault.code, headers=headers)


REASONS = {
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


def _gone() -> web.Response:
    """Return the error as API servers send it: within a stream whose status is 200."""
    event = {"type": "ERROR", "object": _status(410, "Expired")}
    return web.Response(body=json.dumps(event).encode() + b"\n", content_type="application/json")


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "message": f"{reason}: a fault made by the test",
        "reason": reason,
        "code": code,
    }
