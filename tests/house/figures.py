"""Print how large both packages are and how their modules depend on each other, as Markdown.

    python -m tests.house.figures                 the working tree
    python -m tests.house.figures v0.1.0 HEAD .   revisions and folders, one column for each

Definitions:

- A *wing* is a package directly below `tuneyard` or `tuneyard_trainer`. Where arrows between wings
  are counted, the modules beside the wings are one more wing.
- An *arrow* is a pair of modules of which one imports the other, however often and wherever in the
  file: in functions and for type checkers too. An import by a computed name is not seen.
- The *floors* are the number of modules in the longest chain of imports, with all modules of a
  circle on one floor. A *circle* is a set of modules that import each other, directly or not.
- The length of a *function* is the number of lines from `def` to its end: with the docstring,
  comments and nested functions, without decorators. Methods and nested functions count as well.
- The length of a *file* is its number of lines, blank ones included.
- `p90` is the smallest length that at least nine tenths do not exceed (nearest rank).
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"operator": "tuneyard", "trainer": "tuneyard_trainer"}
"""The import package in each source root."""


@dataclass(frozen=True)
class Spread:
    """The distribution of some lengths, in lines."""

    median: float
    p90: int
    longest: int
    where: str
    """The name of the longest one."""

    @classmethod
    def of(cls, lengths: dict[str, int]) -> Spread:
        """Summarize lengths by name; there must be at least one."""
        ordered = sorted(lengths.values())
        where = max(lengths, key=lambda name: lengths[name])
        p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
        return cls(statistics.median(ordered), p90, ordered[-1], where)


@dataclass(frozen=True)
class Figures:
    """The figures of one package at one revision."""

    files: int
    lines: int
    wings: int
    floors: int
    circles: int
    arrows: int
    arrows_between_wings: int
    pairs_of_wings: int
    """Ordered pairs of wings with at least one arrow between them."""
    function_count: int
    functions: Spread
    file_sizes: Spread


def measure(source_root: Path, package: str) -> Figures:
    """Return the figures of the package in a source root. Raises SystemExit if there is none."""
    folder = source_root / package
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise SystemExit(f"{folder} contains no Python files")
    texts = {str(path.relative_to(source_root)): path.read_text("utf-8") for path in files}
    file_lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    function_lengths = dict(_functions(texts))
    graph = _import_graph(source_root, package)
    if len(graph.modules) != len(files):
        raise SystemExit(
            f"{folder} contains {len(files)} Python files and {len(graph.modules)} importable "
            "modules: give every folder an __init__.py"
        )
    arrows = [
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    ]
    wings = {path.parent.name for path in folder.glob("*/__init__.py")}
    ends = [(_wing(importer, wings), _wing(imported, wings)) for importer, imported in arrows]
    crossings = [(start, end) for start, end in ends if start != end]
    circles = _circles(graph)
    return Figures(
        files=len(files),
        lines=sum(file_lengths.values()),
        wings=len(wings),
        floors=_floors(graph, circles),
        circles=len({circle for circle in circles.values() if len(circle) > 1}),
        arrows=len(arrows),
        arrows_between_wings=len(crossings),
        pairs_of_wings=len(set(crossings)),
        function_count=len(function_lengths),
        functions=Spread.of(function_lengths),
        file_sizes=Spread.of(file_lengths),
    )


# ---- imports ------------------------------------------------------------------------------------


def _import_graph(source_root: Path, package: str) -> grimp.ImportGraph:
    """Return the graph of a package that need not be the installed one."""
    sys.path.insert(0, str(source_root))
    try:
        return grimp.build_graph(package, cache_dir=None)
    finally:
        sys.path.remove(str(source_root))


def _circles(graph: grimp.ImportGraph) -> dict[str, frozenset[str]]:
    """Return each module's circle: itself and all modules that it imports and that import it."""
    return {
        module: frozenset(
            {module, *(graph.find_upstream_modules(module) & graph.find_downstream_modules(module))}
        )
        for module in graph.modules
    }


