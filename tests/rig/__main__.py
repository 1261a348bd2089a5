"""Run the command line as `python tests/rig`, which needs no installation and no import path."""

import sys
from pathlib import Path

# Python puts this folder first on sys.path, where `images` or `build` would shadow other modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.cli import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
