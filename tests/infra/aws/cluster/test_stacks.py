"""The configurations of clusters as the stacks write them, with stand-ins for what only AWS knows, fit the schema."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from infra.aws.profiles import PROFILES
from tests.infra.aws.cloudformation import installation

pytestmark = pytest.mark.infra

#: What the names of resources in templates stand for.
STAND_INS: Final = (
    (r"Network\.Vpc\w+", "subnet-0123456789abcdef0"),
    (r"Network\.\w+\.GroupId", "sg-0123456789abcdef0"),
    (r"Storage\.\w+", "artifacts"),
    (r"Lustre\.\w+", "fs-0123456789abcdef0"),
    (r"Data\.\w+\.Endpoint\.Address", "db.example.com"),
    (
        r"(Data|Cluster)\.(AccountingPassword|WorkerSettings)\w+",
        "arn:aws:secretsmanager:us-east-1:123456789012:secret:a-AbCdEf",
    ),
    (r"Cluster\.\w+Policy\w+", "arn:aws:iam::123456789012:policy/a"),
    (r"AWS::Partition", "aws"),
    (r"\bRelease\b", "1.0.0"),
)

#: Reads configurations as ParallelCluster's resource gets them: CloudFormation makes text of numbers and truths.
PROGRAM: Final = """
import json, sys
from pcluster.schemas.cluster_schema import ClusterSchema

def told(value):
    if isinstance(value, dict):
        return {key: told(each) for key, each in value.items()}
    if isinstance(value, list):
        return [told(each) for each in value]
    return value if isinstance(value, str) else json.dumps(value)

for name, configuration in json.load(sys.stdin).items():
    cluster = ClusterSchema(cluster_name=name).load(told(configuration))
    print(name, *(queue.name for queue in cluster.scheduling.queues))
"""


def _with_stand_ins(configuration: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(configuration)
    for pattern, stand_in in STAND_INS:
        text = re.sub(pattern, stand_in, text)
    return json.loads(text)


def test_configurations_fit_the_schema(parallelcluster: Path) -> None:
    clusters = {
        cluster.properties["ClusterName"]: _with_stand_ins(cluster.properties["ClusterConfiguration"])
        for profile in PROFILES
        for cluster in installation(profile).of("Custom::PclusterCluster")
    }
    # Credentials, or ParallelCluster looks for those of an instance.
    account = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    done = subprocess.run(
        [str(parallelcluster), "-I", "-c", PROGRAM],
        input=json.dumps(clusters),
        env={**os.environ, **account, "PATH": f"{parallelcluster.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(read) == set(clusters)
    assert read["superres-prod-a"] == read["superres-prod-b"] == "cpu-spot cpu gpu gpu-large"
