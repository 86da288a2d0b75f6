"""The process that a batch job runs on its node: a nanny with one worker of a pool.

    python -m infra.pools.node tls://head:8786 --name gpu-3 --pool gpu --nthreads 1 ...

dask-jobqueue writes this line into the job script. Unlike `dask worker` it starts this project's worker with its
settings, ends at once when the batch system says so, and lets no worker wait for a scheduler that is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from typing import Final

import dask.config
from distributed.security import Security

from infra.pools.pool import tasks_held
from infra.pools.worker import START_TIMEOUT, WORKER_CONFIG, PoolNanny, quiet_dask

#: What a shell expects of a program that was terminated.
_TERMINATED: Final = 143


def main() -> int:
    """Serve until the scheduler or the batch system ends it.

    Returns:
        0 when the scheduler closed the worker.
    """
    parser = argparse.ArgumentParser(prog="python -m infra.pools.node")
    parser.add_argument("scheduler")
    parser.add_argument("--name", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--nthreads", type=int, required=True, help="slots of the worker")
    parser.add_argument("--memory-limit", help="ignored: the batch system limits memory")
    parser.add_argument("--death-timeout", type=float, default=60.0)
    parser.add_argument("--local-directory")
    parser.add_argument("--interface")
    parser.add_argument("--protocol")
    parser.add_argument("--imports", default="")
    for part in ("ca-file", "cert", "key"):
        parser.add_argument(f"--tls-{part}")
    return asyncio.run(serve(parser.parse_args()))


async def serve(arguments: argparse.Namespace) -> int:
    """Start the nanny and wait for its end."""
    quiet_dask()
    dask.config.update(dask.config.config, WORKER_CONFIG)
    security = None
    if arguments.tls_ca_file:
        security = Security(
            require_encryption=True,
            tls_ca_file=arguments.tls_ca_file,
            tls_worker_cert=arguments.tls_cert,
            tls_worker_key=arguments.tls_key,
        )
    nanny = PoolNanny(
        arguments.scheduler,
        name=arguments.name,
        nthreads=tasks_held(arguments.nthreads),
        resources={arguments.pool: tasks_held(arguments.nthreads)},
        memory_limit=0,
        scheduler_timeout=arguments.death_timeout,
        local_directory=arguments.local_directory,
        interface=arguments.interface,
        protocol=arguments.protocol,
        security=security,
        imports=tuple(filter(None, arguments.imports.split(","))),
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _end_at_once, nanny)
    async with asyncio.timeout(arguments.death_timeout + START_TIMEOUT):
        await nanny
    print(f"{arguments.name} serves {arguments.scheduler}", flush=True)
    await nanny.finished()
    return 0


def _end_at_once(nanny: PoolNanny) -> None:
    # The job is cancelled, preempted or at its time limit: what a task computes now is lost either way, and the sooner
    # the scheduler notices, the sooner another worker begins.
    if nanny.pid:
        os.kill(nanny.pid, signal.SIGKILL)
    os._exit(_TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
