"""The operator under load, on a real API server: Tuneyard's beside a bare kopf operator.

    .venv/bin/python benchmarks/operator_burst.py

First 1,000 FineTuneJobs are created at once: how soon has each its RayJob and its first status?
Then 10,000 finished jobs lie there: what does an idle operator hold in memory, and how soon after a
restart does it act again? KubeRay's kinds are served but KubeRay does not run: it is slower than
either operator and would be all that is measured. In the first half each operator meets an API
server of its own, in the second both meet the same jobs, one after the other.

Times are the benchmark's own: one monotonic
clock, from the API server's answer to a creation until a watch shows what the operator made of it.
The API server shares the machine's cores, so beside the rates stand figures that depend less on the
machine: processor time of the operator and its writes per job.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import shlex
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from rig.ports import Reservation  # noqa: E402
from rig.rig import Rig, bring_up, take_down  # noqa: E402

NAMESPACE = "burst"
JOBS = f"/apis/tuneyard.io/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
RAYJOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
JOB_LABEL = "tuneyard.io/job"
FINISHED = "Succeeded"

NUM_CLIENTS = 16
LINE_BYTES = 16 << 20
"""A watch's longest line; aiohttp's default is shorter than some objects."""
POLL_SECONDS = 0.2
QUIET_SECONDS = 3.0
"""An operator is quiet after so long..."""
QUIET_SHARE = 0.05
"""...with less than this share of one core."""

BARE_KOPF = "{python} -m kopf run --all-namespaces {benchmarks}/operator_burst_kopf.py"
TUNEYARD = (
    "{python} -c 'from tuneyard.cli import main; main()' operator --identity burst"
    " --metrics-port {port1} --progress-port {port2} --progress-url https://127.0.0.1:{port2}"
)

Object = dict[str, Any]

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
spec:
  model: {uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}
  data: {train: [{uri: "pvc://data/train.jsonl"}]}
  adapter: {lora: {}}
  output: {uri: "pvc://models/burst"}
"""


# ---- the API server ------------------------------------------------------------------------------


class Api:
    """Just enough of a client, with as little work of its own per request as Python allows."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def call(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> Object:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind}
        url = self._url + path
        async with self._session.request(method, url, data=data, headers=headers) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]}")
            value: Object = json.loads(text)
            return value

    async def create(self, path: str, body: Object) -> None:
        await self.call("POST", path, body)

    async def write_status(self, path: str, status: Object) -> None:
        await self.call(
            "PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json"
        )

    async def has(self, query: str) -> bool:
        return bool((await self.call("GET", query))["items"])

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Every object that is created or changed from now on."""
        version = (await self.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        query = f"{path}?watch=1&resourceVersion={version}"
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            self._url + query, timeout=timeout, read_bufsize=LINE_BYTES
        ) as answer:
            async for line in answer.content:
                yield json.loads(line)["object"]

    async def writes(self) -> Counter[str]:
        """How often each kind of object was written since the server started, by anyone."""
        async with self._session.get(f"{self._url}/metrics") as answer:
            text = await answer.text()
        count: Counter[str] = Counter()
        for labels, value in re.findall(r"^apiserver_request_total\{(.*)\} (\S+)$", text, re.M):
            label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if label["verb"] in ("POST", "PUT", "PATCH", "APPLY", "DELETE"):
                what = "/".join(filter(None, (label["resource"], label["subresource"])))
                count[f"{label['verb']} {what}"] += int(float(value))
        return count


@asynccontextmanager
async def connected(kubeconfig: Path) -> AsyncIterator[Api]:
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Api(cluster["server"], session)


@contextmanager
def api_server() -> Iterator[Rig]:
    """A fresh API server with Tuneyard's and KubeRay's kinds and an empty namespace."""
    say("a fresh API server")
    rig = bring_up("control", kuberay="crds")
    try:
        for command in (
            ("apply", "--server-side", "--filename", str(ROOT / "crds")),
            ("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"),
            ("create", "namespace", NAMESPACE),
        ):
            kubectl = (rig.programs / "kubectl", "--kubeconfig", rig.kubeconfig, *command)
            subprocess.run(kubectl, check=True, stdout=subprocess.DEVNULL)
        yield rig
    finally:
        take_down(rig.state.root)


# ---- the operator under test ---------------------------------------------------------------------


