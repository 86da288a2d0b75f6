"""What a site has before its clusters: network, file system, bucket, secrets; on moto, for ParallelCluster to see."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import requests

from infra.aws.cluster import Accounting, Site
from infra.aws.cluster.configuration import bootstrap_prefix
from tests.waiting import eventually

REGION: Final = "us-east-1"
CHECKOUT: Final = Path(__file__).parents[4]
BOOTSTRAP: Final = CHECKOUT / "infra/aws/cluster/bootstrap"


@dataclass(frozen=True)
class Cloud:
    """A running AWS and the site on it.

    Attributes:
        endpoint: Its address.
        environment: What clients need in theirs.
        site: The site, its head node in the first zone.
        other_head_subnet: For the head node of the standby cluster.
    """

    endpoint: str
    environment: dict[str, str]
    site: Site
    other_head_subnet: str


@contextmanager
def running_cloud(folder: Path) -> Iterator[Cloud]:
    """Run an AWS with a site on it while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_"))}
    environment = {
        **kept,
        "PYTHONPATH": str(CHECKOUT),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "HOME": str(folder),  # ParallelCluster writes its log there.
    }
    endpoint = environment["AWS_ENDPOINT_URL"]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("moto_service.py"), str(port)],
            env=environment,
            stdout=log,
            stderr=log,
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "moto.log").read_text()
        try:
            return requests.get(f"{endpoint}/moto-api/", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        eventually(answers, 60)
        yield _site(endpoint, environment)
    finally:
        process.terminate()
        process.wait(30)


def _site(endpoint: str, environment: dict[str, str]) -> Cloud:
    def client(service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=endpoint,
            region_name=REGION,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    ec2, secrets = client("ec2"), client("secretsmanager")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    for attribute in ("EnableDnsSupport", "EnableDnsHostnames"):
        ec2.modify_vpc_attribute(VpcId=vpc, **{attribute: {"Value": True}})
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{16 * index}.0/20", AvailabilityZone=f"{REGION}{zone}")["Subnet"]
        for index, zone in enumerate("abc")
    ]
    first, second, third = (subnet["SubnetId"] for subnet in subnets)

    def group(name: str, *ports: tuple[int, int]) -> str:
        made: str = ec2.create_security_group(GroupName=name, Description=name, VpcId=vpc)["GroupId"]
        for low, high in ports:
            pair = [{"GroupId": made}]
            rule = {"IpProtocol": "tcp", "FromPort": low, "ToPort": high, "UserIdGroupPairs": pair}
            ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=[rule])
        return made

    lustre = group("lustre", (988, 988), (1018, 1023))
    file_system = client("fsx").create_file_system(
        FileSystemType="LUSTRE", StorageCapacity=1200, SubnetIds=[first], SecurityGroupIds=[lustre]
    )["FileSystem"]["FileSystemId"]
    settings = secrets.create_secret(Name="superres/worker", SecretString="SUPERRES_HOME=/fsx/superres/home\n")["ARN"]
    site = Site(
        region=REGION,
        head_subnet=first,
        compute_subnets=(first, second, third),
        login_subnets=(second, third),
        file_system_id=file_system,
        lustre_client_group=lustre,
        artifacts_bucket="superres-artifacts",
        release="1.0.0",
        worker_settings_secret=settings,
        accounting=Accounting(
            host="accounting.cluster-abcdefghijkl.us-east-1.rds.amazonaws.com",
            password_secret=secrets.create_secret(Name="superres/slurm", SecretString="a-password")["ARN"],
            client_group=group("accounting"),
        ),
        api_client_group=group("api"),
        policies=(
            client("iam").create_policy(
                PolicyName="superres-work",
                PolicyDocument='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject",'
                ' "Resource": "arn:aws:s3:::superres-input/*"}]}',
            )["Policy"]["Arn"],
        ),
    )
    s3 = client("s3")
    s3.create_bucket(Bucket=site.artifacts_bucket)
    s3.put_bucket_versioning(Bucket=site.artifacts_bucket, VersioningConfiguration={"Status": "Enabled"})
    for script in BOOTSTRAP.glob("*.sh"):
        s3.upload_file(str(script), site.artifacts_bucket, f"{bootstrap_prefix(site)}/{script.name}")
    return Cloud(endpoint, environment, site, second)
