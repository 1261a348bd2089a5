"""Compare Tuneyard's operator under load with a plain kopf operator, on a real API server.

    .venv/bin/python benchmarks/operator_burst.py
    .venv/bin/python benchmarks/operator_burst.py --idle 0 --pairs 3

The burst: clients create 1,000 FineTuneJobs at once.
The benchmark measures how soon each job has its RayJob and its first status.
Each operator gets a new API server.
Afterwards as many jobs are created evenly, at half of the rate that the operator reached.

The idle cluster: 10,000 finished jobs exist.
The benchmark measures the memory of an idle operator and how soon it acts after a restart.
Both operators run against the same jobs, one after the other.

KubeRay's CRDs are installed, but KubeRay does not run.
It is slower than either operator and would hide the difference between them.

All times come from one monotonic clock.
A job's time starts with the API server's response to its creation.
It ends when a watch delivers the operator's RayJob or status.

The API server shares the machine's cores.
The tables therefore also show the operator's processor time and its writes per job, which depend
less on the machine.
A last line shows how many jobs per second the API server takes without any operator.
The clients then write only what a job needs: the job, its RayJob and one status.
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
from operator_burst_api import NAMESPACE, Api, Object, api_server, connect, report
from operator_burst_process import Candidate, Operator
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

PLAIN_KOPF = "{python} -m kopf run --all-namespaces {benchmarks}/operator_burst_kopf.py"
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


# ---- observing the operator ----------------------------------------------------------------------


@dataclass
class Observations:
    """The monotonic time at which a watch first delivered each job's RayJob and status."""

    rayjobs: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, float] = field(default_factory=dict)
    watches: list[asyncio.Task[None]] = field(default_factory=list)

    def check(self) -> None:
        """Raise the error that ended a watch: a benchmark without its watches would wait until the
        timeout."""
        for watch in self.watches:
            if watch.done():
                watch.result()

    def record_rayjob(self, rayjob: Object) -> None:
        name = rayjob["metadata"].get("labels", {}).get(JOB_LABEL)
        if name:
            self.rayjobs.setdefault(name, time.monotonic())

    def record_job(self, job: Object) -> None:
        if job.get("status", {}).get("phase"):
            self.statuses.setdefault(job["metadata"]["name"], time.monotonic())


@asynccontextmanager
async def observe(api: Api) -> AsyncIterator[Observations]:
    """Watch all jobs and RayJobs until the context ends."""
    observed = Observations()

    async def follow(path: str, record: Callable[[Object], None]) -> None:
        async for changed in api.watch(path):
            record(changed)

    observed.watches = [
        asyncio.create_task(follow(JOBS, observed.record_job)),
        asyncio.create_task(follow(RAYJOBS, observed.record_rayjob)),
    ]
    await asyncio.sleep(1)  # until both watches are open
    try:
        yield observed
    finally:
        for watch in observed.watches:
            watch.cancel()
        await asyncio.gather(*observed.watches, return_exceptions=True)


async def wait_until_handled(
    names: Sequence[str], observed: Observations, operator: Operator, timeout_seconds: float
) -> None:
    """Wait until every job has its RayJob and a status; exit after `timeout_seconds`."""
    deadline, reported = time.monotonic() + timeout_seconds, time.monotonic()
    while not (observed.rayjobs.keys() >= set(names) and observed.statuses.keys() >= set(names)):
        operator.check()
        observed.check()
        now = time.monotonic()
        if now > deadline:
            counts = f"{len(observed.rayjobs)} RayJobs and {len(observed.statuses)} statuses"
            raise SystemExit(
                f"{operator.name} wrote {counts} for {len(names)} jobs in {timeout_seconds:.0f} s"
            )
        if now > reported + 2:
            reported = now
            report(f"  {len(observed.rayjobs)} RayJobs, {len(observed.statuses)} statuses")
        await asyncio.sleep(0.05)


# ---- measurements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Burst:
    """The measurements of one operator while many jobs are created at once."""

    jobs_per_second: float
    """From the first creation until the last job has its RayJob and a status."""
    created_per_second: float
    """The rate at which the clients created the jobs: the upper bound of `jobs_per_second`."""
    to_rayjob: list[float]
    """Seconds from each job's creation to its RayJob."""
    to_status: list[float]
    """Seconds from each job's creation to its first status."""
    peak_bytes: int
    after_bytes: int
    processor_seconds_per_job: float
    writes_per_job: dict[str, float]


