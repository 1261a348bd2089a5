"""Measure Tuneyard's operator with many active jobs, on a real API server.

    .venv/bin/python benchmarks/operator_active.py --jobs 10000

A third of the jobs wait in a queue, a third are suspended, and a third run.
The API server, etcd, the jobs, the RayJobs, the pods and the tokens are real.
What a cluster adds is played:

- Kueue is absent: the RayJobs of queued jobs stay suspended.
- KubeRay is absent: each running job gets the status of a running RayJob and a head pod.
- No kubelet runs the pods: a client posts progress for each of them over TLS with the pod's token,
  on a new connection each time, as a driver does.

The operator runs as a process of its own.
The benchmark prints the requests to the API server per second while nothing but progress happens,
the age of the progress in the statuses, the memory, and how long a restarted operator takes until
it has reconciled every job.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import ssl
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from operator_burst import JOBS, NUM_CLIENTS, RAYJOBS, job_manifest, mib, percentile
from operator_burst_api import NAMESPACE, Api, Object, api_server, connect, report
from operator_burst_process import Candidate, Operator
from rig.ports import Reservation
from rig.rig import Rig

from tuneyard.api.pods import CA_VARIABLE, PROGRESS_URL_VARIABLE
from tuneyard.rendering.names import audience

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
TOKENS = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default/token"
MERGE = "application/merge-patch+json"
QUEUED, SUSPENDED, RUNNING = "queued", "suspended", "running"
COMMAND = (
    "{{python}} -c 'from tuneyard.cli.main import main; main()' operator --identity active"
    " --metrics-port {metrics} --progress-port {progress}"
    " --progress-url https://127.0.0.1:{progress} --progress-writes {writes}"
)


@dataclass
class Pod:
    """A running attempt's head pod, as its driver knows it."""

    job: str
    url: str
    ca: str
    token: str
    step: int = 0


@dataclass
class Posts:
    """The posts of all pods, and what became of them."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


# ---- the cluster --------------------------------------------------------------------------------


def manifest_of(number: int) -> Object:
    """Return a job that will be queued, suspended or running."""
    kind = (QUEUED, SUSPENDED, RUNNING)[number % 3]
    manifest = job_manifest(f"{kind}-{number:05}")
    if kind == QUEUED:
        labels = {"kueue.x-k8s.io/queue-name": "absent"}
        manifest = {**manifest, "metadata": {**manifest["metadata"], "labels": labels}}
    if kind == SUSPENDED:
        manifest = {**manifest, "spec": {**manifest["spec"], "runPolicy": {"suspend": True}}}
    return manifest


async def for_each(items: Sequence[Object], work: Callable[[Object], Awaitable[None]]) -> None:
    """Work on all items, with a few clients."""
    waiting = iter(items)

    async def client() -> None:
        for item in waiting:
            await work(item)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


async def play_running(api: Api) -> list[Pod]:
    """Give each RayJob of a running job its status, its head pod and the pod's token."""
    pods: list[Pod] = []

    async def play(ray_job: Object) -> None:
        name, labels = ray_job["metadata"]["name"], ray_job["metadata"]["labels"]
        status = {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running", "startTime": _now()}
        await api.write_status(f"{RAYJOBS}/{name}", {**status, "rayClusterName": name})
        template = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        pod = {
            "metadata": {
                "name": f"{name}-head",
                "labels": {**template["metadata"]["labels"], "ray.io/node-type": "head"},
            },
            # The scheduler leaves it alone, and so does the garbage collector of pods.
            "spec": {**template["spec"], "schedulerName": "played"},
        }
        await api.create(PODS, pod)
        await api.write_status(f"{PODS}/{name}-head", {"phase": "Running"})
        job = labels["tuneyard.io/job"]
        reference = {"kind": "Pod", "apiVersion": "v1", "name": f"{name}-head"}
        spec = {
            "expirationSeconds": 7200,
            "audiences": [audience("FineTuneJob", NAMESPACE, job)],
            "boundObjectRef": reference,
        }
        created = await api.call("POST", TOKENS, {"spec": spec})
        env = {e["name"]: e.get("value", "") for e in template["spec"]["containers"][0]["env"]}
        url, ca = env[PROGRESS_URL_VARIABLE], env[CA_VARIABLE]
        pods.append(Pod(job, url, ca, created["status"]["token"]))
        if len(pods) % 500 == 0:
            report(f"  {len(pods)} running")

    ray_jobs = await all_of(api, RAYJOBS)
    running = [each for each in ray_jobs if each["metadata"]["name"].startswith(RUNNING)]
    await for_each(running, play)
    return pods


async def all_of(api: Api, path: str) -> list[Object]:
    """Return all objects of a collection, read page by page."""
    items: list[Object] = []
    token = ""
    while True:
        page = await api.call("GET", f"{path}?limit=500&continue={token}")
        items += page["items"]
        token = page["metadata"].get("continue") or ""
        if not token:
            return items


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- the drivers --------------------------------------------------------------------------------


async def post_progress(pods: Sequence[Pod], every_seconds: float, posts: Posts) -> None:
    """Post the progress of all pods, evenly spread over time, until canceled."""
    context = ssl.create_default_context(cadata=pods[0].ca)
    connector = aiohttp.TCPConnector(ssl=context, force_close=True, limit=32)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        tasks = set[asyncio.Task[None]]()
        began, count = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * len(pods) / every_seconds)
            while count < due and len(tasks) < 256:
                task = asyncio.create_task(_post(session, pods[count % len(pods)], posts))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                count += 1
            await asyncio.sleep(0.05)