class Operator:
    """One process of the operator, with its children."""

    def __init__(self, name: str, command: Sequence[str], rig: Rig, log: Path) -> None:
        self._name, self._log = name, log
        self.started = time.monotonic()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "KUBECONFIG": str(rig.kubeconfig)},
                stdout=file,
                stderr=file,
            )
        self._family = psutil.Process(self._process.pid)

    def check(self) -> None:
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{self._name} ended with {self._process.returncode}:\n{tail}")

    def memory(self) -> int:
        """Bytes of resident memory."""
        return sum(process.memory_info().rss for process in self._processes())

    def peak_memory(self) -> int:
        """Bytes of resident memory at its highest, as the kernel counted it."""
        kilobytes = 0
        for process in self._processes():
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes += int(re.findall(r"^VmHWM:\s+(\d+)", status, re.M)[0])
        return kilobytes << 10

    def processor_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    async def quiet(self, timeout_seconds: float = 600) -> float:
        """Wait until it has nothing left to do; the monotonic time at which it came to rest."""
        deadline = time.monotonic() + timeout_seconds
        since, spent = time.monotonic(), self.processor_seconds()
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            self.check()
            now, spent_now = time.monotonic(), self.processor_seconds()
            if spent_now - spent > QUIET_SHARE * QUIET_SECONDS:
                since, spent = now, spent_now
            elif now - since > QUIET_SECONDS:
                return since
        raise SystemExit(f"{self._name} was still busy after {timeout_seconds:.0f} s")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        return [self._family, *self._family.children(recursive=True)]


@dataclass(frozen=True)
class Contender:
    """An operator to measure."""

    name: str
    template: str
    """Its command line; {python}, {benchmarks}, {port1} and {port2} are filled in."""

    @contextmanager
    def running(self, rig: Rig, logs: Path) -> Iterator[Operator]:
        with Reservation() as ports:
            filled = self.template.format(
                python=sys.executable,
                benchmarks=ROOT / "benchmarks",
                port1=ports.take(),
                port2=ports.take(),
            )
            operator = Operator(self.name, shlex.split(filled), rig, logs / f"{self.name}.log")
            try:
                yield operator
            finally:
                operator.stop()


# ---- watching what it does -----------------------------------------------------------------------


@dataclass
class Sightings:
    """When a watch first showed what was made of each job, on the monotonic clock."""

    rayjobs: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, float] = field(default_factory=dict)

    def saw_rayjob(self, rayjob: Object) -> None:
        name = rayjob["metadata"].get("labels", {}).get(JOB_LABEL)
        if name:
            self.rayjobs.setdefault(name, time.monotonic())

    def saw_job(self, job: Object) -> None:
        if job.get("status", {}).get("phase"):
            self.statuses.setdefault(job["metadata"]["name"], time.monotonic())


@asynccontextmanager
async def watching(api: Api) -> AsyncIterator[Sightings]:
    seen = Sightings()

    async def follow(path: str, note: Callable[[Object], None]) -> None:
        async for changed in api.watch(path):
            note(changed)

    tasks = [
        asyncio.create_task(follow(JOBS, seen.saw_job)),
        asyncio.create_task(follow(RAYJOBS, seen.saw_rayjob)),
    ]
    await asyncio.sleep(1)  # both watches are open
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def handled(
    names: Sequence[str], seen: Sightings, operator: Operator, timeout_seconds: float
) -> None:
    """Wait until every job has its RayJob and a status."""
    deadline, told = time.monotonic() + timeout_seconds, time.monotonic()
    while not (seen.rayjobs.keys() >= set(names) and seen.statuses.keys() >= set(names)):
        operator.check()
        now = time.monotonic()
        if now > deadline:
            have = f"{len(seen.rayjobs)} RayJobs and {len(seen.statuses)} statuses"
            raise SystemExit(f"after {timeout_seconds:.0f} s {have} for {len(names)} jobs")
        if now > told + 2:
            told = now
            say(f"  {len(seen.rayjobs)} RayJobs, {len(seen.statuses)} statuses")
        await asyncio.sleep(0.05)


# ---- the two halves ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Burst:
    """Many jobs at once."""

    jobs_per_second: float
    """From the first creation until the last job has its RayJob and a status."""
    created_per_second: float
    """What the clients reached: no operator can be faster."""
    to_rayjob: list[float]
    to_status: list[float]
    peak_bytes: int
    after_bytes: int
    processor_seconds_per_job: float
    writes_per_job: dict[str, float]


@dataclass(frozen=True)
class Idle:
    """Many finished jobs."""

    first_seconds: float
    """Until it first came to rest with them."""
    rest_bytes: int
    peak_bytes: int
    restart_seconds: float
    """From a restarted process's start until a job that was created meanwhile has its RayJob."""
    restart_quiet_seconds: float
    restart_bytes: int
    restart_peak_bytes: int
    restart_writes: int


