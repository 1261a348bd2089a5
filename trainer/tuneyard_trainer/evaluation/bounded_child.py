"""The loop of a process of `bounded`: it reads requests as JSON lines and writes a reply for each.

It imports the standard library alone, as the process starts for a few texts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30
"""Address space of the process: more ends with a MemoryError."""
LONGEST_ERROR = 500
"""Characters of a reply's error."""


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Reply to each request until there is no more; an error of `handle` is the reply `error`.

    A request that takes longer than its `seconds` ends the process by the signal of an alarm, which
    ends C code too, and also when the process that asks is gone.
    """
    replies = sys.stdout
    logging.disable()
    for kind, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))
    with contextlib.redirect_stdout(sys.stderr):
        print("{}", file=replies, flush=True)
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request.pop("seconds"))
            try:
                reply = json.dumps(handle(request))
            except Exception as error:  # any text must get a reply
                shown = f"{type(error).__name__}: {error}"
                reply = json.dumps({"error": shown[:LONGEST_ERROR]})
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(reply, file=replies, flush=True)
