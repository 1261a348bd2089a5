"""The status server: training pods post their progress here and learn whether to stop.

A pod authenticates with a token that is bound to the pod and to one job's audience; the API server
reviews the token. The attempt, and whether the pod only prepares data, are read from the pod's
labels, never trusted from the post.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from tuneyard.api.job_facts import FitAnswer
from tuneyard.api.meta import GROUP, Report
from tuneyard.api.progress import MAX_POST_BYTES, PROGRESS_ROUTE, Post, PostResponse, Refusal
from tuneyard.controller import metrics
from tuneyard.controller.cluster import ApiError, Cluster, Key
from tuneyard.controller.job_cache import key_from_labels
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.review_limits import (
    FIRST_REVIEW_SECONDS,
    RETRY_SECONDS,
    Recent,
    ReviewLimits,
    TooManyReviews,
    review_seconds,
)
from tuneyard.errors import ManifestError
from tuneyard.rendering.names import PREPARE_ROLE, audience
from tuneyard.status import observed
from tuneyard.status.observe import Job, is_finished, should_stop
from tuneyard.status.observed import Pod

_KINDS = {"finetunejobs": "FineTuneJob", "alignmentjobs": "AlignmentJob"}

REFUSAL_SECONDS = 10.0
"""How long the review of a token that was refused is cached."""
MOST_PODS, MOST_REFUSALS = 20_000, 1_000
"""Most cached reviews of valid tokens and of refused ones."""
ENDED_SECONDS = 10.0
"""How long it is remembered that a pod's job or attempt has ended, which is read from the API
server: that job is in no cache."""
READ_SECONDS = 10.0
"""How long a post may take to arrive."""
CONNECTION_SECONDS = 60.0
"""A connection is closed when it is between one and two times as old. aiohttp waits without a limit
for a first request, and a pod opens a connection for each post."""
STORED_SECONDS = 20.0
"""How long the response to an attempt's last post waits for the status write."""
MALFORMED_RETRY_SECONDS = 30
"""When a driver posts again whose job cannot be read: the job or the operator must change first."""
_Token = tuple[str, Key]
"""The hash of a token, and the job that it was sent for."""
_POD = "authentication.kubernetes.io/pod-name"


class Refused(Exception):  # noqa: N818 - a response, not a defect
    """The response to a refused post. Status 409 ends the sender's attempt."""

    def __init__(
        self, status: int, outcome: str, message: str, retry_after: int | None = None
    ) -> None:
        self.status, self.outcome, self.message = status, outcome, message
        self.retry_after = retry_after
        super().__init__(message)


