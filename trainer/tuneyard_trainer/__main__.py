"""`python -m tuneyard_trainer`: an attempt's driver, on the head of its Ray cluster."""

from __future__ import annotations

import os
import sys

from tuneyard_trainer.pod.driver import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's exit handlers could write after the outcome, the last line, or hang
