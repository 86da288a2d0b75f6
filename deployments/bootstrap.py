"""Everything a Prefect server needs to know of this installation: work pools, blocks and deployments.

    python -m deployments.bootstrap [--site local] [--site slurm] [--blocks site.toml] [--work-queue slurm-a] [--if-new]

Works against the server that `PREFECT_API_URL` names, with `PREFECT_API_AUTH_STRING` if it asks for one. A second time
it changes nothing but what differs from `prefect.yaml` and the file of blocks; what operators edited in the UI stays:
work pools, blocks that are in no file, and whether a schedule is active.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from blocks.pools import SlurmPools
from blocks.seeds import KINDS, read_seeds
from tasks.errors import BootstrapError, SuperResolutionError
from tasks.home import default_home

#: Where flows run: each is a work pool, and a set of deployments of that name in prefect.yaml.
Site: TypeAlias = Literal["local", "slurm"]
SITES: Final[tuple[Site, ...]] = get_args(Site)

CHECKOUT: Final = Path(__file__).resolve().parent.parent

_DESCRIPTIONS: Final[dict[Site, str]] = {
    "local": "Runs are processes beside their worker, and so are the workers of their pools.",
    "slurm": "Runs are processes on a login node; the workers of their pools are Slurm jobs.",
}

#: Runs at a time. Not a limit of the worker, which with one of its own fails when a run is suspended and resumed.
_RUNS: Final[dict[Site, int]] = {"local": 4, "slurm": 8}

#: The folder of videos that the scheduled sweep looks through, and that of its results: paths or s3:// prefixes.
LIBRARY_VARIABLE: Final = "SUPERRES_LIBRARY"
RESULTS_VARIABLE: Final = "SUPERRES_LIBRARY_RESULTS"

#: Queue of the work pool `slurm` that runs go to where nothing else is said: Prefect's own.
DEFAULT_QUEUE: Final = "default"


@dataclass
class Installed:
    """What there is now, for people."""

    work_pools: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    deployments: list[str] = field(default_factory=list)


def bootstrap(
    sites: Sequence[Site] = ("local",), blocks: Path | None = None, work_queue: str = DEFAULT_QUEUE
) -> Installed:
    """Register everything with the Prefect server in use.

    Args:
        sites: Whose work pools and deployments.
        blocks: TOML file of a site's blocks, see `blocks.seeds`; saved over those of the same name.
        work_queue: Queue of the work pool `slurm` that runs go to; made where there is none.

    Returns:
        What is registered.

    Raises:
        BootstrapError: The server does not answer, refuses the credentials, or prefect.yaml is refused.
        SettingsError: The file of blocks is wrong; nothing was registered.
    """
    seeds = read_seeds(blocks) if blocks else []
    installed = Installed()
    with get_client(sync_client=True) as client:
        _check_server(client)
        for site in sites:
            _make_work_pool(client, site)
            installed.work_pools.append(site)
    for kind in KINDS:
        kind.register_type_and_schema()
    if "slurm" in sites and not any(seed.name == "slurm" for seed in seeds):
        installed.blocks += _default_pools()
    installed.blocks += [seed.save() for seed in seeds]
    _deploy(sites, {**_variables(sites), "SUPERRES_WORK_QUEUE": work_queue})
    installed.deployments += registered(sites)
    return installed


def registered(sites: Sequence[Site]) -> list[str]:
    """The deployments of these sites that the Prefect server in use knows.

    Raises:
        BootstrapError: The server does not answer, or refuses the credentials.
    """
    with get_client(sync_client=True) as client:
        _check_server(client)
        found = client.read_deployments(limit=200)
        flows = {flow.id: flow.name for flow in client.read_flows(limit=200)}
    return sorted(f"{flows.get(each.flow_id)}/{each.name}" for each in found if each.name in sites)


def _check_server(client: SyncPrefectClient) -> None:
    where = str(client.api_url)
    try:
        client.read_work_pools(limit=1)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise BootstrapError(f"{where} answers {error.response.status_code}", "Look at the server's log") from error
        raise BootstrapError(f"{where} refuses the credentials", "Set PREFECT_API_AUTH_STRING") from error
    except httpx.HTTPError as error:
        raise BootstrapError(
            f"{where} does not answer ({error})", "Start the server, or set PREFECT_API_URL"
        ) from error


def _make_work_pool(client: SyncPrefectClient, site: Site) -> None:
    """Make the work pool unless there is one; what operators changed about it is theirs."""
    try:
        client.read_work_pool(site)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(
                name=site,
                type=ProcessWorker.type,
                description=_DESCRIPTIONS[site],
                concurrency_limit=_RUNS[site],
                base_job_template=ProcessWorker.get_default_base_job_template(),
            )
        )


def _default_pools() -> list[str]:
    """A block of the default Slurm pools to begin with, where there is none."""
    try:
        SlurmPools.load("slurm")
    except ValueError:
        SlurmPools().save("slurm")
    return ["slurm-pools/slurm"]


def _variables(sites: Sequence[Site]) -> dict[str, str]:
    """What prefect.yaml takes from the environment, with what holds where it says nothing."""
    library = default_home() / "library"
    defaults = {LIBRARY_VARIABLE: str(library / "videos"), RESULTS_VARIABLE: str(library / "upscaled")}
    if "local" in sites and not os.environ.keys() & defaults.keys():
        for folder in defaults.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
    settings = get_current_settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    return {**defaults, **os.environ, **settings, "SUPERRES_CHECKOUT": str(CHECKOUT), "PYTHONPATH": str(CHECKOUT)}


def _deploy(sites: Sequence[Site], environment: dict[str, str]) -> None:
    names = [word for site in sites for word in ("--name", f"*/{site}")]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", *names]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BootstrapError(f"prefect deploy {' '.join(names)} failed: {said[-1] if said else ''}", "See prefect.yaml")


def main() -> int:
    """Register, and say what is there.

    Returns:
        0, or the exit code of the error.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.bootstrap", description=bootstrap.__doc__)
    parser.add_argument("--site", action="append", choices=SITES, help="which deployments (default: all)")
    parser.add_argument("--blocks", type=Path, metavar="FILE", help="TOML file of a site's blocks")
    parser.add_argument("--work-queue", default=DEFAULT_QUEUE, help="of the work pool slurm (default: %(default)s)")
    parser.add_argument("--if-new", action="store_true", help="do nothing where these deployments are registered")
    given = parser.parse_args()
    sites = cast("list[Site]", given.site) or SITES
    try:
        if given.if_new and (there := registered(sites)):
            print(f"registered already: {', '.join(there)}")
            return 0
        installed = bootstrap(sites, given.blocks, given.work_queue)
    except SuperResolutionError as error:
        print(f"bootstrap: error: {error}", file=sys.stderr)
        return error.exit_code
    for what, names in vars(installed).items():
        print(f"{what.replace('_', ' ')}: {', '.join(names) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
