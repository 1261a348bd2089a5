"""`python tests/rig`: a folder run by its path needs no installation and no import path."""

import sys
from pathlib import Path

# Python puts this folder itself first on the path, where `images` or `build` would shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.cli import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
