"""What ParallelCluster says: its schema, its validators against an AWS on this machine, and the templates it makes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.aws.cluster import DEVELOPMENT, PRODUCTION, cluster_configuration, standby_site
from tests.infra.aws.cluster.cloud import running_cloud

pytestmark = pytest.mark.infra

#: A cluster, its standby and a small one.
NAMES = ("superres-a", "superres-b", "superres-small")

#: Anybody on the Internet.
EVERYBODY = {"0.0.0.0/0", "::/0"}


@dataclass(frozen=True)
class Seen:
    """What became of a configuration.

    Attributes:
        answer: Of `pcluster create-cluster --dryrun true`.
        resources: Of all templates, with their names.
    """

    answer: dict[str, Any]
    resources: list[tuple[str, dict[str, Any]]]

    def of_type(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """Properties of the resources of a type, by name."""
        return [(name, each["Properties"]) for name, each in self.resources if each["Type"] == kind]


@pytest.fixture(scope="module")
def seen(parallelcluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Seen]]:
    """What ParallelCluster makes of each cluster."""
    folder = tmp_path_factory.mktemp("clusters")
    with running_cloud(folder) as cloud:
        standby = standby_site(cloud.site, cloud.other_head_subnet)
        small = dataclasses.replace(cloud.site, accounting=None, login_subnets=cloud.site.login_subnets[:1])
        for name, queues, site in zip(
            NAMES, (PRODUCTION, PRODUCTION, DEVELOPMENT), (cloud.site, standby, small), strict=True
        ):
            text = yaml.safe_dump(cluster_configuration(queues, site), sort_keys=False)
            (folder / f"{name}.yaml").write_text(text)
        done = subprocess.run(
            [parallelcluster, "-I", Path(__file__).with_name("inspect_clusters.py"), folder, *NAMES],
            # Its node comes first; it is there only where the machine has none.
            env={**cloud.environment, "PATH": f"{parallelcluster.parent}:{cloud.environment['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name in NAMES:
        inspected = json.loads((folder / f"{name}.json").read_text())
        resources = [pair for template in inspected["templates"].values() for pair in template["Resources"].items()]
        found[name] = Seen(inspected["answer"], resources)
    yield found


@pytest.mark.parametrize("name", NAMES)
class TestEveryCluster:
    def test_would_be_created(self, seen: dict[str, Seen], name: str) -> None:
        answer = seen[name].answer
        assert answer["message"] == "Request would have succeeded, but DryRun flag is set."
        said = answer.get("configurationValidationErrors", [])
        assert [each for each in said if each["level"] == "ERROR"] == []
        # No warning but these: no SSH key on purpose; a node is as large as the smallest of its types, also on purpose;
        # no node talks to another one.
        meant = {"KeyPairValidator", "InstancesMemorySchedulingWarningValidator", "InstancesEFAValidator"}
        assert {each["type"] for each in said if each["level"] == "WARNING"} <= meant

    def test_lets_nobody_in(self, seen: dict[str, Seen], name: str) -> None:
        rules = [
            (resource, rule)
            for resource, properties in seen[name].of_type("AWS::EC2::SecurityGroup")
            for rule in properties.get("SecurityGroupIngress", [])
        ] + seen[name].of_type("AWS::EC2::SecurityGroupIngress")
        assert rules
        opened = [each for each in rules if EVERYBODY & {each[1].get("CidrIp"), each[1].get("CidrIpv6")}]
        assert opened == []

    def test_encrypts_its_disks(self, seen: dict[str, Seen], name: str) -> None:
        disks = [
            (resource, mapping["Ebs"])
            for resource, data in launch_templates(seen[name])
            for mapping in data["BlockDeviceMappings"]
            if "Ebs" in mapping
        ]
        assert disks
        assert [resource for resource, disk in disks if disk.get("Encrypted") is not True] == []
        shared = seen[name].of_type("AWS::EFS::FileSystem")
        assert [resource for resource, properties in shared if properties["Encrypted"] is not True] == []

    def test_tells_credentials_of_a_node_to_those_only_who_hold_a_token(self, seen: dict[str, Seen], name: str) -> None:
        templates = launch_templates(seen[name])
        # Head node, login pools and one for each compute resource.
        assert len(templates) >= 1 + 1 + len(DEVELOPMENT.queues)
        assert {data["MetadataOptions"]["HttpTokens"] for _, data in templates} == {"required"}

    def test_makes_no_file_system_for_videos(self, seen: dict[str, Seen], name: str) -> None:
        assert seen[name].of_type("AWS::FSx::FileSystem") == []


def test_instances_at_rest_are_the_head_node_and_the_login_nodes(seen: dict[str, Seen]) -> None:
    for name, logins in zip(NAMES, (2, 2, 1), strict=True):
        assert len(seen[name].of_type("AWS::EC2::Instance")) == 1
        groups = [properties for _, properties in seen[name].of_type("AWS::AutoScaling::AutoScalingGroup")]
        assert [int(group["DesiredCapacity"]) for group in groups] == [1] * logins


def launch_templates(cluster: Seen) -> list[tuple[str, dict[str, Any]]]:
    """What instances start from."""
    return [
        (name, properties["LaunchTemplateData"]) for name, properties in cluster.of_type("AWS::EC2::LaunchTemplate")
    ]
