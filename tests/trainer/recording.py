"""The plain launcher, which also writes the rows of every training step of either engine to a file.

Usage: `python recording.py ROWS.jsonl KILL_AFTER --plan ...`. After KILL_AFTER steps the process
sends itself SIGKILL in the next step, before it is reported or saved; 0: never.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tuneyard_trainer.running import torchrun
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.training.course import Course

torch.set_num_threads(1)


def record(path: Path, kill_after: int) -> None:
    """Make each step write a line, and the process end itself after `kill_after` steps."""
    original, steps = Course.follow, 0

    def recorded(
        self: Course, state: LoopState, rows: Any, metrics: Any, *, stop: bool
    ) -> LoopState:
        nonlocal steps
        if kill_after and steps == kill_after:
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        with path.open("a") as file:
            line = {"step": state.step, "rows": [int(row) for row in rows]}
            file.write(json.dumps(line) + "\n")
        return original(self, state, rows, metrics, stop=stop)

    Course.follow = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    sys.exit(torchrun.main())
