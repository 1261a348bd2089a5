"""Invariants of `observe`: on random walks through the simulation, and for a controller that is
killed at each of its writes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.status.simulation import (
    GPU_PLAN,
    INTERRUPTED,
    PLAN,
    SUCCESS,
    KilledError,
    Simulation,
    failed,
    new_job,
    pod,
    post,
)
from tuneyard.api.plan import Plan
from tuneyard.api.status import AttemptStatus, JobStatus
from tuneyard.status.observe import Decision, is_preparing, observe
from tuneyard.status.observed import CreateError, ObservedState, PodProblem, Workload

# ---- random walks -------------------------------------------------------------------------------


def _advance(sim: Simulation, rng: random.Random) -> None:
    """Let KubeRay advance the newest RayJob, or before it the newest Job, by one step."""
    if sim.status.attempts and is_preparing(sim.attempt):
        _advance_preparation(sim, rng)
        return
    if not sim.ray_jobs:
        return
    name, ray = list(sim.ray_jobs.items())[-1]
    if ray.deleting or ray.ended:
        return
    if ray.suspended:
        sim.change(name, suspended=False)
    elif not ray.deployment_status:
        sim.change(name, deployment_status="Initializing", cluster=f"{name}-x")
        sim.add_pods(pod(ray.attempt, "head"), pod(ray.attempt, "worker"))
    elif not ray.job_status:
        sim.change(name, job_status="RUNNING", deployment_status="Running")
    else:
        state = rng.choice(["SUCCEEDED", "FAILED", "RUNNING", "RUNNING", "RUNNING"])
        sim.change(name, job_status=state)


def _advance_preparation(sim: Simulation, rng: random.Random) -> None:
    if not sim.preparations:
        return
    name, job = list(sim.preparations.items())[-1]
    pods = [item for item in sim.pods.values() if item.role == "prepare"]
    if job.deleting or job.ended:
        return
    if job.suspended:
        sim.prepare(name, suspended=False)
    elif not pods:
        sim.add_pods(pod(job.attempt, "prepare"))
    elif rng.random() < 0.5:
        end = rng.choice(["Succeeded", "Succeeded", "Failed"])
        sim.pods[pods[-1].name] = pods[-1]._replace(phase=end)
        sim.prepare(name, succeeded=end == "Succeeded", failed=end == "Failed")


def _post(sim: Simulation, rng: random.Random) -> None:
    if not sim.status.attempts:
        return
    attempt = max(1, sim.attempt.number - rng.choice([0, 0, 0, 1]))
    endings = [None] * 12 + [
        SUCCESS,
        INTERRUPTED,
        failed("DiskFull", retryable=True),
        failed("WorkerDied", retryable=True),
        failed("LossNotFinite"),
    ]
    step = rng.randrange(100)
    resumed = rng.choice([None, step // 2])
    stage = rng.choice(["prepare", "sft", ""])
    outcome = rng.choice(endings)
    more = {"preparing": True} if is_preparing(sim.attempt) else {}
    sim.post = post(attempt, step, stage=stage, outcome=outcome, resumedStep=resumed, **more)


def _pod_problem(sim: Simulation, rng: random.Random) -> None:
    if sim.pods:
        name = rng.choice(sorted(sim.pods))
        reason = rng.choice(["OOMKilled", "DisruptionTarget", "Unschedulable", "Evicted"])
        sim.pods[name] = sim.pods[name]._replace(problems=(PodProblem(reason, "so"),))


def _queue(sim: Simulation, rng: random.Random) -> None:
    if sim.ray_jobs and sim.job.spec.run_policy.queue:
        sim.workload = Workload(False, "evicted")
        sim.ray(suspended=True)
    if sim.preparations and sim.job.spec.run_policy.prepare_queue:
        sim.prepare(suspended=True)


def _delete(sim: Simulation, rng: random.Random) -> None:
    if sim.ray_jobs:
        sim.ray(deleting=True)
    elif sim.preparations:
        sim.prepare(deleting=True)


def _edit(sim: Simulation, rng: random.Random) -> None:
    what = rng.choice(["suspend"] * 8 + ["cancel"])
    sim.edit(**{what: not getattr(sim.job.spec.run_policy, what)})


def _refuse(sim: Simulation, rng: random.Random) -> None:
    refusals = [
        None,
        None,
        CreateError(404, "NotFound", "404"),
        CreateError(403, "Forbidden", "no"),
    ]
    sim.create_error = rng.choice(refusals)


def _hide(sim: Simulation, rng: random.Random) -> None:
    """Let the cache miss RayJobs, as a cache that lags behind does."""
    sim.hidden = bool(sim.status.attempts) and not sim.hidden


def _collect(sim: Simulation, rng: random.Random) -> None:
    sim.collect()


def _wait(sim: Simulation, rng: random.Random) -> None:
    sim.wait(rng.choice([0, 1, 5, 12, 200]))


MOVES: list[tuple[int, Callable[[Simulation, random.Random], None]]] = [
    (8, _advance),
    (4, _post),
    (4, _collect),
    (4, _wait),
    (1, _pod_problem),
    (1, _edit),
    (1, _delete),
    (1, _queue),
    (1, _refuse),
    (1, _hide),
]


def _reconcile(sim: Simulation) -> None:
    """Reconcile once and assert every invariant of a reconcile."""
    before, state = sim.job.status or JobStatus(), sim.observed_state()
    was_finished = before.phase in ("Succeeded", "Failed")
    decision = sim.reconcile()
    after = decision.status
    _assert_settled(sim, state, decision)
    assert not was_finished or after == before, "a finished status never changes"
    _assert_attempts(before, after, decision)
    if decision.start is not None:
        assert after.attempts[-1].number == decision.start
        assert after.attempts[-1].finished_at is None, "only what is open is started"
        assert not _beside(state, decision.start), "nothing is started beside anything"
    _assert_conditions(before, after, sim)
    names = {ray.name for ray in state.ray_jobs}
    assert set(decision.stop) <= names
    current = after.attempts[-1] if after.attempts else None
    if current and is_preparing(current):
        rays = [ray for ray in sim.ray_jobs.values() if ray.attempt == current.number]
        assert not rays, "no RayJob exists while the data are prepared"
    if current and not current.finished_at and current.ray_job_uid:
        ours = [r.name for r in state.ray_jobs if r.uid == current.ray_job_uid]
        assert not set(ours) & set(decision.stop), "the open attempt's RayJob is never stopped"
    if after.phase not in ("Succeeded", "Failed", "Suspended", "Running", "Queued"):
        assert decision.wake_after is not None or decision.start or current, (
            "the controller wakes up again"
        )


def _beside(state: ObservedState, attempt: int) -> list[Any]:
    """Return all objects, but for a Job that has prepared this attempt's data, and its pod."""
    jobs = (job for job in state.preparations if not (job.succeeded and job.attempt == attempt))
    ended = (attempt, "prepare", "Succeeded")
    pods = (item for item in state.pods if (item.attempt, item.role, item.phase) != ended)
    return [*state.ray_jobs, *jobs, *pods]


