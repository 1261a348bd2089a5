"""The process inside: it starts every server, in order, and is the parent of them all.

At level "node" it is pid 1 of the rig's namespaces. It stops nothing by itself: it is killed, and
the kernel ends the rest.
"""

from __future__ import annotations

import time
from typing import Never

from rig import addons, controlplane, node
from rig.apiclient import ApiClient
from rig.processes import Servers, report
from rig.state import State


def supervise(state: State) -> Never:
    """Start what the settings ask for, say so in a file, and reap until killed."""
    servers = Servers(state)
    began = time.monotonic()
    try:
        _start(state, servers)
    except Exception as error:
        state.announce(state.failed, f"{type(error).__name__}: {error}")
        raise
    seconds = time.monotonic() - began
    report(f"ready after {seconds:.1f} s")
    state.announce(state.ready, f"{seconds:.1f}")
    servers.reap_forever()


def _start(state: State, servers: Servers) -> None:
    settings = state.settings
    api = ApiClient(state)
    if settings.level == "node":
        node.prepare(state)
    controlplane.start(state, servers, api)
    if settings.level == "node":
        node.start(state, servers)
    # While controllers and node start: KubeRay's definitions are 4 MB and take seconds to accept.
    if settings.kuberay != "no":
        addons.add_kuberay_definitions(state)
    controlplane.wait_for_controllers(servers, api)
    if settings.level == "node":
        node.wait_until_ready(servers, api)
    if settings.kuberay == "running":
        addons.start_kuberay(state, servers)
    if settings.kueue:
        addons.start_kueue(state, servers, api)
