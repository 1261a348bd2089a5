"""The plain launcher, which also writes the rows of every training step to a file.

Usage: `python recording.py ROWS.jsonl KILL_AFTER --plan ...`. After KILL_AFTER steps the process
sends itself SIGKILL in the middle of the next step; 0: never.
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
from tuneyard_trainer.training.loop import Loop

torch.set_num_threads(1)


def record(path: Path, kill_after: int) -> None:
    """Make each step write a line, and the process end itself after `kill_after` steps."""
    original, steps = Loop.backward, 0

    def recorded(self: Loop, rows: Any, step: int) -> tuple[dict[str, float], bool]:
        nonlocal steps
        result = original(self, rows, step)
        if kill_after and steps == kill_after:
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "rows": [int(row) for row in rows]}) + "\n")
        return result

    Loop.backward = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    sys.exit(torchrun.main())
