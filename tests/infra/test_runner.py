"""The task runner: where tasks run, when, and how they end, whatever happens to workers and flows."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import TaskRun
from prefect.flow_runs import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.futures import as_completed, wait
from prefect.runtime import flow_run as this_flow_run

from infra.pools import PooledCluster, PoolTaskRunner
from infra.prefect_server import Api
from tasks.errors import PoolError
from tests.infra import sample_flows as sample
from tests.infra.sample_flows import notes, small_pools
from tests.infra.test_pools import alive, worker_pid
from tests.waiting import eventually

runner = PoolTaskRunner(small_pools)


def task_runs(flow_run_id: Any, count: int) -> dict[str, TaskRun]:
    """The task runs of a flow run by name, once Prefect has written down that many and how each ended."""

    def ended() -> dict[str, TaskRun] | None:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        found: dict[Any, TaskRun] = {}  # By identifier: one that is written down meanwhile shifts the pages.
        with get_client(sync_client=True) as client:
            while page := client.read_task_runs(flow_run_filter=wanted, limit=200, offset=len(found)):
                if not {run.id for run in page} - found.keys():
                    break
                found |= {run.id: run for run in page}
        runs = found.values()
        settled = all(run.state and (run.state.is_final() or run.state.name == "NotReady") for run in runs)
        return {run.name: run for run in runs} if settled and len(runs) >= count else None

    return eventually(ended)


def states(flow_run_id: Any, count: int) -> dict[str, str]:
    """Names of the final states by task run."""
    return {name: run.state.name for name, run in task_runs(flow_run_id, count).items() if run.state}


def ids_of(name: str) -> Any:
    """The newest flow run of this flow."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        runs: list[FlowRun] = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[name])), sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1
        )
    return runs[0].id


def log_of(flow_run_id: Any) -> list[str]:
    """The log of a flow run, as the server has it."""
    with get_client(sync_client=True) as client:
        found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
    return [line.message for line in found]


