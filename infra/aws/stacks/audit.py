"""CloudTrail: every call to AWS, and every read and write of an object. After the buckets, which it names."""

from __future__ import annotations

from typing import Any

from aws_cdk import Duration, RemovalPolicy, Stack
from aws_cdk import aws_cloudtrail as cloudtrail
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.keeping import removal, retention
from infra.aws.stacks.roles import allow, local_key, service_role
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import StorageStack


class AuditStack(Stack):
    """The trail, its bucket and its log group."""

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        storage: StorageStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        key = local_key(self, "MessagesKey", security.messages)
        called = f"superres-{profile.name}"
        bucket = s3.Bucket(
            self,
            "Trails",
            encryption=s3.BucketEncryption.KMS,
            encryption_key=key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            versioned=True,
            server_access_logs_bucket=storage.logs,
            server_access_logs_prefix="trails/",
            lifecycle_rules=[s3.LifecycleRule(expiration=Duration.days(profile.log_days + 365))],
            removal_policy=RemovalPolicy.RETAIN,  # Who deleted an installation is a question of afterwards.
        )
        arn = f"arn:{self.partition}:cloudtrail:{self.region}:{self.account}:trail/{called}"
        for action, resource in (
            ("s3:GetBucketAcl", bucket.bucket_arn),
            ("s3:PutObject", bucket.arn_for_objects(f"AWSLogs/{self.account}/*")),
        ):
            bucket.add_to_resource_policy(
                iam.PolicyStatement(
                    principals=[iam.ServicePrincipal("cloudtrail.amazonaws.com")],
                    actions=[action],
                    resources=[resource],
                    conditions={"StringEquals": {"aws:SourceArn": arn}},
                )
            )
        group = logs.LogGroup(
            self,
            "Calls",
            encryption_key=key,
            retention=retention(profile),
            removal_policy=removal(profile),
        )
        role = service_role(
            self,
            "TrailRole",
            "cloudtrail.amazonaws.com",
            [allow(["logs:CreateLogStream", "logs:PutLogEvents"], [group.log_group_arn])],
        )
        objects = [bucket.arn_for_objects("") for bucket in (storage.inputs, storage.outputs, storage.artifacts)]
        trail = cloudtrail.CfnTrail(
            self,
            "Trail",
            trail_name=called,
            s3_bucket_name=bucket.bucket_name,
            kms_key_id=key.key_arn,
            cloud_watch_logs_log_group_arn=group.log_group_arn,
            cloud_watch_logs_role_arn=role.role_arn,
            is_logging=True,
            is_multi_region_trail=True,
            include_global_service_events=True,
            enable_log_file_validation=True,
            event_selectors=[
                cloudtrail.CfnTrail.EventSelectorProperty(
                    include_management_events=True,
                    read_write_type="All",
                    data_resources=[cloudtrail.CfnTrail.DataResourceProperty(type="AWS::S3::Object", values=objects)],
                )
            ],
        )
        assert bucket.policy is not None
        trail.node.add_dependency(bucket.policy)
