"""Start the container runtime and import its images without a registry."""

from __future__ import annotations

import json
from pathlib import Path

from rig import images
from rig.network import PODS
from rig.processes import Servers, report, run
from rig.state import State

PAUSE_IMAGE = "rig.local/pause:1"
PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
READY_SECONDS = 30

# Layers and scratch space of the containers are kept in memory. overlayfs refuses a lower folder
# inside another one, and every folder on the disk is inside an image of the machine's root.
STORAGE_SIZE = "4g"

_CONFIG = """\
version = 2
root = "{storage}/root"
state = "{storage}/state"
disabled_plugins = [
  "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{storage}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  # runc may not lower an oom_score_adj without CAP_SYS_RESOURCE, which containers often lack.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{network}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = false
"""


def plugin_folder() -> Path | None:
    """Return the folder of the CNI plugins, which depends on the distribution, or None."""
    return next((folder for folder in PLUGIN_FOLDERS if (folder / "ptp").exists()), None)


class Containerd:
    """A container runtime with all of its files in the rig's own mount namespace."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._storage = state.root / "containerd"
        self.socket = self._storage / "containerd.sock"

    def start(self, servers: Servers) -> None:
        self._storage.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"mode=700,size={STORAGE_SIZE}", "rig", self._storage)
        config = self._state.root / "containerd.toml"
        config.write_text(self._config())
        servers.start("containerd", "containerd", "-c", config)
        servers.wait_for("containerd is ready", lambda: self._ctr("version"), READY_SECONDS)

    def add_images(self) -> None:
        """Import the pause image and one image for each folder of the settings."""
        settings = self._state.settings
        archive = self._state.root / "image.tar"
        images.write_pause_image(archive, PAUSE_IMAGE, Path(settings.program("pause", "pause")))
        self._import(archive)
        for name, root in settings.images.items():
            layer = images.write_folder_image(archive, name, Path(root), settings.image_path)
            self._import(archive)
            folder = self._layer_folder(layer)
            run("mount", "--bind", root, folder)
            # Read-only, so that the removal of the image cannot delete files of the folder.
            run("mount", "-o", "remount,bind,ro", folder)
            report(f"image {name} is {root}, read-only on {folder}")

    def _config(self) -> str:
        network = self._state.root / "cni"
        network.mkdir()
        (network / "10-rig.conflist").write_text(json.dumps(self._network()))
        return _CONFIG.format(
            storage=self._storage,
            socket=self.socket,
            pause=PAUSE_IMAGE,
            plugins=plugin_folder(),
            network=network,
        )

    def _network(self) -> dict[str, object]:
        """Return a network of one point-to-point link per pod: it needs no bridge module."""
        addresses = {
            "type": "host-local",
            "dataDir": str(self._state.root / "ipam"),
            "ranges": [[{"subnet": PODS}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        plugin = {"type": "ptp", "mtu": 1500, "ipMasq": False, "ipam": addresses}
        return {"cniVersion": "0.4.0", "name": "rig", "plugins": [plugin]}

    def _import(self, archive: Path) -> None:
        self._ctr("images", "import", "--snapshotter", "overlayfs", archive)
        archive.unlink()

    def _layer_folder(self, layer: str) -> str:
        """Return the folder in which the snapshotter keeps the unpacked layer."""
        view = f"find-{layer[-12:]}"
        mount = self._ctr("snapshots", "view", "--target", "/unused", view, layer)
        # Nothing references the view, so containerd's garbage collector removes it.
        options = mount.replace(",", " ").replace("lowerdir=", " ").split()
        return next(word for word in options if "/snapshots/" in word)

    def _ctr(self, *arguments: str | Path) -> str:
        return run("ctr", "--address", self.socket, "--namespace", "k8s.io", *arguments)
