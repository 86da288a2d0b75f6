"""What other processes see of the pools that are open."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from distributed import Client

from infra.pools import LocalWorker, Pool, PooledCluster, open_pools
from infra.pools import status as status_module
from infra.pools.status import StatusFile, open_clusters, status_folder
from tests.waiting import eventually

ROOT: Final = Path(__file__).parents[2]

#: A process with one cluster: it writes what is so and waits for the end of its input.
WRITE: Final = """
import pathlib, sys
from infra.pools.status import StatusFile
StatusFile(pathlib.Path(sys.argv[1])).write(lambda: {"scheduler": "tls://elsewhere", "pools": {}})
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts processes that have written their status; ends them."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def snapshot() -> dict[str, Any]:
    """What a cluster would say."""
    return {"scheduler": "tls://here", "pools": {}}


class TestOtherProcesses:
    def test_file_of_a_living_process_is_read_and_kept(
        self, tmp_path: Path, writer: Callable[[Path], subprocess.Popen[str]]
    ) -> None:
        process = writer(tmp_path)
        for _ in range(2):
            (record,) = open_clusters(tmp_path)
            assert (record["host"], record["process"]) == (socket.gethostname(), process.pid)
            assert (record["scheduler"], record["pools"]) == ("tls://elsewhere", {})
            assert record["written"] == pytest.approx(time.time(), abs=60)
        assert len(list(tmp_path.iterdir())) == 1

    def test_file_of_a_dead_process_is_removed(
        self, tmp_path: Path, writer: Callable[[Path], subprocess.Popen[str]]
    ) -> None:
        dead, living = writer(tmp_path), writer(tmp_path)
        dead.kill()
        dead.wait()
        assert [record["process"] for record in open_clusters(tmp_path)] == [living.pid]
        assert [json.loads(path.read_text())["process"] for path in tmp_path.iterdir()] == [living.pid]

    def test_process_of_another_machine_is_not_judged(
        self, tmp_path: Path, writer: Callable[[Path], subprocess.Popen[str]]
    ) -> None:
        process = writer(tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": f"{socket.gethostname()}-2"}))
        process.kill()
        process.wait()
        assert [record["process"] for record in open_clusters(tmp_path)] == [process.pid]
        assert path.exists()

    @pytest.mark.parametrize("text", ["", "{", "not JSON", "[]", "3", "{}", '{"host": 3}'])
    def test_file_that_makes_no_sense_is_passed_over(
        self, tmp_path: Path, writer: Callable[[Path], subprocess.Popen[str]], text: str
    ) -> None:
        process = writer(tmp_path)
        (tmp_path / "nonsense.json").write_text(text)
        assert [record["process"] for record in open_clusters(tmp_path)] == [process.pid]

    def test_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        assert open_clusters(tmp_path / "nowhere") == []


class TestWriting:
    def test_once_in_a_while_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status_module, "_INTERVAL", 0.5)
        asked = []

        def count() -> dict[str, Any]:
            asked.append(time.monotonic())
            return {"number": len(asked)}

        file = StatusFile(tmp_path)
        began = time.monotonic()
        while time.monotonic() - began < 1.8:
            file.write(count)
            time.sleep(0.01)
        assert 2 <= len(asked) <= 4
        assert all(after - before >= 0.5 for before, after in pairwise(asked))
        (record,) = open_clusters(tmp_path)
        assert record["number"] == len(asked)

    def test_again_right_away_is_not_done(self, tmp_path: Path) -> None:
        file = StatusFile(tmp_path)
        file.write(lambda: {"number": 1})
        file.write(lambda: pytest.fail("asked again"))
        assert [record["number"] for record in open_clusters(tmp_path)] == [1]

    def test_leaves_one_complete_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "not" / "there" / "yet"
        StatusFile(folder).write(snapshot)
        (path,) = folder.iterdir()
        assert path.suffix == ".json"
        assert json.loads(path.read_text())["process"] == os.getpid()

    def test_two_clusters_of_one_process_have_two_files(self, tmp_path: Path) -> None:
        first, second = StatusFile(tmp_path), StatusFile(tmp_path)
        first.write(lambda: {"number": 1})
        second.write(lambda: {"number": 2})
        assert sorted(record["number"] for record in open_clusters(tmp_path)) == [1, 2]
        first.remove()
        assert [record["number"] for record in open_clusters(tmp_path)] == [2]

    def test_removed_twice(self, tmp_path: Path) -> None:
        file = StatusFile(tmp_path)
        file.write(snapshot)
        file.remove()
        file.remove()
        assert list(tmp_path.iterdir()) == []

    def test_folder_is_in_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUPERRES_HOME", str(tmp_path / "home"))
        StatusFile().write(snapshot)
        assert status_folder() == tmp_path / "home" / "pools"
        assert [record["scheduler"] for record in open_clusters()] == ["tls://here"]


