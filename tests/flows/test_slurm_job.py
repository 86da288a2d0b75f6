"""The whole job on a real Slurm: the same bytes as on one machine, each stage in its partition, nothing left behind."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from infra.slurm import DEVELOPMENT, LocalSlurm
from tests.flows.jobs import GROUP, Place, make_film
from tests.infra.slurm_cluster import programs_or_skip
from tests.waiting import eventually

pytestmark = pytest.mark.slurm

CHUNKS = 8
SITE = """
[slurm-pools.slurm]
interface = "lo"
cpu = { partition = "cpu", cores = 1, slots = 2, memory = "500MB", maximum = 2, idle_minutes = 0.1 }
gpu = { partition = "gpu", cores = 1, memory = "500MB", maximum = 2, idle_minutes = 0.1 }
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    """A cluster for the tests of this module."""
    programs_or_skip()
    with LocalSlurm(DEVELOPMENT) as slurm, slurm.use():
        yield slurm


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of eight chunks of a second."""
    return make_film(tmp_path_factory.mktemp("film") / "film.mp4", CHUNKS * GROUP, "160x90", sound=("ac3",))


@pytest.fixture
def site(place: Place) -> Place:
    """A place whose home knows pools called `slurm`."""
    file = place.folder / "site.toml"
    file.write_text(SITE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"SUPERRES_HOME": str(place.folder / "home"), "PREFECT_HOME": str(place.folder / "profile")}
    superres = str(Path(sys.executable).with_name("superres"))
    subprocess.run([superres, "blocks", "save", str(file)], env=environment, check=True, capture_output=True)
    return place


def test_the_result_is_that_of_one_machine(slurm: LocalSlurm, film: Path, site: Place) -> None:
    before = {job.id for job in slurm.squeue()}
    picture = site.folder / "timeline.svg"
    options = ("--chunk-seconds", "1", "--pools", "slurm", "--timeline", str(picture))
    run = site.start(film, site.result("slurm.mp4"), *options)
    partitions: set[tuple[str, str]] = set()
    for _ in run.looks():
        partitions |= {(job.name, job.partition) for job in slurm.squeue() if job.id not in before}
        time.sleep(0.2)
    finished = run.wait()
    assert finished.code == 0, finished.stderr
    assert finished.record["chunks"] == CHUNKS
    assert finished.record["node_seconds"]["gpu"] > 0
    assert partitions == {("superres-cpu", "cpu"), ("superres-gpu", "gpu")}
    eventually(lambda: all(job.ended for job in slurm.squeue()), 10)

    # What Prefect shows: the node and the job of every task run.
    names = task_run_names(site.folder / "home")
    for stage, partition in (("extract", "cpu"), ("upscale", "gpu"), ("encode", "cpu")):
        mine = [name for name in names if name.startswith(f"{stage} ")]
        assert len(mine) == CHUNKS
        assert all(f" on {partition}-" in name and " job " in name for name in mine), mine
    bars = [bar for bar in ElementTree.fromstring(picture.read_text()).iter() if bar.tag.endswith("title")]
    assert len(bars) == 3 * CHUNKS

    local = site.start(film, site.result("local.mp4"), "--chunk-seconds", "1").wait()
    assert local.code == 0, local.stderr
    assert site.result("slurm.mp4").read_bytes() == site.result("local.mp4").read_bytes()


@pytest.mark.chaos
def test_jobs_that_are_cancelled_cost_only_their_chunk(
    slurm: LocalSlurm, film: Path, site: Place, chance: random.Random
) -> None:
    run = site.start(film, site.result("film.mp4"), "--chunk-seconds", "1", "--pools", "slurm", "--encoder", "h265")
    cancelled: set[int] = set()
    for _ in run.looks():
        time.sleep(chance.uniform(0.2, 2.0))
        running = [job for job in slurm.squeue() if job.state == "RUNNING" and job.id not in cancelled]
        if running and len(cancelled) < 5:
            victim = chance.choice(running)
            slurm.run("scancel", str(victim.id))
            cancelled.add(victim.id)
    finished = run.wait()
    assert finished.code == 0, finished.stderr
    assert len(cancelled) == 5
    assert finished.record["frames_out"] == CHUNKS * GROUP
    undisturbed = site.start(film, site.result("undisturbed.mp4"), "--chunk-seconds", "1", "--encoder", "h265").wait()
    assert undisturbed.code == 0, undisturbed.stderr
    assert site.result("film.mp4").read_bytes() == site.result("undisturbed.mp4").read_bytes()
    eventually(lambda: all(job.ended for job in slurm.squeue()), 10)


def task_run_names(home: Path) -> list[str]:
    """Names of the task runs in the history of a private Prefect server."""
    (database,) = (home / "prefect").glob("prefect-*.db")
    with sqlite3.connect(database) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM task_run")]
