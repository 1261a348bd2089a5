"""Build the rig's programs with Go, once per machine.

Each target comes from a Go module under `go/`. Its result is kept outside the checkout, in a folder
named by a hash of everything that determines its content. All branches and checkouts therefore
share the programs and never use an outdated one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rig.errors import RigError

MODULES = Path(__file__).resolve().parent / "go"

# With -trimpath and without version control stamps, every checkout builds the same bytes.
FLAGS = ("-mod=readonly", "-trimpath", "-buildvcs=false")
LINKER_FLAGS = "-s -w"

# Without cgo the build needs no C compiler, and the programs run on any Linux. Rare garbage
# collections of the compiler save 15% of its processor time (134 to 114 s for versitygw).
ENVIRONMENT = {"CGO_ENABLED": "0", "GOWORK": "off", "GOGC": "400", "GOMEMLIMIT": "3GiB"}


@dataclass(frozen=True)
class Target:
    """One entry of the cache: a program, or files copied out of a Go module's folder."""

    name: str
    module: str
    """The folder under `go/` that pins the versions."""
    package: str | None = None
    """The package to compile: an import path, or "." for the folder's own main.go."""
    program: str = ""
    aliases: tuple[str, ...] = ()
    """Further names of a program whose behavior depends on the name it is called with."""
    source_module: str | None = None
    """The dependency whose files are copied, or whose version is stamped into the program."""
    files: tuple[str, ...] = ()
    """Folders to copy out of `source_module`."""
    version_variables: tuple[str, ...] = ()
    """Go packages with a variable `gitVersion`; if it is unset, the API server reports v0.0.0."""


TARGETS = {
    target.name: target
    for target in (
        Target(
            "versitygw",
            "versitygw",
            package="github.com/versity/versitygw/cmd/versitygw",
            program="versitygw",
        ),
        Target("helm", "helm", package="helm.sh/helm/v4/cmd/helm", program="helm"),
        Target(
            "kubernetes",
            "kubernetes",
            package=".",
            program="kubernetes",
            aliases=(
                "etcd",
                "kube-apiserver",
                "kube-controller-manager",
                "kube-proxy",
                "kube-scheduler",
                "kubectl",
                "kubelet",
            ),
            source_module="k8s.io/kubernetes",
            version_variables=("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"),
        ),
        Target(
            "kuberay-crds",
            "kuberay",
            source_module="github.com/ray-project/kuberay/ray-operator",
            files=("config/crd/bases",),
        ),
        Target("coredns", "coredns", package=".", program="coredns"),
        Target("pause", "pause", package=".", program="pause"),
        Target(
            "kuberay",
            "kuberay",
            package="github.com/ray-project/kuberay/ray-operator",
            program="ray-operator",
        ),
        Target(
            "kueue-crds",
            "kueue",
            source_module="sigs.k8s.io/kueue",
            files=("config/components/crd", "config/components/webhook"),
        ),
        Target("kueue", "kueue", package="sigs.k8s.io/kueue/cmd/kueue", program="kueue"),
    )
}
"""In the order in which the parts of `make test` need them: those of a node come last."""


def cache_root() -> Path:
    """Return the folder of the built programs: `TUNEYARD_CACHE`, or one in the user's cache."""
    if root := os.environ.get("TUNEYARD_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tuneyard"


def cache_entry(target: Target) -> Path:
    """Return the folder of the target's result, whether or not it is built."""
    return cache_root() / "bin" / f"{target.name}-{_digest(target)}"


def missing(names: Iterable[str]) -> list[str]:
    """Return the targets that are not in the cache."""
    return [name for name in names if not cache_entry(TARGETS[name]).is_dir()]


def ensure(names: Iterable[str]) -> dict[str, Path]:
    """Build the missing targets and return each target's folder.

    The call takes a few milliseconds if nothing is missing.
    """
    return {name: _ensure(TARGETS[name]) for name in names}


@cache
def find_go() -> str | None:
    """Return the `go` command on PATH or in the folder of Go's installer; None without Go."""
    return shutil.which("go") or shutil.which("/usr/local/go/bin/go")


def _digest(target: Target) -> str:
    """Return a hash of sources and flags: either change must rebuild the program."""
    folder = MODULES / target.module
    digest = hashlib.sha256()
    recipe = (target, FLAGS, LINKER_FLAGS, platform.system(), platform.machine())
    digest.update(repr(recipe).encode())
    for path in sorted([folder / "go.mod", folder / "go.sum", *folder.glob("*.go")]):
        if path.exists():
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _ensure(target: Target) -> Path:
    folder = cache_entry(target)
    if folder.is_dir():
        return folder
    with _locked(folder.parent / f"{target.name}.lock"):
        if not folder.is_dir():
            _build_into(target, folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock. The kernel releases it when the process ends, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_into(target: Target, folder: Path) -> None:
    """Build in a temporary folder and rename it, so that an existing entry is always complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if target.package is not None:
        _compile(target, partial)
    if target.files:
        _copy_files(target, partial)
    partial.rename(folder)


def _compile(target: Target, folder: Path) -> None:
    assert target.package is not None
    linker_flags = " ".join([LINKER_FLAGS, *_version_flags(target)])
    output = str(folder / target.program)
    _go(target, "build", *FLAGS, "-ldflags", linker_flags, "-o", output, target.package)
    for alias in target.aliases:
        (folder / alias).symlink_to(target.program)


def _version_flags(target: Target) -> Iterator[str]:
    if not target.version_variables:
        return
    version = _source(target)["Version"]
    major, minor, _ = version.removeprefix("v").split(".", 2)
    for package in target.version_variables:
        yield f"-X {package}.gitVersion={version}"
        yield f"-X {package}.gitMajor={major}"
        yield f"-X {package}.gitMinor={minor}"


def _copy_files(target: Target, folder: Path) -> None:
    source = Path(_source(target)["Dir"])
    for name in target.files:
        copy = folder / Path(name).name
        shutil.copytree(source / name, copy)
        _make_writable(copy)


def _make_writable(root: Path) -> None:
    """Make copies from Go's read-only module cache writable, so that `rm -r` can remove them."""
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def _source(target: Target) -> dict[str, str]:
    """Return Go's description of the dependency (`Version`, `Dir`); download it if necessary."""
    assert target.source_module is not None
    found = _go(target, "mod", "download", "-json", target.source_module)
    described: dict[str, str] = json.loads(found)
    return described


def _go(target: Target, *arguments: str) -> str:
    """Run Go in the target's module and return its output.

    Go runs at a slightly lower priority: a build takes minutes on all cores, beside tests with time
    limits in `.ci/run`, and other tests wait for it.
    """
    go = find_go()
    if go is None:
        raise RigError(
            f"{target.name} is not built and Go is not installed: install Go 1.26 or later"
        )
    environment = {**os.environ, **ENVIRONMENT}
    command = ["nice", "-n", "5", go, *arguments]
    done = subprocess.run(
        command,
        check=False,
        cwd=MODULES / target.module,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RigError(f"{' '.join(command)} failed in {target.module}:\n{done.stderr.strip()}")
    return done.stdout
