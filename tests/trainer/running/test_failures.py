"""Unexpected errors end in one line with a reason."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tuneyard_trainer.running.failures import last_line, out_of_memory, unexpected, unexplained
from tuneyard_trainer.storage.files import disk_error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "the GPU ran out"),
        (MemoryError(), "the worker ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), "the worker ran out"),
    ],
)
def test_out_of_memory_is_named_and_not_retried(error: Exception, said: str) -> None:
    named = out_of_memory(error, "sft")
    assert named
    assert named.reason == "OutOfMemory"
    assert said in named.message
    assert "training.microBatchTokens" in named.advice
    assert not named.retryable


def test_other_errors_are_not_reported_as_out_of_memory() -> None:
    assert out_of_memory(RuntimeError("shapes do not match"), "sft") is None


def test_a_defect_is_reported_by_its_last_line_and_place() -> None:
    with pytest.raises(KeyError) as caught:
        dict[str, int]()["a\nb"]
    named = unexpected(caught.value)
    assert last_line(caught.value).startswith("KeyError: ")
    assert named.reason == "TrainerError"
    assert "test_failures.py:" in named.message
    assert "\n" not in named.message
    assert not named.retryable


def test_a_lost_peer_is_retried() -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]")
    assert (unexpected(error).reason, unexpected(error).retryable) == ("WorkerDied", True)


MONITOR = """Training failed due to worker errors:
[Rank 0 Error Snippet]:
A worker health check failed.
Worker info: Worker(
  metadata=ActorMetadata(
    hostname='bot-1-jfnp8-workers-worker-hmhdd',
  ),
)
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.244.0.12,\
 ID: 2fb3) was 0.97GB used / 1.00GB limit (0.969559)
OOM kill reason: Memory usage 1032667136B exceeded threshold of 1020054720B
Refer to the documentation on how to address the out of memory issue"""
"""The message of Ray 2.60, shortened."""


@pytest.mark.parametrize(
    ("in_a_pod", "where"),
    [
        (True, "container ray-worker of pod bot-1-jfnp8-workers-worker-hmhdd"),
        (False, "worker: bot-1-jfnp8-workers-worker-hmhdd"),
    ],
)
def test_a_worker_ended_by_rays_memory_monitor_names_its_machine_and_is_not_retried(
    monkeypatch: pytest.MonkeyPatch, in_a_pod: bool, where: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if in_a_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    named = unexplained(RuntimeError(MONITOR))
    assert (named.reason, named.retryable) == ("OutOfMemory", False)
    assert f"{where} ran out of memory, 0.97GB used / 1.00GB limit." in named.message
    assert "compute.memory" in named.advice


def test_a_killed_worker_is_retried() -> None:
    killed = RuntimeError("(1) the process was killed by the OOM killer due to high memory usage")
    assert (unexplained(killed).reason, unexplained(killed).retryable) == ("WorkerDied", True)


@pytest.mark.parametrize(
    ("code", "reason", "retryable"),
    [
        (errno.ENOSPC, "DiskFull", False),
        (errno.EACCES, "WriteFailed", False),
        (errno.EROFS, "WriteFailed", False),
        (errno.EIO, "WriteFailed", True),
    ],
)
def test_a_full_or_read_only_disk_is_not_retried(code: int, reason: str, retryable: bool) -> None:
    error = disk_error(OSError(code, "no"), Path("/mnt/pvc/models"))
    assert (error.reason, error.retryable) == (reason, retryable)
