"""The operator's Prometheus metrics; a test fixes their names, units and labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.reasons import REASONS
from tuneyard.api.status import AttemptStatus, JobStatus
from tuneyard.status.observe import Job
from tuneyard.status.times import moment_of

REGISTRY = CollectorRegistry(auto_describe=True)

_MOST_SECONDS = 366 * 24 * 3600.0
"""The longest time that is counted: a driver may report any."""
_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600)

JOBS = Gauge("tuneyard_jobs", "Jobs by phase.", ["kind", "phase"], registry=REGISTRY)
TRANSITIONS = Counter(
    "tuneyard_job_transitions_total",
    "Changes of a job's phase, by the new phase.",
    ["kind", "phase"],
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "tuneyard_job_queue_seconds",
    "Time from an attempt's creation, or the end of its preparation, to the start of its driver.",
    ["kind"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
JOB_SECONDS = Histogram(
    "tuneyard_job_duration_seconds",
    "Total time of a finished job's attempts.",
    ["kind", "method", "outcome"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "tuneyard_stage_duration_seconds",
    "Time that a finished stage took.",
    ["kind", "method", "stage", "outcome"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
ATTEMPTS = Counter(
    "tuneyard_attempts_total", "Ended attempts by reason.", ["kind", "reason"], registry=REGISTRY
)
RECONCILE_SECONDS = Histogram(
    "tuneyard_reconcile_duration_seconds",
    "Time of one reconcile of a job, its writes included.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
    registry=REGISTRY,
)
RECONCILE_ERRORS = Counter(
    "tuneyard_reconcile_errors_total",
    "Reconciles of a job that failed and were retried.",
    ["reason"],
    registry=REGISTRY,
)
REQUESTS = Counter(
    "tuneyard_kubernetes_requests_total",
    "Requests to the API server, without kopf's watches.",
    ["verb", "code"],
    registry=REGISTRY,
)
POSTS = Counter(
    "tuneyard_progress_posts_total",
    "Progress posts by outcome.",
    ["outcome"],
    registry=REGISTRY,
)
PROGRESS_WRITES = Counter(
    "tuneyard_progress_writes_total",
    "Status writes that changed numbers alone: progress, metrics and stages.",
    registry=REGISTRY,
)
PROGRESS_WAIT = Gauge(
    "tuneyard_progress_write_wait_seconds",
    "How long the newest progress write waits for its turn among all jobs.",
    registry=REGISTRY,
)
LEADER = Gauge("tuneyard_leader", "1 while this replica is the active one.", registry=REGISTRY)

_JOB = ("namespace", "kind", "name")
LOSS = Gauge("tuneyard_training_loss", "The newest training loss.", _JOB, registry=REGISTRY)
_TRAINING = {
    "loss": LOSS,
    "validationLoss": Gauge(
        "tuneyard_training_validation_loss", "The newest held-out loss.", _JOB, registry=REGISTRY
    ),
    "reward": Gauge(
        "tuneyard_training_reward",
        "Mean reward of the newest completions.",
        _JOB,
        registry=REGISTRY,
    ),
    "heldOutIndependentReward": Gauge(
        "tuneyard_training_independent_reward",
        "Mean independent reward of the newest completions of held-out prompts.",
        _JOB,
        registry=REGISTRY,
    ),
    "rewardLengthCorrelation": Gauge(
        "tuneyard_training_reward_length_correlation",
        "Correlation of reward and length over the newest completions.",
        _JOB,
        registry=REGISTRY,
    ),
    "kl": Gauge(
        "tuneyard_training_kl_nats",
        "KL divergence of the policy from the reference, in nats per completion.",
        _JOB,
        registry=REGISTRY,
    ),
    "learningRate": Gauge(
        "tuneyard_training_learning_rate", "The learning rate.", _JOB, registry=REGISTRY
    ),
    "tokensPerSecond": Gauge(
        "tuneyard_training_tokens_per_second",
        "Tokens trained on per second, over all workers.",
        _JOB,
        registry=REGISTRY,
    ),
    "gpuMemoryBytes": Gauge(
        "tuneyard_training_gpu_memory_bytes",
        "Peak GPU memory of one worker.",
        _JOB,
        registry=REGISTRY,
    ),
}
PROGRESS = Gauge(
    "tuneyard_training_progress_ratio", "Share of the job that is done.", _JOB, registry=REGISTRY
)


def set_progress(labels: tuple[str, str, str], status: JobStatus) -> None:
    """Set the training series of a job from its status."""
    if status.progress is None:
        return
    PROGRESS.labels(*labels).set(status.progress.percentage / 100)
    for name, gauge in _TRAINING.items():
        if name in status.progress.metrics:
            gauge.labels(*labels).set(status.progress.metrics[name])


def drop_progress(labels: tuple[str, str, str]) -> None:
    """Remove the training series of a job."""
    for gauge in (PROGRESS, *_TRAINING.values()):
        gauge.remove_by_labels(dict(zip(_JOB, labels, strict=True)))


def count_change(job: Job, before: JobStatus | None, after: JobStatus) -> None:
    """Update counters and histograms for a change of status."""
    before = before or JobStatus()
    if after.phase and after.phase != before.phase:
        TRANSITIONS.labels(job.kind, after.phase).inc()
        if after.phase in ("Succeeded", "Failed"):
            reason = after.failure.reason if after.failure else None
            outcome = "Succeeded" if after.phase == "Succeeded" else _label(reason)
            listed = sum(_run_time(attempt) for attempt in after.attempts)
            seconds = (after.dropped_seconds or 0.0) + listed
            JOB_SECONDS.labels(job.kind, method_of(job), outcome).observe(seconds)
    _count_attempts(job, before, after)
    _count_stages(job, before, after)


def _count_attempts(job: Job, before: JobStatus, after: JobStatus) -> None:
    known = {attempt.number: attempt for attempt in before.attempts}
    for attempt in after.attempts:
        old = known.get(attempt.number)
        if attempt.finished_at and not (old and old.finished_at):
            ATTEMPTS.labels(job.kind, _label(attempt.reason)).inc()
        if attempt.running_at and not (old and old.running_at):
            waited = _between(attempt.prepared_at or attempt.started_at, attempt.running_at)
            QUEUE_SECONDS.labels(job.kind).observe(waited)


def _count_stages(job: Job, before: JobStatus, after: JobStatus) -> None:
    known = {stage.name: stage.state for stage in before.stages}
    for stage in after.stages:
        ended = stage.state in ("Succeeded", "Failed") and stage.finished_at
        if ended and known.get(stage.name) != stage.state:
            seconds = _between(stage.started_at, stage.finished_at)
            STAGE_SECONDS.labels(job.kind, method_of(job), stage.kind, stage.state).observe(seconds)


def _run_time(attempt: AttemptStatus) -> float:
    """Return the seconds that an ended attempt ran, its preparation included."""
    end = attempt.finished_at
    prepared = _between(attempt.preparing_at, attempt.prepared_at or end)
    return prepared + _between(attempt.running_at, end)


def method_of(job: Job) -> str:
    """Return the value of the label `method`: sft, pretrain, dpo, ppo, ..., or none."""
    if isinstance(job, FineTuneJob):
        return job.spec.method
    return job.spec.optimize.kind if job.spec.optimize else "none"


def _label(reason: str | None) -> str:
    """Return a reason as a label: drivers may post any word, and a series stays for ever."""
    if reason is None:
        return "Unknown"
    return reason if reason in REASONS or reason == "Succeeded" else "Other"


def _between(start: str | None, end: str | None) -> float:
    """Return the seconds between two times; 0: one of them is unknown, no time in UTC, or they are
    in the wrong order: a driver reports those of its stages, and clocks differ."""
    if not start or not end:
        return 0.0
    try:
        return min(max(0.0, (moment_of(end) - moment_of(start)).total_seconds()), _MOST_SECONDS)
    except (ValueError, TypeError):  # TypeError: one of them has no time zone
        return 0.0