def _assert_settled(sim: Simulation, state: ObservedState, decision: Decision) -> None:
    """Assert that the status settles after a few reconciles of the same state: an attempt is
    closed, then its consequences are written. A decision that is not final sets `wake_after`."""
    job = sim.job
    for _ in range(3):
        again = observe(job, sim.planned or PLAN, state, sim.now)
        if again.status == decision.status:
            return
        soon = decision.wake_after is not None and decision.wake_after <= 1
        assert soon or decision.start, "the controller wakes up again"
        decision = again
        job = job.model_copy(update={"status": again.status})
    raise AssertionError("the status never stands still")


def _assert_attempts(before: JobStatus, after: JobStatus, decision: Decision) -> None:
    open_ones = [a.number for a in after.attempts if not a.finished_at]
    assert len(open_ones) <= 1, "one open attempt at most"
    assert [a.number for a in after.attempts] == list(range(1, len(after.attempts) + 1))
    assert len(after.attempts) - len(before.attempts) in (0, 1)
    for old, new in zip(before.attempts, after.attempts, strict=False):
        assert old.ray_job_uid in (None, new.ray_job_uid)
        assert not old.finished_at or new.finished_at == old.finished_at
    if len(after.attempts) > len(before.attempts):
        assert all(a.finished_at for a in before.attempts), "closed before the next one opens"
        assert decision.start == after.attempts[-1].number


