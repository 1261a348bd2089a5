"""A process of its own replies within its limits, or is ended, and never hangs who asks."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import bounded
from tuneyard_trainer.evaluation.bounded import BoundedProcess

CHILD = """
import os, time
from tuneyard_trainer.evaluation.bounded_child import serve

def handle(request):
    if request["do"] == "sleep":
        time.sleep(60)
    if request["do"] == "fill":
        bytearray(8 << 30)
    if request["do"] == "print":
        print("a line that is no reply")
    if request["do"] == "exit":
        os._exit(3)
    if request["do"] == "much":
        return {"text": "x" * 300_000}
    return {"secret": os.environ.get("SECRET_TOKEN"), "pid": os.getpid()}

serve(handle)
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BoundedProcess:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("SECRET_TOKEN", "1234")
    return BoundedProcess("a_child", "does this and that")


def test_it_starts_for_the_first_request_ends_with_the_context_and_has_no_credentials(
    process: BoundedProcess,
) -> None:
    with process:
        assert process.pid is None
        reply = process.ask({"do": "nothing"}, 30)
        assert reply == {"secret": None, "pid": process.pid}
        assert process.ask({"do": "print"}, 30) == reply, "the same process, and only replies"
    assert not psutil.pid_exists(reply["pid"])


@pytest.mark.parametrize("deed", ["sleep", "exit"])
def test_a_request_that_does_not_end_or_ends_the_process_has_no_reply(
    process: BoundedProcess, deed: str
) -> None:
    with process:
        process.ask({"do": "nothing"}, 30)
        before = time.monotonic()
        assert process.ask({"do": deed}, 0.2) is None
        assert time.monotonic() - before < 0.2 + bounded.GRACE_SECONDS + 1
        assert process.ask({"do": "nothing"}, 30) is not None, "it was started again"


def test_a_process_that_ignores_its_alarm_is_killed(
    process: BoundedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "GRACE_SECONDS", 0.5)
    with process:
        reply = process.ask({"do": "nothing"}, 30)
        assert reply is not None
        os.kill(reply["pid"], signal.SIGSTOP)
        assert process.ask({"do": "nothing"}, 0.1) is None
        assert not psutil.pid_exists(reply["pid"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_more_memory_than_it_may_have_is_an_error_of_the_request(process: BoundedProcess) -> None:
    with process:
        assert process.ask({"do": "fill"}, 30) == {"error": "MemoryError: "}


def test_a_long_reply_comes_whole(process: BoundedProcess) -> None:
    with process:
        assert process.ask({"do": "much"}, 30) == {"text": "x" * 300_000}


def test_a_process_that_was_killed_between_two_requests_is_started_again(
    process: BoundedProcess,
) -> None:
    with process:
        reply = process.ask({"do": "nothing"}, 30)
        assert reply is not None
        killed = psutil.Process(reply["pid"])
        killed.kill()
        while killed.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert process.ask({"do": "nothing"}, 30) is not None


def test_a_process_that_cannot_start_is_an_error() -> None:
    process = BoundedProcess("no.such.module", "does nothing")
    with pytest.raises(StageError, match="does nothing did not start") as failed, process:
        process.ask({}, 1)
    assert failed.value.reason == "WorkerDied"
    assert failed.value.retryable
