"""Container images without a registry: archives written by hand, and folders that act as images."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

# How an image layer says "nothing below this path shows through", and "this path is deleted".
OPAQUE = ".wh..wh..opq"
WHITEOUT = ".wh."

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Of a home's hidden files a pod sees only these, where Python interpreters are installed. The rest
# is settings and credentials: none of a test's business, and a `.ray` with a token would even
# switch Ray's head to token authentication, which leaves the RayJob in Initializing for ever.
VISIBLE = frozenset({".local", ".pyenv"})


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


def _cover(root: Path) -> Layer:
    private = [str(path.relative_to(root)) for path in _private(root)]
    scratch = {"tmp": 0o1777, "run": 0o755}
    homes = {str(PurePosixPath(path).parent): 0o700 for path in private}
    hidden = [_whiteout(path) for path in private]
    empty = [f"{folder}/{OPAQUE}" for folder in scratch]
    return Layer(dict.fromkeys([*empty, *hidden], (b"", 0o644)), {**scratch, **homes})


def _private(root: Path) -> Iterable[Path]:
    homes = {root / "root", root / str(Path.home()).lstrip("/")}
    hidden = [path for home in sorted(homes) for path in sorted(home.glob(".*"))]
    return [path for path in hidden if path.name not in VISIBLE]


def _whiteout(path: str) -> str:
    target = PurePosixPath(path)
    return str(target.with_name(WHITEOUT + target.name))
