"""`python -m infra.aws.cluster configuration|pools`: what is made from the description of the queues, on stdout.

configuration   the YAML for `pcluster create-cluster`, of the site that a file describes
pools           the blocks of pools for `superres blocks save`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import yaml  # type: ignore[import-untyped]  # Its annotations are a package of their own.

from infra.aws.cluster.configuration import cluster_configuration, standby_site
from infra.aws.cluster.pools import pools_toml
from infra.aws.cluster.queues import DEVELOPMENT, PRODUCTION, Queues
from infra.aws.cluster.site import read_site
from tasks.errors import SuperResolutionError

#: Descriptions by the name that nodes know them by.
QUEUES: Final[dict[str, Queues]] = {"production": PRODUCTION, "development": DEVELOPMENT}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or the exit code of the error that was printed.
    """
    parser = argparse.ArgumentParser(prog="python -m infra.aws.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    configuration = commands.add_parser("configuration", help="YAML for pcluster create-cluster")
    pools = commands.add_parser("pools", help="blocks for superres blocks save")
    for command in (configuration, pools):
        command.add_argument("--queues", choices=QUEUES, default="production", help="default: %(default)s")
    configuration.add_argument("--site", type=Path, required=True, metavar="FILE", help="TOML file of the site")
    configuration.add_argument(
        "--standby", metavar="SUBNET", help="a second cluster, with its head node in this subnet"
    )
    given = parser.parse_args(arguments)
    try:
        if given.command == "pools":
            sys.stdout.write(pools_toml(QUEUES[given.queues]))
        else:
            site = read_site(given.site)
            site = standby_site(site, given.standby) if given.standby else site
            yaml.safe_dump(cluster_configuration(QUEUES[given.queues], site, given.queues), sys.stdout, sort_keys=False)
    except SuperResolutionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