async def burst(contender: Contender, rig: Rig, logs: Path, num_jobs: int) -> Burst:
    names = [f"job-{number:05}" for number in range(num_jobs)]
    async with connected(rig.kubeconfig) as api, watching(api) as seen:
        with contender.running(rig, logs) as operator:
            await warm_up(api, seen, operator)
            spent, wrote = operator.processor_seconds(), await api.writes()
            say(f"{contender.name}: creating {num_jobs} jobs with {NUM_CLIENTS} clients")
            began = time.monotonic()
            created = await create_all(api, names)
            all_created = time.monotonic()
            await handled(names, seen, operator, 120 + num_jobs / 5)
            ended = max(*seen.rayjobs.values(), *seen.statuses.values())
            await operator.quiet()
            written = await api.writes() - wrote
            written["POST finetunejobs"] -= num_jobs
            return Burst(
                jobs_per_second=num_jobs / (ended - began),
                created_per_second=num_jobs / (all_created - began),
                to_rayjob=[seen.rayjobs[name] - created[name] for name in names],
                to_status=[seen.statuses[name] - created[name] for name in names],
                peak_bytes=operator.peak_memory(),
                after_bytes=operator.memory(),
                processor_seconds_per_job=(operator.processor_seconds() - spent) / num_jobs,
                writes_per_job=per_job(written, num_jobs),
            )


async def idle(
    contenders: Sequence[Contender], rig: Rig, logs: Path, num_jobs: int
) -> dict[str, Idle]:
    """One after the other over the very same jobs, which take minutes to create."""
    names = [f"job-{number:05}" for number in range(num_jobs)]
    async with connected(rig.kubeconfig) as api:
        say(f"creating {num_jobs} finished jobs, with no operator there")
        await create_all(api, names, finished_status())
        async with watching(api) as seen:
            return {each.name: await start_twice(each, rig, api, seen, logs) for each in contenders}


async def start_twice(
    contender: Contender, rig: Rig, api: Api, seen: Sightings, logs: Path
) -> Idle:
    with contender.running(rig, logs) as operator:
        await warm_up(api, seen, operator)
        first = await operator.quiet() - operator.started
        rest, peak = operator.memory(), operator.peak_memory()
    say(f"{contender.name}: at rest after {first:.1f} s with {mib(rest)}; restarting it")
    # The last of all by name, and so in the order in which the API server lists them.
    name = "zz-created-meanwhile"
    await api.create(JOBS, job(name))
    wrote = await api.writes()
    with contender.running(rig, logs) as operator:
        await handled([name], seen, operator, 300)
        acted = seen.rayjobs[name] - operator.started
        quiet = await operator.quiet() - operator.started
        written = await api.writes() - wrote
        result = Idle(
            first_seconds=first,
            rest_bytes=rest,
            peak_bytes=peak,
            restart_seconds=acted,
            restart_quiet_seconds=quiet,
            restart_bytes=operator.memory(),
            restart_peak_bytes=operator.peak_memory(),
            restart_writes=sum(written[name] for name in relevant(written)),
        )
        await forget(api, seen, name)
        return result


async def warm_up(api: Api, seen: Sightings, operator: Operator) -> None:
    """One job through the operator: then it has started, connected and imported all it needs."""
    await api.create(JOBS, job("aa-warm-up"))
    await handled(["aa-warm-up"], seen, operator, 300)
    await operator.quiet()
    await forget(api, seen, "aa-warm-up")


async def forget(api: Api, seen: Sightings, name: str) -> None:
    """Delete a job while its operator is there to let it go, and wait until all of it is gone."""
    await api.call("DELETE", f"{JOBS}/{name}")
    deadline = time.monotonic() + 120
    while await api.has(f"{JOBS}?fieldSelector=metadata.name={name}") or await api.has(
        f"{RAYJOBS}?labelSelector={JOB_LABEL}={name}"
    ):
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was deleted and is still there after 120 s")
        await asyncio.sleep(POLL_SECONDS)
    seen.rayjobs.clear()
    seen.statuses.clear()


async def create_all(
    api: Api, names: Sequence[str], status: Object | None = None
) -> dict[str, float]:
    """Create every job as fast as the API server takes them; when each was acknowledged."""
    created: dict[str, float] = {}
    waiting = iter(names)

    async def client() -> None:
        for name in waiting:
            await api.create(JOBS, job(name))
            created[name] = time.monotonic()
            if status is not None:
                await api.write_status(f"{JOBS}/{name}", status)
            if len(created) % 2000 == 0:
                say(f"  {len(created)} created")

    clients: list[Awaitable[None]] = [client() for _ in range(NUM_CLIENTS)]
    await asyncio.gather(*clients)
    return created


def job(name: str) -> Object:
    manifest: Object = _MANIFEST | {"metadata": {"name": name, "namespace": NAMESPACE}}
    return manifest


_MANIFEST: Object = yaml.safe_load(MANIFEST)


