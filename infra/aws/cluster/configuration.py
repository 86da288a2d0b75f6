"""The configuration of a cluster, as `pcluster create-cluster` and its CloudFormation resource take it.

Compute is at zero instances until jobs wait. Nodes are reached through Systems Manager alone. Storage and databases
belong to the site and outlive every cluster: a second one in another zone, with the same site, is the standby of the
first and the way to a new version (docs/aws/upgrades.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from infra.aws.cluster.pools import SHARED
from infra.aws.cluster.queues import Capacity, Queue, Queues
from tasks.errors import SettingsError

#: Also part of the image's name and of the address of the CloudFormation provider. Earlier ones ship a Slurm with known
#: holes (before 25.11.8).
PARALLELCLUSTER_VERSION: Final = "3.16.1"

OPERATING_SYSTEM: Final = "ubuntu2404"

#: Folder of the bucket that holds the scripts of this package's `bootstrap/`, below it one for each release.
BOOTSTRAP_PREFIX: Final = "bootstrap"

#: Beside the scripts: the code of the release, as `git archive` packs it.
RELEASE_ARCHIVE: Final = "release.tar.gz"

#: Object of the artifacts bucket with the blocks of the site.
BLOCKS: Final = "blocks.toml"

HEAD_INSTANCE: Final = "m7i.large"
LOGIN_INSTANCE: Final = "t3.medium"

#: Lets Systems Manager in, which is the only way in.
_MANAGED_BY_SSM: Final = "arn:{partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"

#: ParallelCluster opens port 22 to everybody unless told otherwise; this leaves it to the machine itself.
_NOBODY: Final = {"AllowedIps": "127.0.0.1/32"}

#: Instances at rest for so many minutes end.
_IDLE_MINUTES: Final = 10

#: What a head node has to start in, the release that it makes included (ParallelCluster gives it 2100). CloudFormation
#: waits an hour for a whole cluster; what fails is to fail before, with its own reason. It cannot be changed later.
_HEAD_SECONDS: Final = 2700

#: As long as names of login pools go; one pool in each zone.
_POOL_NAMES: Final = "abcdefgh"


@dataclass(frozen=True)
class Accounting:
    """Where Slurm writes which jobs ran: a database that speaks MySQL.

    Attributes:
        host: Its address.
        password_secret: ARN of the secret that holds the password, as plain text and not as JSON.
        user: Who writes.
        database: Its name. Every cluster has one of its own: two controllers must not write into the same.
        port: Its port.
        client_group: Security group that may connect; the head node gets it. Empty for none.
    """

    host: str
    password_secret: str
    user: str = "slurm"
    database: str = "slurm_a"
    port: int = 3306
    client_group: str = ""


@dataclass(frozen=True)
class Site:
    """What a cluster stands on. Every text may be a token of CDK.

    Attributes:
        region: AWS region.
        head_subnet: Private subnet of the head node; the zone of a cluster is that of its head node.
        compute_subnets: Private subnets of compute nodes, the zone of the file system first.
        login_subnets: Private subnets of login nodes; one of these in each.
        file_system_id: Of the FSx for Lustre file system that is mounted at `/fsx`.
        lustre_client_group: Security group that may mount it; all nodes get it.
        artifacts_bucket: Bucket that holds the bootstrap scripts, and that ParallelCluster keeps its own files in.
        release: Name of the environment below `/fsx/envs`. The head node makes it, from `bootstrap/RELEASE/` of the
            artifacts bucket.
        first_release: The release that the cluster was made with, where it is another. What head and login nodes do
            when they start cannot be changed afterwards: it stays of this one, and they move on when updated.
        worker_settings_secret: ARN of the secret with `/etc/superres/environment` (deployments/systemd); without it
            login nodes run no Prefect worker.
        work_queue: Queue of the Prefect work pool `slurm` that this cluster's workers look at.
        blocks: Address (`s3://...`) of a TOML file with more blocks of the site, such as its store; empty for none.
        accounting: Database for Slurm's accounting.
        api_client_group: Security group that may reach the Prefect API; login and compute nodes get it.
        policies: ARNs of more IAM policies for login and compute nodes: buckets, ledger, metrics, settings secret.
            One of them lets nodes read `bootstrap/*` in the artifacts bucket: for login nodes ParallelCluster has no
            setting of its own.
        head_policies: The same for the head node.
        custom_ami: Image for all nodes instead of ParallelCluster's own.
        munge_secret: ARN of the secret with Slurm's key; without one each cluster makes its own.
        log_days: How long logs are kept, one of the numbers that CloudWatch knows.
        partition: `aws`, or that of another region family.
        tags: Of everything that belongs to the cluster.
    """

    region: str
    head_subnet: str
    compute_subnets: tuple[str, ...]
    login_subnets: tuple[str, ...]
    file_system_id: str
    lustre_client_group: str
    artifacts_bucket: str
    release: str
    first_release: str = ""
    worker_settings_secret: str = ""
    work_queue: str = "slurm-a"
    blocks: str = ""
    accounting: Accounting | None = None
    api_client_group: str = ""
    policies: tuple[str, ...] = ()
    head_policies: tuple[str, ...] = ()
    custom_ami: str = ""
    munge_secret: str = ""
    log_days: int = 365
    partition: str = "aws"
    tags: tuple[tuple[str, str], ...] = (("project", "superres"),)

    def __post_init__(self) -> None:
        for name in ("compute_subnets", "login_subnets"):
            if not getattr(self, name):
                raise SettingsError(f"the site has no {name}", "Name at least one private subnet")
        if len(self.login_subnets) > len(_POOL_NAMES):
            raise SettingsError(f"the site has {len(self.login_subnets)} login_subnets", "Name one for each zone")
        if not self.release or "/" in self.release:
            raise SettingsError(f"{self.release!r} is no name of a release", "Name the folder below /fsx/envs")


def standby_site(site: Site, head_subnet: str, work_queue: str = "slurm-b", database: str = "slurm_b") -> Site:
    """The same site for a second cluster, whose head node is in another zone.

    Args:
        site: That of the first cluster.
        head_subnet: Private subnet in the other zone. Nodes are started in that zone first where it has a subnet.
        work_queue: Queue that its workers look at.
        database: Its own for accounting.

    Raises:
        SettingsError: It would share with the first what must be its own.
    """
    accounting = site.accounting and replace(site.accounting, database=database)
    if (
        work_queue == site.work_queue
        or head_subnet == site.head_subnet
        or (accounting and accounting == site.accounting)
    ):
        raise SettingsError(
            "the standby cluster has the head subnet, the work queue or the database of the first",
            "Give it its own of each",
        )
    return replace(site, head_subnet=head_subnet, work_queue=work_queue, accounting=accounting)


def cluster_configuration(queues: Queues, site: Site, name: str = "production") -> dict[str, Any]:
    """The configuration of a cluster.

    Args:
        queues: Its queues.
        site: What it stands on.
        name: Under which `Queues` are known to `python -m infra.aws.cluster pools`: login nodes write the blocks of
            pools from it.

    Returns:
        What becomes the YAML.
    """
    image: dict[str, Any] = {"Os": OPERATING_SYSTEM}
    if site.custom_ami:
        image["CustomAmi"] = site.custom_ami
    return {
        "Region": site.region,
        "Image": image,
        "Imds": {"ImdsSupport": "v2.0"},
        "CustomS3Bucket": site.artifacts_bucket,
        "HeadNode": _head_node(site),
        "Scheduling": {
            "Scheduler": "slurm",
            # Workers are independent: those that are to be had start. The default is all or none.
            "ScalingStrategy": "best-effort",
            "SlurmSettings": _slurm_settings(site),
            "SlurmQueues": [_queue(queue, site) for queue in queues.queues],
        },
        "LoginNodes": {
            "Pools": [
                _login_pool(letter, subnet, site, name)
                for letter, subnet in zip(_POOL_NAMES, site.login_subnets, strict=False)
            ]
        },
        # Named, not made: it belongs to the site, and one that ParallelCluster makes cannot serve several zones.
        "SharedStorage": [
            {
                "Name": "fsx",
                "StorageType": "FsxLustre",
                "MountDir": SHARED,
                "FsxLustreSettings": {"FileSystemId": site.file_system_id},
            }
        ],
        "Monitoring": {
            "Logs": {"CloudWatch": {"RetentionInDays": site.log_days, "DeletionPolicy": "Retain"}},
            "Dashboards": {"CloudWatch": {"Enabled": True}},
            "Alarms": {"Enabled": True},
        },
        "DeploymentSettings": {"DisableSudoAccessForDefaultUser": True},
        "DevSettings": {"Timeouts": {"HeadNodeBootstrapTimeout": _HEAD_SECONDS}},
        "Tags": [{"Key": key, "Value": value} for key, value in site.tags],
    }


def _head_node(site: Site) -> dict[str, Any]:
    groups = [site.lustre_client_group]
    if site.accounting and site.accounting.client_group:
        groups.append(site.accounting.client_group)
    return {
        "InstanceType": HEAD_INSTANCE,
        "Networking": {"SubnetId": site.head_subnet, "AdditionalSecurityGroups": groups},
        # Off the head node's own disk: what users keep survives it.
        "SharedStorageType": "Efs",
        "SharedStorageEfsSettings": {"Encrypted": True},
        "Imds": {"Secured": True},
        "Ssh": dict(_NOBODY),
        "LocalStorage": {"RootVolume": {"Size": 100, "VolumeType": "gp3", "Encrypted": True}},
        "CustomActions": {
            "OnNodeConfigured": {"Sequence": _making(_first(site))},
            "OnNodeUpdated": {"Sequence": _making(site)},
        },
        "Iam": _permissions(site, site.head_policies),
    }


def _slurm_settings(site: Site) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "ScaledownIdletime": _IDLE_MINUTES,
        # Jobs that run are left alone when a queue changes.
        "QueueUpdateStrategy": "DRAIN",
        # Jobs ask for memory (`--mem`), and several share a node.
        "EnableMemoryBasedScheduling": True,
    }
    if site.munge_secret:
        settings["MungeKeySecretArn"] = site.munge_secret
    if accounting := site.accounting:
        settings["Database"] = {
            "Uri": f"{accounting.host}:{accounting.port}",
            "UserName": accounting.user,
            "PasswordSecretArn": accounting.password_secret,
            "DatabaseName": accounting.database,
        }
    return settings


def _queue(queue: Queue, site: Site) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "Name": queue.name,
        "CapacityType": queue.capacity.value,
        "ComputeResources": [
            {
                "Name": "nodes",
                "Instances": [{"InstanceType": name} for name in queue.instances],
                "MinCount": 0,
                "MaxCount": queue.maximum,
            }
        ],
        "ComputeSettings": {"LocalStorage": {"RootVolume": {"Size": 100, "VolumeType": "gp3", "Encrypted": True}}},
        "Networking": {
            "SubnetIds": list(site.compute_subnets[: queue.zones]),
            "AdditionalSecurityGroups": _worker_groups(site),
        },
        "CustomSlurmSettings": {"PriorityTier": queue.priority_tier},
        "CustomActions": {"OnNodeConfigured": {"Sequence": _waiting(site)}},
        "Iam": _permissions(site, site.policies),
    }
    if queue.capacity is Capacity.SPOT:
        rendered["AllocationStrategy"] = "price-capacity-optimized"
    if queue.maximum_minutes is not None:
        rendered["CustomSlurmSettings"]["MaxTime"] = queue.maximum_minutes
    if queue.gpus:
        rendered["HealthChecks"] = {"Gpu": {"Enabled": True}}
    return rendered


def _login_pool(letter: str, subnet: str, site: Site, queues: str) -> dict[str, Any]:
    return {
        "Name": f"login-{letter}",
        "Count": 1,
        "InstanceType": LOGIN_INSTANCE,
        # Minutes for a worker to hand over before its node is replaced.
        "GracetimePeriod": 10,
        "Ssh": dict(_NOBODY),
        "Networking": {"SubnetIds": [subnet], "AdditionalSecurityGroups": _worker_groups(site)},
        "CustomActions": {
            "OnNodeConfigured": {"Sequence": _working(_first(site), queues)},
            # The worker stays, and the runs that it started: it may be of another release than those to come.
            "OnNodeUpdated": {"Sequence": _waiting(site)},
        },
        "Iam": {"AdditionalIamPolicies": _permissions(site, site.policies)["AdditionalIamPolicies"]},
    }


def _worker_groups(site: Site) -> list[str]:
    return [site.lustre_client_group, *([site.api_client_group] if site.api_client_group else [])]


def _first(site: Site) -> Site:
    """The site as it was when the cluster was made."""
    return replace(site, release=site.first_release or site.release)


def _making(site: Site) -> list[dict[str, Any]]:
    """On a head node: the release is made where it is missing."""
    archive = f"s3://{site.artifacts_bucket}/{bootstrap_prefix(site)}/{RELEASE_ARCHIVE}"
    link = _script(site, "link_environment.sh", [site.release])
    return [_script(site, "build_environment.sh", [site.release, archive]), link]


def _waiting(site: Site) -> list[dict[str, Any]]:
    """On other nodes, which may start while the head node is still at it."""
    return [_script(site, name, [site.release]) for name in ("wait_for_environment.sh", "link_environment.sh")]


def _working(site: Site, queues: str) -> list[dict[str, Any]]:
    """On a login node: the Prefect worker, too."""
    scripts = _waiting(site)
    if site.worker_settings_secret:
        arguments = [site.release, queues, site.work_queue, site.worker_settings_secret, site.region]
        scripts.append(_script(site, "start_worker.sh", [*arguments, *([site.blocks] if site.blocks else [])]))
    return scripts


def _script(site: Site, name: str, arguments: list[str]) -> dict[str, Any]:
    return {"Script": f"s3://{site.artifacts_bucket}/{bootstrap_prefix(site)}/{name}", "Args": arguments}


def bootstrap_prefix(site: Site) -> str:
    """Folder of the artifacts bucket that the scripts of this release lie in."""
    return f"{BOOTSTRAP_PREFIX}/{site.release}"


def _permissions(site: Site, policies: tuple[str, ...]) -> dict[str, Any]:
    managed = _MANAGED_BY_SSM.format(partition=site.partition)
    return {
        "S3Access": [{"BucketName": site.artifacts_bucket, "KeyName": f"{BOOTSTRAP_PREFIX}/*"}],
        "AdditionalIamPolicies": [{"Policy": policy} for policy in (managed, *policies)],
    }