def _floors(graph: grimp.ImportGraph, circles: dict[str, frozenset[str]]) -> int:
    """Return the length of the longest chain of imports, each circle taken as one module."""

    @cache
    def height(circle: frozenset[str]) -> int:
        below = {
            circles[imported]
            for module in circle
            for imported in graph.find_modules_directly_imported_by(module)
        } - {circle}
        return 1 + max(map(height, below), default=0)

    return max(map(height, circles.values()))


def _wing(module: str, wings: set[str]) -> str:
    """Return the name of the module's wing; "" for a module beside the wings."""
    _, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return first if first in wings else ""


# ---- functions ----------------------------------------------------------------------------------


def _functions(texts: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yield the name and the length of each function, in the files of the given texts."""
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text, file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None  # None is for nodes that no parser made
                yield f"{file}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


# ---- revisions ----------------------------------------------------------------------------------


@contextmanager
def checkout(source: str) -> Iterator[tuple[str, Path]]:
    """Give a name for the source and the folder with its `operator/` and `trainer/`.

    `source` is a folder that contains both, or else a Git revision of this repository, which is
    extracted into a temporary folder. Raises SystemExit if it is neither.
    """
    folder = Path(source)
    if all((folder / root / package).is_dir() for root, package in PACKAGES.items()):
        folder = folder.resolve()
        yield "working tree" if folder == ROOT else folder.name, folder
        return
    name = _git("rev-parse", "--short", f"{source}^{{commit}}").decode().strip()
    archive = _git("archive", "--format=zip", name, *PACKAGES)
    with tempfile.TemporaryDirectory(prefix="tuneyard-figures-") as temporary:
        zipfile.ZipFile(io.BytesIO(archive)).extractall(temporary)
        yield name, Path(temporary)


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], check=False, cwd=ROOT, capture_output=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


# ---- the table ----------------------------------------------------------------------------------


def table(columns: dict[str, Figures]) -> str:
    """Return a Markdown table with one column for each entry, and the longest ones below it."""
    rows = {
        "Python files": [str(f.files) for f in columns.values()],
        "lines": [f"{f.lines:,}" for f in columns.values()],
        "wings": [str(f.wings) for f in columns.values()],
        "floors": [str(f.floors) for f in columns.values()],
        "circles": [str(f.circles) for f in columns.values()],
        "arrows": [str(f.arrows) for f in columns.values()],
        "arrows between wings": [str(f.arrows_between_wings) for f in columns.values()],
        "pairs of wings with arrows": [str(f.pairs_of_wings) for f in columns.values()],
        "functions": [f"{f.function_count:,}" for f in columns.values()],
        "lines a function: median, p90, longest": [_spread(f.functions) for f in columns.values()],
        "lines a file: median, p90, longest": [_spread(f.file_sizes) for f in columns.values()],
    }
    lines = [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        "",
    ]
    for name, figures in columns.items():
        longest = f"`{figures.functions.where}`, `{figures.file_sizes.where}`"
        lines.append(f"- Longest in {name}: {longest}")
    return "\n".join(lines)


def _spread(spread: Spread) -> str:
    return f"{spread.median:g}, {spread.p90}, {spread.longest}"


def main(arguments: Sequence[str]) -> None:
    """Print the table for the given revisions and folders, or for the working tree."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sources", nargs="*", metavar="REVISION|FOLDER", default=[str(ROOT)])
    sources: list[str] = parser.parse_args(arguments).sources
    columns: dict[tuple[str, str], Figures] = {}
    for source in sources:
        with checkout(source) as (name, folder):
            for root, package in PACKAGES.items():
                columns[root, name] = measure(folder / root, package)
    by_package = sorted(columns, key=lambda column: list(PACKAGES).index(column[0]))
    print(table({" ".join(column): columns[column] for column in by_package}))


if __name__ == "__main__":
    main(sys.argv[1:])
