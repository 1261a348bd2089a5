"""Container images without a registry: archives written by hand, and folders that act as images."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# How an image layer says "nothing below this path shows through", and "this path is deleted".
OPAQUE = ".wh..wh..opq"
WHITEOUT = ".wh."

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Of a home's hidden files a pod sees only these, where Python interpreters are installed. The rest
# is settings and credentials: none of a test's business, and a `.ray` with a token would even
# switch Ray's head to token authentication, which leaves the RayJob in Initializing for ever.
VISIBLE = frozenset({".local", ".pyenv"})

SCRATCH = ("run", "tmp")

# What a test's pods run: this interpreter, its virtual environment and this checkout.
NEEDED = (Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Layer:
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Path to content and mode."""
    folders: dict[str, int] = field(default_factory=dict)
    """Path to mode."""

    def archive(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, mode in self.folders.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, mode
                archive.addfile(entry)
            for name, (content, mode) in self.files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), mode
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()


def write(path: Path, name: str, layers: Iterable[Layer], config: dict[str, object]) -> str:
    """Write an image for `ctr images import`; return the id of its bottom layer."""
    archives = [layer.archive() for layer in layers]
    digests = ["sha256:" + hashlib.sha256(archive).hexdigest() for archive in archives]
    machine = platform.machine()
    description = {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": digests},
    }
    content = json.dumps(description).encode()
    config_name = hashlib.sha256(content).hexdigest() + ".json"
    layer_files = {f"{index}.tar": archive for index, archive in enumerate(archives)}
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": list(layer_files)}]
    parts = {config_name: content, **layer_files, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(Layer({part: (data, 0o644) for part, data in parts.items()}).archive())
    return digests[0]


def pause(path: Path, name: str, program: Path) -> None:
    """The image of the process that holds a pod's namespaces."""
    layer = Layer({"pause": (program.read_bytes(), 0o755)})
    write(path, name, [layer], {"Entrypoint": ["/pause"]})


def stand_in(path: Path, name: str, root: Path, search_path: str) -> str:
    """Write an image that stands in for a folder; return the id of its bottom layer.

    That layer holds a marker only, which makes its id unique; a bind mount of `root` then takes its
    place. The top layer hides what must not show through.
    """
    marker = Layer({".tuneyard-rig-image": (name.encode(), 0o644)})
    config: dict[str, object] = {
        "Env": [f"PATH={search_path}", "LANG=C.UTF-8"],
        "Cmd": ["/bin/sh"],
        "WorkingDir": "/tmp",
    }
    return write(path, name, [marker, _cover(root)], config)


def out_of_reach(root: Path) -> Path | None:
    """A folder that the tests need and that pods would not see in `root`; None if they see all.

    An image shows one filesystem: what is mounted somewhere below the root stays outside.
    """
    inside = [path for path in NEEDED if path.is_relative_to(root)]
    return next((path for path in inside if path.stat().st_dev != root.stat().st_dev), None)


def _cover(root: Path) -> Layer:
    hidden = [*_private(root), *_scratch(root)]
    marks = [path.relative_to(root) for path in hidden]
    folders = {path.parent for path in hidden} | set(_ways(root))
    modes = {str(path.relative_to(root)): path.stat().st_mode & 0o7777 | 0o11 for path in folders}
    return Layer({str(path): (b"", 0o644) for path in marks}, modes)


def _ways(root: Path) -> Iterator[Path]:
    """The folders on the way to what is needed: pods do not run as root, and a home is closed."""
    for path in NEEDED:
        if path.is_relative_to(root):
            yield from (
                parent for parent in path.parents if parent != root and parent.is_relative_to(root)
            )


def _private(root: Path) -> Iterator[Path]:
    """The marks that hide settings and credentials in the homes of root and of this user."""
    homes = {root / "root", root / str(Path.home()).lstrip("/")} - {root}
    for home in sorted(homes):
        for path in sorted(home.glob(".*")):
            if path.name not in VISIBLE:
                yield _whiteout(path)


def _scratch(root: Path) -> Iterator[Path]:
    """The marks that empty the scratch folders, but for a checkout or an interpreter in them."""
    for folder in (root / name for name in SCRATCH):
        keep = {path.relative_to(folder).parts[0] for path in NEEDED if folder in path.parents}
        if not folder.is_dir():
            continue
        if not keep:
            yield folder / OPAQUE
            continue
        for path in sorted(folder.iterdir()):
            if path.name not in keep:
                yield _whiteout(path)


def _whiteout(path: Path) -> Path:
    return path.with_name(WHITEOUT + path.name)
