"""What holds on every path: random walks of a job through the world, and a controller that dies at
each of its writes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.status.world import INTERRUPTED, PLAN, SUCCESS, Died, World, failed, new_job, pod, post
from tuneyard.api.status import JobStatus
from tuneyard.status.observe import Decision, observe
from tuneyard.status.observed import Obstacle, Seen, Trouble, Workload

# ---- random walks -------------------------------------------------------------------------------


def _advance(played: World, dice: random.Random) -> None:
    """KubeRay takes the newest RayJob one step on."""
    if not played.ray_jobs:
        return
    name, ray = list(played.ray_jobs.items())[-1]
    if ray.deleting or ray.ended:
        return
    if ray.suspended:
        played.change(name, suspended=False)
    elif not ray.deployment_status:
        played.change(name, deployment_status="Initializing", cluster=f"{name}-x")
        played.add_pods(pod(ray.attempt, "head"), pod(ray.attempt, "worker"))
    elif not ray.job_status:
        played.change(name, job_status="RUNNING", deployment_status="Running")
    else:
        state = dice.choice(["SUCCEEDED", "FAILED", "RUNNING", "RUNNING", "RUNNING"])
        played.change(name, job_status=state)


def _post(played: World, dice: random.Random) -> None:
    if not played.status.attempts:
        return
    attempt = max(1, played.attempt.number - dice.choice([0, 0, 0, 1]))
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
    played.post = post(attempt, step, stage=stage, outcome=outcome, resumedStep=resumed)


def _trouble(played: World, dice: random.Random) -> None:
    if played.pods:
        name = dice.choice(sorted(played.pods))
        reason = dice.choice(["OOMKilled", "DisruptionTarget", "Unschedulable", "Evicted"])
        played.pods[name] = played.pods[name]._replace(troubles=(Trouble(reason, "so"),))


def _queue(played: World, dice: random.Random) -> None:
    if played.ray_jobs and played.job.spec.run_policy.queue:
        played.workload = Workload(False, "evicted")
        played.ray(suspended=True)


def _delete(played: World, dice: random.Random) -> None:
    if played.ray_jobs:
        played.ray(deleting=True)


def _edit(played: World, dice: random.Random) -> None:
    what = dice.choice(["suspend"] * 8 + ["cancel"])
    played.edit(**{what: not getattr(played.job.spec.run_policy, what)})


def _refuse(played: World, dice: random.Random) -> None:
    refusals = [None, None, Obstacle(404, "NotFound", "404"), Obstacle(403, "Forbidden", "no")]
    played.obstacle = dice.choice(refusals)


def _hide(played: World, dice: random.Random) -> None:
    """The cache lags behind: only what it once showed, since nothing is created meanwhile."""
    played.hidden = bool(played.status.attempts) and not played.hidden


def _collect(played: World, dice: random.Random) -> None:
    played.collect()


def _wait(played: World, dice: random.Random) -> None:
    played.wait(dice.choice([0, 1, 5, 12, 200]))


MOVES: list[tuple[int, Callable[[World, random.Random], None]]] = [
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


def _look(played: World) -> None:
    """A look, and everything that must hold of it."""
    before, seen = played.job.status or JobStatus(), played.seen()
    was_finished = before.phase in ("Succeeded", "Failed")
    decision = played.look()
    after = decision.status
    _settles(played, seen, decision)
    assert not was_finished or after == before, "a finished status never changes"
    _attempts_hold(before, after, decision)
    if decision.start is not None:
        assert after.attempts[-1].number == decision.start
        assert after.attempts[-1].finished_at is None, "only what is open is started"
        beside = (*seen.ray_jobs, *seen.pods)
        assert not beside, "nothing is started beside anything"
    _conditions_hold(before, after, played)
    names = {ray.name for ray in seen.ray_jobs}
    assert set(decision.stop) <= names
    current = after.attempts[-1] if after.attempts else None
    if current and not current.finished_at and current.ray_job_uid:
        ours = [r.name for r in seen.ray_jobs if r.uid == current.ray_job_uid]
        assert not set(ours) & set(decision.stop), "the open attempt's RayJob is never stopped"
    if after.phase not in ("Succeeded", "Failed", "Suspended", "Running", "Queued"):
        assert decision.wake_after is not None or decision.start or current, "nobody sleeps on"


def _settles(played: World, seen: Seen, decision: Decision) -> None:
    """Seeing the same again, the status stands still after a few looks: a close, then what follows.
    Whoever has more to say asks to be woken soon."""
    job = played.job
    for _ in range(3):
        again = observe(job, PLAN, seen, played.now)
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


def _conditions_hold(before: JobStatus, after: JobStatus, played: World) -> None:
    held = {c.type: c for c in after.conditions}
    ends = [held[t] for t in ("Succeeded", "Failed") if t in held]
    assert len(ends) == (after.phase in ("Succeeded", "Failed"))
    assert all(c.status == "True" and c.type == after.phase for c in ends)
    assert (after.failure is not None) == (after.phase == "Failed")
    assert (after.result is not None) == (after.phase == "Succeeded")
    now = played.now.strftime("%Y-%m-%dT%H:%M:%SZ")
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
    played = World(new_job(**{k: v for k, v in policy.items() if v is not None}))
    weights = [weight for weight, _ in MOVES]
    for _ in range(120):
        ((_, move),) = dice.choices(MOVES, weights)
        move(played, dice)
        if not played.hidden or (played.status.attempts and played.attempt.ray_job_uid):
            _look(played)
    _events_hold(played)
    _ends(played)


def _events_hold(played: World) -> None:
    """One event for each transition, however often it was looked."""
    told = Counter(event.reason for event in played.events)
    attempts = played.status.attempts
    assert told["AttemptStarted"] == len(attempts)
    assert max(Counter(played.created).values(), default=1) == 1, "one RayJob for each attempt"
    assert told["Running"] == sum(1 for a in attempts if a.running_at)
    ended = [a for a in attempts if a.finished_at and a.reason != "Succeeded"]
    assert told["AttemptEnded"] == len(ended)
    assert told["Succeeded"] == (played.phase == "Succeeded")
    assert told["Failed"] == (played.phase == "Failed")
    assert told["Planned"] == 1
    assert all(len(event.message.encode()) <= 1024 for event in played.events)


def _ends(played: World) -> None:
    """Cancelled, a job ends whatever it went through, and leaves nothing."""
    played.hidden, played.obstacle, played.post = False, None, None
    if played.phase not in ("Succeeded", "Failed"):
        played.edit(cancel=True)
    for _ in range(6):
        _look(played)
        played.collect()
        played.wait(130)
    assert played.phase in ("Succeeded", "Failed")
    assert not played.ray_jobs
    assert not played.pods


def test_the_walks_go_everywhere() -> None:
    """A walk that never gets far proves nothing."""
    reasons: Counter[str] = Counter()
    for seed in range(40):
        dice = random.Random(seed)
        played = World(new_job())
        for _ in range(120):
            ((_, move),) = dice.choices(MOVES, [weight for weight, _ in MOVES])
            move(played, dice)
            if not played.hidden:
                played.look()
        reasons.update(a.reason or "open" for a in played.status.attempts)
    expected = {"Succeeded", "Suspended", "RayJobDeleted", "LossNotFinite", "Preempted"}
    assert expected <= set(reasons)


# ---- deaths -------------------------------------------------------------------------------------


def _play(dies_at: int | None, dies_after: bool) -> World:
    """A life with two failures, a suspension and an eviction, whoever controls it."""
    played = World(new_job(runPolicy__queue="team-a", runPolicy__backoffSeconds=0))
    played.dies_at, played.dies_after = dies_at, dies_after
    is_suspended = False
    for _ in range(120):
        try:
            played.look()
        except Died:
            played.missing_since = played.post = None  # what was in its memory
            played.dies_at = None
            continue
        _cluster(played)
        if played.phase == "Suspended" and is_suspended:
            played.edit(suspend=False)
        running = [a.number for a in played.status.attempts if a.running_at and not a.finished_at]
        if running == [2] and not is_suspended:
            played.edit(suspend=True)
            is_suspended = True
        played.wait(1)
    return played


def _cluster(played: World) -> None:
    """What KubeRay, Kueue and the drivers do, one step: attempt 1 loses a worker, 2 is suspended,
    3 is evicted, 4 succeeds."""
    played.collect()
    live = [ray for ray in played.ray_jobs.values() if not ray.deleting]
    if not live:
        return
    ray = live[-1]
    number, policy = ray.attempt, played.job.spec.run_policy
    if ray.suspended:
        played.change(ray.name, suspended=False)
    elif not ray.cluster:
        played.change(ray.name, deployment_status="Initializing", cluster="x")
        played.add_pods(pod(number, "head"), pod(number, "worker"))
    elif not ray.job_status:
        played.change(ray.name, job_status="RUNNING", deployment_status="Running")
    elif number == 1:
        outcome = failed("DiskFull", retryable=True)
        words = outcome.model_dump_json(by_alias=True, exclude_none=True)
        played.post = post(1, 20, outcome=outcome)
        played.change(ray.name, job_status="FAILED", message=f"TUNEYARD-OUTCOME {words}")
    elif number == 2 and policy.suspend:
        played.post = post(2, 30, outcome=INTERRUPTED)
        words = INTERRUPTED.model_dump_json(by_alias=True, exclude_none=True)
        played.change(ray.name, job_status="FAILED", message=f"TUNEYARD-OUTCOME {words}")
    elif number == 3:
        played.change(ray.name, suspended=True, deployment_status="Suspending")
    elif number == 4:
        played.post = post(4, 100, outcome=SUCCESS)
        played.change(ray.name, job_status="SUCCEEDED")


def _fate(played: World) -> Any:
    attempts = [(a.number, a.ray_job, a.reason) for a in played.status.attempts]
    return played.phase, attempts, played.created


UNDISTURBED = _play(None, dies_after=False)


def test_an_undisturbed_life_has_four_attempts_and_tells_its_story() -> None:
    phase, attempts, created = _fate(UNDISTURBED)
    assert phase == "Succeeded"
    assert [a[2] for a in attempts] == ["DiskFull", "Suspended", "Preempted", "Succeeded"]
    assert created == ["minimal-1", "minimal-2", "minimal-3", "minimal-4"]
    assert not UNDISTURBED.ray_jobs
    assert not UNDISTURBED.pods


@pytest.mark.parametrize("dies_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(UNDISTURBED.actions))
def test_a_controller_that_dies_at_any_write_changes_no_fate(write: int, dies_after: bool) -> None:
    played = _play(write, dies_after)
    assert played.dies_at is None, "it died"
    assert _fate(played) == _fate(UNDISTURBED)
    assert not played.ray_jobs
    assert not played.pods
