"""Pools on a real Slurm: where tasks run, how pools grow and shrink, and what survives which accident."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from infra.pools import Pool, PooledCluster, SlurmWorker, open_pools
from infra.pools import cluster as cluster_module
from infra.pools.cluster import MAXIMUM_FAILED_STARTS
from infra.pools.slurm import slurm_environment
from infra.prefect_server import Api, ensure_api
from infra.slurm import LocalSlurm, Partition, SlurmDescription, Timings
from infra.slurm.description import WhenPreempted
from infra.slurm.network import can_use_network_namespaces
from tasks.errors import PoolError
from tests.infra import slurm_flows as flows
from tests.infra.slurm_cluster import programs_or_skip
from tests.infra.slurm_flows import Note, notes
from tests.infra.test_runner import states
from tests.waiting import eventually

pytestmark = pytest.mark.slurm

IDLE = 5.0

#: A silent node is given up soon.
TIMINGS = Timings(node_timeout=8, message_timeout=4)

#: GPU jobs give way to those of `urgent`.
DESCRIPTION = SlurmDescription(
    (
        Partition("cpu", nodes=2, cpus=4, memory_mb=8000),
        Partition("gpu", nodes=2, cpus=4, memory_mb=8000, gpus=3, when_preempted=WhenPreempted.CANCEL),
        Partition("urgent", shares_nodes_of="gpu", priority_tier=10),
    )
)

#: More nodes, where accidents that Slurm takes long to notice happen meanwhile.
LARGE_DESCRIPTION = SlurmDescription(
    (
        *DESCRIPTION.partitions,
        *(
            Partition(f"{kind}-{accident}", nodes=2, cpus=4, memory_mb=8000, gpus=gpus)
            for accident in ("timed", "killed", "cut")
            for kind, gpus in (("cpu", 0), ("gpu", 3))
        ),
    )
)

#: How often each accident happens, and the seconds in which it must have.
TIMES = 5
TOO_LONG = 400

#: Seconds of the stages where an accident takes half a minute to be noticed.
LONG = (0.3, 5.0, 0.3)


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    """A cluster for the tests of this module."""
    programs_or_skip()
    # Detached: daemons otherwise end with the thread that starts them, here those in which accidents happen.
    with LocalSlurm(DESCRIPTION, timings=TIMINGS, detached=True) as slurm, slurm.use():
        yield slurm


@dataclass
class Site:
    """Slurm, and pools on it.

    Attributes:
        slurm: The cluster.
        folder: For logs and shared files.
        options: More of the workers.
        suffix: What the names of the partitions `cpu` and `gpu` end with.
    """

    slurm: LocalSlurm
    folder: Path
    options: dict[str, Any] = field(default_factory=lambda: {"interface": "lo"})
    suffix: str = ""

    @property
    def partitions(self) -> tuple[str, str]:
        """Those of the pools."""
        return f"cpu{self.suffix}", f"gpu{self.suffix}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def pools(self, gpus: int = 2, gres: str = "gpu:1", **gpu_options: Any) -> tuple[Pool, Pool]:
        """A `cpu` pool of up to two jobs and a `gpu` pool."""

        def worker(partition: str, **more: Any) -> SlurmWorker:
            return SlurmWorker(
                shared_directory=self.folder / "shared",
                log_directory=self.folder / "logs",
                partition=partition,
                memory="200MB",
                env=slurm_environment(1, inference=False),
                imports=("infra.pools.remote", "tests.infra.slurm_flows"),
                death_timeout=10,
                **{**self.options, **more},
            )

        # A lost chunk starts again before all others, so chance may have one chunk hit by every accident of a test.
        common: dict[str, Any] = {"idle_seconds": IDLE, "maximum_losses": 4 * TIMES}
        cpu_partition, gpu_partition = self.partitions
        cpu = Pool("cpu", slots=2, maximum=2, coming="ignore", start=worker(cpu_partition), **common)
        start = worker(gpu_partition, gres=gres, **gpu_options)
        return cpu, Pool("gpu", maximum=gpus, coming="keep", start=start, **common)

    @contextlib.contextmanager
    def open(self, pools: tuple[Pool, ...] | None = None) -> Iterator[PooledCluster]:
        """Open pools; at the end no job of theirs may be left."""
        with open_pools(pools or self.pools(), warm=False) as cluster:
            yield cluster
        eventually(lambda: not self.alive(), 10)
        assert list((self.folder / "shared").iterdir()) == []

    def alive(self) -> set[int]:
        """Numbers of the jobs that have not ended."""
        mine = (job for job in self.slurm.squeue() if job.partition in self.partitions)
        return {job.id for job in mine if job.name.startswith("superres-") and not job.ended}

    def busy(self, stage: str) -> list[Note]:
        """Tasks of a stage that run now, as far as their notes tell."""
        running: dict[tuple[int, int], Note] = {}
        for entry in notes(self.log):
            key = (entry.index, entry.process)
            if entry.stage == stage and entry.event == "start":
                running[key] = entry
            elif entry.stage == stage:
                running.pop(key, None)
        alive = {str(number) for number in self.alive()}
        return [entry for entry in running.values() if entry.job in alive and _exists(entry.process)]

    def check_all_done_once(self, chunks: int, in_flight: int = 0) -> None:
        """Check that every stage of every chunk was finished, and not again.

        Args:
            chunks: How many.
            in_flight: Tasks that were under way when a worker was lost. A task ends a moment after its work, when
                Prefect has been told; one that loses its worker in this moment is done again.
        """
        finished = Counter((entry.stage, entry.index) for entry in notes(self.log) if entry.event == "end")
        assert set(finished) == {
            (stage, index) for stage in ("extract", "upscale", "encode") for index in range(chunks)
        }
        assert sum(finished.values()) - len(finished) <= in_flight, finished


def gone(site: Site, tasks: Iterable[Note]) -> bool:
    """Whether neither job nor process of these tasks is left."""
    alive = site.alive()
    return not any(int(entry.job) in alive or _exists(entry.process) for entry in tasks)


def _exists(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def site(slurm: LocalSlurm, prefect_api: Api, tmp_path: Path) -> Iterator[Site]:
    yield from cleared(Site(slurm, tmp_path))


def cleared(site: Site) -> Iterator[Site]:
    """A site, and then no job on it."""
    yield site
    for job in site.alive():
        site.slurm.run("scancel", str(job))
    eventually(lambda: not site.alive(), 20)


def ends(state: State[Any], count: int) -> dict[str, str]:
    """How the task runs of a flow run ended, by name, once Prefect knows of all of them."""
    found = states(state.state_details.flow_run_id, count)
    assert len(found) == count
    return found


class Watch:
    """Samples of `squeue` while a block runs.

    Attributes:
        samples: Time and the jobs alive, by pool.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.samples: list[tuple[float, dict[str, int]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            jobs = [job for job in self.site.slurm.squeue() if not job.ended]
            self.samples.append((time.time(), Counter(job.partition for job in jobs)))

    def most(self, pool: str, since: float, until: float) -> int:
        """The most jobs of a pool seen between two times."""
        return max((jobs.get(pool, 0) for at, jobs in self.samples if since <= at <= until), default=0)


class TestWork:
    def test_stages_stream_each_in_its_partition(self, site: Site) -> None:
        chunks = 8
        cpu, gpu = site.pools()
        # Or the CPU jobs are gone before the first GPU job of a slow machine is up.
        pools = replace(cpu, coming="keep"), gpu
        with site.open(pools) as cluster, Watch(site) as watch:
            assert flows.stream(chunks, [0.3, 1.0, 0.3], str(site.log)) == list(range(chunks))
            ended = time.time()
            eventually(lambda: not site.alive(), IDLE + 5)
            seconds = cluster.leases.node_seconds(0)
        site.check_all_done_once(chunks)
        seen = notes(site.log)
        assert {(entry.stage, entry.partition) for entry in seen} == {
            ("extract", "cpu"),
            ("upscale", "gpu"),
            ("encode", "cpu"),
        }
        assert all(entry.node.startswith(entry.partition) for entry in seen)
        ends = sorted(entry.at for entry in seen if (entry.stage, entry.event) == ("upscale", "end"))
        assert min(entry.at for entry in seen if entry.stage == "encode") < ends[2]
        # Zero before, up to two of each, zero afterwards.
        assert watch.most("cpu", 0, ended) == watch.most("gpu", 0, ended) == 2
        held = {
            pool: sum(lease.seconds(0, ended + 60) for lease in cluster.leases if lease.pool == pool)
            for pool in seconds
        }
        assert 8 < held["gpu"] < 60 and 4 < held["cpu"] < 80

    def test_chunks_are_upscaled_in_plan_order(self, site: Site) -> None:
        with site.open():
            flows.stream(10, [0.1, 0.5, 0.1], str(site.log))
        started = [entry.index for entry in notes(site.log) if (entry.stage, entry.event) == ("upscale", "start")]
        # Two workers: what starts at the same time may be noted in any order.
        assert all(abs(position - index) <= 1 for position, index in enumerate(started))

    def test_no_gpu_job_while_only_extraction_or_encoding_remains(self, site: Site) -> None:
        with site.open(), Watch(site) as watch:
            flows.stream(2, [5.0, 0.5, 14.0], str(site.log))
            ended = time.time()
        at = {(entry.stage, entry.event): entry.at for entry in notes(site.log)}
        first_extracted = min(e.at for e in notes(site.log) if (e.stage, e.event) == ("extract", "end"))
        assert watch.most("gpu", 0, first_extracted - 0.2) == 0
        assert watch.most("gpu", at["upscale", "end"], ended) >= 1
        assert watch.most("gpu", at["upscale", "end"] + IDLE + 4, ended) == 0
        assert watch.most("cpu", at["upscale", "end"] + IDLE + 4, ended) >= 1

    def test_open_pools_stay_warm_from_flow_to_flow(self, site: Site) -> None:
        cpu, gpu = site.pools()
        with site.open((replace(cpu, idle_seconds=60), replace(gpu, idle_seconds=60))):
            flows.stream(2, [0.1, 0.1, 0.1], str(site.log))
            first = site.alive()
            flows.stream(2, [0.1, 0.1, 0.1], str(site.log))
            assert site.alive() == first
        assert len({entry.job for entry in notes(site.log)}) <= len(first)

    def test_task_runs_tell_node_and_job(self, site: Site) -> None:
        with site.open() as cluster:
            state = flows.stream(2, [0.1, 0.1, 0.1], str(site.log), return_state=True)
            names = ends(state, 6)
            leases = {lease.job: lease for lease in cluster.leases}
        jobs = {(entry.stage, entry.index): entry for entry in notes(site.log)}
        assert set(names) == {f"{stage} {i} on {e.node} job {e.job}" for (stage, i), e in jobs.items()}
        for entry in jobs.values():
            assert leases[entry.job].node == entry.node
            assert "serves tls://" in Path(leases[entry.job].log).read_text()


class TestCredentials:
    def test_are_private_and_needed(self, site: Site) -> None:
        with site.open() as cluster:
            flows.stream(1, [0.0, 0.0, 0.0], str(site.log))
            (folder,) = (site.folder / "shared").iterdir()
            assert folder.stat().st_mode & 0o777 == 0o700
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
            host, port = cluster.scheduler_address.removeprefix("tls://").split(":")
            with socket.create_connection((host, int(port)), timeout=5) as plain:
                plain.sendall(b"\x00" * 64)
                plain.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert plain.recv(64) in (b"", plain.recv(0)) or True
            with pytest.raises((OSError, TypeError, RuntimeError)):
                from distributed import Client

                Client(f"tcp://{host}:{port}", timeout=3, set_as_default=False)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [({"partition": "nowhere"}, "nvalid partition"), ({"gres": "gpu:9"}, "node configuration is not available")],
    )
    def test_a_job_that_slurm_would_not_run(self, site: Site, options: dict[str, Any], words: str) -> None:
        from infra.pools.slurm_job import check_job

        _, gpu = site.pools()
        check_job(gpu)
        wrong = replace(gpu, start=replace(gpu.start, **options))  # type: ignore[type-var]
        with pytest.raises(PoolError, match=words):
            check_job(wrong)
        assert site.alive() == set()

    def test_jobs_that_end_at_once_fail_the_tasks(self, site: Site) -> None:
        cpu, gpu = site.pools(prologue=("exit 3",))
        with site.open((cpu, gpu)), pytest.raises(PoolError, match=r"failed to start 3 times .* FAILED.*its log is"):
            flows.poisoned(1, str(site.log))

    def test_jobs_taken_before_they_are_up_are_replaced(self, site: Site) -> None:
        taken: set[int] = set()
        with site.open(), Accidents(lambda: self.take(site, taken), MAXIMUM_FAILED_STARTS + 1, random.Random(), 0.2):
            assert flows.stream(2, [0.1, 0.1, 0.1], str(site.log)) == [0, 1]
        assert len(taken) >= MAXIMUM_FAILED_STARTS + 1

    @staticmethod
    def take(site: Site, taken: set[int]) -> int:
        """Cancel jobs before their workers can have joined: a moment ago they were not there."""
        victims = site.alive() - taken
        for job in victims:
            site.slurm.run("scancel", str(job))
        taken |= victims
        return len(victims)


class Accidents:
    """Lets things happen to a run at random moments, from a thread of its own.

    Args:
        happen: Does one or several; returns how many.
        times: How often.
        chance: For the moments.
        pause: The most seconds between two.
        over: A file to make when no more will happen.
    """

    def __init__(
        self, happen: Callable[[], int], times: int, chance: random.Random, pause: float = 1.5, over: Path | None = None
    ) -> None:
        self.count = 0
        self._over = over
        self._happen = happen
        self._times = times
        self._chance = chance
        self._pause = pause
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Accidents:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        deadline = time.monotonic() + TOO_LONG
        try:
            while self.count < self._times and not self._ended.wait(self._chance.uniform(0.1, self._pause)):
                assert time.monotonic() < deadline, f"{self.count} of {self._times} could happen in {TOO_LONG} s"
                self.count += self._happen()
        except BaseException as error:
            self._error = error
        finally:
            if self._over:
                self._over.touch()


def run(
    site: Site, happen: Callable[[], int], chance: random.Random, *,
    pools: tuple[Pool, ...] | None = None, seconds: tuple[float, float, float] = (0.5, 1.2, 0.5),
) -> None:  # fmt: skip
    """Let accidents happen to a run, which has to end as if nothing had."""
    over = site.folder / "over"
    with site.open(pools or site.pools()), Accidents(happen, TIMES, chance, over=over) as accidents:
        state = flows.stream(8, list(seconds), str(site.log), until=str(over), return_state=True)
        chunks = len(state.result())
        assert state.result() == list(range(chunks))
        assert set(ends(state, 3 * chunks).values()) == {"Completed"}
    assert accidents.count >= TIMES
    # Each accident hits at most the two jobs of one pool, with two slots each.
    site.check_all_done_once(chunks, in_flight=4 * accidents.count)


def node_daemon_killed(site: Site, chance: random.Random, daemons: Executor) -> None:
    def kill() -> int:
        victims = {entry.node: entry for entry in site.busy("upscale")}
        for node in victims:
            site.slurm.kill_node(node)
        # Jobs run on until Slurm gives the nodes up; then the workers are let go of, and the nodes come back.
        eventually(lambda: gone(site, victims.values()), TIMINGS.node_timeout + 50)
        for node in victims:
            daemons.submit(site.slurm.start_node, node).result()
        return len(victims)

    run(site, kill, chance, seconds=LONG, pools=site.pools(gres="gpu:2"))


def wall_time_over(site: Site, chance: random.Random, _: Executor) -> None:
    # Slurm counts in minutes and looks every half: five jobs meet their end between 60 and 90 s.
    cpu, gpu = site.pools(gpus=TIMES, walltime="00:01:00")
    over, seen = site.folder / "over", set[int]()

    def ended() -> set[int]:
        jobs = [(job.id, job.partition, job.state) for job in site.slurm.squeue()]
        return {number for number, *rest in jobs if rest == [gpu.start.partition, "TIMEOUT"]}  # type: ignore[attr-defined]

    def look() -> int:
        new = ended() - seen
        seen.update(new)
        return len(new)

    with site.open((cpu, replace(gpu, maximum=TIMES))), Accidents(look, TIMES, chance, over=over):
        state = flows.stream(15, [0.1, 8.0, 0.1], str(site.log), window=15, until=str(over), return_state=True)
        chunks = len(state.result())
        assert state.result() == list(range(chunks))
        assert set(ends(state, 3 * chunks).values()) == {"Completed"}
    site.check_all_done_once(chunks, in_flight=TIMES)
    assert len(ended()) >= TIMES


def node_cut_off(site: Site, chance: random.Random, _: Executor) -> None:
    def cut() -> int:
        victims = {entry.node: entry for entry in site.busy("upscale")}
        for node in victims:
            site.slurm.cut(node)
        eventually(lambda: not site.alive() & {int(entry.job) for entry in victims.values()}, 60)
        for node in victims:
            site.slurm.mend(node)
        # Its processes may not outlive the loss for long, or two workers would have one GPU.
        eventually(lambda: gone(site, victims.values()), 60)
        return len(victims)

    run(site, cut, chance, seconds=LONG, pools=site.pools(gres="gpu:2"))


@dataclass(frozen=True)
class Behind:
    """What goes on behind the tests of a class.

    Attributes:
        slurm: Where.
        options: Of the workers there.
        runs: Runs that meet slow accidents; each raises what is wrong when it is over.
    """

    slurm: LocalSlurm
    options: dict[str, Any]
    runs: dict[str, Future[None]]


@pytest.fixture(scope="class")
def behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """Slow accidents under way, those that tests ask for."""
    programs_or_skip()
    asked_for = {item.name for item in request.session.items}
    has_network = can_use_network_namespaces()
    folder = tmp_path_factory.mktemp("behind")
    seed = os.environ.get("CHAOS_SEED") or time.time_ns()
    print(f"CHAOS_SEED={seed}")
    with ExitStack() as held:
        patch = held.enter_context(pytest.MonkeyPatch.context())
        patch.setitem(cluster_module.SCHEDULER_CONFIG, "distributed.comm.timeouts.tcp", "12s")
        patch.setenv("SUPERRES_HOME", str(folder / "home"))
        patch.delenv("PREFECT_API_URL", raising=False)
        slurm = held.enter_context(LocalSlurm(LARGE_DESCRIPTION, timings=TIMINGS, network=has_network))
        held.enter_context(slurm.use())
        held.enter_context(ensure_api(home=folder / "prefect", host=slurm.address))
        # Daemons end with the thread that starts them, and the accidents' own end before their pools.
        daemons = held.enter_context(ThreadPoolExecutor(1))
        threads = held.enter_context(ThreadPoolExecutor())
        options = {"host": slurm.address, "interface": "eth0"} if has_network else {"interface": "lo"}
        runs: dict[str, Future[None]] = {}

        def begin(name: str, accident: Callable[[Site, random.Random, Executor], None]) -> Site:
            site = Site(slurm, folder / name, options, f"-{name}")
            site.folder.mkdir()
            chance = random.Random(f"{seed} {name}")
            runs[name] = threads.submit(copy_context().run, accident, site, chance, daemons)
            return site

        if "test_wall_time_over" in asked_for:
            timed = begin("timed", wall_time_over)
            # Its jobs have a minute, so they start alone.
            eventually(lambda: len(timed.busy("upscale")) == TIMES or runs["timed"].done(), 120)
        if "test_node_daemon_killed" in asked_for:
            begin("killed", node_daemon_killed)
        if "test_node_cut_off" in asked_for and has_network:
            begin("cut", node_cut_off)
        yield Behind(slurm, options, runs)


@pytest.mark.chaos
class TestAccidents:
    """Each run ends with the same result, finished work is not repeated, and nothing is left behind.

    Accidents that Slurm takes long to notice happen behind the others; they are looked at last.
    """

    @pytest.fixture
    def site(self, behind: Behind, tmp_path: Path) -> Iterator[Site]:
        yield from cleared(Site(behind.slurm, tmp_path, behind.options))

    @pytest.mark.parametrize("stage", ["extract", "upscale", "encode"])
    def test_job_cancelled(self, site: Site, chance: random.Random, stage: str) -> None:
        def cancel() -> bool:
            if busy := site.busy(stage):
                site.slurm.run("scancel", chance.choice(busy).job)
            return bool(busy)

        run(site, cancel, chance)

    @pytest.mark.parametrize("stage", ["extract", "upscale", "encode"])
    def test_worker_killed(self, site: Site, chance: random.Random, stage: str) -> None:
        def kill() -> bool:
            if busy := site.busy(stage):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(busy).process, signal.SIGKILL)
            return bool(busy)

        run(site, kill, chance)

    def test_node_set_down(self, site: Site, chance: random.Random) -> None:
        down: list[str] = []

        def set_down() -> bool:
            if down:
                site.slurm.set_node(down.pop(), "resume")
                return False
            if busy := site.busy(chance.choice(["extract", "upscale", "encode"])):
                down.append(chance.choice(busy).node)
                site.slurm.set_node(down[0], "down")
            return bool(busy)

        run(site, set_down, chance)
        for node in down:
            site.slurm.set_node(node, "resume")

    def test_preempted(self, site: Site, chance: random.Random) -> None:
        def preempt() -> bool:
            if not (busy := site.busy("upscale")):
                return False
            victim = chance.choice(busy)
            # Four CPUs and three GPUs: the whole node.
            script = "#!/bin/sh\nsleep 1\n"
            options = ("-p", "urgent", "-w", victim.node, "-c", "4", "--gres=gpu:3", "-o", "/dev/null")
            site.slurm.run("sbatch", *options, stdin=script)
            eventually(lambda: int(victim.job) not in site.alive(), 30)
            return True

        run(site, preempt, chance)

    def test_node_daemon_killed(self, behind: Behind) -> None:
        behind.runs["killed"].result()

    def test_wall_time_over(self, behind: Behind) -> None:
        behind.runs["timed"].result()

    @pytest.mark.skipif(not can_use_network_namespaces(), reason="this process may not make network namespaces")
    def test_node_cut_off(self, behind: Behind) -> None:
        behind.runs["cut"].result()


