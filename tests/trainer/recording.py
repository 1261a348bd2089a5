"""The plain launcher, with every row that a step trained on written to a file as it happens.

Run as `python recording.py ROWS.jsonl KILL_AFTER --plan ...`: SIGKILLs itself in the middle of the
step after KILL_AFTER steps of this process; 0 never.
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
