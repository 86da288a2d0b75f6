"""A network between the nodes of a local cluster: each node in a network namespace of its own, all on one bridge.

So a node can be cut off while its processes run on, as a broken cable would. Needs root. Only the bridge belongs to the
machine; everything else vanishes with the process that made it, and the next network removes a bridge left behind.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from infra.slurm.errors import SlurmError
from tasks.errors import SettingsError

#: 198.18.<n>.0/24 for the n-th network of this machine. The range is set aside for tests; no real network uses it.
_PREFIX: Final = "198.18"
_FIRST_NODE: Final = 10
_MOST_NODES: Final = 240

_BRIDGE: Final = re.compile(r"sr-(\d+)-(\d+)")


class NodeNetwork:
    """Namespaces for some nodes. They exist from `create` to `remove`, at the latest until this process ends.

    Args:
        nodes: Names of the nodes.

    Attributes:
        address: This machine's address as the nodes see it.
        addresses: Address of each node.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        if len(nodes) > _MOST_NODES:
            raise SettingsError(f"a local network has no room for {len(nodes)} nodes", f"Use up to {_MOST_NODES}")
        self.address = ""
        self.addresses: dict[str, str] = {}
        self._nodes = tuple(nodes)
        self._bridge = ""
        self._number = 0
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def create(self) -> None:
        """Make the bridge and the namespaces.

        Raises:
            SlurmError: This process may not.
        """
        _remove_left_bridges()
        self._make_bridge()
        try:
            for index, node in enumerate(self._nodes):
                self._holders[node] = _hold_namespace()
                self.addresses[node] = f"{_PREFIX}.{self._number}.{_FIRST_NODE + index}"
            for node, holder in self._holders.items():
                _await_namespace(holder)
                link = self._link(node)
                _ip(
                    f"link add {link} type veth peer name eth0 netns {holder.pid}",
                    f"link set {link} master {self._bridge} up",
                )
                _ip(
                    "link set lo up",
                    f"address add {self.addresses[node]}/24 dev eth0",
                    "link set eth0 up",
                    inside=self.enter(node),
                )
        except BaseException:
            self.remove()
            raise

    def enter(self, node: str) -> list[str]:
        """What to put in front of a command to run it in the namespace of a node.

        Only the network is another one: `ip netns exec` would also mount another /sys, where slurmd misses its cgroups.
        """
        return ["nsenter", f"--net=/proc/{self._holders[node].pid}/ns/net"]

    def cut(self, node: str) -> None:
        """Cut a node off: nothing comes or goes, and nobody is told."""
        _ip(f"link set {self._link(node)} down")

    def mend(self, node: str) -> None:
        """Undo `cut`."""
        _ip(f"link set {self._link(node)} up")

    def remove(self) -> None:
        """Remove everything. Processes still inside keep a namespace that leads nowhere."""
        for node, holder in self._holders.items():
            if Path("/sys/class/net", self._link(node)).exists():
                _ip(f"link delete {self._link(node)}")
            holder.kill()
            holder.wait()
        self._holders.clear()
        self.addresses.clear()
        if self._bridge:
            _ip(f"link delete {self._bridge}")
            self._bridge = ""

    def _make_bridge(self) -> None:
        for number in range(256):
            if any(match[2] == str(number) for _, match in _bridges()):
                continue
            bridge = f"sr-{os.getpid()}-{number}"
            _ip(f"link add {bridge} type bridge", f"address add {_PREFIX}.{number}.1/24 dev {bridge}")
            # Somebody else may have looked at the same time. The one with the lower process number keeps it.
            if any(match[2] == str(number) and int(match[1]) < os.getpid() for _, match in _bridges()):
                _ip(f"link delete {bridge}")
                continue
            _ip(f"link set {bridge} up")
            self._bridge, self._number, self.address = bridge, number, f"{_PREFIX}.{number}.1"
            return
        raise SlurmError("all 256 local networks are in use", "End another local Slurm")

    def _link(self, node: str) -> str:
        return f"sr{self._number}n{self._nodes.index(node)}"


@functools.cache
def can_use_network_namespaces() -> bool:
    """Whether this process may make network namespaces, bridges and links between them."""
    if not all(shutil.which(program) for program in ("ip", "nsenter", "unshare", "setpriv")):
        return False
    # All of it inside a namespace that is gone again at once.
    trial = "ip link add type bridge && ip link add type veth"
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "--net", "sh", "-c", trial], capture_output=True).returncode == 0
    )


def _hold_namespace() -> subprocess.Popen[bytes]:
    """A process that keeps a new namespace in existence, and ends with this one."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _await_namespace(holder: subprocess.Popen[bytes]) -> None:
    own = Path("/proc/self/ns/net").readlink()
    deadline = time.monotonic() + 10
    while holder.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # It has just ended.
            if Path(f"/proc/{holder.pid}/ns/net").readlink() != own:
                return
        time.sleep(0.002)
    raise SlurmError("a network namespace could not be made", "Run as root, or without a network of nodes")


def _bridges() -> list[tuple[str, re.Match[str]]]:
    names = [entry.name for entry in Path("/sys/class/net").iterdir()]
    return [(name, match) for name in names if (match := _BRIDGE.fullmatch(name))]


def _remove_left_bridges() -> None:
    for name, match in _bridges():
        if not Path("/proc", match[1]).exists():
            subprocess.run(["ip", "link", "delete", name], capture_output=True)


def _ip(*commands: str, inside: Sequence[str] = ()) -> None:
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run([*inside, "ip", "-batch", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0]
        raise SlurmError(f"`ip {commands[0]}` failed ({complaint})", "Run as root, or without a network of nodes")
