"""The operator's process: wait to become the active replica, then serve until a signal."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneyard.controller import metrics, watch
from tuneyard.controller.certificates import ServerCertificates
from tuneyard.controller.cluster import Cluster, connect
from tuneyard.controller.lease import Lease
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.resync import Resync
from tuneyard.controller.settings import Settings
from tuneyard.controller.status_server import StatusServer

COLLECT_AFTER = 50_000
"""How many objects are created before Python looks for cycles among them. Its default, 700, is
reached by the JSON of a few jobs: a start with 3,000 jobs took a fifth longer."""

log = logging.getLogger("tuneyard")


async def run(settings: Settings) -> int:
    """Run until SIGTERM, SIGINT or the loss of the Lease; return the exit code. Raises ApiError if
    the cluster refuses a request that the operator depends on."""
    cluster = await connect()
    stop, active = asyncio.Event(), asyncio.Event()
    _stop_on_signal(stop)
    try:
        served = None
        if settings.progress_url:
            served = ServerCertificates(
                cluster, settings.own_namespace, settings.tls_secret, settings.progress_url
            )
            await served.refresh()
        reconciler = Reconciler(cluster, settings, ca=served.ca if served else "")
        server = StatusServer(cluster, reconciler, active.is_set)
        async with (
            _web_server(settings.metrics_port),
            _status_server(server, settings.progress_port, served, reconciler),
        ):
            return await _run_as_leader(cluster, settings, reconciler, stop, active)
    finally:
        await cluster.close()


async def _run_as_leader(
    cluster: Cluster,
    settings: Settings,
    reconciler: Reconciler,
    stop: asyncio.Event,
    active: asyncio.Event,
) -> int:
    """Wait for the Lease, serve while this replica holds it, release it; return the exit code."""
    lease = Lease(cluster, settings.own_namespace, settings.lease, settings.identity)
    log.info("%s waits for Lease %s", settings.identity, settings.lease)
    await _wait_for_first(lease.acquire(), stop.wait())
    if stop.is_set():
        await lease.release()
        return 0
    log.info("%s is the active replica", settings.identity)
    await _wait_for_first(_hold(lease, active), stop.wait(), _serve(settings, reconciler, stop))
    if not stop.is_set():
        # Another replica may hold the Lease: exit at once; a restart recovers the state.
        log.error("the Lease is lost, or the watches have ended: the operator exits")
        return 1
    await lease.release()
    return 0


async def _hold(lease: Lease, active: asyncio.Event) -> None:
    """Be the active replica until the Lease is lost or the caller cancels."""
    active.set()
    metrics.LEADER.set(1)
    try:
        await lease.renew()
    finally:
        active.clear()
        metrics.LEADER.set(0)


async def _serve(settings: Settings, reconciler: Reconciler, stop: asyncio.Event) -> None:
    """Run the reconciler, the watches and the resync until one of them ends: each needs the
    others."""
    resync = Resync(reconciler)
    await _wait_for_first(reconciler.run(), resync.run(), _watch(settings, reconciler, stop))


async def _watch(settings: Settings, reconciler: Reconciler, stop: asyncio.Event) -> None:
    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=watch.registry(reconciler),
        settings=watch.settings(clusterwide=not settings.namespaces),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        stop_flag=stop,
    )
    _stop_on_signal(stop)  # kopf has replaced the signal handlers, and would end alone
    await kopf.run_tasks(tasks, ignored=others)


def _stop_on_signal(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _wait_for_first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one coroutine ends; cancel the others, and return when they have ended, even if
    the caller is canceled: nothing may write after that. Raises the exception of the first."""
    tasks = [asyncio.ensure_future(item) for item in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def _status_server(
    server: StatusServer, port: int, served: ServerCertificates | None, reconciler: Reconciler
) -> AsyncIterator[None]:
    """Listen for posts, with certificates that are renewed meanwhile. `served` None: no posts."""
    if served is None:
        yield
        return
    port = await server.start(port, served.context)
    log.info("the status server listens on port %d", port)
    following = asyncio.create_task(served.follow(reconciler.trust))
    try:
        yield
    finally:
        following.cancel()
        await server.close()


@asynccontextmanager
async def _web_server(port: int) -> AsyncIterator[None]:
    """Serve /metrics, /healthz and /readyz. Both probes succeed while the event loop runs; a
    standby replica is ready too."""

    async def expose(_: web.Request) -> web.Response:
        text = generate_latest(metrics.REGISTRY)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/metrics", expose)
    app.router.add_get("/healthz", healthy)
    app.router.add_get("/readyz", healthy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        log.info("metrics are on port %d", runner.addresses[0][1])
        yield
    finally:
        await runner.cleanup()


def main(settings: Settings) -> int:
    """Set up logging and run the operator; return the exit code."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    gc.set_threshold(COLLECT_AFTER)
    return asyncio.run(run(settings))