@dataclass(frozen=True)
class Idle:
    """The measurements of one operator on a cluster with many finished jobs."""

    first_seconds: float
    """From the first start until the operator is idle."""
    idle_bytes: int
    peak_bytes: int
    restart_seconds: float
    """From the restart until a job that was created during the downtime has its RayJob."""
    restart_idle_seconds: float
    """From the restart until the operator is idle."""
    restart_bytes: int
    restart_peak_bytes: int
    restart_writes: int


async def measure_burst(
    candidate: Candidate, rig: Rig, logs: Path, num_jobs: int, rate: float = math.inf
) -> Burst:
    """Create `num_jobs` jobs while the operator runs, at `rate` jobs per second; infinite: at
    once."""
    names = [f"job-{number:05}" for number in range(num_jobs)]
    async with connect(rig.kubeconfig) as api, observe(api) as observed:
        with candidate.running(rig, logs) as operator:
            await warm_up(api, observed, operator)
            spent_before, writes_before = operator.processor_seconds(), await api.writes()
            pace = "at once" if rate == math.inf else f"at {rate:.1f} jobs/s"
            report(f"{candidate.name}: creating {num_jobs} jobs {pace}")
            started = time.monotonic()
            created = await create_all(api, names, rate=rate)
            all_created = time.monotonic()
            await wait_until_handled(names, observed, operator, 120 + num_jobs / 5)
            ended = max(*observed.rayjobs.values(), *observed.statuses.values())
            await operator.wait_until_idle()
            written = await api.writes() - writes_before
            written["POST finetunejobs"] -= num_jobs
            return Burst(
                jobs_per_second=num_jobs / (ended - started),
                created_per_second=num_jobs / (all_created - started),
                to_rayjob=[observed.rayjobs[name] - created[name] for name in names],
                to_status=[observed.statuses[name] - created[name] for name in names],
                peak_bytes=operator.peak_memory(),
                after_bytes=operator.memory(),
                processor_seconds_per_job=(operator.processor_seconds() - spent_before) / num_jobs,
                writes_per_job=per_job(written, num_jobs),
            )


async def measure_api_server(rig: Rig, num_jobs: int) -> float:
    """Return jobs per second when the clients write each job, its RayJob and one status."""
    manifests = [job_manifest(f"job-{number:05}") for number in range(num_jobs)]
    # Rendered before the clock starts, so that only the API server's work is measured.
    waiting = iter([(manifest, rendered_rayjob(manifest)) for manifest in manifests])
    async with connect(rig.kubeconfig) as api:

        async def client() -> None:
            for manifest, ray_job in waiting:
                name = manifest["metadata"]["name"]
                await api.create(JOBS, manifest)
                await api.create(RAYJOBS, ray_job)
                await api.write_status(f"{JOBS}/{name}", {"phase": "Pending"})

        report(f"no operator: writing {num_jobs} jobs with {NUM_CLIENTS} clients")
        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        return num_jobs / (time.monotonic() - started)


def rendered_rayjob(manifest: Object) -> Object:
    """Return the RayJob that Tuneyard renders for a job."""
    parsed = parse_job({**manifest, "metadata": {**manifest["metadata"], "uid": "none"}})
    rayjob: Object = render(plan_job(parsed), parsed, attempt=1).ray_job
    rayjob["metadata"].pop("ownerReferences")
    return rayjob


async def measure_idle(
    candidates: Sequence[Candidate], rig: Rig, logs: Path, num_jobs: int
) -> dict[str, Idle]:
    """Measure each operator with `num_jobs` finished jobs.

    The operators share the jobs, because creating them takes minutes.
    """
    names = [f"job-{number:05}" for number in range(num_jobs)]
    async with connect(rig.kubeconfig) as api:
        report(f"creating {num_jobs} finished jobs while no operator runs")
        await create_all(api, names, finished_status())
        async with observe(api) as observed:
            return {
                each.name: await measure_two_starts(each, rig, api, observed, logs)
                for each in candidates
            }