@pytest.fixture(params=["below-a-file", "proc"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that nobody can make, root neither."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "pools" if request.param == "below-a-file" else Path("/proc/nowhere/pools")


class TestUnwritableFolder:
    def test_does_not_stop_a_run(self, unwritable: Path) -> None:
        file = StatusFile(unwritable)
        file.write(snapshot)
        file.remove()
        assert open_clusters(unwritable) == []

    def test_does_not_stop_pools(self, unwritable: Path) -> None:
        pool = Pool("cpu", start=LocalWorker(imports=()))
        with (
            PooledCluster([pool], warm=True, interval=0.1, status_folder=unwritable) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            assert client.submit(os.getpid, resources={"cpu": 1}, pure=False).result(60) != os.getpid()


def superres(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class TestCommand:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUPERRES_HOME", str(tmp_path))

    def test_shows_the_pools_that_are_open(self, tmp_path: Path) -> None:
        pools = [
            Pool("cpu", slots=2, maximum=3, start=LocalWorker(imports=())),
            Pool("gpu", maximum=1, start=LocalWorker(imports=())),
        ]
        with open_pools(pools, warm=True, interval=0.1) as cluster, Client(cluster, set_as_default=False) as client:
            for pool in ("cpu", "gpu"):
                client.submit(time.sleep, 0, resources={pool: 1}, pure=False).result(60)

            def all_ready() -> list[dict[str, Any]]:
                records = open_clusters()
                workers = [worker for record in records for facts in record["pools"].values()
                           for worker in facts["workers"]]  # fmt: skip
                return records if [worker["state"] for worker in workers] == ["ready", "ready"] else []

            eventually(all_ready)
            (record,) = json.loads(superres("pools", "status", "--json"))["clusters"]
            assert (record["host"], record["process"]) == (socket.gethostname(), os.getpid())
            assert record["scheduler"] == cluster.scheduler_address
            cpu, gpu = record["pools"]["cpu"], record["pools"]["gpu"]
            assert (cpu["maximum"], cpu["running"], cpu["waiting"], cpu["coming"]) == (3, 0, 0, 0)
            assert [worker["name"] for worker in cpu["workers"]] == ["cpu-0"]
            (worker,) = gpu["workers"]
            assert (worker["name"], worker["state"], worker["job"]) == ("gpu-0", "ready", "")
            assert worker["node"] == socket.gethostname()
            assert 0 <= worker["seconds"] < 120

            first, *rest = superres("pools", "status").splitlines()
            assert first.startswith(f"{socket.gethostname()} process {os.getpid()}, scheduler tls://127.0.0.1:")
            assert rest[0] == "  cpu: 1 of at most 3 workers; tasks: 0 running, 0 waiting, 0 coming"
            assert rest[1].split("  ")[:5] == ["", "", "cpu-0", "ready", socket.gethostname()]
            assert rest[2] == "  gpu: 1 of at most 1 workers; tasks: 0 running, 0 waiting, 0 coming"
            assert rest[3].split("  ")[:5] == ["", "", "gpu-0", "ready", socket.gethostname()]
            assert len(rest) == 4

        assert superres("pools", "status") == "no pools are open\n"
        assert list((tmp_path / "pools").iterdir()) == []

    def test_shows_what_waits(self) -> None:
        pool = Pool("gpu", maximum=1, start=LocalWorker(imports=()))
        with open_pools([pool], warm=False, interval=0.1) as cluster:
            cluster.dispatcher.expect("gpu", 4)
            eventually(lambda: [record for record in open_clusters() if record["pools"]["gpu"]["coming"] == 4])
            assert "tasks: 0 running, 0 waiting, 4 coming" in superres("pools", "status")
            cluster.dispatcher.expect("gpu", -4)

    def test_without_pools(self) -> None:
        assert superres("pools", "status") == "no pools are open\n"
        assert json.loads(superres("pools", "status", "--json")) == {"clusters": []}
