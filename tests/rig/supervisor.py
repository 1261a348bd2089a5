"""The process inside of the rig: it starts every server and is the parent of all of them.

At level "node" it is pid 1 of the rig's namespaces. It stops no server: the keeper kills it, and
the kernel then ends the servers.
"""

from __future__ import annotations

import time
from typing import Never

from rig import addons, controlplane, node
from rig.apiclient import ApiClient
from rig.processes import Servers, report
from rig.state import State


def supervise(state: State) -> Never:
    """Start the servers of the settings, report the result in a file, and reap until killed."""
    servers = Servers(state)
    began = time.monotonic()
    try:
        _start(state, servers)
    except Exception as error:
        state.write_atomically(state.failed, f"{type(error).__name__}: {error}")
        raise
    seconds = time.monotonic() - began
    report(f"ready after {seconds:.1f} s")
    state.write_atomically(state.ready, f"{seconds:.1f}")
    servers.reap_forever()


def _start(state: State, servers: Servers) -> None:
    settings = state.settings
    api = ApiClient(state)
    if settings.level == "node":
        node.prepare(state)
    controlplane.start(state, servers, api)
    if settings.level == "node":
        node.start(state, servers)
    # KubeRay's CRDs are 4 MB and take seconds to install, while the controllers and the node start.
    if settings.kuberay != "no":
        addons.install_kuberay_crds(state)
    controlplane.wait_for_controllers(servers, api)
    if settings.level == "node":
        node.wait_until_ready(servers, api)
    if settings.kuberay == "running":
        addons.start_kuberay(state, servers)
    if settings.kueue:
        addons.start_kueue(state, servers, api)
