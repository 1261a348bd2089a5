"""The entry point of the `tuneyard` script.

It imports next to nothing: Ctrl-C during the other imports is an interruption like any later one.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the `tuneyard` command."""
    try:
        from tuneyard.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()
