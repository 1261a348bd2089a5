"""The watchdog: no process is left behind by a driver that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil

DRIVER = """
import subprocess, sys, time
from tuneyard_trainer.running import watchdog
watchdog.GRACE_SECONDS = 0.1
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with watchdog.guarded():
    later = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, later.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_driver_leaves_no_process_that_was_there_when_the_watchdog_started() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    child, later = (psutil.Process(int(pid)) for pid in driver.stdout.readline().split())
    watchdogs = [
        process
        for process in psutil.Process(driver.pid).children()
        if process.pid not in (child.pid, later.pid)
    ]
    try:
        assert len(watchdogs) == 1
        driver.send_signal(signal.SIGKILL)
        driver.wait(60)
        ended, alive = psutil.wait_procs([child, *watchdogs], timeout=120)
        assert alive == [], f"{len(ended)} processes ended, these did not"
        assert later.is_running()  # the worker ends by itself
    finally:
        later.kill()
