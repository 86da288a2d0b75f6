"""Buckets: videos in, results out, artifacts of releases, and who asked for what."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import CfnOutput, Duration, Stack
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.keeping import removal
from infra.aws.stacks.roles import local_key
from infra.aws.stacks.security import SecurityStack

#: Folders of the buckets, as the event handler, the portal and scratch know them.
UPLOADS: Final = "incoming"
RESULTS: Final = "upscaled"
MODELS: Final = "models"


class StorageStack(Stack):
    """The buckets.

    Attributes:
        inputs: Videos, as they come, each version of them. Tells EventBridge of each.
        outputs: Results, verified.
        artifacts: What the cluster is made from: bootstrap scripts, weights of models.
        logs: Of accesses to the buckets and to the load balancer.
    """

    def __init__(self, scope: Construct, name: str, profile: Profile, security: SecurityStack, **options: Any) -> None:
        super().__init__(scope, name, **options)
        self._keep = removal(profile)
        self._key = local_key(self, "MediaKey", security.media)
        self.logs = s3.Bucket(
            self,
            "Logs",
            encryption=s3.BucketEncryption.S3_MANAGED,  # S3 and load balancers write into no other.
            lifecycle_rules=[s3.LifecycleRule(expiration=Duration.days(profile.log_days + 365))],
            **self._common(),
        )
        old = Duration.days(profile.backup_days)
        rarely = s3.Transition(storage_class=s3.StorageClass.INTELLIGENT_TIERING, transition_after=Duration.days(0))
        self.inputs = self._bucket(
            "Inputs", [s3.LifecycleRule(transitions=[rarely], noncurrent_version_expiration=old)]
        )
        # By hand: CDK's own way is a function that does this one thing, with rights of its own.
        bucket = self.inputs.node.default_child
        assert isinstance(bucket, s3.CfnBucket)
        bucket.add_property_override("NotificationConfiguration.EventBridgeConfiguration.EventBridgeEnabled", True)
        self.outputs = self._bucket(
            "Outputs", [s3.LifecycleRule(transitions=[rarely], noncurrent_version_expiration=old)]
        )
        self.artifacts = self._bucket("Artifacts", [s3.LifecycleRule(noncurrent_version_expiration=old)])
        CfnOutput(self, "ArtifactsBucket", value=self.artifacts.bucket_name)

    def _bucket(self, name: str, rules: list[s3.LifecycleRule]) -> s3.Bucket:
        return s3.Bucket(
            self,
            name,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self._key,
            bucket_key_enabled=True,
            server_access_logs_bucket=self.logs,
            server_access_logs_prefix=f"{name.lower()}/",
            # What a killed upload leaves behind is paid for, and seen by nobody.
            lifecycle_rules=[*rules, s3.LifecycleRule(abort_incomplete_multipart_upload_after=Duration.days(7))],
            **self._common(),
        )

    def _common(self) -> dict[str, Any]:
        return {
            "block_public_access": s3.BlockPublicAccess.BLOCK_ALL,
            "object_ownership": s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            "enforce_ssl": True,
            "minimum_tls_version": 1.2,
            "versioned": True,
            "removal_policy": self._keep,
        }
