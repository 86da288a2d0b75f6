"""An AWS on this machine as ParallelCluster's validators need it: `python moto_service.py PORT`, until it is ended.

A process of its own, because moto reads its images when it is imported, and gives file systems ids that AWS never gave.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from infra.aws.cluster.configuration import OPERATING_SYSTEM, PARALLELCLUSTER_VERSION


def image(name: str) -> dict[str, Any]:
    """An image as moto reads it."""
    return {
        "ami_id": f"ami-{uuid.uuid4().hex[:17]}",
        "architecture": "x86_64",
        "description": name,
        "hypervisor": "xen",
        "image_location": f"amazon/{name}",
        "image_type": "machine",
        "name": name,
        "owner_id": "amazon",
        "platform": "Linux/UNIX",
        "public": True,
        "root_device_name": "/dev/sda1",
        "root_device_type": "ebs",
        "sriov": "simple",
        "state": "available",
        "virtualization_type": "hvm",
    }


def give_file_systems_what_aws_gives_them() -> None:
    """Ids of 17 digits, a VPC, an interface, a name to mount: what the validators look at."""
    from moto.ec2.models import ec2_backends
    from moto.fsx import models

    plain_init, plain_dict = models.FileSystem.__init__, models.FileSystem.to_dict

    def init(self: Any, account_id: str, region_name: str, *arguments: Any, **options: Any) -> None:
        plain_init(self, account_id, region_name, *arguments, **options)
        old, self.file_system_id = self.file_system_id, f"fs-{uuid.uuid4().hex[:17]}"
        self.dns_name = self.dns_name.replace(old, self.file_system_id)
        self.resource_arn = self.resource_arn.replace(old, self.file_system_id)
        ec2 = ec2_backends[account_id][region_name]
        subnet = ec2.get_subnet(self.subnet_ids[0])
        interface = ec2.create_network_interface(subnet, None, group_ids=self.security_group_ids)
        self.placed = {"VpcId": subnet.vpc_id, "NetworkInterfaceIds": [interface.id], "Lifecycle": "AVAILABLE"}

    def to_dict(self: Any) -> dict[str, Any]:
        found = {**plain_dict(self), **self.placed}
        found["LustreConfiguration"] = {**(found.get("LustreConfiguration") or {}), "MountName": "abcdefgh"}
        return found

    models.FileSystem.__init__, models.FileSystem.to_dict = init, to_dict  # type: ignore[method-assign, assignment]


def main() -> None:
    release = OPERATING_SYSTEM.replace("ubuntu", "ubuntu-").replace("04", "04-lts")
    name = f"aws-parallelcluster-{PARALLELCLUSTER_VERSION}-{release}-hvm-x86_64-202609080000"
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "amis.json"
        images.write_text(json.dumps([image(name)]))
        os.environ["MOTO_AMIS_PATH"] = str(images)
        os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"
        import moto.server

        give_file_systems_what_aws_gives_them()
        moto.server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])


if __name__ == "__main__":
    main()
