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
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
keeper = subprocess.Popen(sleep)
before = watchdog.descendants()
child = subprocess.Popen(sleep)
with watchdog.guarded(spare=before):
    later = subprocess.Popen(sleep)
    print(keeper.pid, child.pid, later.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_driver_leaves_none_of_rays_processes_and_its_log_is_kept_to_the_end() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    keeper, child, later = (psutil.Process(int(pid)) for pid in driver.stdout.readline().split())
    watchdogs = [
        process
        for process in psutil.Process(driver.pid).children()
        if process not in (keeper, child, later)
    ]
    try:
        assert len(watchdogs) == 1
        driver.send_signal(signal.SIGKILL)
        driver.wait(60)
        ended, alive = psutil.wait_procs([child, *watchdogs], timeout=120)
        assert alive == [], f"{len(ended)} processes ended, these did not"
        assert later.is_running()  # the worker ends by itself
        assert keeper.is_running()  # so does the helper that writes the rest of the log
    finally:
        later.kill()
        keeper.kill()
