"""A real cluster: jobs, GPUs, faults, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from infra.slurm import (
    Job,
    LocalSlurm,
    Partition,
    Programs,
    SlurmDescription,
    SlurmError,
    Timings,
    WhenPreempted,
    can_use_network_namespaces,
)
from infra.slurm.daemons import Process
from infra.slurm.local import _free_ports
from tasks.errors import SettingsError
from tests.waiting import eventually

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[3]


def submit(cluster: LocalSlurm, script: str, *options: str) -> int:
    """Submit a shell script; the number of the job."""
    text = f"#!/bin/sh\n{script}\n"
    return int(cluster.run("sbatch", "--parsable", f"--chdir={cluster.folder}", *options, stdin=text))


def job(cluster: LocalSlurm, number: int) -> Job:
    return next(job for job in cluster.squeue() if job.id == number)


def reaches(cluster: LocalSlurm, number: int, state: str, seconds: float = 30.0) -> Job:
    """Wait for a state of a job."""

    def found() -> Job | None:
        now = job(cluster, number)
        assert now.state == state or not now.ended, now
        return now if now.state == state else None

    result = eventually(found, seconds)
    assert isinstance(result, Job)
    return result


def processes_of(cluster_folder: Path) -> list[str]:
    """Command lines of all processes that name the folder of a cluster in arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            what = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            if entry.name.isdigit() and str(cluster_folder).encode() in what and Process.of(int(entry.name)):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


