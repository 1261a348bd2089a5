"""The names of the operator's metrics. Users' dashboards and alerts depend on each of them."""

from __future__ import annotations

NAMES = {
    "tuneyard_attempts_total",
    "tuneyard_job_duration_seconds",
    "tuneyard_job_queue_seconds",
    "tuneyard_job_transitions_total",
    "tuneyard_jobs",
    "tuneyard_kubernetes_requests_total",
    "tuneyard_leader",
    "tuneyard_progress_posts_total",
    "tuneyard_progress_write_wait_seconds",
    "tuneyard_progress_writes_total",
    "tuneyard_reconcile_duration_seconds",
    "tuneyard_reconcile_errors_total",
    "tuneyard_stage_duration_seconds",
    "tuneyard_training_gpu_memory_bytes",
    "tuneyard_training_independent_reward",
    "tuneyard_training_kl_nats",
    "tuneyard_training_learning_rate",
    "tuneyard_training_loss",
    "tuneyard_training_progress_ratio",
    "tuneyard_training_reward",
    "tuneyard_training_reward_length_correlation",
    "tuneyard_training_tokens_per_second",
    "tuneyard_training_validation_loss",
}
