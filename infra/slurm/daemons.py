"""Daemons that are written down in a file, so that another process can look after them without ever hitting a stranger.

A process number alone means nothing once its process has ended: another one may get it. Together with the moment at
which the process started it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

#: In the environment of everything that belongs to a node: set for its daemon, and by Slurm for its jobs.
NODE_VARIABLE: Final = "SLURMD_NODENAME"

#: Seconds that an ended process gets before it is killed.
_END_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Process:
    """A process that was seen once, and may have ended since.

    Attributes:
        pid: Its number.
        started: When it started, in clock ticks since this machine did.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now, unless it has ended and only waits to be reaped."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()  # The name before it may contain anything.
        return None if state in "ZX" else cls(pid, int(fields[18]))

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return Process.of(self.pid) == self

    def end(self, number: int, seconds: float) -> bool:
        """Send it a signal if it still runs.

        Args:
            number: The signal.
            seconds: How long to wait for its end.

        Returns:
            Whether it has ended.
        """
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if self.runs:  # Asked while the handle is held: from here on the signal cannot reach any other process.
                signal.pidfd_send_signal(handle, number)
                return bool(select.select([handle], [], [], seconds)[0])
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)
        return True


class Daemons:
    """The daemons of one folder by name.

    Args:
        record: The file they are written down in.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], output: Path, ends_with_me: bool
    ) -> None:
        """Start a daemon that stays in the foreground of its own session.

        Args:
            name: Its name.
            command: Its command.
            environment: Its environment.
            output: File that its output is added to.
            ends_with_me: Whether it ends with this process (more precisely: with the thread that calls), even where
                this process is killed.
        """
        if ends_with_me:
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with output.open("ab") as log:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the program that uses the cluster, which then ends it.
            )
        self._children[name] = child
        if process := Process.of(child.pid):
            self._write({**self._read(), name: process})

    def started(self) -> list[str]:
        """Names of the daemons that were started and not ended; one that ended by itself is still among them."""
        return list(self._read())

    def names(self) -> list[str]:
        """Names of the daemons that run, in the order of their start."""
        return [name for name, process in self._read().items() if process.runs]

    def runs(self, name: str) -> bool:
        """Whether a daemon runs."""
        return name in self.names()

    def end(self, name: str, *, kill: bool = False) -> None:
        """End a daemon, by force if it does not end by itself. Nothing happens if it does not run."""
        processes = self._read()
        if process := processes.pop(name, None):
            if kill or not process.end(signal.SIGTERM, _END_SECONDS):
                process.end(signal.SIGKILL, _END_SECONDS)
            self._write(processes)
        if child := self._children.pop(name, None):
            child.wait()

    def _read(self) -> dict[str, Process]:
        try:
            return {name: Process(**fields) for name, fields in json.loads(self._record.read_text()).items()}
        except FileNotFoundError:
            return {}

    def _write(self, processes: Mapping[str, Process]) -> None:
        partial = self._record.with_name(self._record.name + ".partial")
        partial.write_text(json.dumps({name: asdict(process) for name, process in processes.items()}, indent=1))
        os.replace(partial, self._record)


def kill_job_processes(slurm_conf: Path, node: str | None = None) -> None:
    """Kill all that jobs of a cluster have started, also where Slurm does not know of it or cannot end it any more.

    These are the processes that have Slurm's variables for the cluster and a node. Slurm sets them for jobs, whatever
    a job inherits otherwise, and its helper for each job inherits them from the daemon of the node.

    Args:
        slurm_conf: The cluster, by its configuration.
        node: Only those of this node.
    """
    for _ in range(10):  # One that is killed may just have started another.
        found = list(_job_processes(slurm_conf, node))
        if not found:
            return
        # Slurm's helpers first: they would otherwise report the end of their jobs as if nothing else had happened.
        for _, process in sorted(found, key=lambda named: named[0] != "slurmstepd"):
            process.end(signal.SIGKILL, 1.0)


def _job_processes(slurm_conf: Path, node: str | None) -> Iterator[tuple[str, Process]]:
    of_cluster = f"SLURM_CONF={slurm_conf}".encode()
    of_node = f"{NODE_VARIABLE}=".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # It has ended meanwhile, or belongs to another user.
            if not entry.name.isdigit() or not (process := Process.of(int(entry.name))):
                continue
            variables = (entry / "environ").read_bytes().split(b"\0")
            nodes = [variable.removeprefix(of_node).decode() for variable in variables if variable.startswith(of_node)]
            if of_cluster in variables and nodes and node in (None, nodes[0]):
                yield (entry / "comm").read_text().strip(), process
