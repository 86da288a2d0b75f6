"""The rendered files, as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infra.slurm import (
    DEVELOPMENT,
    Partition,
    Place,
    SlurmDescription,
    Timings,
    WhenPreempted,
    gres_conf,
    slurm_conf,
)
from tasks.errors import SettingsError

PLACE = Place(
    folder=Path("/here"),
    host="desk",
    user="ada",
    controller_port=10000,
    node_ports={"cpu-1": 10001, "cpu-2": 10002, "gpu-1": 10003, "gpu-2": 10004},
)

SLURM_CONF = """\
ClusterName=superres
SlurmctldHost=desk(127.0.0.1)
SlurmctldPort=10000
SlurmUser=ada
SlurmdUser=ada
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=/here/munge/munge.socket,cred_expire=10
StateSaveLocation=/here/state
SlurmdSpoolDir=/here/spool/%n
SlurmctldPidFile=/here/run/slurmctld.pid
SlurmdPidFile=/here/run/slurmd.%n.pid
SlurmctldLogFile=/here/log/slurmctld.log
SlurmdLogFile=/here/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=1
SlurmdTimeout=20
KillWait=5
MinJobAge=300
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
GresTypes=gpu
NodeName=cpu-1 NodeHostname=desk NodeAddr=127.0.0.1 Port=10001 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=cpu-2 NodeHostname=desk NodeAddr=127.0.0.1 Port=10002 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=gpu-1 NodeHostname=desk NodeAddr=127.0.0.1 Port=10003 CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName=gpu-2 NodeHostname=desk NodeAddr=127.0.0.1 Port=10004 CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes=cpu-1,cpu-2 Default=YES DefMemPerCPU=2000 MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=gpu Nodes=gpu-1,gpu-2 Default=NO DefMemPerCPU=2000 MaxTime=INFINITE PriorityTier=1 State=UP
"""

GRES_CONF = """\
NodeName=gpu-1 Name=gpu File=/here/devices/gpu0
NodeName=gpu-1 Name=gpu File=/here/devices/gpu1
NodeName=gpu-2 Name=gpu File=/here/devices/gpu0
NodeName=gpu-2 Name=gpu File=/here/devices/gpu1
"""


def test_development() -> None:
    assert slurm_conf(DEVELOPMENT, PLACE, Timings()) == SLURM_CONF
    assert gres_conf(DEVELOPMENT, PLACE) == GRES_CONF


def difference(description: SlurmDescription, place: Place, timings: Timings) -> list[str]:
    """Lines that others than the development cluster have."""
    return [line for line in slurm_conf(description, place, timings).splitlines() if line not in SLURM_CONF]


def test_preemption() -> None:
    description = SlurmDescription(
        (
            Partition("cpu", nodes=2, cpus=4, memory_mb=8000, when_preempted=WhenPreempted.REQUEUE),
            Partition("urgent", shares_nodes_of="cpu", priority_tier=10, maximum_minutes=30),
        )
    )
    assert difference(description, PLACE, Timings()) == [
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "PartitionName=cpu Nodes=cpu-1,cpu-2 Default=YES DefMemPerCPU=2000 MaxTime=INFINITE PriorityTier=1 State=UP "
        "PreemptMode=REQUEUE",
        "PartitionName=urgent Nodes=cpu-1,cpu-2 Default=NO DefMemPerCPU=2000 MaxTime=30 PriorityTier=10 State=UP "
        "PreemptMode=OFF",
    ]
    assert gres_conf(description, PLACE) == ""


def test_facts_of_the_machine() -> None:
    place = replace(
        PLACE,
        plugins=Path("/plugins"),
        address="198.18.0.1",
        node_addresses={"cpu-1": "198.18.0.10"},
        listen_everywhere=True,
    )
    one = SlurmDescription((Partition("cpu", nodes=1, cpus=4, memory_mb=8000),), name="other")
    text = slurm_conf(one, place, Timings(node_timeout=7, kill_wait=8, remember_jobs=9, credential_lifetime=11))
    assert [line for line in text.splitlines() if line not in SLURM_CONF] == [
        "ClusterName=other",
        "SlurmctldHost=desk(198.18.0.1)",
        "AuthInfo=socket=/here/munge/munge.socket,cred_expire=11",
        "SlurmdTimeout=7",
        "KillWait=8",
        "MinJobAge=9",
        "PluginDir=/plugins",
        "NodeName=cpu-1 NodeHostname=desk NodeAddr=198.18.0.10 Port=10001 CPUs=4 RealMemory=8000 State=UNKNOWN",
        "PartitionName=cpu Nodes=cpu-1 Default=YES DefMemPerCPU=2000 MaxTime=INFINITE PriorityTier=1 State=UP",
    ]
    assert "CommunicationParameters" not in text
    assert "GresTypes" not in text


def test_messages_may_wait_for_less_long() -> None:
    text = slurm_conf(DEVELOPMENT, PLACE, Timings(message_timeout=4))
    assert [line for line in text.splitlines() if line not in SLURM_CONF] == ["MessageTimeout=4"]


@pytest.mark.parametrize("folder", ["relative", "/with space", "/with#sign", "/with,comma", "/with%n", "/" + "x" * 100])
def test_folders_that_slurm_cannot_use(folder: str) -> None:
    with pytest.raises(SettingsError, match="folder"):
        replace(PLACE, folder=Path(folder))


@pytest.mark.parametrize("timing", [{"remember_jobs": 1}, {"credential_lifetime": 4}, {"node_timeout": 0}])
def test_timings_that_slurm_would_ignore(timing: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="too short"):
        Timings(**timing)
