"""The command line: `python tests/rig {build,deps,up,down,exec}`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rig import build, keeper, machine, rig, supervisor
from rig.errors import RigError
from rig.state import State


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status.

    The rig's own processes also start here, with the commands `keep` and `supervise`.
    """
    try:
        if arguments[:1] == ["supervise"]:
            supervisor.supervise(State(Path(arguments[1])))
        if arguments[:1] == ["keep"]:
            owner = int(arguments[2]) if arguments[2:] else None
            keeper.keep(State(Path(arguments[1])), owner)
            return 0
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
        return status
    except RigError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tests/rig", description=rig.__doc__)
    commands = parser.add_subparsers(required=True)
    for add in (_add_build, _add_deps, _add_up, _add_down, _add_exec):
        add(commands)
    return parser


_Commands = argparse._SubParsersAction  # argparse gives the type no public name


def _add_build(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("build", help="build the programs that are not in the cache")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(build.TARGETS),
        default=list(build.TARGETS),
        help="build these programs (default: all)",
    )
    parser.set_defaults(run=_build)


def _add_deps(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("deps", help="install the Debian packages that are missing")
    parser.add_argument("--level", choices=("control", "node"), default="node")
    parser.set_defaults(run=_deps)


def _add_up(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("up", help="bring a rig up; it runs until `down`")
    parser.add_argument("--level", choices=("control", "node"), default="control")
    parser.add_argument(
        "--kuberay",
        nargs="?",
        choices=("no", "crds", "running"),
        const="running",
        default="no",
        help="run KubeRay, or install its CRDs only",
    )
    parser.add_argument("--kueue", action="store_true", help="run Kueue")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=_image,
        metavar="NAME=FOLDER",
        help="a folder that pods can use as an image, read-only",
    )
    _add_state(parser)
    parser.set_defaults(run=_up)


def _add_down(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("down", help="end the rig and remove its files")
    _add_state(parser)
    parser.set_defaults(run=_down)


def _add_exec(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("exec", help="run a command where the rig's addresses exist")
    _add_state(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parser.set_defaults(run=_exec)


def _add_state(parser: argparse.ArgumentParser) -> None:
    default = Path(tempfile.gettempdir()) / f"tuneyard-rig-of-{os.getuid()}"
    parser.add_argument(
        "--state", type=Path, default=default, help="folder of the rig (default: %(default)s)"
    )


def _image(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with an existing folder")
    return name, Path(folder)


def _build(options: argparse.Namespace) -> int:
    for name in options.only:
        began = time.monotonic()
        cached = not build.missing([name])
        folder = build.ensure([name])[name]
        source = "cached" if cached else f"built in {time.monotonic() - began:.0f} s"
        print(f"{name:14}{folder} ({source})", flush=True)
    return 0


def _deps(options: argparse.Namespace) -> int:
    installed = machine.install_packages(options.level)
    print(f"installed: {', '.join(installed) or 'nothing was missing'}")
    return 0


def _up(options: argparse.Namespace) -> int:
    if reason := machine.missing_requirement(options.level, options.kuberay, options.kueue):
        raise RigError(f"no rig can run on this machine: {reason}")
    began = time.monotonic()
    started = rig.bring_up(
        options.level,
        folder=options.state,
        kuberay=options.kuberay,
        kueue=options.kueue,
        images=dict(options.image),
        ends_with_caller=False,
    )
    print(f"# up in {time.monotonic() - began:.1f} s; logs in {started.state.logs}")
    print(f"export KUBECONFIG={started.kubeconfig} PATH={started.programs}:$PATH")
    return 0


def _down(options: argparse.Namespace) -> int:
    print("down" if rig.take_down(options.state) else f"there is no rig in {options.state}")
    return 0


def _exec(options: argparse.Namespace) -> int:
    if not options.command:
        raise RigError("exec needs a command: python tests/rig exec COMMAND ...")
    current = rig.Rig(State(options.state))
    command = current.inside(options.command)
    os.execvpe(command[0], command, current.environment())