@pytest.mark.chaos
class TestLosses:
    def test_controller_restarted(self, site: Site, chance: random.Random) -> None:
        def restart() -> bool:
            site.slurm.restart_controller()
            return True

        run(site, restart, chance)

    def test_a_killed_workers_chunk_starts_again_within_seconds(self, site: Site) -> None:
        with site.open(site.pools(gpus=1)):
            thread_log = site.log

            def kill() -> bool:
                if not (busy := site.busy("upscale")):
                    return False
                os.kill(busy[0].process, signal.SIGKILL)
                return True

            with Accidents(kill, TIMES, random.Random(0), pause=3.0) as accidents:
                flows.stream(8, [0.1, 2.0, 0.1], str(thread_log))
            assert accidents.count == TIMES
        starts = [entry for entry in notes(site.log) if (entry.stage, entry.event) == ("upscale", "start")]
        again = [b.at - a.at for a, b in itertools.pairwise(starts) if a.index == b.index]
        assert len(again) == TIMES
        # From the start of the attempt that was lost, at most 2 s of it.
        assert max(again) < 2 + 5

    def test_a_chunk_that_kills_every_worker_is_named_and_the_others_finish(self, site: Site) -> None:
        cpu, gpu = site.pools()
        with site.open((cpu, replace(gpu, maximum_losses=3))):
            state = flows.poisoned(5, str(site.log), return_state=True)
            with pytest.raises(
                PoolError, match=r"upscale 1 lost its worker 3 times, the last one gpu-\d+ on gpu-\d, Slurm"
            ):
                state.result()
            ended = ends(state, 5)
        assert [name for name, kind in ended.items() if kind == "Crashed" and name.startswith("upscale 1")]
        assert sorted(ended.values()) == ["Completed"] * 4 + ["Crashed"]


@pytest.mark.chaos
class TestEndOfTheFlow:
    @pytest.mark.parametrize(("how", "seconds"), [(signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 15)])
    def test_no_job_outlives_it(self, site: Site, how: signal.Signals, seconds: float) -> None:
        code = (
            "import sys, pathlib, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from tests.infra import slurm_flows as flows\n"
            "from tests.infra.test_slurm_pools import Site\n"
            "from infra.slurm import LocalSlurm\n"
            "if __name__ == '__main__':\n"
            "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            f"    site = Site(LocalSlurm(folder={str(site.slurm.folder)!r}), pathlib.Path({str(site.folder)!r}))\n"
            "    with site.open():\n"
            "        flows.stream(4, [0.1, 60, 0.1], str(site.log))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, process_group=0
        )
        try:
            eventually(lambda: len(site.busy("upscale")) == 2, 60)
            workers = [entry.process for entry in site.busy("upscale")]
            began = time.monotonic()
            os.kill(process.pid, how)
            eventually(lambda: not site.alive(), seconds)
            print(f"jobs gone after {time.monotonic() - began:.1f} s")
            assert process.wait(30) != 0
            eventually(lambda: not any(_exists(pid) for pid in workers), 5)
        finally:
            process.kill()