class StatusServer:
    """Check posts and hand them to the reconciler."""

    def __init__(
        self, cluster: Cluster, reconciler: Reconciler, is_active: Callable[[], bool]
    ) -> None:
        """Make a server. `is_active` returns whether this replica is the active one."""
        self._cluster, self._reconciler, self._is_active = cluster, reconciler, is_active
        self._authenticated_pods: Recent[_Token, Pod] = Recent(MOST_PODS, FIRST_REVIEW_SECONDS)
        self._refusals: Recent[_Token, tuple[int, str, str]] = Recent(
            MOST_REFUSALS, REFUSAL_SECONDS
        )
        self._ended: Recent[tuple[Key, str, str], bool] = Recent(MOST_REFUSALS, ENDED_SECONDS)
        self._limits = ReviewLimits()
        self._runner: web.AppRunner | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self, port: int, context: ssl.SSLContext) -> int:
        """Start to listen and return the port. Raises OSError."""
        app = web.Application(client_max_size=MAX_POST_BYTES)
        app.router.add_post(PROGRESS_ROUTE, self._post)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,  # a decompressed body can be a thousand times as long
            lingering_time=1.0,  # for the rest of a refused post; the process's end waits for it
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, port=port, ssl_context=context).start()
        self._closing = asyncio.create_task(_close_old_connections(self._runner))
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._closing:
            self._closing.cancel()
        if self._runner:
            await self._runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        try:
            response = await self._accept(request)
        except Refused as refused:
            metrics.POSTS.labels(refused.outcome).inc()
            headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
            body = Refusal(message=refused.message, superseded=refused.status == 409)
            return _json(body, status=refused.status, headers=headers)
        metrics.POSTS.labels("accepted").inc()
        return _json(response)

    async def _accept(self, request: web.Request) -> PostResponse:
        """Return the response to a valid post. Raises Refused."""
        if not self._is_active():
            raise Refused(503, "standby", "this replica is not the active one", retry_after=1)
        kind = _KINDS.get(request.match_info["plural"])
        if kind is None:
            raise Refused(
                404, "malformed", "the path names no kind of job: use finetunejobs or alignmentjobs"
            )
        key = Key(kind, request.match_info["namespace"], request.match_info["name"])
        pod = await self._pod_of(request, key)
        post = await _read(request)
        if post.tuneyard is not None and post.tuneyard.attempt != pod.attempt:
            raise Refused(409, "stale", f"the pod belongs to attempt {pod.attempt}")
        return await self._deliver(key, pod, _as_sent_by(pod, post))

    async def _deliver(self, key: Key, pod: Pod, post: Post) -> PostResponse:
        """Hand a post to the reconciler; wait until its outcome, if any, is stored. Raises
        Refused."""
        sender = (key, pod.name, pod.job_uid)
        if self._ended.get(sender):
            return PostResponse(stop=True)
        try:
            job = await self._reconciler.current(key, pod)
        except ApiError as error:
            raise Refused(503, "unavailable", str(error), retry_after=2) from error
        except ManifestError as error:
            # Another version of the operator may have written the job: the attempt goes on.
            message = f"this version of the operator cannot read the job: {error}"
            raise Refused(503, "unavailable", message, MALFORMED_RETRY_SECONDS) from error
        if job is None:
            # The pod is removed next, and a new job may have the name already. The pod may save a
            # checkpoint, because that job starts no attempt while it exists.
            self._ended.put(sender, True)
            return PostResponse(stop=True)
        attempt = pod.attempt
        newest = job.status.attempts[-1] if job.status and job.status.attempts else None
        if newest is None or newest.number < attempt:
            raise Refused(
                503, "unavailable", "the operator does not know this attempt yet", retry_after=2
            )
        if newest.number > attempt:
            raise Refused(409, "stale", f"attempt {attempt} is not the newest attempt")
        if newest.finished_at:
            # For example, a queue evicted the attempt. It may save a checkpoint, because no other
            # attempt starts while its pods exist. A driver that ended on its own has already posted
            # its outcome.
            self._ended.put(sender, True)
            return PostResponse(stop=True)
        fit = await self._fit(key, job, attempt, post)
        self._reconciler.accept_post(key, job.metadata.uid or "", post)
        if post.tuneyard is not None and post.tuneyard.outcome is not None:
            await self._until_stored(key, pod)
        return PostResponse(stop=should_stop(job) or is_finished(job), fit=fit)

    async def _fit(self, key: Key, job: Job, attempt: int, post: Post) -> FitAnswer | None:
        """Return the answer to a post that asks whether the job fits. None: it does not ask, or
        the attempt has ended. Raises Refused."""
        report = post.tuneyard
        if report is None or report.facts is None or report.outcome is not None:
            return None
        try:
            return await self._reconciler.fit_of(key, job, attempt, report.facts)
        except ApiError as error:
            raise Refused(503, "unavailable", str(error), retry_after=2) from error

    async def _until_stored(self, key: Key, pod: Pod) -> None:
        """Wait until the attempt is closed in the status. Raises Refused after STORED_SECONDS."""
        deadline = time.monotonic() + STORED_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            try:
                job = await self._reconciler.current(key, pod)
            except (ApiError, ManifestError):
                continue
            attempts = job.status.attempts if job and job.status else []
            if not attempts or attempts[-1].number != pod.attempt or attempts[-1].finished_at:
                return
        raise Refused(503, "unavailable", "the status could not be written yet", retry_after=2)

    # ---- authentication ---------------------------------------------------------------------

    async def _pod_of(self, request: web.Request, key: Key) -> Pod:
        """Return the sender's pod. Raises Refused."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(401, "unauthorized", "a bearer token is required")
        if not token.isascii():
            raise Refused(401, "unauthorized", "the token contains a character that no token has")
        known = (hashlib.sha256(token.encode()).hexdigest(), key)
        if refusal := self._refusals.get(known):
            raise Refused(*refusal)
        pod = self._authenticated_pods.get(known)
        if pod is None:
            pod = await self._review_within_limits(token, key, request.remote or "", known)
            seconds = review_seconds(len(self._authenticated_pods))
            self._authenticated_pods.put(known, pod, seconds)
        return pod

    async def _review_within_limits(self, token: str, key: Key, address: str, known: _Token) -> Pod:
        """Review a token that is not cached. Raises Refused."""
        try:
            async with self._limits.review(address):
                return await self._review(token, key)
        except TooManyReviews as error:
            raise Refused(429, "limited", str(error), retry_after=RETRY_SECONDS) from error
        except ApiError as error:
            raise Refused(503, "unavailable", str(error), retry_after=2) from error
        except Refused as refused:
            self._limits.count_refusal(address)
            self._refusals.put(known, (refused.status, refused.outcome, refused.message))
            raise

    async def _review(self, token: str, key: Key) -> Pod:
        """Return the pod of a token that is valid for the job. Raises Refused, ApiError."""
        expected = audience(key.kind, key.namespace, key.name)
        status = await self._cluster.review_token(token, expected)
        if not status.get("authenticated") or expected not in (status.get("audiences") or ()):
            raise Refused(401, "unauthorized", f"the token is not valid for audience {expected}")
        user: dict[str, Any] = status.get("user") or {}
        if not str(user.get("username")).startswith(f"system:serviceaccount:{key.namespace}:"):
            raise Refused(
                403, "forbidden", f"the token does not belong to namespace {key.namespace}"
            )
        names = (user.get("extra") or {}).get(_POD) or [""]
        pod = await self._cluster.pod(key.namespace, names[0]) if names[0] else None
        if pod is None or key_from_labels(pod) != key:
            raise Refused(
                403, "forbidden", f"the token belongs to no pod with label {GROUP}/job={key.name}"
            )
        return observed.pod(pod)


def _as_sent_by(pod: Pod, post: Post) -> Post:
    """Return a post that says of its pod what the pod's labels say: a pod that prepares data cannot
    report the success of the job, and its time counts once."""
    if post.tuneyard is None:
        return post
    report = post.tuneyard.model_copy(update={"preparing": pod.role == PREPARE_ROLE})
    return post.model_copy(update={"tuneyard": report})


async def _close_old_connections(runner: web.AppRunner) -> None:
    """Close connections by their age until canceled."""
    known: set[web.RequestHandler] = set()
    while runner.server:
        await asyncio.sleep(CONNECTION_SECONDS)
        open_ = set(runner.server.connections)
        for connection in known & open_:
            connection.force_close()
        known = open_


def _json(body: Report, **more: Any) -> web.Response:
    return web.json_response(body.model_dump(mode="json", by_alias=True), **more)


async def _read(request: web.Request) -> Post:
    """Return the post in a request. Raises Refused."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            text = await request.read()
    except TimeoutError:
        message = f"the post did not arrive within {READ_SECONDS:.0f} s"
        raise Refused(408, "malformed", message) from None
    except web.HTTPRequestEntityTooLarge:
        message = f"the post is longer than {MAX_POST_BYTES} bytes"
        raise Refused(413, "malformed", message) from None
    try:
        return Post.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Refused(400, "malformed", f"{place}: {first['msg']}") from None
