"""A cluster on this machine: started, watched, broken on purpose, ended."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from infra.slurm.configuration import Place, Timings, gpu_devices, gres_conf, slurm_conf
from infra.slurm.daemons import NODE_VARIABLE, Daemons, kill_job_processes
from infra.slurm.description import DEVELOPMENT, SlurmDescription
from infra.slurm.errors import SlurmError
from infra.slurm.network import NodeNetwork, can_use_network_namespaces
from infra.slurm.programs import Programs, find_programs
from tasks.errors import SettingsError

#: Seconds a daemon may take to be ready. It takes a tenth of one, but machines may be busy.
_READY_SECONDS: Final = 60.0

_COMMAND_SECONDS: Final = 60.0

#: Starts, with other ports each, if a daemon ends instead.
_ATTEMPTS: Final = 3

#: In what daemons write, what comes before the words that people need.
_SERIOUS: Final = re.compile(r"(?:error|fatal): ")

#: What a cluster puts into its folder, and its next start removes.
_FOLDERS: Final = ("devices", "log", "munge", "run", "spool", "state")
_RECORD: Final = "daemons.json"

#: States of jobs that have ended.
_ENDED: Final = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    }
)


class _EndedError(SlurmError):
    """A daemon has ended instead of starting."""


@dataclass(frozen=True)
class Job:
    """A job as `squeue` shows it.

    Attributes:
        id: Its number.
        name: Its name.
        partition: Its partition.
        state: Slurm's name of its state, for instance `PENDING`, `RUNNING`, `COMPLETING`, `COMPLETED`, `FAILED`.
        nodes: The nodes it runs or ran on, in Slurm's notation (`gpu-1`, `gpu-[1-2]`); empty while it waits.
        reason: Why it waits or failed.
    """

    id: int
    name: str
    partition: str
    state: str
    nodes: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it has ended for good."""
        return self.state in _ENDED


