"""The operator's command line, with a status server that checks its certificates more often.

python -m tests.chaos.operator operator ...
"""

from __future__ import annotations

from functools import partialmethod

from tuneyard.cli.main import main
from tuneyard.controller.certificates import ServerCertificates

CHECK_SECONDS = 10.0
"""In place of a minute, for which every run would wait where a certificate has expired."""

if __name__ == "__main__":
    followed = partialmethod(ServerCertificates.follow, every=CHECK_SECONDS)
    ServerCertificates.follow = followed  # type: ignore[assignment]
    main()
