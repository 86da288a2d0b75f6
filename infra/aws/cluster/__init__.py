"""AWS ParallelCluster: its queues, its configuration, and what its nodes do when they start.

One description of queues (`queues.py`) is rendered three times: as the configuration of a cluster
(`configuration.py`), as the blocks of pools that flows use (`pools.py`), and as a Slurm on one machine
(`Queues.slurm_description`).

    python -m infra.aws.cluster configuration --site site.toml > cluster.yaml
    pcluster create-cluster --cluster-name superres-a --cluster-configuration cluster.yaml

Pure Python: neither Prefect nor CDK is imported, so that both can use it.
"""

from __future__ import annotations

from infra.aws.cluster.configuration import (
    PARALLELCLUSTER_VERSION,
    Accounting,
    Site,
    cluster_configuration,
    standby_site,
)
from infra.aws.cluster.pools import pools_toml
from infra.aws.cluster.queues import DEVELOPMENT, PRODUCTION, Capacity, Jobs, PoolsBlock, Queue, Queues

__all__ = [
    "DEVELOPMENT",
    "PARALLELCLUSTER_VERSION",
    "PRODUCTION",
    "Accounting",
    "Capacity",
    "Jobs",
    "PoolsBlock",
    "Queue",
    "Queues",
    "Site",
    "cluster_configuration",
    "pools_toml",
    "standby_site",
]
