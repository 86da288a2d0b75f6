"""The process that works on a job, and whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process.

    Attributes:
        host: Name of its machine.
        pid: Its number there.
        token: Boot of the machine, name space of process numbers and start time: what tells it from another process
            of the same number. Empty where the system does not tell.
    """

    host: str = ""
    pid: int = 0
    token: str = ""

    def __str__(self) -> str:
        return f"{self.host} process {self.pid}"


def this_holder() -> Holder:
    """This process."""
    here, start = _here(), _start(os.getpid())
    return Holder(socket.gethostname(), os.getpid(), f"{here}/{start}" if here and start else "")


def is_gone(holder: Holder) -> bool:
    """Whether a process has surely ended; false where nobody here can know.

    Names of machines can repeat, in containers above all: only the same boot and the same name space of process numbers
    mean that the process would be seen from here.
    """
    here, _, start = holder.token.rpartition("/")
    if not _is_here(here):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It is there, but somebody else's, and /proc may hide it.
    found = _start(holder.pid)
    return found is not None and found != start


def is_alive(holder: Holder) -> bool:
    """Whether a process surely still runs; false where nobody here can know."""
    here, _, start = holder.token.rpartition("/")
    return _is_here(here) and bool(start) and _start(holder.pid) == start


def _is_here(boot_and_space: str) -> bool:
    return bool(boot_and_space) and boot_and_space == _here()


def _here() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """When a process started, in ticks since the boot; empty if it is dead and only waits for its parent."""
    try:
        # The name of the program, in parentheses, may hold anything.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "" if state in "ZX" else rest[18]
