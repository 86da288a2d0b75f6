"""One description of queues, rendered as a cluster, as pools and as a Slurm on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.pools import SlurmPools
from blocks.seeds import read_seeds
from infra.aws.cluster import (
    DEVELOPMENT,
    PRODUCTION,
    Accounting,
    Capacity,
    Jobs,
    PoolsBlock,
    Queue,
    Queues,
    Site,
    cluster_configuration,
    pools_toml,
    standby_site,
)
from infra.aws.cluster.__main__ import QUEUES
from infra.slurm import LocalSlurm
from infra.slurm.description import SlurmDescription
from tasks.errors import SettingsError
from tests.infra.aws.cluster.cloud import BOOTSTRAP, CHECKOUT
from tests.infra.slurm_cluster import programs_or_skip

pytestmark = pytest.mark.infra

SITE = Site(
    region="eu-central-1",
    head_subnet="subnet-a",
    compute_subnets=("subnet-a", "subnet-b"),
    login_subnets=("subnet-a", "subnet-b"),
    file_system_id="fs-1",
    lustre_client_group="sg-lustre",
    artifacts_bucket="artifacts",
    release="1.0.0",
    worker_settings_secret="arn:settings",
    accounting=Accounting(host="db", password_secret="arn:password", client_group="sg-db"),
    api_client_group="sg-api",
)


#: The same as a file.
SITE_FILE = """
region = "eu-central-1"
head_subnet = "subnet-a"
compute_subnets = ["subnet-a", "subnet-b"]
login_subnets = ["subnet-a", "subnet-b"]
file_system_id = "fs-1"
lustre_client_group = "sg-lustre"
artifacts_bucket = "artifacts"
release = "1.0.0"
worker_settings_secret = "arn:settings"
api_client_group = "sg-api"

[accounting]
host = "db"
password_secret = "arn:password"
client_group = "sg-db"
"""


def saved_pools(queues: Queues, folder: Path) -> dict[str, SlurmPools]:
    """The blocks of pools, as `superres blocks save` would save them."""
    path = folder / "blocks.toml"
    path.write_text(pools_toml(queues))
    found = {}
    for seed in read_seeds(path):
        block = seed.block()
        assert isinstance(block, SlurmPools)
        found[seed.name] = block
    return found


def all_nodes(values: Any, key: str) -> Iterator[Any]:
    """All values of a key, wherever it is."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name == key:
                yield value
            yield from all_nodes(value, key)
    elif isinstance(values, list):
        for value in values:
            yield from all_nodes(value, key)


