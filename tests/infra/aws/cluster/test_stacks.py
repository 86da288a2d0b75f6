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
    (r"\bFirstRelease\b", "1.0.0"),
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


#: Asks ParallelCluster whether a cluster whose nodes all run could be updated from one configuration to another.
UPDATE: Final = """
import json, sys
from pcluster.config.config_patch import ConfigPatch

class Running:
    name = stack_name = "superres"
    def has_running_capacity(self, *_, **__):
        return True
    def has_running_login_nodes(self, *_, **__):
        return True

before, after = json.load(sys.stdin)
allowed, rows = ConfigPatch(Running(), base_config=before, target_config=after).check()
json.dump({"allowed": allowed, "said": str(rows)}, sys.stdout)
"""


def _with_stand_ins(configuration: dict[str, Any], release: str = "1.0.0") -> dict[str, Any]:
    text = re.sub(r"\bRelease\b", release, json.dumps(configuration))
    for pattern, stand_in in STAND_INS:
        text = re.sub(pattern, stand_in, text)
    return json.loads(text)


def _told(parallelcluster: Path, program: str, given: Any) -> str:
    """What a program says that runs in the environment of ParallelCluster."""
    # Credentials, or ParallelCluster looks for those of an instance.
    account = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    done = subprocess.run(
        [str(parallelcluster), "-I", "-c", program],
        input=json.dumps(given),
        env={**os.environ, **account, "PATH": f"{parallelcluster.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_configurations_fit_the_schema(parallelcluster: Path) -> None:
    clusters = {
        cluster.properties["ClusterName"]: _with_stand_ins(cluster.properties["ClusterConfiguration"])
        for profile in PROFILES
        for cluster in installation(profile).of("Custom::PclusterCluster")
    }
    read = dict(line.split(" ", 1) for line in _told(parallelcluster, PROGRAM, clusters).splitlines())
    assert set(read) == set(clusters)
    assert read["superres-prod-a"] == read["superres-prod-b"] == "cpu-spot cpu gpu gpu-large"


def test_another_release_is_an_update_that_running_clusters_take(parallelcluster: Path) -> None:
    cluster = installation("prod").of("Custom::PclusterCluster")[0].properties["ClusterConfiguration"]
    before, after = _with_stand_ins(cluster), _with_stand_ins(cluster, "1.1.0")
    assert before != after
    answer = json.loads(_told(parallelcluster, UPDATE, [before, after]))
    assert answer["allowed"], answer["said"]
    # What nodes that stay do when they start cannot be changed: hence the first release.
    other = json.loads(json.dumps(after).replace("1.0.0", "1.1.0"))
    answer = json.loads(_told(parallelcluster, UPDATE, [before, other]))
    assert not answer["allowed"] and "not currently supported" in answer["said"]
