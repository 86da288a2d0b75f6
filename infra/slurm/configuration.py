"""Renders `slurm.conf` and `gres.conf` of a cluster whose nodes are all on one machine.

Pure functions of the description, the facts of the machine and the timings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.slurm.description import Partition, SlurmDescription
from tasks.errors import SettingsError

#: Longest path of a Unix socket on Linux, without the closing zero.
_LONGEST_SOCKET = 107

#: Slurm's own `MessageTimeout`, in seconds.
_MESSAGE_TIMEOUT = 10


@dataclass(frozen=True)
class Timings:
    """How fast a cluster notices and forgets, in seconds. The defaults suit tests, which wait for all of it.

    Attributes:
        node_timeout: A node that does not answer for so long is down, and its jobs are requeued or fail. Slurm only
            looks from time to time: 5 s means 25 to 30 s, and 20 s about 35 s.
        message_timeout: How long an answer may take. Slurm asks a silent node several times before it believes it: with
            4 s instead of 10, and a `node_timeout` of 8, it is down after 12 to 15 s instead of 25 to 30.
        kill_wait: Between SIGTERM and SIGKILL for a job that is cancelled.
        remember_jobs: How long `squeue --states=all` shows a job after its end.
        credential_lifetime: How long a message stays valid. A requeued job is also held for so long; a machine that is
            busy for so long between sending and reading loses the message.
    """

    node_timeout: int = 20
    message_timeout: int = _MESSAGE_TIMEOUT
    kill_wait: int = 5
    remember_jobs: int = 300
    credential_lifetime: int = 10

    def __post_init__(self) -> None:
        # Slurm ignores values below the last two, or takes its defaults of minutes instead.
        if (
            min(self.node_timeout, self.message_timeout, self.kill_wait) < 1
            or self.remember_jobs < 2
            or self.credential_lifetime < 5
        ):
            raise SettingsError(
                f"these timings are too short: {self}",
                "Use 5 s or more for credential_lifetime, 2 s for remember_jobs and 1 s for the others",
            )


@dataclass(frozen=True)
class Place:
    """Where a cluster runs: the facts of one machine.

    Attributes:
        folder: Everything of the cluster is in it: sockets, state, logs, this configuration.
        host: Host name of the machine, as `hostname --short` says it.
        user: Whose daemons and jobs they are.
        controller_port: Port of slurmctld.
        node_ports: Port of each slurmd by node name.
        plugins: Slurm's plugin folder where it is not the built-in one.
        address: Where the controller is reached.
        node_addresses: Address of each node by name where nodes have their own; all others have `address`.
        listen_everywhere: Whether daemons listen on all addresses. Otherwise they do on one, the one that `host`
            resolves to: Slurm leaves no other choice, so `address` has to be that one.
    """

    folder: Path
    host: str
    user: str
    controller_port: int
    node_ports: Mapping[str, int]
    plugins: Path | None = None
    address: str = "127.0.0.1"
    node_addresses: Mapping[str, str] = field(default_factory=dict)
    listen_everywhere: bool = False

    def __post_init__(self) -> None:
        # A space would end the value in slurm.conf, and %, # and commas have a meaning there.
        if not self.folder.is_absolute() or any(character in " \t%#,\\\"'=" for character in str(self.folder)):
            raise SettingsError(
                f"Slurm cannot use the folder {self.folder}", "Choose an absolute path of letters, digits, - and _"
            )
        if len(str(self.munge_socket).encode()) > _LONGEST_SOCKET:
            raise SettingsError(f"the path {self.munge_socket} is too long for a socket", "Choose a folder nearer to /")

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def gres_conf(self) -> Path:
        return self.folder / "gres.conf"  # Slurm looks for it beside slurm.conf.

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge" / "munge.socket"

    @property
    def logs(self) -> Path:
        return self.folder / "log"


def slurm_conf(description: SlurmDescription, place: Place, timings: Timings) -> str:
    """The text of `slurm.conf`."""
    folder = place.folder
    settings: dict[str, object] = {
        "ClusterName": description.name,
        "SlurmctldHost": f"{place.host}({place.address})",
        "SlurmctldPort": place.controller_port,
        "SlurmUser": place.user,
        "SlurmdUser": place.user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={place.munge_socket},cred_expire={timings.credential_lifetime}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool" / "%n",  # %n is the name of the node: several run here.
        "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
        "SlurmdPidFile": folder / "run" / "slurmd.%n.pid",
        "SlurmctldLogFile": place.logs / "slurmctld.log",
        "SlurmdLogFile": place.logs / "slurmd.%n.log",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SlurmdParameters": "config_overrides",  # Nodes are as large as described, whatever this machine has.
        "SchedulerType": "sched/backfill",
        # Starts a job within a second of its submission.
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        # A node that was lost comes back by itself; one that was set down does not (2 would bring it back, too).
        "ReturnToService": 1,
        "SlurmdTimeout": timings.node_timeout,
        "KillWait": timings.kill_wait,
        "MinJobAge": timings.remember_jobs,
    }
    if timings.message_timeout != _MESSAGE_TIMEOUT:
        settings["MessageTimeout"] = timings.message_timeout
    if not place.listen_everywhere:
        settings["CommunicationParameters"] = "NoInAddrAny,NoCtldInAddrAny"
    if place.plugins is not None:
        settings["PluginDir"] = place.plugins
    if any(node.gpus for node in description.nodes()):
        settings["GresTypes"] = "gpu"
    if any(partition.when_preempted for partition in description.partitions):
        settings["PreemptType"] = "preempt/partition_prio"
        settings["PreemptMode"] = "REQUEUE"  # Partitions have their own; Slurm refuses OFF here.
    lines = [f"{name}={value}" for name, value in settings.items()]
    for node in description.nodes():
        gres = f" Gres=gpu:{node.gpus}" if node.gpus else ""
        lines.append(
            f"NodeName={node.name} NodeHostname={place.host} "
            f"NodeAddr={place.node_addresses.get(node.name, place.address)} Port={place.node_ports[node.name]} "
            f"CPUs={node.cpus} RealMemory={node.memory_mb}{gres} State=UNKNOWN"
        )
    lines += [_partition_line(description, partition) for partition in description.partitions]
    return "\n".join(lines) + "\n"


def gres_conf(description: SlurmDescription, place: Place) -> str:
    """The text of `gres.conf`: which files stand for the GPUs of each node.

    Slurm wants a device file for each GPU, and numbers the GPUs by the digits at its end; it never opens one.
    """
    return "".join(
        f"NodeName={node.name} Name=gpu File={device}\n"
        for node in description.nodes()
        for device in gpu_devices(place, node.gpus)
    )


def gpu_devices(place: Place, count: int) -> tuple[Path, ...]:
    """The files that stand for the GPUs of a node with so many."""
    return tuple(place.folder / "devices" / f"gpu{index}" for index in range(count))


def _partition_line(description: SlurmDescription, partition: Partition) -> str:
    owner = description.owner(partition)
    minutes = partition.maximum_minutes
    settings = {
        "PartitionName": partition.name,
        "Nodes": ",".join(owner.node_names),
        "Default": "YES" if partition is description.partitions[0] else "NO",
        # Without it, a job that does not name its memory gets all of the node, and no other runs beside it.
        "DefMemPerCPU": max(1, owner.memory_mb // owner.cpus),
        "MaxTime": "INFINITE" if minutes is None else minutes,
        "PriorityTier": partition.priority_tier,
        "State": "UP",
    }
    if any(other.when_preempted for other in description.partitions):
        settings["PreemptMode"] = (partition.when_preempted or "off").upper()
    return " ".join(f"{name}={value}" for name, value in settings.items())
