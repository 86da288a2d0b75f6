"""Runs in ParallelCluster's own environment: `inspect_clusters.py FOLDER NAME ...`.

For each FOLDER/NAME.yaml: does it fit the schema, would `pcluster create-cluster` take it, and what templates would it
become? The answer is in FOLDER/NAME.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Of ParallelCluster's checks, those that start instances: moto's answer differs from that of EC2.
_SUPPRESSED = ["type:HeadNodeLaunchTemplateValidator", "type:ComputeResourceLaunchTemplateValidator"]


def inspect(path: Path, name: str) -> dict[str, Any]:
    from pcluster.cli import entrypoint
    from pcluster.models.cluster import Cluster
    from pcluster.schemas.cluster_schema import ClusterSchema
    from pcluster.templates import cdk_artifacts_manager
    from pcluster.templates.cdk_builder import CDKTemplateBuilder
    from pcluster.utils import yaml_load

    ClusterSchema(cluster_name=name).load(yaml_load(path.read_text()))
    arguments = ["create-cluster", "--cluster-name", name, "--cluster-configuration", str(path), "--dryrun", "true"]
    try:
        answer: Any = entrypoint.run([*arguments, "--suppress-validators", *_SUPPRESSED])
    except entrypoint.APIOperationException as refusal:  # A dry run that would succeed is one, too.
        answer = refusal.data

    templates = {}

    def keep(self: Any, bucket: Any) -> list[Any]:
        assembly = self.cluster_cdk_assembly
        for asset in assembly.get_assets():
            text = (Path(assembly.get_cloud_assembly_directory()) / asset.path).read_text()
            templates[asset.id] = json.loads(text)
        return []

    cdk_artifacts_manager.CDKArtifactsManager.upload_assets = keep
    cluster = Cluster(name, path.read_text())
    cluster._add_tags()
    cluster._generate_artifact_dir()
    template, _ = CDKTemplateBuilder().build_cluster_template(cluster.config, cluster.bucket, cluster.stack_name)
    return {"answer": answer, "templates": {"cluster": template, **templates}}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for each in names:
        found = inspect(Path(folder) / f"{each}.yaml", each)
        (Path(folder) / f"{each}.json").write_text(json.dumps(found, default=str))
