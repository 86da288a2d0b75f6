"""Pools that the tests of this folder share: starting workers takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import Client

from infra.pools import PooledCluster, open_pools
from infra.prefect_server import Api
from tests.infra.sample_flows import small_pools


@pytest.fixture(scope="module")
def pools(prefect_api: Api) -> Iterator[PooledCluster]:
    """Open `cpu` and `gpu` pools with one worker each; flows called in this process use them, so not beyond a file."""
    with open_pools(small_pools()) as cluster:
        yield cluster


@pytest.fixture
def dask_client(pools: PooledCluster) -> Iterator[Client]:
    """A plain Dask client of the shared pools."""
    with Client(pools, set_as_default=False) as client:
        yield client