async def measure_two_starts(
    candidate: Candidate, rig: Rig, api: Api, observed: Observations, logs: Path
) -> Idle:
    """Start the operator, stop it, create one job and start the operator again."""
    with candidate.running(rig, logs) as operator:
        await warm_up(api, observed, operator)
        first = await operator.wait_until_idle() - operator.started
        idle_bytes, peak = operator.memory(), operator.peak_memory()
    report(f"{candidate.name}: idle after {first:.1f} s with {mib(idle_bytes)}; restarting it")
    # The API server lists jobs by name, so the operator reads this one last.
    name = "zz-created-during-downtime"
    await api.create(JOBS, job_manifest(name))
    writes_before = await api.writes()
    with candidate.running(rig, logs) as operator:
        await wait_until_handled([name], observed, operator, 300)
        first_action = observed.rayjobs[name] - operator.started
        idle = await operator.wait_until_idle() - operator.started
        written = await api.writes() - writes_before
        result = Idle(
            first_seconds=first,
            idle_bytes=idle_bytes,
            peak_bytes=peak,
            restart_seconds=first_action,
            restart_idle_seconds=idle,
            restart_bytes=operator.memory(),
            restart_peak_bytes=operator.peak_memory(),
            restart_writes=sum(written[name] for name in operator_writes(written)),
        )
        await delete_job(api, observed, name)
        return result


async def warm_up(api: Api, observed: Observations, operator: Operator) -> None:
    """Wait for one job to be handled: the operator has then started, connected and imported
    everything it needs."""
    await api.create(JOBS, job_manifest("aa-warm-up"))
    await wait_until_handled(["aa-warm-up"], observed, operator, 300)
    await operator.wait_until_idle()
    await delete_job(api, observed, "aa-warm-up")


async def delete_job(api: Api, observed: Observations, name: str) -> None:
    """Delete a job and wait until the job and its RayJob no longer exist.

    An operator that puts a finalizer on the job must run.
    """
    await api.call("DELETE", f"{JOBS}/{name}")
    deadline = time.monotonic() + 120
    while await api.has(f"{JOBS}?fieldSelector=metadata.name={name}") or await api.has(
        f"{RAYJOBS}?labelSelector={JOB_LABEL}={name}"
    ):
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was deleted 120 s ago and still exists")
        await asyncio.sleep(POLL_SECONDS)
    observed.rayjobs.clear()
    observed.statuses.clear()


async def create_all(
    api: Api, names: Sequence[str], status: Object | None = None, rate: float = math.inf
) -> dict[str, float]:
    """Create every job; return the monotonic time of each response.

    `status`: the status that every job gets; None: no status. `rate`: jobs per second; infinite:
    as fast as possible.
    """
    created: dict[str, float] = {}
    began, waiting = time.monotonic(), iter(enumerate(names))

    async def client() -> None:
        for number, name in waiting:
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            await api.create(JOBS, job_manifest(name))
            created[name] = time.monotonic()
            if status is not None:
                await api.write_status(f"{JOBS}/{name}", status)
            if len(created) % 2000 == 0:
                report(f"  {len(created)} created")

    clients: list[Awaitable[None]] = [client() for _ in range(NUM_CLIENTS)]
    await asyncio.gather(*clients)
    return created


def job_manifest(name: str) -> Object:
    """Return the manifest of a FineTuneJob."""
    manifest: Object = _MANIFEST | {"metadata": {"name": name, "namespace": NAMESPACE}}
    return manifest


_MANIFEST: Object = yaml.safe_load(MANIFEST)


def finished_status() -> Object:
    """Return the status of a finished job with four stages, at about its usual size."""
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
            {"number": 1, "rayJob": "deleted-1", "reason": FINISHED, "message": FINISHED, **times}
        ],
        "result": {"uri": "pvc://models/burst", "metrics": {"lossReduction": 0.5}},
    }


# ---- printing the tables -------------------------------------------------------------------------


def operator_writes(writes: Mapping[str, int]) -> list[str]:
    """Return the names of the writes that operators make.

    The control plane's own writes (leases, nodes) depend on the time that passes.
    """
    kinds = ("finetunejobs", "rayjobs", "configmaps", "events")
    return sorted(name for name in writes if name.split()[1].split("/")[0] in kinds)


