"""Scratch: FSx for Lustre, in a stack of its own, so that it can be made for a batch and removed after it."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import Stack
from aws_cdk import aws_fsx as fsx
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.network import NetworkStack
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import MODELS, UPLOADS, StorageStack

#: Where nodes mount it, and where on it the folders of buckets show.
MOUNT: Final = "/fsx"
INPUTS: Final = "/inputs"
WEIGHTS: Final = "/models"


class LustreStack(Stack):
    """The file system, and what of the buckets shows on it.

    Results are not exported: a job uploads what it has verified, by itself, and scratch may be lost at any time.

    Attributes:
        file_system_id: Of FSx.
    """

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        network: NetworkStack,
        storage: StorageStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        system = fsx.CfnFileSystem(
            self,
            "Scratch",
            file_system_type="LUSTRE",
            file_system_type_version="2.15",
            storage_capacity=profile.lustre_gib,
            storage_type="SSD",
            # In one zone, whatever the network has; nodes in others reach it, and pay for the way.
            subnet_ids=[network.vpc.select_subnets(subnet_group_name="Data").subnet_ids[0]],
            security_group_ids=[network.lustre.security_group_id],
            kms_key_id=security.media.key_arn,
            lustre_configuration=fsx.CfnFileSystem.LustreConfigurationProperty(
                # Also where scratch would do: only persistent ones are encrypted with a key of one's own.
                deployment_type="PERSISTENT_2",
                per_unit_storage_throughput=profile.lustre_throughput,
                data_compression_type="NONE",  # Video does not compress, and compressing takes its time.
                weekly_maintenance_start_time="7:03:00",
            ),
        )
        self.file_system_id = system.ref
        for title, path, bucket, prefix in (
            ("Inputs", INPUTS, storage.inputs, UPLOADS),
            ("Weights", WEIGHTS, storage.artifacts, MODELS),
        ):
            fsx.CfnDataRepositoryAssociation(
                self,
                title,
                file_system_id=system.ref,
                file_system_path=path,
                data_repository_path=f"s3://{bucket.bucket_name}/{prefix}",
                batch_import_meta_data_on_create=True,
                s3=fsx.CfnDataRepositoryAssociation.S3Property(
                    auto_import_policy=fsx.CfnDataRepositoryAssociation.AutoImportPolicyProperty(
                        events=["NEW", "CHANGED", "DELETED"]
                    )
                ),
            )