@pytest.mark.parametrize("queues", QUEUES.values(), ids=QUEUES)
class TestOneDescription:
    def test_queues_are_partitions_of_pools_and_of_the_local_slurm(self, queues: Queues, tmp_path: Path) -> None:
        rendered = cluster_configuration(queues, SITE)["Scheduling"]["SlurmQueues"]
        in_cluster = [queue["Name"] for queue in rendered]
        in_pools = {
            name
            for block in saved_pools(queues, tmp_path).values()
            for nodes in (block.cpu, block.gpu)
            for name in nodes.partition.split(",")
        }
        in_slurm = [partition.name for partition in queues.slurm_description().partitions]
        assert in_cluster == in_slurm
        assert set(in_cluster) == in_pools
        most = {queue["Name"]: queue["ComputeResources"][0]["MaxCount"] for queue in rendered}
        assert most == {partition.name: partition.nodes for partition in queues.slurm_description().partitions}

    def test_jobs_fit_every_node_they_may_run_on(self, queues: Queues, tmp_path: Path) -> None:
        description = queues.slurm_description()
        for block, described in zip(saved_pools(queues, tmp_path).values(), queues.blocks, strict=True):
            for nodes, jobs in ((block.cpu, described.cpu), (block.gpu, described.gpu)):
                for name in nodes.partition.split(","):
                    partition = description.partition(name)
                    assert nodes.cores * jobs.per_node <= partition.cpus
                    assert int(nodes.memory.removesuffix("MB")) * jobs.per_node <= partition.memory_mb
                    assert bool(nodes.gres) == bool(partition.gpus)

    def test_nothing_runs_without_work(self, queues: Queues) -> None:
        rendered = cluster_configuration(queues, SITE)
        assert set(all_nodes(rendered["Scheduling"], "MinCount")) == {0}
        assert rendered["Scheduling"]["SlurmSettings"]["EnableMemoryBasedScheduling"] is True

    def test_no_job_is_bought_at_the_price_of_spot_where_gpus_are(self, queues: Queues) -> None:
        bought = {queue.name: queue.capacity for queue in queues.queues if queue.gpus}
        assert set(bought.values()) == {Capacity.ON_DEMAND}
        assert Capacity.SPOT in {queue.capacity for queue in queues.queues}

    def test_scripts_exist_and_get_the_arguments_they_ask_for(self, queues: Queues) -> None:
        rendered = cluster_configuration(queues, SITE)
        scripts = [script for sequence in all_nodes(rendered, "Sequence") for script in sequence]
        assert {script["Script"].rpartition("/")[0] for script in scripts} == {"s3://artifacts/bootstrap/1.0.0"}
        for script in scripts:
            text = (BOOTSTRAP / script["Script"].rpartition("/")[2]).read_text()
            assert len(script["Args"]) == text.count(":?")
        started = [script for actions in all_nodes(rendered, "OnNodeConfigured") for script in actions["Sequence"]]
        links = [script for script in started if script["Script"].endswith("link_environment.sh")]
        assert len(links) == 1 + len(queues.queues) + len(SITE.login_subnets)

    def test_head_nodes_make_the_release_and_all_others_wait_for_it(self, queues: Queues) -> None:
        rendered = cluster_configuration(queues, SITE)
        first = [
            (each["Sequence"][0]["Script"].rpartition("/")[2], each["Sequence"][0]["Args"])
            for event in ("OnNodeConfigured", "OnNodeUpdated")
            for each in all_nodes(rendered["HeadNode"], event)
        ]
        archive = "s3://artifacts/bootstrap/1.0.0/release.tar.gz"
        assert first == [("build_environment.sh", ["1.0.0", archive])] * 2
        for part in ("LoginNodes", "Scheduling"):
            sequences = list(all_nodes(rendered[part], "Sequence"))
            assert sequences
            names = [[script["Script"].rpartition("/")[2] for script in sequence[:2]] for sequence in sequences]
            assert all(each == ["wait_for_environment.sh", "link_environment.sh"] for each in names)

    def test_another_release_moves_what_can_be_moved(self, queues: Queues) -> None:
        before = cluster_configuration(queues, SITE)
        after = cluster_configuration(queues, replace(SITE, release="1.1.0", first_release="1.0.0"))
        for part in ("HeadNode", "LoginNodes"):
            assert list(all_nodes(after[part], "OnNodeConfigured")) == list(all_nodes(before[part], "OnNodeConfigured"))
            said = str(list(all_nodes(after[part], "OnNodeUpdated")))
            assert "1.1.0" in said and "1.0.0" not in said
        said = str(list(all_nodes(after["Scheduling"], "OnNodeConfigured")))
        assert "1.1.0" in said and "1.0.0" not in said

    @pytest.mark.slurm
    def test_a_slurm_of_it_takes_a_job_of_every_pool(self, queues: Queues, tmp_path: Path) -> None:
        programs_or_skip()
        with LocalSlurm(queues.slurm_description(nodes=1)) as slurm, slurm.use():
            for block in saved_pools(queues, tmp_path).values():
                block.log_directory = str(tmp_path / "logs")
                block.check()
                # It is this Slurm that would refuse.
                greedy = block.model_copy(update={"gpu": block.gpu.model_copy(update={"memory": "2TB"})})
                with pytest.raises(Exception, match="Slurm would not run the workers of pool 'gpu'"):
                    greedy.check()