def per_job(writes: Mapping[str, int], num_jobs: int) -> dict[str, float]:
    """Return the operator's writes per job, without those below 0.01."""
    counts = {name: writes[name] / num_jobs for name in operator_writes(writes)}
    return {name: count for name, count in counts.items() if count >= 0.01}


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile; `fraction` lies between 0 and 1."""
    return sorted(values)[max(0, math.ceil(len(values) * fraction) - 1)]


def mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"


def time_rows(result: Burst) -> dict[str, str]:
    rows = {"created by the clients, jobs/s": f"{result.created_per_second:.1f}"}
    for target, values in (("RayJob", result.to_rayjob), ("first status", result.to_status)):
        rows[f"creation to {target}, p50"] = f"{statistics.median(values):.2f} s"
        rows[f"creation to {target}, p99"] = f"{percentile(values, 0.99):.2f} s"
    return rows


def burst_rows(result: Burst) -> dict[str, str]:
    rows = {"jobs/s": f"{result.jobs_per_second:.1f}"} | time_rows(result)
    rows["memory, peak"] = mib(result.peak_bytes)
    rows["memory, after"] = mib(result.after_bytes)
    rows["processor time per job"] = f"{result.processor_seconds_per_job * 1000:.1f} ms"
    rows["writes per job"] = f"{sum(result.writes_per_job.values()):.1f}"
    rows |= {f"  {name}": f"{count:.2f}" for name, count in result.writes_per_job.items()}
    return rows


def idle_rows(result: Idle) -> dict[str, str]:
    return {
        "first start to idle": f"{result.first_seconds:.1f} s",
        "memory, idle": mib(result.idle_bytes),
        "memory, peak": mib(result.peak_bytes),
        "restart to first action": f"{result.restart_seconds:.1f} s",
        "restart to idle": f"{result.restart_idle_seconds:.1f} s",
        "memory, idle, restarted": mib(result.restart_bytes),
        "memory, peak, restarted": mib(result.restart_peak_bytes),
        "writes after the restart": str(result.restart_writes),
    }


def print_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print a table with one column per operator; a row that an operator lacks counts 0."""
    labels = list(dict.fromkeys(label for rows in columns.values() for label in rows))
    width = max(len(title), *map(len, labels))
    print(f"\n{title:{width}}" + "".join(f"{name:>14}" for name in columns))
    for label in labels:
        values = (rows.get(label, "0.00") for rows in columns.values())
        print(f"{label:{width}}" + "".join(f"{value:>14}" for value in values), flush=True)


def print_burst(candidates: Sequence[Candidate], logs: Path, num_jobs: int) -> dict[str, float]:
    """Measure and print one burst of each operator; return their rates in jobs per second."""
    bursts: dict[str, Burst] = {}
    paced: dict[str, Burst] = {}
    for candidate in candidates:
        with api_server() as rig:
            burst = asyncio.run(measure_burst(candidate, rig, logs, num_jobs))
        rate = burst.jobs_per_second / 2
        with api_server() as rig:
            paced[candidate.name] = asyncio.run(measure_burst(candidate, rig, logs, num_jobs, rate))
        bursts[candidate.name] = burst
    with api_server() as rig:
        alone = asyncio.run(measure_api_server(rig, num_jobs))
    print_table(f"{num_jobs:,} jobs at once", {n: burst_rows(each) for n, each in bursts.items()})
    print_table("at half of that rate", {n: time_rows(each) for n, each in paced.items()})
    print(f"\nthe API server without any operator takes {alone:.0f} jobs/s", flush=True)
    return {name: burst.jobs_per_second for name, burst in bursts.items()}


def main() -> None:
    arguments = parse()
    candidates = [
        Candidate("plain-kopf", arguments.plain_kopf),
        Candidate("tuneyard", arguments.tuneyard),
    ]
    selected = [each for each in candidates if arguments.only in (None, each.name)]
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        ratios: list[float] = []
        for _ in range(arguments.pairs if arguments.jobs else 0):
            rates = print_burst(selected, logs, arguments.jobs)
            if len(rates) > 1:
                ratios.append(rates["tuneyard"] / rates["plain-kopf"])
        if ratios:
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            median = statistics.median(ratios)
            print(f"\njobs/s, tuneyard / plain-kopf: {each}; median {median:.2f}", flush=True)
        if arguments.idle:
            with api_server() as rig:
                measured_idle = asyncio.run(measure_idle(selected, rig, logs, arguments.idle))
            idles = {name: idle_rows(each) for name, each in measured_idle.items()}
            print_table(f"{arguments.idle:,} finished jobs", idles)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1000, help="number of jobs created at once; 0 skips the burst"
    )
    parser.add_argument(
        "--pairs", type=int, default=1, help="bursts of each operator; their rates are compared"
    )
    parser.add_argument(
        "--idle", type=int, default=10_000, help="number of finished jobs; 0 skips the idle cluster"
    )
    parser.add_argument(
        "--only", choices=["plain-kopf", "tuneyard"], help="measure only this operator"
    )
    parser.add_argument(
        "--plain-kopf", default=PLAIN_KOPF, help="command line of the plain kopf operator"
    )
    parser.add_argument("--tuneyard", default=TUNEYARD, help="command line of Tuneyard's operator")
    parser.add_argument("--logs", type=Path, help="folder that keeps the operators' logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