def finished_status() -> Object:
    """What a job of four stages leaves behind, at about its usual size."""
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T01:00:00Z"}
    kinds = ("prepare", "sft", "evaluate", "export")
    return {
        "phase": FINISHED,
        "observedGeneration": 1,
        "planDigest": "sha256:" + "0" * 64,
        "conditions": [
            {
                "type": kind,
                "status": status,
                "reason": FINISHED,
                "message": "The job finished and its result was checked.",
                "lastTransitionTime": "2026-01-01T01:00:00Z",
                "observedGeneration": 1,
            }
            for kind, status in (("Planned", "True"), ("Running", "False"), (FINISHED, "True"))
        ],
        "stages": [
            {
                "name": kind,
                "kind": kind,
                "state": FINISHED,
                "digest": "sha256:" + "0" * 64,
                "metrics": {"loss": 0.1, "tokens": 1000000, "seconds": 3600},
                **times,
            }
            for kind in kinds
        ],
        "attempts": [
            {"number": 1, "rayJob": "gone-1", "reason": FINISHED, "message": FINISHED, **times}
        ],
        "result": {"uri": "pvc://models/burst", "metrics": {"lossReduction": 0.5}},
    }


# ---- saying it -----------------------------------------------------------------------------------


def relevant(writes: Mapping[str, int]) -> list[str]:
    """The writes that are an operator's; the control plane's own (leases, nodes) come with time."""
    ours = ("finetunejobs", "rayjobs", "configmaps", "events")
    return sorted(name for name in writes if name.split()[1].split("/")[0] in ours)


def per_job(writes: Mapping[str, int], num_jobs: int) -> dict[str, float]:
    shares = {name: writes[name] / num_jobs for name in relevant(writes)}
    return {name: share for name, share in shares.items() if share >= 0.01}


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


_BEGAN = time.monotonic()


def burst_rows(result: Burst) -> dict[str, str]:
    rows = {
        "jobs/s": f"{result.jobs_per_second:.0f}",
        "  created by the clients, jobs/s": f"{result.created_per_second:.0f}",
    }
    for what, values in (("RayJob", result.to_rayjob), ("first status", result.to_status)):
        rows[f"creation to {what}, p50"] = f"{statistics.median(values):.2f} s"
        rows[f"creation to {what}, p99"] = f"{percentile(values, 0.99):.2f} s"
    rows["memory, peak"] = mib(result.peak_bytes)
    rows["memory, after"] = mib(result.after_bytes)
    rows["processor time per job"] = f"{result.processor_seconds_per_job * 1000:.1f} ms"
    rows["writes per job"] = f"{sum(result.writes_per_job.values()):.1f}"
    rows |= {f"  {name}": f"{share:.2f}" for name, share in result.writes_per_job.items()}
    return rows


def idle_rows(result: Idle) -> dict[str, str]:
    return {
        "first start to rest": f"{result.first_seconds:.1f} s",
        "memory at rest": mib(result.rest_bytes),
        "memory, peak": mib(result.peak_bytes),
        "restart until it acts": f"{result.restart_seconds:.1f} s",
        "restart to rest": f"{result.restart_quiet_seconds:.1f} s",
        "memory at rest, restarted": mib(result.restart_bytes),
        "memory, peak, restarted": mib(result.restart_peak_bytes),
        "writes after the restart": str(result.restart_writes),
    }


def show(title: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    labels = list(dict.fromkeys(label for rows in columns.values() for label in rows))
    width = max(len(title), *map(len, labels))
    print(f"\n{title:{width}}" + "".join(f"{name:>14}" for name in columns))
    for label in labels:
        values = (rows.get(label, "0.00") for rows in columns.values())
        print(f"{label:{width}}" + "".join(f"{value:>14}" for value in values), flush=True)


def main() -> None:
    arguments = parse()
    contenders = [
        Contender("bare-kopf", arguments.bare_kopf),
        Contender("tuneyard", arguments.tuneyard),
    ]
    chosen = [each for each in contenders if arguments.only in (None, each.name)]
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        if arguments.jobs:
            bursts: dict[str, Mapping[str, str]] = {}
            for contender in chosen:
                with api_server() as rig:
                    measured = asyncio.run(burst(contender, rig, logs, arguments.jobs))
                bursts[contender.name] = burst_rows(measured)
            show(f"{arguments.jobs:,} jobs at once", bursts)
        if arguments.idle:
            with api_server() as rig:
                rested = asyncio.run(idle(chosen, rig, logs, arguments.idle))
            idles = {name: idle_rows(each) for name, each in rested.items()}
            show(f"{arguments.idle:,} finished jobs", idles)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000, help="jobs created at once; 0: none")
    parser.add_argument("--idle", type=int, default=10_000, help="finished jobs; 0: none")
    parser.add_argument("--only", choices=["bare-kopf", "tuneyard"], help="one of the operators")
    parser.add_argument("--bare-kopf", default=BARE_KOPF, help="its command line")
    parser.add_argument("--tuneyard", default=TUNEYARD, help="its command line")
    parser.add_argument("--logs", type=Path, help="keep the operators' logs in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
