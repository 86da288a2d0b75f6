"""`python -m infra.slurm up|down|status|env`: a Slurm on this machine that stays until it is ended.

    eval "$(python -m infra.slurm up)"

`up` and `env` print, for the shell to evaluate, what makes it use the cluster; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from infra.prefect_server import default_home
from infra.slurm.errors import SlurmError
from infra.slurm.local import LocalSlurm
from tasks.errors import SuperResolutionError


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or the exit code of the error that was printed.
    """
    parser = argparse.ArgumentParser(prog="python -m infra.slurm", description="A Slurm on this machine.")
    parser.add_argument("command", choices=["up", "down", "status", "env"])
    default = default_home() / "slurm"
    parser.add_argument("--folder", type=Path, default=default, help="where it keeps its files (default: %(default)s)")
    options = parser.parse_args(arguments)
    slurm = LocalSlurm(folder=options.folder, detached=True)
    try:
        _run(options.command, slurm)
    except SuperResolutionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(command: str, slurm: LocalSlurm) -> None:
    if command == "up":
        slurm.start()
        nodes = ", ".join(slurm.node_states())
        print(f"Slurm runs in {slurm.folder} with the nodes {nodes}.", file=sys.stderr)
    elif not slurm.running:
        raise SlurmError(f"no Slurm runs in {slurm.folder}", "Start one with: python -m infra.slurm up")
    if command in ("up", "env"):
        for name, value in slurm.environment.items():
            print(f"export {name}={shlex.quote(value)}")
    elif command == "status":
        print(slurm.run("sinfo"), slurm.run("squeue"), sep="\n", end="")
    elif command == "down":
        slurm.stop()


if __name__ == "__main__":
    sys.exit(main())
