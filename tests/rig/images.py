"""Write container images as archives, without a registry, and images that show a folder."""

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

# Markers of an image layer: a folder hides its content in lower layers; a path is deleted.
OPAQUE = ".wh..wh..opq"
WHITEOUT = ".wh."

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# The only hidden entries of a home folder that pods see, because Python interpreters are installed
# there. The others contain settings and credentials. A `.ray` with a token would also switch Ray's
# head to token authentication, and the RayJob would stay Initializing forever.
VISIBLE = frozenset({".local", ".pyenv"})

SCRATCH = ("run", "tmp")

# The folders that a test's pods need: this interpreter, its virtual environment, this checkout.
NEEDED = (Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Layer:
    """The content of an image layer."""

    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Path to (content, mode)."""
    folders: dict[str, int] = field(default_factory=dict)
    """Path to mode."""

    def archive(self) -> bytes:
        """Return the layer as a tar archive."""
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
    """Write an image for `ctr images import`; return the digest of its bottom layer."""
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


def write_pause_image(path: Path, name: str, program: Path) -> None:
    """Write the image of the process that keeps a pod's namespaces open."""
    layer = Layer({"pause": (program.read_bytes(), 0o755)})
    write(path, name, [layer], {"Entrypoint": ["/pause"]})


def write_folder_image(path: Path, name: str, root: Path, search_path: str) -> str:
    """Write an image that shows the folder `root`; return the digest of its bottom layer.

    The bottom layer contains only a marker, which makes its digest unique. The caller replaces this
    layer by a bind mount of `root`. The top layer hides credentials and scratch folders.

    `search_path`: PATH inside the image.
    """
    marker = Layer({".tuneyard-rig-image": (name.encode(), 0o644)})
    config: dict[str, object] = {
        "Env": [f"PATH={search_path}", "LANG=C.UTF-8"],
        "Cmd": ["/bin/sh"],
        "WorkingDir": "/tmp",
    }
    return write(path, name, [marker, _hiding_layer(root)], config)


def invisible_to_pods(root: Path, needed: Iterable[Path] = NEEDED) -> str | None:
    """Return which folder tests need but pods would not see in an image of `root`, why, and what to
    do. None: pods see them all.

    An image shows one filesystem, without the mounts below `root`, and pods mount an empty /tmp.
    """
    for path in needed:
        if not path.is_relative_to(root):
            continue
        if path.is_relative_to(root / "tmp"):
            return (
                f"{path} is below {root / 'tmp'}, where pods have a volume of their own and would "
                "not find it: move the checkout and its .venv elsewhere, for example to your home"
            )
        if path.stat().st_dev != root.stat().st_dev:
            return f"needs {path} on the filesystem of {root}, the only one that pods see"
    return None


def _hiding_layer(root: Path) -> Layer:
    """Return the layer that hides parts of `root` and opens the folders above the needed ones."""
    hidden = [*_hidden_in_homes(root), *_hidden_scratch(root)]
    markers = [path.relative_to(root) for path in hidden]
    folders = {path.parent for path in hidden} | set(_parents_of_needed(root))
    modes = {str(path.relative_to(root)): path.stat().st_mode & 0o7777 | 0o11 for path in folders}
    return Layer({str(path): (b"", 0o644) for path in markers}, modes)


def _parents_of_needed(root: Path) -> Iterator[Path]:
    """Yield the parents of the needed folders.

    The layer makes them searchable: pods do not run as root, and a home folder may be private.
    """
    for path in NEEDED:
        if path.is_relative_to(root):
            yield from (
                parent for parent in path.parents if parent != root and parent.is_relative_to(root)
            )


def _hidden_in_homes(root: Path) -> Iterator[Path]:
    """Yield the markers that hide settings and credentials in the homes of root and this user."""
    homes = {root / "root", root / str(Path.home()).lstrip("/")} - {root}
    for home in sorted(homes):
        for path in sorted(home.glob(".*")):
            if path.name not in VISIBLE:
                yield _whiteout(path)


def _hidden_scratch(root: Path) -> Iterator[Path]:
    """Yield the markers that empty the scratch folders, except for needed folders in them."""
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