class LocalSlurm:
    """Slurm on this machine, with daemons of its own, as root or as a plain user.

        with LocalSlurm() as slurm, slurm.use():
            subprocess.run(["sbatch", ...])

    The daemons end with the `with` block, and also when this process is killed. They belong to the thread that starts
    them: Linux ends them with it. Another object with the folder and description of a running cluster works on it, too.

    Args:
        description: Its partitions and nodes.
        folder: Its folder: a new one, an empty one, or that of an earlier cluster. By default a temporary one, which
            is removed at the end.
        timings: How fast it notices and forgets.
        network: Give each node a network of its own (see `can_use_network_namespaces`), for `cut` and `mend`.
        detached: Let the daemons outlive this process.
    """

    def __init__(
        self,
        description: SlurmDescription = DEVELOPMENT,
        *,
        folder: Path | str | None = None,
        timings: Timings | None = None,
        network: bool = False,
        detached: bool = False,
    ) -> None:
        if network and detached:
            raise SettingsError("a network of nodes cannot outlive its process", "Leave out network or detached")
        if network and not can_use_network_namespaces():
            raise SettingsError("this process may not make network namespaces", "Run as root, or leave out network")
        self.description = description
        self.timings = timings or Timings()
        self._temporary = folder is None
        self._folder = None if folder is None else Path(folder).expanduser().resolve()
        self._network = NodeNetwork([node.name for node in description.nodes()]) if network else None
        self._detached = detached
        self._children: Daemons | None = None

    # Life

    def start(self) -> Self:
        """Start everything and wait until all nodes are idle.

        Raises:
            SlurmMissingError: There are no programs of Slurm and they cannot be fetched.
            SlurmError: A daemon does not start, or a cluster already runs in the folder.
            SettingsError: The folder cannot be used.
        """
        _ = self.programs
        if self._temporary:
            self._folder, self._children = Path(tempfile.mkdtemp(prefix="superres-slurm-")), None
        with self._locked():
            if self._daemons.names():
                raise SlurmError(f"a Slurm already runs in {self.folder}", "Use it, end it, or choose another folder")
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._start_daemons()
                    break
                except BaseException as error:
                    self._end()
                    # Between the choice of a port and its use another program may have taken it. Whatever else ends a
                    # daemon does so again.
                    if attempt == _ATTEMPTS or not isinstance(error, _EndedError):
                        raise
        return self

    def stop(self) -> None:
        """Cancel all jobs, end all daemons and every process of a job. Safe to call twice, and from any process."""
        if self._folder is None or not self._folder.is_dir():
            return
        with self._locked():
            self._cancel_jobs()
            self._end()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = self._children = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether a controller runs in the folder."""
        return self._folder is not None and self._folder.is_dir() and self._daemons.runs("slurmctld")

    # Use

    @property
    def folder(self) -> Path:
        """Folder with configuration, state and logs."""
        if self._folder is None:
            raise SlurmError("this Slurm does not run", "Start it first")
        return self._folder

    @functools.cached_property
    def programs(self) -> Programs:
        """The programs it runs with; fetched on first use where this machine has none."""
        return find_programs()

    @property
    def address(self) -> str:
        """This machine's address as the nodes see it: what listens there is reached from jobs."""
        return self._network.address if self._network else "127.0.0.1"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process uses this cluster: `SLURM_CONF`, and search paths where they are needed."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), **self.programs.environment(os.environ)}

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Make this process and those it starts use this cluster while the block lasts."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def run(
        self, program: Literal["sbatch", "scancel", "squeue", "sinfo", "scontrol"], *arguments: str, stdin: str = ""
    ) -> str:
        """Run a program of Slurm on this cluster.

        Args:
            program: Its name.
            arguments: Its arguments.
            stdin: What it reads, for instance the script of a job.

        Returns:
            What it printed.

        Raises:
            SlurmError: It failed.
        """
        command = [str(getattr(self.programs, program)), *arguments]
        try:
            done = subprocess.run(
                command,
                input=stdin,
                env=self._own_environment(),
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise SlurmError(
                f"{program} got no answer in {_COMMAND_SECONDS:.0f} s", f"Look at the logs in {self.folder / 'log'}"
            ) from error
        if done.returncode:
            complaint = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise SlurmError(
                f"`{' '.join([program, *arguments])}` failed ({complaint})",
                f"Look at the logs in {self.folder / 'log'}",
            )
        return done.stdout

    def squeue(self) -> list[Job]:
        """All jobs, and those that ended in the last `Timings.remember_jobs` seconds, by number."""
        # The name comes last: it may contain the separator.
        rows = self.run("squeue", "--noheader", "--states=all", "--format=%A|%P|%T|%N|%r|%j").splitlines()
        jobs = []
        for row in rows:
            number, partition, state, nodes, reason, name = row.split("|", 5)
            jobs.append(Job(int(number), name, partition, state, nodes, reason))
        return sorted(jobs, key=lambda job: job.id)

    def node_states(self) -> dict[str, str]:
        """State of each node as `sinfo` names it, for instance `idle`, `mixed`, `down`; `*` at the end: no answer."""
        rows = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(sorted((name, state) for name, state in map(str.split, rows)))

    # Faults

    def kill_node(self, name: str, *, with_jobs: bool = False) -> None:
        """Kill the daemon of a node with SIGKILL. Slurm notices it late (`Timings.node_timeout`).

        Args:
            name: The node.
            with_jobs: Also kill all that its jobs have started, as a power cut does. Otherwise that runs on.
        """
        self._check_node(name)
        self._daemons.end(f"slurmd {name}", kill=True)
        if with_jobs:
            kill_job_processes(self.folder / "slurm.conf", name)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node again and wait until the controller knows it.

        A node that was lost comes back by itself; one that was set down stays so until it is resumed.
        """
        self._check_node(name)
        now = int(time.time())
        self._launch_node(name)

        def registered() -> bool:
            shown = dict(
                word.split("=", 1) for word in self.run("scontrol", "show", "node", name).split() if "=" in word
            )
            try:
                return datetime.fromisoformat(shown["SlurmdStartTime"]).timestamp() >= now
            except ValueError:  # "None": it has never started.
                return False

        self._await(registered, [f"slurmd {name}"], self.folder / "log" / f"slurmd.{name}.log")

    def set_node(self, name: str, state: Literal["down", "drain", "resume"]) -> None:
        """Do what an administrator does: `down` ends the jobs of a node at once, `drain` lets them finish."""
        self._check_node(name)
        self.run("scontrol", "update", f"NodeName={name}", f"State={state}", "Reason=asked for")

    def kill_controller(self) -> None:
        """Kill the controller with SIGKILL. Jobs run on; commands of Slurm fail after about 10 s.

        It forgets what it has not written down yet, which may be the last 5 s: new jobs and new states of jobs.
        """
        self._daemons.end("slurmctld", kill=True)

    def start_controller(self) -> None:
        """Start the controller and wait until it answers. It goes on with what the one before wrote down."""
        self._launch("slurmctld", [str(self.programs.slurmctld), "-D", "-i"])

        def answers() -> bool:
            return "is UP" in self.run("scontrol", "ping")

        self._await(answers, ["slurmctld"], self.folder / "log" / "slurmctld.log")

    def restart_controller(self) -> None:
        """End the controller, which then writes everything down, and start it again."""
        self._daemons.end("slurmctld")
        self.start_controller()

    def cut(self, name: str) -> None:
        """Cut the network of a node while all of its processes run on; needs `network=True`."""
        self._nodes_network(name).cut(name)

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        self._nodes_network(name).mend(name)

    # How

    @property
    def _daemons(self) -> Daemons:
        if self._children is None:
            self._children = Daemons(self.folder / _RECORD)
        return self._children

    def _own_environment(self) -> dict[str, str]:
        # Where this process is itself a job of some cluster, or has defaults for one, they are not for this one.
        foreign = ("SLURM", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
        mine = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {**mine, **self.environment}

    def _write_files(self) -> None:
        (self.folder / _RECORD).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        if self._network:
            self._network.create()
        host = socket.gethostname().partition(".")[0]
        own_address = _loopback_address(host)
        nodes = list(self.description.nodes())
        controller, *ports = _free_ports(1 + len(nodes))
        place = Place(
            folder=self.folder,
            host=host,
            user=_user(),
            controller_port=controller,
            node_ports=dict(zip((node.name for node in nodes), ports, strict=True)),
            plugins=self.programs.plugins,
            address=self._network.address if self._network else own_address or "127.0.0.1",
            node_addresses=self._network.addresses if self._network else {},
            listen_everywhere=self._network is not None or own_address is None,
        )
        for node in nodes:
            (self.folder / "spool" / node.name).mkdir()
        for device in gpu_devices(place, max(node.gpus for node in nodes)):
            device.symlink_to("/dev/null")  # It has to be a device; there is no machine without this one.
        place.slurm_conf.write_text(slurm_conf(self.description, place, self.timings))
        place.gres_conf.write_text(gres_conf(self.description, place))

    def _start_daemons(self) -> None:
        self._write_files()
        self._start_munged()
        self.start_controller()
        nodes = list(self.description.nodes())
        for node in nodes:
            self._launch_node(node.name)
        self._await(self._all_idle, [f"slurmd {node.name}" for node in nodes], self.folder / "log")

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        key = munge / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{what}-file={munge}/munge.{what}" for what in ("key", "pid", "seed", "log")]
        # --force: munged otherwise wants a folder that all users may enter. This cluster has one user.
        command = [str(self.programs.munged), "--foreground", "--force", f"--socket={munge}/munge.socket", *files]
        self._launch("munged", command)
        self._await((munge / "munge.socket").exists, ["munged"], munge / "munge.log")

    def _launch_node(self, name: str) -> None:
        inside = self._network.enter(name) if self._network else []
        command = [str(self.programs.slurmd), "-D", "-N", name, "-d", str(self.programs.slurmstepd)]
        self._launch(f"slurmd {name}", [*inside, *command], {NODE_VARIABLE: name})

    def _launch(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        if self._daemons.runs(name):
            raise SlurmError(f"{name} already runs in {self.folder}", "Kill it first")
        self._daemons.start(
            name,
            command,
            environment={**self._own_environment(), **(variables or {})},
            output=self.folder / "log" / "output.log",
            ends_with_me=not self._detached,
        )

    def _await(self, condition: Callable[[], bool], daemons: list[str], log: Path) -> None:
        """Wait until daemons have got somewhere, or one has ended instead."""
        deadline = time.monotonic() + _READY_SECONDS
        while not self._holds(condition):
            alive = self._daemons.names()
            ended = [name for name in daemons if name not in alive]
            if ended or time.monotonic() > deadline:
                problem = f"{ended[0]} ended while starting" if ended else f"{daemons[0]} did not start"
                output = self.folder / "log" / "output.log"
                said = [line for line in output.read_text(errors="replace").splitlines() if _SERIOUS.search(line)]
                # What is fatal often only says that an error before it was.
                words = f", which says: {'; '.join(_SERIOUS.split(line, 1)[-1] for line in said[-2:])}" if said else ""
                kind = _EndedError if ended else SlurmError
                raise kind(problem, f"Look at {log} and {output}{words}")
            time.sleep(0.01)

    def _holds(self, condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except SlurmError:  # A controller that has only just started refuses to answer.
            return False

    def _all_idle(self) -> bool:
        return set(self.node_states().values()) == {"idle"}

    def _cancel_jobs(self) -> None:
        if not self.running:
            return
        alive = self._daemons.names()
        lost = {node.name for node in self.description.nodes() if f"slurmd {node.name}" not in alive}

        def left() -> list[str]:
            # A job on a node that is gone never completes. Its processes are killed at the end.
            return [str(job.id) for job in self.squeue() if not job.ended and job.nodes not in lost]

        with contextlib.suppress(SlurmError):  # What does not go in peace is killed.
            if jobs := left():
                self.run("scancel", *jobs)
            deadline = time.monotonic() + self.timings.kill_wait + 5
            while left() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _end(self) -> None:
        for name in reversed(self._daemons.started()):
            self._daemons.end(name)
        kill_job_processes(self.folder / "slurm.conf")
        if self._network:
            self._network.remove()

    def _check_node(self, name: str) -> None:
        known = [node.name for node in self.description.nodes()]
        if name not in known:
            raise SettingsError(f"there is no node {name!r}", f"There are: {', '.join(known)}")

    def _nodes_network(self, name: str) -> NodeNetwork:
        self._check_node(name)
        if self._network is None:
            raise SettingsError("the nodes of this Slurm share one network", "Start it with network=True")
        return self._network

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep others from starting or ending the cluster of this folder; make the folder if need be."""
        folder = self.folder
        with contextlib.ExitStack() as held:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if any(folder.iterdir()) and not (folder / "lock").exists():
                    raise SettingsError(f"{folder} holds other things than a local Slurm", "Choose an empty folder")
                lock = held.enter_context((folder / "lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise SettingsError(f"{folder} cannot be used ({error})", "Choose a folder of your own") from error
            yield


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise SlurmError(f"user {os.geteuid()} has no name on this machine", "Add one to /etc/passwd") from None


def _loopback_address(host: str) -> str | None:
    """The loopback address of a host name, if it has one: 127.0.0.1 or 127.0.1.1, as most systems set it up."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return address if address.startswith("127.") else None


def _free_ports(count: int) -> list[int]:
    """Free ports outside the range that the system gives to connections, so that none is taken meanwhile."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(10000, low)) if low > 12000 else list(range(10000, 65536))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise SlurmError(f"this machine has no {count} free ports", "End a program that listens on many")