async def _post(session: aiohttp.ClientSession, pod: Pod, posts: Posts) -> None:
    pod.step += 1
    stage = {"name": "sft", "kind": "sft", "state": "Running", "startedAt": "2026-01-01T00:00:00Z"}
    metrics = {"loss": 1.5 / pod.step, "learningRate": 2e-4, "tokensPerSecond": 9000.0}
    body = {
        "trainerStatus": {
            "progressPercentage": min(99, pod.step // 10),
            "estimatedRemainingSeconds": 3600,
            "metrics": [{"name": name, "value": value} for name, value in metrics.items()],
        },
        "tuneyard": {
            "attempt": 1,
            "stage": "sft",
            "step": pod.step,
            "totalSteps": 10_000,
            "stages": [{**stage, "metrics": metrics}],
        },
    }
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {pod.token}", "Content-Type": "application/json"}
    try:
        async with session.post(pod.url, data=json.dumps(body), headers=headers) as response:
            await response.read()
            if response.status == 200:
                posts.accepted += 1
                posts.seconds.append(time.monotonic() - began)
            else:
                posts.refused[str(response.status)] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        posts.refused[type(error).__name__] += 1


# ---- measurements -------------------------------------------------------------------------------


async def num_reconciled(port: int) -> int:
    """Return how many jobs the operator has reconciled since its start; 0: it does not respond."""
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"http://127.0.0.1:{port}/metrics") as response,
        ):
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return 0
    return int(sum(map(float, re.findall(r"^tuneyard_jobs\{[^}]*\} (\S+)$", text, re.M))))


async def until_reconciled(port: int, num_jobs: int, operator: Operator) -> float:
    """Wait until every job was reconciled; return the seconds since the operator's start."""
    while (found := await num_reconciled(port)) < num_jobs:
        operator.check()
        if time.monotonic() - operator.started > 1800:
            raise SystemExit(f"after 1800 s {found} of {num_jobs} jobs are reconciled")
        await asyncio.sleep(0.5)
    return time.monotonic() - operator.started


