"""What an installation costs while nobody uses it, and what an hour of video costs; in US dollars.

Prices of us-east-1, as published; those of instances are in `infra.aws.cluster.instances`. A month has 730 hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from infra.aws.cluster.configuration import HEAD_INSTANCE, LOGIN_INSTANCE
from infra.aws.cluster.instances import INSTANCE_TYPES
from infra.aws.profiles import Profile

#: When these were looked up; those of instances have a date of their own.
LOOKED_UP: Final = "2026-11-23"

HOURS: Final = 730

#: Per hour.
BALANCER: Final = 0.0225
NAT_GATEWAY: Final = 0.045
ENDPOINT: Final = 0.01
FARGATE_CPU: Final = 0.04048
FARGATE_GB: Final = 0.004445
AURORA_UNIT: Final = 0.12

#: Of FSx for Lustre (SSD, persistent), per GB and month by MB/s per TiB; the faster ones were not looked up.
LUSTRE_GB: Final = {125: 0.145}


@dataclass(frozen=True)
class Item:
    """A part of an installation, and what it costs a month without any job."""

    what: str
    monthly: float


def idle(profile: Profile) -> list[Item]:
    """What an installation costs a month while no job runs; traffic, requests and what is stored in S3 come on top."""
    clusters = 1 + profile.standby
    logins = clusters * profile.login_zones
    prefect = profile.api_servers + profile.ui_servers + profile.has_cache
    server = FARGATE_CPU + 2 * FARGATE_GB
    least = profile.database_units[0]
    lustre = LUSTRE_GB[profile.lustre_throughput] * profile.lustre_gib
    hourly = {
        f"{clusters} head node{'s' * (clusters > 1)}": clusters * INSTANCE_TYPES[HEAD_INSTANCE].hourly_price,
        f"{logins} login node{'s' * (logins > 1)} and what balances their load": logins
        * (INSTANCE_TYPES[LOGIN_INSTANCE].hourly_price + BALANCER),
        f"Prefect on Fargate: {prefect} x (1 vCPU, 2 GB)": prefect * server,
        f"Portal on Fargate: {profile.portal_servers} x (0.5 vCPU, 1 GB)": profile.portal_servers * server / 2,
        f"Aurora PostgreSQL: {1 + profile.database_readers} x {least} units": (1 + profile.database_readers)
        * least
        * AURORA_UNIT,
        f"Aurora MySQL: {profile.accounting_instances} x {least} units": profile.accounting_instances
        * least
        * AURORA_UNIT,
        "Load balancer of UI, portal and API": BALANCER,
        f"{profile.nat_gateways} NAT gateway{'s' * (profile.nat_gateways > 1)}": profile.nat_gateways * NAT_GATEWAY,
    }
    if profile.endpoints:
        count = len(profile.endpoints) * len(profile.zones)
        hourly[f"{count} interface endpoints"] = count * ENDPOINT
    return [
        Item(f"FSx for Lustre, {profile.lustre_gib} GiB", lustre),
        *(Item(what, HOURS * price) for what, price in hourly.items()),
    ]


def of_video(frames_per_second: float, hourly_price: float, rate: float = 24.0) -> float:
    """What it costs to bring an hour of video through one stage.

    Args:
        frames_per_second: That a node works on.
        hourly_price: Of the node.
        rate: Frames per second of the video.

    Returns:
        `3600 * rate / frames_per_second` seconds of the node: dollars per hour of video.
    """
    return rate / frames_per_second * hourly_price
