"""What a description refuses, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from infra.slurm import DEVELOPMENT, Partition, SlurmDescription
from tasks.errors import SettingsError

CPU = Partition("cpu", nodes=1, cpus=4, memory_mb=1000)


def test_development_has_nodes_with_and_without_gpus() -> None:
    assert [(node.name, node.gpus) for node in DEVELOPMENT.nodes()] == [
        ("cpu-1", 0),
        ("cpu-2", 0),
        ("gpu-1", 2),
        ("gpu-2", 2),
    ]


@pytest.mark.parametrize("name", ["", "GPU", "gpu_1", "gpu,cpu", "1gpu", "gpu-", "default", "g" * 26])
def test_names_that_slurm_or_a_cloud_would_misread(name: str) -> None:
    with pytest.raises(SettingsError, match="name of a partition"):
        Partition(name, nodes=1, cpus=1, memory_mb=1)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"nodes": 0},
        {"cpus": 0},
        {"memory_mb": -1},
        {"gpus": -1},
        {"maximum_minutes": 0},
        {"priority_tier": 0},
        {"priority_tier": 70000},
        {"shares_nodes_of": "cpu"},
    ],
)
def test_sizes_out_of_range(sizes: dict[str, Any]) -> None:
    usual = {"nodes": 1, "cpus": 1, "memory_mb": 1} if sizes else {}
    with pytest.raises(SettingsError, match="partition 'odd'"):
        Partition("odd", **{**usual, **sizes})


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ((), "no partition"),
        ((CPU, CPU), "two partitions named 'cpu'"),
        ((CPU, Partition("urgent", shares_nodes_of="gpu")), "no partition 'gpu'"),
        (
            (CPU, Partition("urgent", shares_nodes_of="cpu"), Partition("mad", shares_nodes_of="urgent")),
            "none of its own",
        ),
        ((CPU, Partition("self", shares_nodes_of="self")), "none of its own"),
    ],
)
def test_partitions_that_do_not_fit_together(partitions: tuple[Partition, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SlurmDescription(partitions)


def test_the_name_of_a_cluster() -> None:
    with pytest.raises(SettingsError, match="name of a cluster"):
        SlurmDescription((CPU,), name="My Cluster")
