"""What holds on every path: random walks of a job through the simulation, and a controller that
dies at each of its writes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.status.simulation import (
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
from tuneyard.api.status import JobStatus
from tuneyard.status.observe import Decision, observe
from tuneyard.status.observed import CreateError, ObservedState, PodProblem, Workload

# ---- random walks -------------------------------------------------------------------------------


def _advance(sim: Simulation, dice: random.Random) -> None:
    """KubeRay takes the newest RayJob one step on."""
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
        state = dice.choice(["SUCCEEDED", "FAILED", "RUNNING", "RUNNING", "RUNNING"])
        sim.change(name, job_status=state)


def _post(sim: Simulation, dice: random.Random) -> None:
    if not sim.status.attempts:
        return
    attempt = max(1, sim.attempt.number - dice.choice([0, 0, 0, 1]))
    endings = [None] * 12 + [
        SUCCESS,
        INTERRUPTED,
        failed("DiskFull", retryable=True),
        failed("WorkerDied", retryable=True),
        failed("LossNotFinite"),
    ]
    step = dice.randrange(100)
    resumed = dice.choice([None, step // 2])
    stage = dice.choice(["prepare", "sft", ""])
    outcome = dice.choice(endings)
    sim.post = post(attempt, step, stage=stage, outcome=outcome, resumedStep=resumed)


def _trouble(sim: Simulation, dice: random.Random) -> None:
    if sim.pods:
        name = dice.choice(sorted(sim.pods))
        reason = dice.choice(["OOMKilled", "DisruptionTarget", "Unschedulable", "Evicted"])
        sim.pods[name] = sim.pods[name]._replace(problems=(PodProblem(reason, "so"),))


def _queue(sim: Simulation, dice: random.Random) -> None:
    if sim.ray_jobs and sim.job.spec.run_policy.queue:
        sim.workload = Workload(False, "evicted")
        sim.ray(suspended=True)


def _delete(sim: Simulation, dice: random.Random) -> None:
    if sim.ray_jobs:
        sim.ray(deleting=True)


def _edit(sim: Simulation, dice: random.Random) -> None:
    what = dice.choice(["suspend"] * 8 + ["cancel"])
    sim.edit(**{what: not getattr(sim.job.spec.run_policy, what)})


def _refuse(sim: Simulation, dice: random.Random) -> None:
    refusals = [
        None,
        None,
        CreateError(404, "NotFound", "404"),
        CreateError(403, "Forbidden", "no"),
    ]
    sim.create_error = dice.choice(refusals)


def _hide(sim: Simulation, dice: random.Random) -> None:
    """The cache lags behind: only what it once showed, since nothing is created meanwhile."""
    sim.hidden = bool(sim.status.attempts) and not sim.hidden


def _collect(sim: Simulation, dice: random.Random) -> None:
    sim.collect()


def _wait(sim: Simulation, dice: random.Random) -> None:
    sim.wait(dice.choice([0, 1, 5, 12, 200]))


MOVES: list[tuple[int, Callable[[Simulation, random.Random], None]]] = [
    (8, _advance),
    (4, _post),
    (4, _collect),
    (4, _wait),
    (1, _trouble),
    (1, _edit),
    (1, _delete),
    (1, _queue),
    (1, _refuse),
    (1, _hide),
]


def _look(sim: Simulation) -> None:
    """A look, and everything that must hold of it."""
    before, seen = sim.job.status or JobStatus(), sim.observed_state()
    was_finished = before.phase in ("Succeeded", "Failed")
    decision = sim.reconcile()
    after = decision.status
    _settles(sim, seen, decision)
    assert not was_finished or after == before, "a finished status never changes"
    _attempts_hold(before, after, decision)
    if decision.start is not None:
        assert after.attempts[-1].number == decision.start
        assert after.attempts[-1].finished_at is None, "only what is open is started"
        beside = (*seen.ray_jobs, *seen.pods)
        assert not beside, "nothing is started beside anything"
    _conditions_hold(before, after, sim)
    names = {ray.name for ray in seen.ray_jobs}
    assert set(decision.stop) <= names
    current = after.attempts[-1] if after.attempts else None
    if current and not current.finished_at and current.ray_job_uid:
        ours = [r.name for r in seen.ray_jobs if r.uid == current.ray_job_uid]
        assert not set(ours) & set(decision.stop), "the open attempt's RayJob is never stopped"
    if after.phase not in ("Succeeded", "Failed", "Suspended", "Running", "Queued"):
        assert decision.wake_after is not None or decision.start or current, "nobody sleeps on"


def _settles(sim: Simulation, seen: ObservedState, decision: Decision) -> None:
    """Seeing the same again, the status stands still after a few looks: a close, then what follows.
    Whoever has more to say asks to be woken soon."""
    job = sim.job
    for _ in range(3):
        again = observe(job, PLAN, seen, sim.now)
        if again.status == decision.status:
            return
        soon = decision.wake_after is not None and decision.wake_after <= 1
        assert soon or decision.start, "nobody sleeps on"
        decision = again
        job = job.model_copy(update={"status": again.status})
    raise AssertionError("the status never stands still")


def _attempts_hold(before: JobStatus, after: JobStatus, decision: Decision) -> None:
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


def _conditions_hold(before: JobStatus, after: JobStatus, sim: Simulation) -> None:
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


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    policy: dict[str, Any] = {
        "runPolicy__maxAttempts": dice.choice([1, 2, 3]),
        "runPolicy__queue": dice.choice([None, "team-a"]),
        "runPolicy__deadlineSeconds": dice.choice([None, 900]),
        "runPolicy__startDeadlineSeconds": dice.choice([60, 1800]),
    }
    sim = Simulation(new_job(**{k: v for k, v in policy.items() if v is not None}))
    weights = [weight for weight, _ in MOVES]
    for _ in range(120):
        ((_, move),) = dice.choices(MOVES, weights)
        move(sim, dice)
        if not sim.hidden or (sim.status.attempts and sim.attempt.ray_job_uid):
            _look(sim)
    _events_hold(sim)
    _ends(sim)


def _events_hold(sim: Simulation) -> None:
    """One event for each transition, however often it was looked."""
    told = Counter(event.reason for event in sim.events)
    attempts = sim.status.attempts
    assert told["AttemptStarted"] == len(attempts)
    assert max(Counter(sim.created).values(), default=1) == 1, "one RayJob for each attempt"
    assert told["Running"] == sum(1 for a in attempts if a.running_at)
    ended = [a for a in attempts if a.finished_at and a.reason != "Succeeded"]
    assert told["AttemptEnded"] == len(ended)
    assert told["Succeeded"] == (sim.phase == "Succeeded")
    assert told["Failed"] == (sim.phase == "Failed")
    assert told["Planned"] == 1
    assert all(len(event.message.encode()) <= 1024 for event in sim.events)


def _ends(sim: Simulation) -> None:
    """Canceled, a job ends whatever it went through, and leaves nothing."""
    sim.hidden, sim.create_error, sim.post = False, None, None
    if sim.phase not in ("Succeeded", "Failed"):
        sim.edit(cancel=True)
    for _ in range(6):
        _look(sim)
        sim.collect()
        sim.wait(130)
    assert sim.phase in ("Succeeded", "Failed")
    assert not sim.ray_jobs
    assert not sim.pods


def test_the_walks_go_everywhere() -> None:
    """A walk that never gets far proves nothing."""
    reasons: Counter[str] = Counter()
    for seed in range(40):
        dice = random.Random(seed)
        sim = Simulation(new_job())
        for _ in range(120):
            ((_, move),) = dice.choices(MOVES, [weight for weight, _ in MOVES])
            move(sim, dice)
            if not sim.hidden:
                sim.reconcile()
        reasons.update(a.reason or "open" for a in sim.status.attempts)
    expected = {"Succeeded", "Suspended", "RayJobDeleted", "LossNotFinite", "Preempted"}
    assert expected <= set(reasons)


# ---- deaths -------------------------------------------------------------------------------------


def _play(killed_at: int | None, killed_after: bool) -> Simulation:
    """A life with two failures, a suspension and an eviction, whoever controls it."""
    sim = Simulation(new_job(runPolicy__queue="team-a", runPolicy__backoffSeconds=0))
    sim.killed_at, sim.killed_after = killed_at, killed_after
    is_suspended = False
    for _ in range(120):
        try:
            sim.reconcile()
        except KilledError:
            sim.missing_since = sim.post = None  # what was in its memory
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
    """What KubeRay, Kueue and the drivers do, one step: attempt 1 loses a worker, 2 is suspended,
    3 is evicted, 4 succeeds."""
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


def _fate(sim: Simulation) -> Any:
    attempts = [(a.number, a.ray_job, a.reason) for a in sim.status.attempts]
    return sim.phase, attempts, sim.created


UNDISTURBED = _play(None, killed_after=False)


def test_an_undisturbed_life_has_four_attempts_and_tells_its_story() -> None:
    phase, attempts, created = _fate(UNDISTURBED)
    assert phase == "Succeeded"
    assert [a[2] for a in attempts] == ["DiskFull", "Suspended", "Preempted", "Succeeded"]
    assert created == ["minimal-1", "minimal-2", "minimal-3", "minimal-4"]
    assert not UNDISTURBED.ray_jobs
    assert not UNDISTURBED.pods


@pytest.mark.parametrize("killed_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(UNDISTURBED.actions))
def test_a_controller_that_dies_at_any_write_changes_no_fate(
    write: int, killed_after: bool
) -> None:
    sim = _play(write, killed_after)
    assert sim.killed_at is None, "it died"
    assert _fate(sim) == _fate(UNDISTURBED)
    assert not sim.ray_jobs
    assert not sim.pods