def _assert_conditions(before: JobStatus, after: JobStatus, sim: Simulation) -> None:
    held = {c.type: c for c in after.conditions}
    ends = [held[t] for t in ("Succeeded", "Failed") if t in held]
    assert len(ends) == (after.phase in ("Succeeded", "Failed"))
    assert all(c.status == "True" and c.type == after.phase for c in ends)
    assert (after.failure is not None) == (after.phase == "Failed")
    assert (after.result is not None) == (after.phase == "Succeeded")
    now = sim.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    for old in before.conditions:
        new = held.get(old.type)
        if new and new.status == old.status:
            assert new.last_transition_time == old.last_transition_time
        elif new:
            assert new.last_transition_time == now
    if after.phase == "Running":
        assert held["Running"].status == "True"
    elif "Running" in held:
        assert held["Running"].status == "False"


@pytest.mark.parametrize("plan", [PLAN, GPU_PLAN], ids=["without GPUs", "with GPUs"])
@pytest.mark.parametrize("seed", range(60))
def test_invariants_hold_on_random_walks(seed: int, plan: Plan) -> None:
    rng = random.Random(seed)
    policy: dict[str, Any] = {
        "runPolicy__maxAttempts": rng.choice([1, 2, 3]),
        "runPolicy__queue": rng.choice([None, "team-a"]),
        "runPolicy__deadlineSeconds": rng.choice([None, 900]),
        "runPolicy__startDeadlineSeconds": rng.choice([60, 1800]),
        "runPolicy__prepareQueue": rng.choice([None, "cpus"]),
    }
    job = new_job(**{k: v for k, v in policy.items() if v is not None})
    sim = Simulation(job, planned=plan, workers=2, min_workers=1)
    weights = [weight for weight, _ in MOVES]
    for _ in range(120):
        ((_, move),) = rng.choices(MOVES, weights)
        move(sim, rng)
        if not sim.hidden or (sim.status.attempts and _has_object(sim.attempt)):
            _reconcile(sim)
    _assert_events(sim)
    _assert_cancelable(sim)


def _has_object(attempt: AttemptStatus) -> bool:
    """Return whether it is known that the attempt's Job or RayJob was created."""
    uid = attempt.prepare_job_uid if is_preparing(attempt) else attempt.ray_job_uid
    return uid is not None


def _assert_events(sim: Simulation) -> None:
    """Assert that each transition has one event, however often the job was reconciled."""
    counts = Counter(event.reason for event in sim.events)
    attempts = sim.status.attempts
    assert counts["AttemptStarted"] == len(attempts)
    assert max(Counter(sim.created).values(), default=1) == 1, "one RayJob for each attempt"
    assert counts["Running"] == sum(1 for a in attempts if a.running_at)
    ended = [a for a in attempts if a.finished_at and a.reason != "Succeeded"]
    assert counts["AttemptEnded"] == len(ended)
    assert counts["Succeeded"] == (sim.phase == "Succeeded")
    assert counts["Failed"] == (sim.phase == "Failed")
    assert counts["Planned"] <= 1, "an attempt that begins at once names the plan in its own event"
    assert all(len(event.message.encode()) <= 1024 for event in sim.events)


def _assert_cancelable(sim: Simulation) -> None:
    """Assert that a canceled job ends from any state and leaves no objects."""
    sim.hidden, sim.create_error, sim.post = False, None, None
    if sim.phase not in ("Succeeded", "Failed"):
        sim.edit(cancel=True)
    for _ in range(6):
        _reconcile(sim)
        sim.collect()
        sim.wait(130)
    assert sim.phase in ("Succeeded", "Failed")
    assert not sim.ray_jobs
    assert not sim.preparations
    assert not sim.pods


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (PLAN, {"Succeeded", "Suspended", "RayJobDeleted", "LossNotFinite", "FewerWorkers"}),
        (GPU_PLAN, {"Succeeded", "Suspended", "PrepareJobDeleted", "LossNotFinite", "Preempted"}),
    ],
    ids=["without GPUs", "with GPUs"],
)
def test_the_walks_reach_every_phase_and_reason(plan: Plan, expected: set[str]) -> None:
    """Walks that stay in a few states would prove nothing."""
    reasons: Counter[str] = Counter()
    for seed in range(40):
        rng = random.Random(seed)
        sim = Simulation(new_job(), planned=plan, workers=2, min_workers=1)
        for _ in range(120):
            ((_, move),) = rng.choices(MOVES, [weight for weight, _ in MOVES])
            move(sim, rng)
            if not sim.hidden:
                sim.reconcile()
        reasons.update(a.reason or "open" for a in sim.status.attempts)
    assert {*expected, "Preempted"} <= set(reasons)


