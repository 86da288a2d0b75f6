"""Workers that are Slurm jobs: what one asks Slurm for, as data. The jobs themselves are in `slurm_job`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.pools.pool import ENGINE, Pool, inference_settings, thread_settings
from tasks.cores import assumed_flops
from tasks.errors import SettingsError

if TYPE_CHECKING:
    from distributed.security import Security

#: What every job of this project is called, with the name of its pool behind it.
JOB_NAME: Final = "superres-"

#: Seconds that a program of Slurm may take to answer.
_ANSWER_SECONDS: Final = 30

#: Where a worker keeps its own small files on its node.
NODE_DIRECTORY: Final = "${TMPDIR:-/tmp}"


@dataclass(frozen=True)
class SlurmWorker:
    """A worker that is a Slurm job of its own.

    Attributes:
        shared_directory: Folder on a file system that all nodes share; holds the credentials while pools are open.
        log_directory: Folder for the log of each job.
        partition: Partition the job is sent to.
        cores: CPUs of the job.
        memory: Memory of the job, such as `16GB`, a number alone for megabytes, 0 for all of the node; empty where the
            site does not schedule memory.
        gres: Generic resources, such as `gpu:1`; empty for none.
        walltime: Longest time of the job, `D-HH:MM:SS` or `HH:MM:SS`. What a worker computes at its end is repeated.
        account: Account that is charged; empty for the user's default.
        interface: Network interface of the nodes, and of this machine where `host` is empty; empty for the default
            route's.
        host: Address of this machine as the nodes see it.
        local_directory: Folder of the node for Dask's own files; the shell of the job expands it. Never on Lustre.
        prologue: Shell lines that run before the worker starts.
        directives: More options of `sbatch`, such as `--constraint=a100`.
        env: Environment of the worker and of everything it starts.
        python: The interpreter on the nodes.
        imports: Modules imported before the worker takes tasks.
        death_timeout: Seconds after which a worker that finds no scheduler ends, and its job with it.
    """

    shared_directory: Path
    log_directory: Path
    partition: str
    cores: int = 1
    memory: str = "4GB"
    gres: str = ""
    walltime: str = "04:00:00"
    account: str = ""
    interface: str = ""
    host: str = ""
    local_directory: str = NODE_DIRECTORY
    prologue: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    imports: tuple[str, ...] = ENGINE
    death_timeout: float = 60.0

    @property
    def interval(self) -> float:
        """Seconds between two looks at the demand."""
        return 1.0

    @property
    def scheduler_host(self) -> str:
        """Address of this machine that the nodes can reach."""
        if self.host:
            return self.host
        from distributed.utils import get_ip, get_ip_interface

        return get_ip_interface(self.interface) if self.interface else get_ip()

    @property
    def flops(self) -> float:
        """Those of a GPU where the job asks for one, else of its cores."""
        return assumed_flops(self.cores, on_gpu=any("gpu" in option for option in (self.gres, *self.directives)))

    def log_path(self, pool: Pool) -> str:
        """Where a job of the pool writes; Slurm puts its number for `%j`."""
        return f"{self.log_directory}/{JOB_NAME}{pool.name}-%j.log"

    def spec(self, pool: Pool, index: int, security: Security | None) -> dict[str, Any]:
        """The `worker_spec` entry of worker `index`: a job with a nanny and one worker."""
        from infra.pools.slurm_job import SlurmJob

        return {"cls": SlurmJob, "options": self.job_options(pool, security)}

    def job_options(self, pool: Pool, security: Security | None) -> dict[str, Any]:
        """Keywords of dask-jobqueue's `SLURMJob`. Every one is given, so that no `jobqueue.yaml` changes a job."""
        log = self.log_path(pool)
        environment = {**self.env, "SUPERRES_WORKER_LOG": log.replace("%j", "${SLURM_JOB_ID}")}
        directives = [f"--output={shlex.quote(log)}", "--open-mode=append"]
        # A requeued job would take the name of a worker that was replaced long ago.
        directives += ["--no-requeue", *([f"--gres={self.gres}"] if self.gres else []), *self.directives]
        memory = slurm_memory(self.memory)
        # Output goes where `log` says; the others are left out where they are empty.
        skipped = ["#SBATCH -e ", "#SBATCH -o "]
        skipped += [*([] if memory else ["--mem="]), *([] if self.account else ["#SBATCH -A "])]
        worker = ["--pool", pool.name, "--imports", ",".join(self.imports)]
        # Not through dask-jobqueue, which would not quote a folder with a space in its name.
        worker += [
            *(["--interface", self.interface] if self.interface else []),
            "--protocol",
            "tls" if security else "tcp",
        ]
        if security is not None:
            for part, path in security.get_tls_config_for_role("worker").items():
                if part != "ciphers":
                    worker += [f"--tls-{part.replace('_', '-')}", shlex.quote(path)]
        return {
            "pool": pool.name,
            "log": log,
            "config_name": "slurm",
            "job_name": f"{JOB_NAME}{pool.name}",
            "queue": self.partition,
            "account": self.account,
            "walltime": self.walltime,
            "cores": pool.slots,  # Dask's threads; what Slurm reserves is `job_cpu`.
            "job_cpu": self.cores,
            "memory": "1GB",  # Dask's limit, which nobody reads; what Slurm reserves is `job_mem`.
            "job_mem": memory or "0",
            "processes": 1,
            "nanny": True,
            "interface": "",
            "protocol": None,
            "security": None,
            "death_timeout": self.death_timeout,
            "local_directory": _quoted(self.local_directory or NODE_DIRECTORY),
            "log_directory": str(self.log_directory),
            "shebang": "#!/bin/bash",
            # The batch script's process becomes the worker's: a signal of Slurm's reaches it without a shell between.
            "python": f"exec {shlex.quote(self.python)}",
            "worker_command": "infra.pools.node",
            "worker_extra_args": worker,
            "job_extra_directives": directives,
            "job_directives_skip": skipped,
            "job_script_prologue": [
                *(f"export {name}={_quoted(value)}" for name, value in environment.items()),
                *self.prologue,
            ],
        }

    async def watch(self, workers: Collection[Any], urgent: bool) -> None:
        """Ask Slurm how the jobs of these workers are."""
        from infra.pools.slurm_job import watch

        await watch(workers, urgent)