class TestJobs:
    @pytest.mark.parametrize("partition", ["cpu", "gpu"])
    def test_a_job_runs_on_each_partition(self, cluster: LocalSlurm, tmp_path: Path, partition: str) -> None:
        number = submit(cluster, "hostname", f"--partition={partition}", f"--output={tmp_path}/out", "--job-name=a|b")
        done = reaches(cluster, number, "COMPLETED")
        assert (done.name, done.partition, done.ended) == ("a|b", partition, True)
        assert done.nodes in (f"{partition}-1", f"{partition}-2")
        assert (tmp_path / "out").read_text().strip() == socket.gethostname()

    def test_jobs_share_a_node_by_cpus(self, cluster: LocalSlurm) -> None:
        numbers = [submit(cluster, "sleep 60", "--nodelist=cpu-2", "--cpus-per-task=2") for _ in range(3)]
        for number in numbers[:2]:
            reaches(cluster, number, "RUNNING")
        assert job(cluster, numbers[2]).state == "PENDING"
        cluster.run("scancel", str(numbers[0]))
        reaches(cluster, numbers[2], "RUNNING")
        cluster.run("scancel", *map(str, numbers[1:]))

    def test_gpus_are_counted_and_handed_out(self, cluster: LocalSlurm, tmp_path: Path) -> None:
        script = f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_JOB_ID; sleep 60"
        options = ("--partition=gpu", "--nodelist=gpu-1", "--gres=gpu:1")
        numbers = [submit(cluster, script, *options) for _ in range(3)]
        for number in numbers[:2]:
            reaches(cluster, number, "RUNNING")
        files = [tmp_path / str(number) for number in numbers[:2]]
        eventually(lambda: all(file.is_file() and file.read_text() for file in files))
        assert sorted(file.read_text() for file in files) == ["0\n", "1\n"]
        assert job(cluster, numbers[2]).state == "PENDING"
        cluster.run("scancel", *map(str, numbers))

    @pytest.mark.parametrize("options", [("--partition=cpu", "--gres=gpu:1"), ("--partition=gpu", "--gres=gpu:3")])
    def test_gpus_that_no_node_has_are_refused(self, cluster: LocalSlurm, options: tuple[str, ...]) -> None:
        with pytest.raises(SlurmError, match=r"sbatch .*configuration is not available"):
            submit(cluster, "true", *options)

    def test_a_process_uses_the_cluster_inside_the_block(self, cluster: LocalSlurm) -> None:
        before = dict(os.environ)
        with cluster.use():
            shown = subprocess.run(["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, check=True)
        assert sorted(shown.stdout.split()) == ["cpu*", "gpu"]
        assert dict(os.environ) == before

    def test_defaults_of_another_cluster_do_not_count(
        self, cluster: LocalSlurm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
        reaches(cluster, submit(cluster, "true"), "COMPLETED")


class TestFaults:
    def test_a_node_is_set_down_and_resumed(self, slurm_programs: Programs) -> None:
        with LocalSlurm(timings=Timings(credential_lifetime=5)) as cluster:
            moves = submit(cluster, "sleep 60", "--nodelist=gpu-1", "--partition=gpu")
            fails = submit(cluster, "sleep 60", "--nodelist=gpu-1", "--partition=gpu", "--no-requeue")
            reaches(cluster, moves, "RUNNING")
            reaches(cluster, fails, "RUNNING")
            cluster.set_node("gpu-1", "down")
            assert cluster.node_states()["gpu-1"] == "down"
            reaches(cluster, fails, "NODE_FAIL")
            reaches(cluster, moves, "PENDING")
            cluster.set_node("gpu-1", "resume")
            reaches(cluster, moves, "RUNNING")

    def test_jobs_survive_a_restart_of_the_controller(self, slurm_programs: Programs) -> None:
        with LocalSlurm() as cluster:
            number = submit(cluster, "sleep 60")
            reaches(cluster, number, "RUNNING")
            cluster.restart_controller()
            assert job(cluster, number).state == "RUNNING"
            time.sleep(6)  # By then it has written down what there is.
            cluster.kill_controller()
            assert not cluster.running
            cluster.start_controller()
            assert job(cluster, number).state == "RUNNING"

    def test_lost_nodes_are_noticed_and_come_back(self, slurm_programs: Programs, tmp_path: Path) -> None:
        """One node loses its power and one, where that can be done here, its network."""
        network = can_use_network_namespaces()
        with LocalSlurm(timings=Timings(node_timeout=5, credential_lifetime=5), network=network) as cluster:
            script = f"echo >> {tmp_path}/starts-$SLURM_JOB_ID; exec sleep 1234"
            dark, apart = (submit(cluster, script, f"--nodelist=cpu-{index}") for index in (1, 2))
            for number in (dark, apart):
                reaches(cluster, number, "RUNNING")
                # Slurm calls a job running a moment before its script begins.
                eventually(lambda n=number: (tmp_path / f"starts-{n}").exists())
            cluster.kill_node("cpu-1", with_jobs=True)
            if network:
                cluster.cut("cpu-2")
            else:
                cluster.kill_node("cpu-2")
            for index, number in enumerate((dark, apart), 1):
                eventually(lambda index=index: cluster.node_states()[f"cpu-{index}"] == "down*", 90)
                reaches(cluster, number, "PENDING")
            # What ran on the node that still has power runs on, and Slurm does not know.
            assert len([line for line in processes_of(cluster.folder) if "sleep 1234" in line]) == 1
            cluster.start_node("cpu-1")
            assert cluster.node_states()["cpu-1"] == "idle"
            if network:
                cluster.mend("cpu-2")
            else:
                cluster.start_node("cpu-2")
            for number in (dark, apart):
                reaches(cluster, number, "RUNNING", 60)
                eventually(lambda n=number: (tmp_path / f"starts-{n}").read_text() == "\n\n")
            folder = cluster.folder
        assert processes_of(folder) == []

    def test_a_higher_tier_preempts(self, slurm_programs: Programs) -> None:
        description = SlurmDescription(
            (
                Partition("cpu", nodes=1, cpus=1, memory_mb=1000, when_preempted=WhenPreempted.REQUEUE),
                Partition("cheap", nodes=1, cpus=1, memory_mb=1000, when_preempted=WhenPreempted.CANCEL),
                Partition("urgent-cpu", shares_nodes_of="cpu", priority_tier=2),
                Partition("urgent-cheap", shares_nodes_of="cheap", priority_tier=2),
            )
        )
        with LocalSlurm(description, timings=Timings(credential_lifetime=5)) as cluster:
            victims = [submit(cluster, "sleep 60", f"--partition={name}") for name in ("cpu", "cheap")]
            for number in victims:
                reaches(cluster, number, "RUNNING")
            winners = [submit(cluster, "sleep 2", f"--partition=urgent-{name}") for name in ("cpu", "cheap")]
            for number in winners:
                reaches(cluster, number, "RUNNING")
            assert job(cluster, victims[0]).state == "PENDING"
            assert job(cluster, victims[1]).state == "PREEMPTED"
            reaches(cluster, victims[0], "RUNNING")

    def test_nodes_and_networks_that_are_not_there(self, cluster: LocalSlurm) -> None:
        with pytest.raises(SettingsError, match="no node 'gpu-9'"):
            cluster.kill_node("gpu-9")
        with pytest.raises(SettingsError, match="network=True"):
            cluster.cut("gpu-1")
        with pytest.raises(SlurmError, match="already runs"):
            cluster.start_node("gpu-1")


@pytest.mark.skipif(not can_use_network_namespaces(), reason="needs root and network namespaces")
class TestNetwork:
    def test_nodes_reach_this_machine_and_each_other(self, slurm_programs: Programs, tmp_path: Path) -> None:
        with LocalSlurm(network=True) as cluster, socket.create_server((cluster.address, 0)) as server:
            port = server.getsockname()[1]
            code = f"import socket; socket.create_connection(('{cluster.address}', {port})).send(b'here')"
            submit(cluster, f'{sys.executable} -c "{code}"; sleep 60', "--nodelist=gpu-2", "--partition=gpu")
            server.settimeout(30)
            connection, (address, _) = server.accept()
            with connection:
                assert connection.recv(4) == b"here"
            assert address not in ("127.0.0.1", cluster.address)
            bridges = [
                entry for entry in Path("/sys/class/net").iterdir() if entry.name.startswith(f"sr-{os.getpid()}-")
            ]
            assert len(bridges) == 1
            folder = cluster.folder
        assert processes_of(folder) == []
        assert not bridges[0].exists()

    def test_what_a_killed_process_left_is_removed(self, slurm_programs: Programs) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        bridge = f"sr-{gone.pid}-255"
        subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
        with LocalSlurm(network=True):
            assert not Path("/sys/class/net", bridge).exists()


class TestLife:
    def test_nothing_is_left(self, slurm_programs: Programs) -> None:
        with LocalSlurm() as cluster:
            folder = cluster.folder
            # The second one leaves its session, where Slurm loses sight of it.
            number = submit(cluster, "setsid sleep 1234 & sleep 1234")
            reaches(cluster, number, "RUNNING")
            eventually(lambda: len([line for line in processes_of(folder) if line == "sleep 1234 "]) == 2)
        assert processes_of(folder) == []
        assert not folder.exists()
        assert not cluster.running
        cluster.stop()

    def test_two_at_once_and_one_again(self, slurm_programs: Programs, tmp_path: Path) -> None:
        with LocalSlurm(folder=tmp_path / "one") as one, LocalSlurm(folder=tmp_path / "two") as two:
            submit(one, "sleep 60")
            assert len(one.squeue()) == 1
            assert two.squeue() == []
            with pytest.raises(SlurmError, match="already runs in"):
                LocalSlurm(folder=tmp_path / "one").start()
        with one:
            assert one.squeue() == []

    def test_another_object_works_on_a_running_cluster(self, slurm_programs: Programs, tmp_path: Path) -> None:
        with LocalSlurm(folder=tmp_path / "one"):
            other = LocalSlurm(folder=tmp_path / "one")
            assert other.running
            other.kill_node("cpu-1")
            other.start_node("cpu-1")
            other.stop()
            assert processes_of(tmp_path / "one") == []

    def test_daemons_end_with_a_killed_process(self, slurm_programs: Programs, tmp_path: Path) -> None:
        code = """
            import sys, time
            from infra.slurm import LocalSlurm
            LocalSlurm(folder=sys.argv[1]).start()
            print("up", flush=True)
            time.sleep(600)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "one")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"up\n"
            owner.send_signal(signal.SIGKILL)
        eventually(lambda: processes_of(tmp_path / "one") == [])

    def test_daemons_listen_on_loopback_only(self, cluster: LocalSlurm) -> None:
        host = socket.gethostname().partition(".")[0]
        if not socket.gethostbyname(host).startswith("127."):
            pytest.skip("the name of this machine does not resolve to a loopback address")
        configuration = (cluster.folder / "slurm.conf").read_text()
        words = [word.split("=") for word in configuration.split() if "Port=" in word]
        ports = {int(port) for _, port in words}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listeners = [row[1].split(":") for row in rows if row[3] == "0A"]
        # Addresses are hexadecimal there, the last byte first.
        assert {address[-2:] for address, port in listeners if int(port, 16) in ports} == {"7F"}

    def test_a_daemon_that_does_not_start_is_named(
        self, slurm_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("infra.slurm.local.slurm_conf", lambda *_: "Nonsense=1\n")
        with pytest.raises(SlurmError, match=r"slurmctld ended while starting\. Look at .*slurmctld\.log"):
            LocalSlurm(folder=tmp_path / "one").start()
        assert processes_of(tmp_path / "one") == []

    def test_a_port_that_is_taken_meanwhile_is_given_up(
        self, slurm_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen: list[list[int]] = []
        with socket.socket() as other:
            other.bind(("", 0))
            other.listen()

            def choose(count: int) -> list[int]:
                chosen.append(_free_ports(count))
                return chosen[-1] if len(chosen) > 1 else [other.getsockname()[1], *chosen[-1][1:]]

            monkeypatch.setattr("infra.slurm.local._free_ports", choose)
            with LocalSlurm(folder=tmp_path / "one") as cluster:
                assert set(cluster.node_states().values()) == {"idle"}
            assert len(chosen) == 2
            monkeypatch.setattr("infra.slurm.local._free_ports", lambda count: [other.getsockname()[1]] * count)
            with pytest.raises(SlurmError, match=r"slurmctld ended while starting.*says: .*Address already in use"):
                LocalSlurm(folder=tmp_path / "two").start()
        assert processes_of(tmp_path) == []

    def test_a_folder_with_other_things_is_refused(self, slurm_programs: Programs, tmp_path: Path) -> None:
        (tmp_path / "log").mkdir()
        with pytest.raises(SettingsError, match="holds other things"):
            LocalSlurm(folder=tmp_path).start()
        assert (tmp_path / "log").is_dir()

    def test_contradictions(self) -> None:
        with pytest.raises(SettingsError, match="outlive"):
            LocalSlurm(network=True, detached=True)

    def test_ports_differ(self) -> None:
        assert len(set(_free_ports(50))) == 50