# ---- a killed controller ------------------------------------------------------------------------


def _run(killed_at: int | None, killed_after: bool) -> Simulation:
    """Run a job through a lost worker, a suspension and an eviction to success. The controller is
    killed at the write `killed_at`; None: never."""
    sim = Simulation(new_job(runPolicy__queue="team-a", runPolicy__backoffSeconds=0))
    sim.killed_at, sim.killed_after = killed_at, killed_after
    is_suspended = False
    for _ in range(120):
        try:
            sim.reconcile()
        except KilledError:
            sim.missing_since = sim.post = None  # the memory of the killed controller
            sim.killed_at = None
            continue
        _cluster(sim)
        if sim.phase == "Suspended" and is_suspended:
            sim.edit(suspend=False)
        running = [a.number for a in sim.status.attempts if a.running_at and not a.finished_at]
        if running == [2] and not is_suspended:
            sim.edit(suspend=True)
            is_suspended = True
        sim.wait(1)
    return sim


def _cluster(sim: Simulation) -> None:
    """Advance the cluster by one step: attempt 1 loses a worker, 2 is suspended, 3 is evicted,
    4 succeeds."""
    sim.collect()
    live = [ray for ray in sim.ray_jobs.values() if not ray.deleting]
    if not live:
        return
    ray = live[-1]
    number, policy = ray.attempt, sim.job.spec.run_policy
    if ray.suspended:
        sim.change(ray.name, suspended=False)
    elif not ray.cluster:
        sim.change(ray.name, deployment_status="Initializing", cluster="x")
        sim.add_pods(pod(number, "head"), pod(number, "worker"))
    elif not ray.job_status:
        sim.change(ray.name, job_status="RUNNING", deployment_status="Running")
    elif number == 1:
        outcome = failed("DiskFull", retryable=True)
        words = outcome.model_dump_json(by_alias=True, exclude_none=True)
        sim.post = post(1, 20, outcome=outcome)
        sim.change(ray.name, job_status="FAILED", message=f"TUNEYARD-OUTCOME {words}")
    elif number == 2 and policy.suspend:
        sim.post = post(2, 30, outcome=INTERRUPTED)
        words = INTERRUPTED.model_dump_json(by_alias=True, exclude_none=True)
        sim.change(ray.name, job_status="FAILED", message=f"TUNEYARD-OUTCOME {words}")
    elif number == 3:
        sim.change(ray.name, suspended=True, deployment_status="Suspending")
    elif number == 4:
        sim.post = post(4, 100, outcome=SUCCESS)
        sim.change(ray.name, job_status="SUCCEEDED")


def _outcome(sim: Simulation) -> Any:
    attempts = [(a.number, a.ray_job, a.reason) for a in sim.status.attempts]
    return sim.phase, attempts, sim.created


UNDISTURBED = _run(None, killed_after=False)


def test_an_undisturbed_job_has_four_attempts_and_all_their_events() -> None:
    phase, attempts, created = _outcome(UNDISTURBED)
    assert phase == "Succeeded"
    assert [a[2] for a in attempts] == ["DiskFull", "Suspended", "Preempted", "Succeeded"]
    assert created == ["minimal-1", "minimal-2", "minimal-3", "minimal-4"]
    assert not UNDISTURBED.ray_jobs
    assert not UNDISTURBED.pods


@pytest.mark.parametrize("killed_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(UNDISTURBED.actions))
def test_a_controller_killed_at_any_write_does_not_change_the_outcome(
    write: int, killed_after: bool
) -> None:
    sim = _run(write, killed_after)
    assert sim.killed_at is None, "it was never killed"
    assert _outcome(sim) == _outcome(UNDISTURBED)
    assert not sim.ray_jobs
    assert not sim.pods
