"""The operator's process: waits to be the active replica, then serves until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneyard.controller import certificates, metrics, watch
from tuneyard.controller.cluster import Cluster, connect
from tuneyard.controller.lease import Lease
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings
from tuneyard.controller.status_server import StatusServer

log = logging.getLogger("tuneyard")


async def run(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT, or until the Lease is lost; the exit code. Raises ApiError if
    the cluster refuses what the operator cannot do without."""
    cluster = await connect()
    stop, active = asyncio.Event(), asyncio.Event()
    _end_on_signal(stop)
    try:
        made = None
        if settings.progress_url:
            made = await certificates.ensure(
                cluster, settings.own_namespace, settings.tls_secret, settings.progress_url
            )
        reconciler = Reconciler(cluster, settings, ca=made.ca if made else "")
        async with _web_server(settings.metrics_port):
            server = StatusServer(cluster, reconciler, active.is_set)
            if made:
                port = await server.start(settings.progress_port, made.context())
                log.info("the status server listens on port %d", port)
            try:
                return await _lead(cluster, settings, reconciler, stop, active)
            finally:
                await server.close()
    finally:
        await cluster.close()


async def _lead(
    cluster: Cluster,
    settings: Settings,
    reconciler: Reconciler,
    stop: asyncio.Event,
    active: asyncio.Event,
) -> int:
    """Waits for the Lease, serves while it holds, gives it back."""
    lease = Lease(cluster, settings.own_namespace, settings.lease, settings.identity)
    log.info("%s waits for Lease %s", settings.identity, settings.lease)
    await _first(lease.acquire(), stop.wait())
    if stop.is_set():
        await lease.give_back()
        return 0
    active.set()
    metrics.LEADER.set(1)
    log.info("%s is the active replica", settings.identity)
    await _first(lease.keep(), stop.wait(), _serve(settings, reconciler, stop))
    active.clear()
    metrics.LEADER.set(0)
    if not stop.is_set():
        # Whoever holds it now must not find us at work: no tidy end, the next life starts over.
        log.error("the Lease is lost, or the watches ended by themselves")
        return 1
    await lease.give_back()
    return 0


async def _serve(settings: Settings, reconciler: Reconciler, stop: asyncio.Event) -> None:
    """Until one of the two ends: neither is of use without the other."""
    await _first(reconciler.run(), _watch(settings, reconciler, stop))


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
    _end_on_signal(stop)  # kopf has just taken the signals, and would end alone
    await kopf.run_tasks(tasks, ignored=others)


def _end_on_signal(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Ends all when one is done. Raises what that one raised."""
    tasks = [asyncio.ensure_future(item) for item in waits]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def _web_server(port: int) -> AsyncIterator[None]:
    """/metrics, /healthz and /readyz. Both probes say that the event loop turns; a standby is as
    ready as the active replica."""

    async def show(_: web.Request) -> web.Response:
        text = generate_latest(metrics.REGISTRY)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def well(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/metrics", show)
    app.router.add_get("/healthz", well)
    app.router.add_get("/readyz", well)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        log.info("metrics are on port %d", runner.addresses[0][1])
        yield
    finally:
        await runner.cleanup()


def main(settings: Settings) -> int:
    """The command's body."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    return asyncio.run(run(settings))