async def until_all_have_progress(api: Api, num_running: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        found = len(await ages(api))
        report(f"  {found} of {num_running} statuses have progress")
        if found == num_running:
            return
        await asyncio.sleep(5)


async def ages(api: Api) -> list[float]:
    """Return the seconds since the measurement of each progress in a status."""
    now = datetime.now(UTC)
    times = [
        job["status"]["progress"]["lastUpdatedTime"]
        for job in await all_of(api, JOBS)
        if (job.get("status") or {}).get("progress")
    ]
    return [(now - datetime.fromisoformat(text)).total_seconds() for text in times]


async def measure(rig: Rig, logs: Path, arguments: argparse.Namespace) -> dict[str, str]:
    rows: dict[str, str] = {}
    with Reservation() as ports:
        metrics, progress = ports.take(), ports.take()
        command = COMMAND.format(
            metrics=metrics, progress=progress, writes=arguments.progress_writes
        )
        candidate = Candidate("tuneyard", command)
        async with connect(rig.kubeconfig) as api:
            pods = await prepare(candidate, rig, logs, api, metrics, arguments.jobs)
            posts = Posts()
            with candidate.running(rig, logs) as operator:
                took = await until_reconciled(metrics, arguments.jobs, operator)
                rows["restart to all jobs reconciled"] = f"{took:.1f} s"
                report(f"restart: {took:.1f} s")
                rows["memory after the restart"] = mib(operator.memory())
                posting = asyncio.create_task(post_progress(pods, arguments.post_seconds, posts))
                await until_all_have_progress(api, len(pods), 300)
                await asyncio.sleep(arguments.settle_seconds)
                rows |= await steady(api, operator, posts, arguments.seconds)
                posting.cancel()
    return rows


async def prepare(
    candidate: Candidate, rig: Rig, logs: Path, api: Api, metrics: int, num_jobs: int
) -> list[Pod]:
    """Create all jobs while an operator runs, and play the running ones."""
    with candidate.running(rig, logs) as operator:
        report(f"creating {num_jobs} jobs")

        async def create(manifest: Object) -> None:
            await api.create(JOBS, manifest)

        await for_each([manifest_of(number) for number in range(num_jobs)], create)
        took = await until_reconciled(metrics, num_jobs, operator)
        report(f"all jobs are reconciled after {took:.0f} s; playing the running ones")
        pods = await play_running(api)
        await operator.wait_until_idle()
        report(f"idle with {mib(operator.memory())}, peak {mib(operator.peak_memory())}")
        return pods


async def steady(api: Api, operator: Operator, posts: Posts, seconds: float) -> dict[str, str]:
    """Measure while only progress is posted."""
    before, spent, accepted = await requests(api), operator.processor_seconds(), posts.accepted
    posts.seconds.clear()
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    made = await requests(api) - before
    rows = {
        "posts accepted per second": f"{(posts.accepted - accepted) / took:.1f}",
        "posts refused, all in all": str(dict(posts.refused) or 0),
        "post answered after, p50": f"{statistics.median(posts.seconds) * 1000:.0f} ms",
        "post answered after, p99": f"{percentile(posts.seconds, 0.99) * 1000:.0f} ms",
        "processor of the operator": f"{(operator.processor_seconds() - spent) / took:.2f} cores",
        "requests to the API server per second": f"{sum(made.values()) / took:.1f}",
    }
    rows |= {f"  {name}": f"{count / took:.2f}" for name, count in sorted(made.items()) if count}
    found = await ages(api)
    rows["age of the progress in a status, p50"] = f"{statistics.median(found):.0f} s"
    rows["age of the progress in a status, p99"] = f"{percentile(found, 0.99):.0f} s"
    rows["memory"] = mib(operator.memory())
    rows["memory, peak"] = mib(operator.peak_memory())
    return rows


OPERATED = ("finetunejobs", "alignmentjobs", "rayjobs", "pods", "configmaps", "events", "leases")


async def requests(api: Api) -> Counter[str]:
    """Return the number of requests so far for what the operator reads and writes, by verb and
    resource. Leases include those of the control plane."""
    count: Counter[str] = Counter()
    for label, value in await api.request_counts():
        if label["resource"] in (*OPERATED, "tokenreviews"):
            resource = "/".join(filter(None, (label["resource"], label["subresource"])))
            count[f"{label['verb']} {resource}"] += value
    return count


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder, api_server() as rig:
        logs = arguments.logs or Path(folder)
        rows = asyncio.run(measure(rig, logs, arguments))
    title = f"{arguments.jobs:,} active jobs, {arguments.jobs // 3:,} of them running"
    width = max(len(title), *map(len, rows))
    print(title)
    for label, value in rows.items():
        print(f"{label:{width}}  {value:>12}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=10_000, help="number of active jobs")
    parser.add_argument(
        "--post-seconds", type=float, default=15, help="seconds between two posts of one pod"
    )
    parser.add_argument(
        "--progress-writes", type=int, default=20, help="the operator's option of this name"
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long to measure")
    parser.add_argument(
        "--settle-seconds", type=float, default=60, help="how long to wait before that"
    )
    parser.add_argument("--logs", type=Path, help="folder that keeps the operator's logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
