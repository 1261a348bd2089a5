"""Tell what a run waits for, and repeat it while the wait lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

FIRST_SECONDS = 1.0
"""A wait that ends sooner is not told."""
REPEAT_SECONDS = 20.0


class Waits:
    """Tells of each wait after FIRST_SECONDS, and then every REPEAT_SECONDS until it ends.

    `begin` and `end` are not called at the same time. `tell(message, seconds)` is called in another
    thread; `seconds`: the time that the wait has lasted.
    """

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell = tell
        self._ended = threading.Event()

    def follow(self, event: Mapping[str, Any]) -> None:
        """Begin or end a wait as an event of the runner says. A message of a stage without a step
        is a wait too, and the stage's progress has told it."""
        if event["type"] == "wait":
            self.begin(event["message"])
        elif event["type"] == "progress" and event["message"] and not event["step"]:
            self.begin(event["message"], told=True)
        else:
            self.end()

    def begin(self, message: str, *, told: bool = False) -> None:
        """Begin a wait, which ends the one before it. `told`: only repeat the message."""
        self.end()
        self._ended = threading.Event()
        pause = REPEAT_SECONDS if told else FIRST_SECONDS
        arguments = (message, time.monotonic(), self._ended, pause)
        threading.Thread(target=self._repeat, args=arguments, daemon=True, name="waits").start()

    def end(self) -> None:
        """End the present wait, if there is one."""
        self._ended.set()

    def _repeat(self, message: str, start: float, ended: threading.Event, pause: float) -> None:
        while not ended.wait(pause):
            self._tell(message, time.monotonic() - start)
            pause = REPEAT_SECONDS


def wait_event(message: str) -> dict[str, Any]:
    """Return the event of a wait, which lasts until the next event."""
    return {"type": "wait", "message": message}
