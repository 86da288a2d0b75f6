"""Stage: bring the source within reach of all workers. A local path is used where it lies."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import SourceError


@task(name="stage", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def stage(source: str) -> str:
    """Give the path under which workers read the source.

    Raises:
        SourceError: A worker cannot see the file.
    """
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise SourceError(f"{path} is not visible on worker nodes", "Put it on the file system that all nodes share")
    return str(path)