class TestSite:
    def test_a_standby_has_head_queue_and_database_of_its_own(self) -> None:
        first = cluster_configuration(PRODUCTION, SITE)
        other = cluster_configuration(PRODUCTION, standby_site(SITE, "subnet-b"))
        assert other["HeadNode"]["Networking"]["SubnetId"] == "subnet-b"
        assert _worker_arguments(first)[2:3] == ["slurm-a"] and _worker_arguments(other)[2:3] == ["slurm-b"]
        databases = {each["Scheduling"]["SlurmSettings"]["Database"]["DatabaseName"] for each in (first, other)}
        assert len(databases) == 2
        assert first["SharedStorage"] == other["SharedStorage"]
        assert first["Scheduling"]["SlurmQueues"] == other["Scheduling"]["SlurmQueues"]

    def test_a_standby_that_shares_what_it_must_not(self) -> None:
        with pytest.raises(SettingsError, match="its own of each"):
            standby_site(SITE, "subnet-a")
        with pytest.raises(SettingsError, match="its own of each"):
            standby_site(SITE, "subnet-b", work_queue="slurm-a")

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"compute_subnets": ()}, "no compute_subnets"),
            ({"login_subnets": ()}, "no login_subnets"),
            ({"release": ""}, "no name of a release"),
            ({"release": "a/b"}, "no name of a release"),
        ],
    )
    def test_one_that_cannot_be(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(SettingsError, match=complaint):
            replace(SITE, **changes)


def _worker_arguments(configuration: dict[str, Any]) -> list[str]:
    sequence = configuration["LoginNodes"]["Pools"][0]["CustomActions"]["OnNodeConfigured"]["Sequence"]
    found: list[str] = sequence[-1]["Args"]
    return found


CPU = Queue("cpu", ("c7i.8xlarge",), maximum=1)
GPU = Queue("gpu", ("g6.2xlarge",), maximum=1)


def block(**changes: Jobs) -> PoolsBlock:
    return PoolsBlock("slurm", **{"cpu": Jobs(("cpu",), maximum=1), "gpu": Jobs(("gpu",), maximum=1), **changes})


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Queue("cpu", (), maximum=1), "no instance type"),
        (lambda: Queue("cpu", ("z9.huge",), maximum=1), "'z9.huge' is not known"),
        (lambda: Queue("cpu", ("c7i.8xlarge", "c7i.2xlarge"), maximum=1), "mixes instance types with 8 and 32 vcpus"),
        (lambda: Queue("cpu", ("c7i.2xlarge", "g6.2xlarge"), maximum=1), "mixes instance types with 0 and 1 gpus"),
        (lambda: Queue("Cpu", ("c7i.8xlarge",), maximum=1), "cannot be the name"),
        (lambda: Queue("cpu", ("c7i.8xlarge",), maximum=0), "nodes=0"),
        (lambda: Queue("cpu", ("c7i.8xlarge",), maximum=1, zones=0), "in 0 zones"),
        (lambda: Jobs((), maximum=1), "no queue"),
        (lambda: Jobs(("cpu",), maximum=0), "maximum=0"),
        (lambda: Queues((), ()), "no partition"),
        (lambda: Queues((CPU, GPU, replace(CPU)), (block(),)), "two partitions named 'cpu'"),
        (lambda: Queues((CPU, GPU, replace(GPU, name="spare")), (block(),)), "no pool uses the queue 'spare'"),
        (lambda: Queues((CPU, GPU), (block(cpu=Jobs(("gpu",), maximum=1)),)), "has GPUs"),
        (lambda: Queues((CPU, GPU), (block(gpu=Jobs(("cpu",), maximum=1)),)), "has no GPU"),
        (lambda: Queues((CPU, GPU), (block(gpu=Jobs(("gpu",), maximum=1, per_node=2)),)), "2 jobs on a node"),
        (lambda: Queues((CPU, GPU), (block(gpu=Jobs(("gpus",), maximum=1)),)), "no queue 'gpus'"),
    ],
)
def test_queues_that_cannot_be_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        make()


class TestCommand:
    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.aws.cluster", *arguments]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)

    def test_prints_a_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "site.toml").write_text(SITE_FILE)
        done = self.run("configuration", "--queues", "development", "--site", tmp_path / "site.toml")
        assert yaml.safe_load(done.stdout) == cluster_configuration(DEVELOPMENT, SITE, "development")
        done = self.run("configuration", "--site", tmp_path / "site.toml", "--standby", "subnet-b")
        assert yaml.safe_load(done.stdout) == cluster_configuration(PRODUCTION, standby_site(SITE, "subnet-b"))

    @pytest.mark.parametrize(
        ("right", "wrong", "complaint"),
        [
            ("= ", "", "cannot be read as TOML"),
            ('head_subnet = "subnet-a"', "", "head_subnet: Field required"),
            ('host = "db"', 'host = "db"\nhots = "db"', "accounting.hots: Unexpected keyword argument"),
            ('["subnet-a", "subnet-b"]', '["subnet-a", 2]', "compute_subnets.1: Input should be a valid string"),
            ('release = "1.0.0"', 'release = "../1"', "is no name of a release"),
        ],
    )
    def test_says_what_is_wrong_with_a_site(self, tmp_path: Path, right: str, wrong: str, complaint: str) -> None:
        (tmp_path / "site.toml").write_text(SITE_FILE.replace(right, wrong))
        done = self.run("configuration", "--site", tmp_path / "site.toml")
        assert done.returncode == SettingsError.exit_code
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert complaint in line


def test_the_description_can_be_made_small() -> None:
    small = PRODUCTION.slurm_description(nodes=2)
    assert isinstance(small, SlurmDescription)
    assert {partition.nodes for partition in small.partitions} == {2}


def test_needs_nothing_but_python() -> None:
    # The stacks around a cluster import it in an environment of their own.
    command = [sys.executable, "-S", "-c", "import infra.aws.cluster"]
    subprocess.run(command, cwd=CHECKOUT, env={"PYTHONPATH": str(CHECKOUT)}, check=True)
