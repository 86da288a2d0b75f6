"""Where a site's workers come from: `LocalPools` and `SlurmPools`, blocks that operators edit in the Prefect UI.

    SlurmPools(shared_directory="/fsx", gpu=SlurmGpuNodes(partition="a100", maximum=8)).save("fsx")

A flow or `superres --pools fsx` then names the block. `load_pools("local")` and `load_pools("slurm")` work without any
block saved: the first is this machine, the second a Slurm with partitions `cpu` and `gpu`. In a notebook the pools stay
warm from call to call:

    with load_pools("fsx").open():
        upscale_video("film.mkv", "film-large.mkv")
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ConfigDict, Field

from blocks.stages import CPU_IMPORTS, GPU_IMPORTS
from infra.pools import Pool, SlurmWorker, local_pools, open_pools
from infra.pools.pool import ENGINE, common_host
from infra.pools.slurm import NODE_DIRECTORY, home_of_logs, slurm_environment
from infra.prefect_server import default_home
from tasks.errors import SettingsError

if TYPE_CHECKING:
    from infra.pools import OpenPools


class PoolsBlock(Block):
    """What all blocks of pools can do."""

    scratch_directory: str = Field(
        "", title="Scratch folder", description="Where chunk files live; on a file system that all nodes share."
    )

    @abstractmethod
    def pools(self) -> tuple[Pool, ...]:
        """The pools."""

    @property
    def hourly_prices(self) -> dict[str, float]:
        """Price of one worker of each pool for an hour; zero where it is not known."""
        return {}

    @property
    def scheduler_host(self) -> str:
        """Address at which all workers can reach this machine."""
        return common_host(self.pools())

    def check(self) -> None:
        """Refuse what cannot work, before anything is started.

        Raises:
            SuperResolutionError: What is wrong, in the words of whoever refuses it.
        """

    def describe(self) -> str:
        """What the pools can be, for people."""
        return ", ".join(f"{pool.name}: up to {_workers(pool.maximum)}" for pool in self.pools())

    def open(self, *, warm: bool = True) -> OpenPools:
        """Open the pools for all flows that run inside the `with` block.

        Args:
            warm: Start one worker of each pool right away instead of with the first task.
        """
        return open_pools(self.pools(), warm=warm)


class LocalPools(PoolsBlock):
    """Workers that are processes of the machine the flow runs on."""

    _block_type_name = "Local pools"
    _block_type_slug = "local-pools"
    _description = "Upscale on one machine: its cores decode and encode, its GPUs (or its cores) upscale."

    cpu_slots: int = Field(2, ge=1, title="CPU slots", description="Chunks decoded or encoded at a time.")
    idle_minutes: float = Field(2.0, ge=0, title="Idle minutes", description="How long a worker without work stays.")

    def pools(self) -> tuple[Pool, ...]:
        return local_pools(
            cpu_slots=self.cpu_slots,
            cpu_imports=CPU_IMPORTS,
            gpu_imports=GPU_IMPORTS,
            idle_seconds=60 * self.idle_minutes,
        )


class SlurmNodes(BaseModel):
    """The jobs of one pool."""

    model_config = ConfigDict(extra="forbid")

    partition: str = Field(title="Partition")
    cores: int = Field(4, ge=1, title="Cores", description="CPUs of one job.")
    memory: str = Field(
        "8GB",
        title="Memory",
        description="Of one job; 0 for the node's, empty where the site does not schedule memory.",
    )
    gres: str = Field("", title="GRES", description="Generic resources of one job, such as `gpu:1`.")
    walltime: str = Field("08:00:00", title="Wall time", description="Longest time of one job, HH:MM:SS or D-HH:MM:SS.")
    minimum: int = Field(0, ge=0, title="Minimum", description="Jobs that always run while the pools are open.")
    maximum: int = Field(4, ge=1, title="Maximum", description="Jobs at a time.")
    slots: int = Field(1, ge=1, title="Slots", description="Chunks that one job works on at a time.")
    idle_minutes: float = Field(5.0, ge=0, title="Idle minutes", description="How long a job without work stays.")
    coming: Literal["start", "keep", "ignore"] = Field(
        "ignore",
        title="Coming work",
        description="Chunks that are not ready for this pool yet: start jobs for them, keep those that run, or ignore.",
    )
    maximum_losses: int = Field(
        5, ge=1, title="Losses", description="Jobs that one chunk may lose before it counts as failed."
    )
    hourly_price: float = Field(
        0.0, ge=0, title="Hourly price", description="Of one job, in the site's currency; 0 where it is not known."
    )
    directives: list[str] = Field(
        [], title="Directives", description="More sbatch options, such as `--constraint=a100`."
    )
    environment: dict[str, str] = Field(
        {}, title="Environment", description="Variables of the job, on top of the usual."
    )


class SlurmGpuNodes(SlurmNodes):
    """The jobs of a pool whose nodes are dear: held through a short gap, but none starts before it has work."""

    gres: str = Field("gpu:1", title="GRES", description="Generic resources of one job, such as `gpu:1`.")
    coming: Literal["start", "keep", "ignore"] = Field(
        "keep", title="Coming work", description="See the CPU pool: GPU jobs that run stay for chunks that are coming."
    )


class SlurmPools(PoolsBlock):
    """Workers that are Slurm jobs, started and ended as the work needs them."""

    _block_type_name = "Slurm pools"
    _block_type_slug = "slurm-pools"
    _description = "Upscale on a Slurm cluster: CPU jobs decode and encode, GPU jobs only upscale, both from zero."

    cpu: SlurmNodes = Field(default_factory=lambda: SlurmNodes(partition="cpu", slots=2), title="CPU pool")
    gpu: SlurmGpuNodes = Field(default_factory=lambda: SlurmGpuNodes(partition="gpu"), title="GPU pool")
    interface: str = Field(
        "",
        title="Network interface",
        description="Of the nodes, and of this machine if it has no address below; empty for the default route's.",
    )
    host: str = Field("", title="Address", description="Of this machine as the nodes see it.")
    shared_directory: str = Field(
        "", title="Shared folder", description="On a file system that all nodes share; holds credentials while in use."
    )
    log_directory: str = Field("", title="Log folder", description="Where jobs write their logs; also shared.")
    local_directory: str = Field(
        NODE_DIRECTORY, title="Folder on the node", description="For small files of the worker; never on Lustre."
    )
    account: str = Field("", title="Account", description="That is charged; empty for the user's default.")
    prologue: list[str] = Field([], title="Prologue", description="Shell lines that run before a worker starts.")
    python: str = Field(
        "", title="Python", description="Interpreter on the nodes; empty for the one that runs the flow."
    )
    death_timeout: float = Field(
        60.0, gt=0, title="Death timeout", description="Seconds until a job whose flow is gone ends by itself."
    )

    @property
    def hourly_prices(self) -> dict[str, float]:
        return {"cpu": self.cpu.hourly_price, "gpu": self.gpu.hourly_price}

    def pools(self) -> tuple[Pool, ...]:
        return self._pool("cpu", self.cpu, CPU_IMPORTS), self._pool("gpu", self.gpu, GPU_IMPORTS)

    def check(self) -> None:
        from infra.pools.slurm_job import check_job

        for pool in self.pools():
            check_job(pool)

    def describe(self) -> str:
        from infra.pools.slurm import possible_jobs

        parts = []
        for pool, nodes in zip(self.pools(), (self.cpu, self.gpu), strict=True):
            possible = possible_jobs(pool)
            few = f", but partition {nodes.partition} has room for {possible}"
            is_less = possible is not None and possible < pool.maximum
            parts.append(f"{pool.name}: up to {_workers(pool.maximum)}" + (few if is_less else ""))
        return "; ".join(parts)

    def _pool(self, name: str, nodes: SlurmNodes, imports: tuple[str, ...]) -> Pool:
        shared = Path(self.shared_directory).expanduser() if self.shared_directory else default_home() / "shared"
        logs = Path(self.log_directory).expanduser() if self.log_directory else home_of_logs()
        threads = slurm_environment(nodes.cores, inference=name == "gpu")
        return Pool(
            name,
            slots=nodes.slots,
            minimum=nodes.minimum,
            maximum=nodes.maximum,
            idle_seconds=60 * nodes.idle_minutes,
            coming=nodes.coming,
            maximum_losses=nodes.maximum_losses,
            start=SlurmWorker(
                shared_directory=shared.absolute(),
                log_directory=logs.absolute(),
                partition=nodes.partition,
                cores=nodes.cores,
                memory=nodes.memory,
                gres=nodes.gres,
                walltime=nodes.walltime,
                account=self.account,
                interface=self.interface,
                host=self.host,
                local_directory=self.local_directory,
                prologue=tuple(self.prologue),
                directives=tuple(nodes.directives),
                env={**threads, **nodes.environment},
                imports=(*ENGINE, *imports),
                death_timeout=self.death_timeout,
                **({"python": self.python} if self.python else {}),
            ),
        )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def load_pools(name: str) -> PoolsBlock:
    """The block of pools with this name, or with `TYPE/NAME`, of the Prefect API in use.

    `local` and `slurm` stand for the defaults where no block of that name was saved. `local` asks no API.

    Raises:
        SettingsError: There is no such block.
    """
    if name == "local":
        return LocalPools()
    kind, _, document = name.rpartition("/")
    for block in (SlurmPools, LocalPools):
        if kind in ("", block._block_type_slug):
            try:
                found = block.load(document)
            except (ValueError, ObjectNotFound):
                continue
            except (
                RuntimeError
            ) as error:  # Prefect's word for values that its rules refuse, for instance edited elsewhere.
                reason = " ".join(str(error.__cause__ or error).split())
                raise SettingsError(
                    f"the block {block._block_type_slug}/{document} is wrong: {reason}", "Edit it"
                ) from error
            assert isinstance(found, PoolsBlock)
            return found
    if name == "slurm":
        return SlurmPools()
    raise SettingsError(
        f"there are no pools called {name!r}",
        "Use local or slurm, or save a block of type Slurm pools or Local pools under that name",
    )