def slurm_memory(text: str) -> str:
    """An amount of memory as `sbatch --mem` takes it: `16GB` and `16GiB` are Slurm's `16G`.

    Raises:
        SettingsError: It is none.
    """
    parts = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if text.strip() and parts is None:
        raise SettingsError(f"{text!r} is no amount of memory", "Write it as 16GB or 4000MB, or leave it empty")
    return f"{parts[1]}{parts[2].upper()}" if parts else ""


def slurm_environment(cores: int, *, inference: bool) -> dict[str, str]:
    """Environment of a worker with this many cores: as many threads as it may use.

    Args:
        cores: CPUs of the job.
        inference: Whether its tasks compute with torch, which then takes all cores; ffmpeg is told its threads itself.
    """
    return inference_settings(cores) if inference else thread_settings(1)


def _quoted(value: str) -> str:
    # Double quotes, so that variables of the node (`$TMPDIR`, `$SLURM_JOB_ID`) can be used.
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'


def home_of_logs() -> Path:
    """Where job logs lie by default."""
    from infra.prefect_server import default_home

    return default_home() / "logs" / str(os.getuid())


def possible_jobs(pool: Pool) -> int | None:
    """Jobs of a pool that its partition has room for when it is empty, memory aside; `None` if Slurm does not say."""
    start = pool.start
    assert isinstance(start, SlurmWorker)
    command = ["sinfo", "--noheader", "--Node", f"--partition={start.partition}", "--format=%c|%G"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ANSWER_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    wanted = _gres(start.gres)
    jobs = 0
    for line in listed.splitlines():
        cpus, _, has = line.partition("|")
        there = _gres(has)
        shares = [int(cpus) // start.cores, *(there.get(name, 0) // count for name, count in wanted.items() if count)]
        jobs += min(shares)
    return jobs


def _gres(text: str) -> dict[str, int]:
    """Generic resources by name, whatever their type: `gpu:a100:2(S:0-1)` is two of `gpu`."""
    counts: dict[str, int] = {}
    for name, rest in re.findall(r"(?:gres/)?(\w+)((?::[^,(:]+)*)(?:\([^)]*\))?", text.replace("(null)", "")):
        last = rest.rpartition(":")[2]
        counts[name] = counts.get(name, 0) + (int(last) if last.isdigit() else 1)
    return counts


def running_jobs() -> set[str]:
    """Numbers of this user's jobs of this project that have not ended; none where there is no Slurm."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%A|%j"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ANSWER_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    rows = (line.partition("|") for line in listed.splitlines())
    return {number for number, _, name in rows if name.startswith(JOB_NAME)}


def cancel_jobs(numbers: Collection[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter."""
    subprocess.run(["scancel", *numbers], capture_output=True, check=False, timeout=_ANSWER_SECONDS)
