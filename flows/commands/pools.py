"""`superres pools` and `superres blocks`: what pools do, and the facts of a site."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from flows.commands.common import Commands, print_json


def add_to(commands: Commands) -> None:
    """Add the commands to those of the program."""
    pools = commands.add_parser("pools", help="what pools do, and which there are", description="Pools of workers.")
    actions = pools.add_subparsers(dest="action", metavar="status", required=True)
    status = actions.add_parser("status", help="jobs, workers and tasks of the pools that are open")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_pools_status)
    blocks = commands.add_parser("blocks", help="save the facts of a site", description="Facts of a site.")
    actions = blocks.add_subparsers(dest="action", metavar="save", required=True)
    save = actions.add_parser("save", help="save what a TOML file describes: pools, media stores, job ledgers")
    save.add_argument("file", help="with tables such as [slurm-pools.NAME], see infra/pools/README.md")
    save.set_defaults(run=_save_blocks)


def _pools_status(arguments: argparse.Namespace) -> None:
    from infra.pools.status import open_clusters

    clusters = open_clusters()
    if arguments.json:
        print_json({"clusters": clusters})
        return
    if not clusters:
        print("no pools are open")
    for cluster in clusters:
        age = time.time() - cluster["written"]
        print(f"{cluster['host']} process {cluster['process']}, scheduler {cluster['scheduler']}, {age:.0f} s ago")
        for pool, facts in cluster["pools"].items():
            tasks = f"{facts['running']} running, {facts['waiting']} waiting, {facts['coming']} coming"
            print(f"  {pool}: {len(facts['workers'])} of at most {facts['maximum']} workers; tasks: {tasks}")
            for worker in facts["workers"]:
                job = f"job {worker['job']}" if worker["job"] else ""
                facets = (worker["name"], worker["state"], job, worker["node"], f"{worker['seconds']} s", worker["log"])
                print("    " + "  ".join(filter(None, facets)))


def _save_blocks(arguments: argparse.Namespace) -> None:
    from blocks.seeds import read_seeds
    from infra.prefect_server import ensure_api

    seeds = read_seeds(Path(arguments.file))
    with ensure_api():
        for seed in seeds:
            print(f"saved {seed.save()}")
