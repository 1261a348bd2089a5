"""The operator under load, on a real API server: Tuneyard's beside a bare kopf operator.

    .venv/bin/python benchmarks/operator_burst.py

First 1,000 FineTuneJobs are created at once: how soon has each its RayJob and its first status?
Then 10,000 finished jobs lie there: what does an idle operator hold in memory, and how soon after a
restart does it act again? KubeRay's kinds are served but KubeRay does not run: it is slower than
either operator and would be all that is measured. In the first half each operator meets an API
server of its own, in the second both meet the same jobs, one after the other.

Times are the benchmark's own: one monotonic clock, from the API server's answer to a creation until
a watch shows what the operator made of it. The API server shares the machine's cores, so beside the
rates stand figures that depend less on the machine: processor time of the operator and its writes
per job; and how many jobs a second the API server takes with no operator at all, where the clients
themselves write the least that a job needs: it, its RayJob and one status.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from operator_burst_api import NAMESPACE, Api, Object, api_server, connected, say
from operator_burst_process import Contender, Operator
from rig.rig import Rig

from tuneyard.manifests.manifest import parse as parse_job
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.rayjob import render

JOBS = f"/apis/tuneyard.io/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
RAYJOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
JOB_LABEL = "tuneyard.io/job"
FINISHED = "Succeeded"

NUM_CLIENTS = 16
POLL_SECONDS = 0.2

BARE_KOPF = "{python} -m kopf run --all-namespaces {benchmarks}/operator_burst_kopf.py"
TUNEYARD = (
    "{python} -c 'from tuneyard.cli.main import main; main()' operator --identity burst"
    " --metrics-port {port1} --progress-port {port2} --progress-url https://127.0.0.1:{port2}"
)

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
spec:
  model: {uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}
  data: {train: [{uri: "pvc://data/train.jsonl"}]}
  adapter: {lora: {}}
  output: {uri: "pvc://models/burst"}
"""


# ---- watching what it does -----------------------------------------------------------------------


@dataclass
class Sightings:
    """When a watch first showed what was made of each job, on the monotonic clock."""

    rayjobs: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, float] = field(default_factory=dict)
    watches: list[asyncio.Task[None]] = field(default_factory=list)

    def check(self) -> None:
        """Raises what ended a watch: without it nothing more would be seen."""
        for watch in self.watches:
            if watch.done():
                watch.result()

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

    seen.watches = [
        asyncio.create_task(follow(JOBS, seen.saw_job)),
        asyncio.create_task(follow(RAYJOBS, seen.saw_rayjob)),
    ]
    await asyncio.sleep(1)  # both watches are open
    try:
        yield seen
    finally:
        for watch in seen.watches:
            watch.cancel()
        await asyncio.gather(*seen.watches, return_exceptions=True)


async def handled(
    names: Sequence[str], seen: Sightings, operator: Operator, timeout_seconds: float
) -> None:
    """Wait until every job has its RayJob and a status."""
    deadline, told = time.monotonic() + timeout_seconds, time.monotonic()
    while not (seen.rayjobs.keys() >= set(names) and seen.statuses.keys() >= set(names)):
        operator.check()
        seen.check()
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


async def without_operator(rig: Rig, num_jobs: int) -> float:
    """Jobs a second when the clients write each job, its RayJob and one status."""
    manifests = [job(f"job-{number:05}") for number in range(num_jobs)]
    # Rendered before the clock starts: only what the API server does is measured.
    waiting = iter([(manifest, ray_job_of(manifest)) for manifest in manifests])
    async with connected(rig.kubeconfig) as api:

        async def client() -> None:
            for manifest, ray_job in waiting:
                name = manifest["metadata"]["name"]
                await api.create(JOBS, manifest)
                await api.create(RAYJOBS, ray_job)
                await api.write_status(f"{JOBS}/{name}", {"phase": "Pending"})

        say(f"no operator: writing {num_jobs} jobs with {NUM_CLIENTS} clients")
        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        return num_jobs / (time.monotonic() - began)


def ray_job_of(manifest: Object) -> Object:
    """What Tuneyard makes of it."""
    parsed = parse_job({**manifest, "metadata": {**manifest["metadata"], "uid": "none"}})
    made: Object = render(plan_job(parsed), parsed, attempt=1).ray_job
    made["metadata"].pop("ownerReferences")
    return made


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
            with api_server() as rig:
                most = asyncio.run(without_operator(rig, arguments.jobs))
            show(f"{arguments.jobs:,} jobs at once", bursts)
            print(f"\nthe API server without any operator takes {most:.0f} jobs/s", flush=True)
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
