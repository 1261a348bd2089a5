"""The files that pkg:// sources name."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged_file(rest: str) -> Path:
    """Return the file of an installed package that `PACKAGE/NAME` names, without importing the
    package: its code is not run.

    Raises ModuleNotFoundError if the package is not installed, FileNotFoundError if it has no such
    file.
    """
    package, _, name = rest.partition("/")
    # find_spec of a dotted name would import the parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ModuleNotFoundError(f"the package {package} is not installed", name=package)
    for folder in spec.submodule_search_locations or ():
        file = (Path(folder) / name).resolve()
        if name and file.exists() and file.is_relative_to(Path(folder).resolve()):
            return file
    raise FileNotFoundError(f"the package {package} has no file {name!r}")
