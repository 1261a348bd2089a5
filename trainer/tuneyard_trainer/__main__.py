"""`python -m tuneyard_trainer`: an attempt's driver, on the head of its Ray cluster."""

from __future__ import annotations

import os
import sys

from tuneyard_trainer.pod.driver import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the ending is the last line: nothing of Ray's may follow it, or linger
