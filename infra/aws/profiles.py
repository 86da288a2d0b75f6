"""How large an installation is, and of which versions beside those of the cluster: all that two can differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from infra.aws.cluster import DEVELOPMENT, PRODUCTION, Queues

#: Where runs put their metrics in CloudWatch.
NAMESPACE: Final = "MediaSuperResolution"

#: Of Aurora PostgreSQL; Prefect needs 14.9 or later.
POSTGRESQL: Final = "17.9"
#: Of Aurora MySQL, which speaks MySQL 8.0: what slurmdbd talks to.
MYSQL: Final = "3.12.0"
VALKEY: Final = "8.1"


@dataclass(frozen=True)
class Profile:
    """One installation.

    Attributes:
        name: Part of the names of stacks and resources.
        region: Where it is.
        zones: Availability zones by their letters; nodes run in all of them, and two are the least that load balancer
            and databases take.
        cidr: Addresses of the network.
        operators: Networks from which the UI and the portal may be reached, through a VPN or Direct Connect.
        nat_gateways: Ways out to the internet; with fewer than zones, one zone's loss can cut off the others.
        endpoints: Services that are reached without the internet, beside S3 and DynamoDB, which cost nothing. Each
            costs per hour and zone.
        lustre_gib: Size of scratch: 1200, or a multiple of 2400.
        lustre_throughput: MB/s per TiB: 125, 250, 500 or 1000.
        api_servers: Prefect API servers; more than one needs the cache.
        ui_servers: Prefect servers behind the UI.
        portal_servers: Of the portal.
        database_readers: Copies of the databases in other zones, which take over.
        database_units: Least and most capacity units of each Aurora instance (2 GB of memory each).
        accounting_instances: Of Slurm's accounting database.
        backup_days: How long backups are kept.
        log_days: How long logs are kept; one of the numbers that CloudWatch knows.
        queues: Of each cluster.
        queues_name: What `python -m infra.aws.cluster` calls them.
        login_zones: Zones in which each cluster has a login node, which runs the Prefect worker.
        standby: Whether a second cluster, without nodes while idle, waits in another zone.
        warm_functions: Event handlers that are kept running; 0 starts them when an event comes.
        monthly_budget: US dollars a month from which on somebody is told.
        keep_data: Whether buckets, tables and databases outlive their stacks.
    """

    name: str
    region: str
    zones: tuple[str, ...]
    cidr: str
    operators: tuple[str, ...]
    nat_gateways: int
    endpoints: tuple[str, ...]
    lustre_gib: int
    lustre_throughput: int
    api_servers: int
    ui_servers: int
    portal_servers: int
    database_readers: int
    database_units: tuple[float, float]
    accounting_instances: int
    backup_days: int
    log_days: int
    queues: Queues
    queues_name: str
    login_zones: int
    standby: bool
    warm_functions: int
    monthly_budget: int
    keep_data: bool

    def stack_name(self, stack: str) -> str:
        """What CloudFormation calls a stack of this installation."""
        return f"Superres-{self.name.capitalize()}-{stack}"

    @property
    def tags(self) -> dict[str, str]:
        """Of everything in this installation."""
        return {"project": "superres", "profile": self.name}

    def __post_init__(self) -> None:
        if len(self.zones) < 2:
            raise ValueError(f"profile {self.name}: load balancer and databases need two zones, it has {self.zones}")
        if self.lustre_gib != 1200 and self.lustre_gib % 2400:
            raise ValueError(f"profile {self.name}: FSx has 1200 GiB or a multiple of 2400, not {self.lustre_gib}")

    @property
    def availability_zones(self) -> list[str]:
        return [self.region + zone for zone in self.zones]

    @property
    def has_cache(self) -> bool:
        """Prefect servers tell one another of events through a cache once there are several."""
        return self.api_servers + self.ui_servers > 1


#: What nodes and servers need all the time; the rest goes through the NAT gateways.
_ENDPOINTS: Final = ("ssm", "ssmmessages", "ec2messages", "logs", "secretsmanager")

DEV: Final = Profile(
    name="dev",
    region="us-east-1",
    zones=("a", "b"),
    cidr="10.40.0.0/16",
    operators=("10.40.0.0/16",),
    nat_gateways=1,
    endpoints=(),
    lustre_gib=1200,
    lustre_throughput=125,
    api_servers=1,
    ui_servers=0,
    portal_servers=1,
    database_readers=0,
    database_units=(0.5, 2),
    accounting_instances=1,
    backup_days=7,
    log_days=30,
    queues=DEVELOPMENT,
    queues_name="development",
    login_zones=1,
    standby=False,
    warm_functions=0,
    monthly_budget=1000,
    keep_data=False,
)

PROD: Final = Profile(
    name="prod",
    region="us-east-1",
    zones=("a", "b", "c"),
    cidr="10.20.0.0/16",
    operators=("10.0.0.0/8",),
    nat_gateways=3,
    endpoints=_ENDPOINTS,
    lustre_gib=2400,
    lustre_throughput=125,
    api_servers=2,
    ui_servers=2,
    portal_servers=2,
    database_readers=1,
    database_units=(0.5, 16),
    accounting_instances=2,
    backup_days=35,
    log_days=365,
    queues=PRODUCTION,
    queues_name="production",
    login_zones=2,
    standby=True,
    warm_functions=1,
    monthly_budget=25_000,
    keep_data=True,
)

PROFILES: Final = {profile.name: profile for profile in (DEV, PROD)}
