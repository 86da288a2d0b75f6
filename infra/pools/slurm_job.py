"""One Slurm job as Dask sees it: submit, watch, cancel. The only module that imports dask-jobqueue."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distributed.core import Status

from infra.pools.pool import Pool
from tasks.errors import PoolError

if TYPE_CHECKING:
    from infra.pools.leases import Leases
    from infra.pools.slurm import SlurmWorker

logger = logging.getLogger(__name__)

# dask-jobqueue 0.9.0 takes SIGINT for itself when it is imported, and can be imported in the main thread only
# (dask/dask-jobqueue#667). Pools are opened in a thread, and Ctrl-C is this project's own business.
_signal, signal.signal = signal.signal, lambda *_: None
try:
    from dask_jobqueue.slurm import SLURMJob
finally:
    signal.signal = _signal

#: Seconds between two questions to Slurm while nothing is urgent: its controller answers for the whole site.
_ASK_SECONDS: Final = 5.0

#: Seconds to go on trying to submit a job while the controller does not answer.
_CONTROLLER_PATIENCE: Final = 600.0
_RETRY_SECONDS: Final = 2.0

#: Seconds that Slurm may take to say whether it would run a job.
_TEST_SECONDS: Final = 60.0

#: What Slurm's commands say when the controller is away, restarts or is overloaded.
_AWAY: Final = re.compile(
    "unable to contact slurm controller|socket timed out|connection refused|zero bytes were transmitted"
    "|transport endpoint|resource temporarily unavailable|unexpected message received",
    re.IGNORECASE,
)

#: States of a job that has not ended (squeue(1)). `COMPLETING` is not among them: its worker is gone.
_ALIVE: Final = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
)

#: States of a job that ended for no reason of its own: an administrator, a job of higher rank or the node.
_TAKEN: Final = frozenset({"CANCELLED", "PREEMPTED", "NODE_FAIL"})

_STARTED_NEVER: Final = frozenset({"N/A", "Unknown", "NONE", ""})


class SlurmJob(SLURMJob):
    """A worker of a pool as a Slurm job.

    Args:
        pool: Name of the pool.
        log: Path of the job's log, with `%j` for its number.

    Attributes:
        state: Slurm's word for the state of the job.
        failure: Why there is no such job any more.
        taken: It was ended from outside.
        node: The node it runs on, once it does.
        began: When it was first seen to run, on the monotonic clock; before that, when it was made.
    """

    leases: Leases | None = None

    def __init__(self, *args: Any, pool: str, log: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool = pool
        self.state = "SUBMITTING"
        self.failure = ""
        self.taken = False
        self.node = ""
        self.began = time.monotonic()
        self._has_run = False
        self._log = log
        self._submitted = math.inf
        self._unwanted = False

    @property
    def log(self) -> str:
        """Path of the log."""
        return self._log.replace("%j", str(self.job_id))

    async def start(self) -> None:
        """Submit the job; wait for a controller that is away.

        Raises:
            PoolError: Slurm refused it.
        """
        deadline = time.monotonic() + _CONTROLLER_PATIENCE
        while not self._unwanted:
            try:
                await super().start()
                self._submitted = time.monotonic()
                self.state = "PENDING"
                break
            except RuntimeError as error:
                message = str(error).partition("stderr:\n")[2].strip() or str(error)
                if not _AWAY.search(message) or time.monotonic() > deadline:
                    self.failure = f"Slurm refused the job: {' '.join(message.split())}"
                    raise PoolError(self.failure, "Correct the settings of the pool") from error
                logger.warning("Slurm's controller does not answer; %s waits for it", self.name)
            await asyncio.sleep(_RETRY_SECONDS)
        if self._unwanted:
            await self._cancel()

    async def close(self) -> None:
        """Cancel the job; also one that is still being submitted."""
        self._unwanted = True
        if self.status not in (Status.closed, Status.failed):
            self.status = Status.closed
            await self._cancel()

    async def kill(self) -> None:
        """The same as `close`."""
        await self.close()

    async def _cancel(self) -> None:
        if self.job_id:
            await self._close_job(self.job_id, self.cancel_command)

    def take(self, row: JobRow | None) -> None:
        """Take what Slurm says about the job; `None` when it knows no such job any more."""
        self.state = row.state if row else "GONE"
        if row and row.node:
            self.node = row.node
        if row and row.started is not None and not self._has_run:
            self._has_run, self.began = True, time.monotonic()
        if row and row.started is not None and self.leases is not None and self.node:
            lease = self.leases.begin(self.pool, str(self.name), self.node)
            lease.started, lease.node, lease.job, lease.log = row.started, self.node, str(self.job_id), self.log
        if self.state not in _ALIVE:
            self.status = Status.failed
            self.taken = self.state in _TAKEN
            on = f" on {self.node}" if self.node else ""
            why = f"{self.state}, {row.reason}" if row and row.reason not in ("None", "") else self.state
            self.failure = f"Slurm job {self.job_id}{on} ended: {why}; its log is {self.log}"


@dataclass(frozen=True)
class JobRow:
    """A line of `squeue`."""

    state: str
    node: str
    started: float | None
    """Seconds since the epoch; `None` before it started."""
    reason: str


class _Queue:
    """What Slurm said last, to any pool of this process.

    Attributes:
        asked: When, on the monotonic clock.
        rows: The jobs of this user by number, those that ended lately included; `None` without an answer.
    """

    asked = -math.inf
    rows: dict[str, JobRow] | None = None


async def watch(jobs: Collection[SlurmJob], urgent: bool) -> None:
    """Bring the state of jobs up to date, every few seconds or at once.

    A controller that does not answer is no news about any job.
    """
    running = [job for job in jobs if job.job_id and job.status == Status.running]
    if not running:
        return
    if time.monotonic() - _Queue.asked >= (0 if urgent else _ASK_SECONDS):
        asked = time.monotonic()
        _Queue.asked, _Queue.rows = math.inf, None  # Nobody else asks meanwhile.
        try:
            _Queue.rows = await _squeue()
        finally:
            _Queue.asked = asked
    if _Queue.rows is not None:
        for job in running:
            if job.status == Status.running and job._submitted < _Queue.asked:
                job.take(_Queue.rows.get(str(job.job_id)))


async def _squeue() -> dict[str, JobRow] | None:
    """All jobs of this user by number, those that ended lately included; `None` if the controller does not answer."""
    process = await asyncio.create_subprocess_exec(
        "squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%A|%T|%S|%N|%r",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode != 0:
        return None
    rows = {}
    for line in output.decode(errors="replace").splitlines():
        number, state, start, node, reason = line.split("|", 4)
        has_started = start not in _STARTED_NEVER and state != "PENDING"
        started = datetime.fromisoformat(start).timestamp() if has_started else None
        rows[number] = JobRow(state, node, started, reason)
    return rows


def check_job(pool: Pool) -> None:
    """Have Slurm look at the job of a pool without starting it.

    Raises:
        PoolError: There is no Slurm here, or it would refuse the job; its own words are part of the message.
    """
    start: SlurmWorker = pool.start  # type: ignore[assignment]
    if shutil.which("sbatch") is None:
        raise PoolError("Slurm's sbatch is not on the PATH", "Run on a login or head node, or use --pools local")
    try:
        job = SlurmJob("tls://127.0.0.1:0", name=pool.worker_name(0), **start.job_options(pool, None))
    except OSError as error:
        raise PoolError(
            f"cannot make the folder for logs {start.log_directory} ({error.strerror})", "Name another log folder"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        script.write_text(job.job_script())
        try:
            done = subprocess.run(
                ["sbatch", "--test-only", str(script)], capture_output=True, text=True, timeout=_TEST_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise PoolError("Slurm's controller does not answer", "Try again when it does") from error
    if done.returncode != 0:
        words = " ".join(done.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        away = bool(_AWAY.search(words))
        raise PoolError(
            f"Slurm would not run the workers of pool {pool.name!r}: {words}",
            "Try again when its controller answers" if away else "Correct the settings of the pool",
        )