class TestRouting:
    def test_tasks_run_in_the_pool_they_name(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")
        assert sample.stream(3, 0.0, log) == [0, 1, 2]
        where = {(words[0], pid) for _, pid, words in notes(log)}
        cpu, gpu = worker_pid(pools, "cpu-0"), worker_pid(pools, "gpu-0")
        assert where == {("extract", cpu), ("upscale", gpu), ("encode", cpu)}

    @pytest.mark.parametrize(
        ("task", "message"),
        [(sample.homeless, "names no pool"), (sample.torn, "names 2 pools"), (sample.lost, "asks for pool 'tpu'")],
    )
    def test_a_task_must_name_one_open_pool(self, pools: PooledCluster, task: Any, message: str) -> None:
        @flow(task_runner=runner)
        def submits() -> None:
            task.submit()

        with pytest.raises(PoolError, match=message):
            submits()

    def test_a_task_cannot_submit_tasks(self, pools: PooledCluster) -> None:
        @flow(task_runner=runner)
        def submits() -> None:
            sample.nested.submit(0).result()

        with pytest.raises(PoolError, match="a task submitted a task"):
            submits()

    def test_runner_travels_and_duplicates(self) -> None:
        assert runner.duplicate() == runner
        assert pickle.loads(pickle.dumps(runner)) == runner
        assert PoolTaskRunner() != runner

    def test_module_state_is_shared_between_task_runs(self, pools: PooledCluster) -> None:
        @flow(task_runner=runner)
        def counts() -> list[tuple[int, int]]:
            return [sample.call_count.submit().result() for _ in range(3)]

        results = counts()
        assert len({pid for pid, _ in results}) == 1
        assert [count for _, count in results] == [results[0][1] + step for step in range(3)]

    def test_a_flow_that_a_deployment_loads_from_its_path(self, pools: PooledCluster) -> None:
        # As a Prefect worker does: the module then bears the name of its file, under which no pool worker knows it.
        path = Path(sample.__file__)
        loaded = load_flow_from_entrypoint(f"{path}:stream")
        assert loaded is not sample.stream
        assert loaded(2) == [0, 1]


class TestOrder:
    def test_chunks_stream(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")
        sample.stream(5, 0.3, log)
        at = {tuple(words): when for when, _, words in notes(log)}
        assert at["encode", "0", "start"] < at["upscale", "4", "start"]
        assert all(at["upscale", str(i), "start"] >= at["extract", str(i), "end"] for i in range(5))
        assert all(at["encode", str(i), "start"] >= at["upscale", str(i), "end"] for i in range(5))

    def test_first_submitted_first_run(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")

        @flow(task_runner=runner)
        def queue() -> None:
            wait([sample.upscale.submit(index, 0.05, log) for index in range(8)])

        queue()
        started = [int(words[1]) for _, _, words in notes(log) if words[2] == "start"]
        assert started == sorted(started)

    def test_wait_for_orders_tasks_that_exchange_nothing(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")

        @flow(task_runner=runner)
        def ordered() -> None:
            first = sample.upscale.submit(0, 0.5, log)
            sample.extract.submit(1, 0, log, wait_for=[first]).result()

        ordered()
        assert [words[0] for _, _, words in notes(log)] == ["upscale", "upscale", "extract", "extract"]


class TestFutures:
    def test_nothing_is_left_in_the_scheduler(self, pools: PooledCluster) -> None:
        sample.stream(4)
        eventually(lambda: not pools.scheduler.tasks, 5)
        queues = pools.dispatcher
        for pool in pools.pools:
            assert (queues.coming(pool), queues.waiting(pool), queues.running(pool)) == (0, 0, 0)

    def test_results_and_states_stay(self, pools: PooledCluster) -> None:
        @flow(task_runner=runner)
        def keeps() -> list[Any]:
            futures = [sample.extract.submit(index) for index in range(3)]
            done = [future.result() for future in as_completed(futures)]
            assert all(future.state.is_completed() for future in futures)
            return [sorted(done), [future.result() for future in futures]]

        assert keeps() == [[0, 1, 2], [0, 1, 2]]

    def test_map_and_async_tasks(self, pools: PooledCluster) -> None:
        @flow(task_runner=runner)
        def maps() -> list[int]:
            return sample.asynchronous.map(sample.extract.map([1, 2, 3])).result()

        assert maps() == [2, 3, 4]

    def test_timeout(self, pools: PooledCluster) -> None:
        @flow(task_runner=runner)
        def impatient() -> None:
            future = sample.upscale.submit(0, 1.0)
            with pytest.raises(TimeoutError):
                future.result(timeout=0.1)
            future.result()

        impatient()

    def test_failure_is_raised_with_its_type(self, pools: PooledCluster) -> None:
        @flow(name="failing", task_runner=runner)
        def failing() -> Any:
            bad = sample.broken.submit(7)
            after = sample.upscale.submit(bad)
            after.wait()
            assert after.state.name == "NotReady"
            with pytest.raises(ValueError, match="chunk 7 is broken"):
                bad.result()
            return this_flow_run.id

        assert sorted(states(failing(), 2).values()) == ["Failed", "NotReady"]

    def test_what_never_began_tells_why(self, pools: PooledCluster) -> None:
        @flow(name="never-began", task_runner=runner)
        def never_began() -> Any:
            bad = sample.broken.submit(7)
            after = sample.upscale.submit(bad)
            last = sample.encode.submit(sample.extract.submit(0), wait_for=[after])
            with pytest.raises(ValueError, match="chunk 7 is broken"):
                last.result()
            assert isinstance(last.result(raise_on_failure=False), ValueError)
            return after.result()

        state = never_began(return_state=True)
        assert state.is_failed()
        with pytest.raises(ValueError, match="chunk 7 is broken"):
            state.result()

    def test_persisted_results_are_reused(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")
        kept = sample.extract.with_options(
            persist_result=True,
            cache_key_fn=lambda *_: f"kept-{tmp_path.name}",
            result_storage_key="kept-{parameters[index]}",
        )

        @flow(task_runner=runner)
        def twice() -> list[int]:
            return [kept.submit(5, 0, log).result(), kept.submit(5, 0, log).result()]

        assert twice() == [5, 5]
        assert len(notes(log)) == 2


class TestLosses:
    def test_only_the_lost_task_runs_again(self, pools: PooledCluster, tmp_path: Path) -> None:
        assert sample.survive(str(tmp_path), deaths=1) == [3, 2]
        starts = Counter((words[0], words[1]) for _, _, words in notes(tmp_path / "log") if words[2] == "start")
        assert starts == {
            ("extract", "0"): 1,
            ("extract", "1"): 1,
            ("upscale", "0"): 1,
            ("upscale", "2"): 2,
            ("upscale", "3"): 1,
        }
        run = ids_of("survive")
        assert set(states(run, 5).values()) == {"Completed"}
        # Whoever watches the run in the UI reads why it takes longer.
        warned = eventually(lambda: [line for line in log_of(run) if "lost its worker" in line])
        assert len(warned) == 1 and warned[0].startswith("upscale-2 lost its worker, gpu-")

    @pytest.mark.chaos
    def test_a_task_that_always_kills_its_worker_ends(
        self, pools: PooledCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(pools.pools, "gpu", replace(pools.pools["gpu"], maximum_losses=2))
        with pytest.raises(PoolError, match="upscale-2 lost its worker 2 times, the last one gpu-0 on "):
            sample.survive(str(tmp_path), deaths=1000)
        assert len(list(tmp_path.glob("died-2-*"))) == 2
        ended = states(ids_of("survive"), 5)
        assert ended.pop("upscale-2") == "Crashed"
        assert set(ended.values()) == {"Completed"}

    def test_an_idle_worker_that_dies_takes_nothing_with_it(self, pools: PooledCluster, tmp_path: Path) -> None:
        log = str(tmp_path / "log")

        assert sample.robbed(log) == 0
        assert [words[:2] for _, _, words in notes(log)] == [["extract", "0"]] * 2 + [["upscale", "0"]] * 2

    def test_task_runs_of_a_flow_that_gave_up_end(self, pools: PooledCluster, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="gave up"):
            sample.abandon(str(tmp_path / "log"))
        assert states(ids_of("abandon"), 1) == {"upscale-0": "Crashed"}
        assert pools.dispatcher.coming("cpu") == pools.dispatcher.coming("gpu") == 0
        # Its thread cannot be stopped; the tests after this one should not wait for it.
        os.kill(worker_pid(pools, "gpu-0"), signal.SIGKILL)


class Driver:
    """A flow in a process of its own (`tests.infra.driver`)."""

    def __init__(self, home: Path, flow_name: str, **arguments: Any) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.infra.driver", str(home), flow_name, json.dumps(arguments)],
            cwd=Path(__file__).parents[2],
            env={**environment, "PREFECT_LOGGING_LEVEL": "WARNING"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        return json.loads(line)

    def family(self) -> list[int]:
        """The process and everything below it."""
        me = psutil.Process(self.process.pid)
        return [me.pid, *(child.pid for child in me.children(recursive=True))]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Where drivers keep their server's database."""
    yield tmp_path / "home"


@pytest.mark.chaos
class TestFlowProcess:
    def test_killed_flow_leaves_no_process(self, home: Path, tmp_path: Path) -> None:
        driver = Driver(home, "children", folder=str(tmp_path))
        driver.line()
        log = tmp_path / "log"
        eventually(lambda: notes(log), 60)
        family = {*driver.family(), int(notes(log)[0][2][1])}
        assert len(family) >= 6
        os.kill(driver.process.pid, signal.SIGKILL)
        began = time.monotonic()
        eventually(lambda: not any(alive(pid) for pid in family), 15)
        print(f"gone after {time.monotonic() - began:.2f} s")
        driver.process.wait()

    def test_interrupted_flow_closes_quickly_and_quietly(self, home: Path, tmp_path: Path) -> None:
        driver = Driver(home, "children", folder=str(tmp_path))
        driver.line()
        log = tmp_path / "log"
        eventually(lambda: notes(log), 60)
        family = {*driver.family(), int(notes(log)[0][2][1])}
        began = time.monotonic()
        os.killpg(driver.process.pid, signal.SIGINT)  # As a terminal does: to the whole foreground group.
        output, errors = driver.process.communicate(timeout=30)
        took = time.monotonic() - began
        print(f"closed after {took:.2f} s")
        assert driver.process.returncode == 130
        assert took < 10
        assert json.loads(output.splitlines()[-1]) == {"interrupted": True, "children": []}
        eventually(lambda: not any(alive(pid) for pid in family), 5)
        assert "Traceback" not in errors
        assert "distributed" not in errors

    def test_two_flows_at_once(self, home: Path, tmp_path: Path) -> None:
        drivers = [Driver(home, "stream", chunks=3, log=str(tmp_path / f"log{number}")) for number in range(2)]
        urls = {driver.line()["api"] for driver in drivers}
        assert len(urls) == 2
        assert [driver.line() for driver in drivers] == [{"result": [0, 1, 2]}] * 2
        for driver in drivers:
            _, errors = driver.process.communicate(timeout=60)
            assert driver.process.returncode == 0
            assert errors == ""


def test_flow_opens_pools_of_its_own(prefect_api: Api) -> None:
    # Not the shared pools: this test must not run inside their context.
    code = (
        "from tests.infra.sample_flows import stream\n"
        "from infra.pools.opening import current_cluster\n"
        "if __name__ == '__main__':\n"
        "    assert current_cluster() is None\n"
        "    print(stream(2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[0, 1]", "")
