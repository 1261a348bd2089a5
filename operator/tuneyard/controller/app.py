"""The operator's process: waits to be the active replica, then serves until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import kopf
from aiohttp import web
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneyard.controller import certificates, metrics, watch
from tuneyard.controller.cluster import Cluster, connect
from tuneyard.controller.progress import StatusServer
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
"""As in Kubernetes' own controllers: a dead replica is replaced within 17 s."""

log = logging.getLogger("tuneyard")


async def run(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT, or until the Lease is lost; the exit code. Raises ApiError if
    the cluster refuses what the operator cannot do without."""
    cluster = await connect()
    stop, active = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
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
    lost = asyncio.Event()
    lock = LeaseLock(settings.lease, settings.own_namespace, settings.identity, cluster.api)

    async def on_lost() -> None:
        lost.set()

    async def on_won() -> None:
        active.set()

    election = leaderelection.LeaderElection(
        electionconfig.Config(
            lock,
            lease_duration=LEASE_SECONDS,
            renew_deadline=RENEW_SECONDS,
            retry_period=RETRY_SECONDS,
            onstarted_leading=on_won,
            onstopped_leading=on_lost,
        )
    )
    log.info("%s waits for Lease %s", settings.identity, settings.lease)
    candidate = asyncio.create_task(election.run())
    await _first(active.wait(), stop.wait(), candidate)
    if active.is_set():
        metrics.LEADER.set(1)
        log.info("%s is the active replica", settings.identity)
        serving = asyncio.create_task(_serve(settings, reconciler, stop))
        await _first(stop.wait(), lost.wait(), candidate, serving)
        active.clear()
        metrics.LEADER.set(0)
        serving.cancel()
        if lost.is_set() or candidate.done():
            # Whoever holds it now must not find us at work: no tidy end, the next life starts over.
            log.error("the Lease is lost")
            return 1
        with suppress(asyncio.CancelledError):
            await serving
        await _give_back(cluster, settings)
    candidate.cancel()
    return 0


async def _serve(settings: Settings, reconciler: Reconciler, stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reconciler.run())
        tasks.create_task(
            kopf.operator(
                registry=watch.registry(reconciler),
                settings=watch.settings(),
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                stop_flag=stop,
            )
        )


async def _give_back(cluster: Cluster, settings: Settings) -> None:
    """Lets the next replica start at once."""
    try:
        await cluster.release_lease(settings.own_namespace, settings.lease, settings.identity)
    except Exception:
        log.warning("the Lease could not be given back; the next replica waits for its end")


async def _first(*waits: object) -> None:
    """Returns when one of them is done; the others go on, if they are tasks of somebody's."""
    own = {asyncio.ensure_future(item) for item in waits if asyncio.iscoroutine(item)}
    others = {item for item in waits if isinstance(item, asyncio.Task)}
    await asyncio.wait(own | others, return_when=asyncio.FIRST_COMPLETED)
    for task in own:
        task.cancel()


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
