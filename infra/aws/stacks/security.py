"""Keys that all at rest is encrypted with, for media, for records and for messages; and whom alarms are told to."""

from __future__ import annotations

from typing import Any

from aws_cdk import CfnParameter, RemovalPolicy, Stack
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from constructs import Construct

from infra.aws.profiles import Profile


class SecurityStack(Stack):
    """The keys. Who may use them is said in the policies of roles; here only which services may on their own.

    Attributes:
        media: Buckets of videos, and scratch.
        records: Ledger, databases, secrets, images.
        messages: Logs, topics, queues.
        alarms: Topic through which people are told that something is wrong.
    """

    def __init__(self, scope: Construct, name: str, profile: Profile, **options: Any) -> None:
        super().__init__(scope, name, **options)
        self.media = self._key(profile, "Media", "Videos, and what is made of them")
        self.records = self._key(profile, "Records", "Ledger, databases, secrets and images")
        self.messages = self._key(profile, "Messages", "Logs, topics and queues")
        here = f"{self.region}:{self.account}"
        self._let(f"logs.{self.region}.amazonaws.com", ArnLike={
            "kms:EncryptionContext:aws:logs:arn": f"arn:{self.partition}:logs:{here}:*"
        })  # fmt: skip
        self._let("cloudtrail.amazonaws.com", StringLike={
            "kms:EncryptionContext:aws:cloudtrail:arn": f"arn:{self.partition}:cloudtrail:*:{self.account}:trail/*"
        })  # fmt: skip
        for service in ("events", "cloudwatch", "budgets", "backup"):
            self._let(f"{service}.amazonaws.com", StringEquals={"aws:SourceAccount": self.account})

        self.alarms = sns.Topic(self, "Alarms", master_key=self.messages, enforce_ssl=True)
        for service in ("cloudwatch", "budgets"):
            self.alarms.add_to_resource_policy(
                iam.PolicyStatement(
                    principals=[iam.ServicePrincipal(f"{service}.amazonaws.com")],
                    actions=["sns:Publish"],
                    resources=[self.alarms.topic_arn],
                    conditions={"StringEquals": {"aws:SourceAccount": self.account}},
                )
            )
        address = CfnParameter(self, "AlarmAddress", description="E-mail address that alarms go to").value_as_string
        self.alarms.add_subscription(subscriptions.EmailSubscription(address))
        # Scratch shows what lies in buckets: it reads them as a role of its own, which has no policy of ours.
        self.media.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.AccountRootPrincipal()],
                actions=["kms:Decrypt", "kms:GenerateDataKey", "kms:DescribeKey"],
                resources=["*"],
                conditions={
                    "ArnLike": {
                        "aws:PrincipalArn": f"arn:{self.partition}:iam::{self.account}:role/aws-service-role/"
                        "s3.data-source.lustre.fsx.amazonaws.com/AWSServiceRoleForFSxS3Access_*"
                    }
                },
            )
        )

    def _key(self, profile: Profile, name: str, description: str) -> kms.Key:
        return kms.Key(
            self,
            name,
            alias=f"superres/{profile.name}/{name.lower()}",
            description=description,
            enable_key_rotation=True,
            # A key that is gone takes everything with it, also in an installation that keeps nothing.
            removal_policy=RemovalPolicy.RETAIN,
        )

    def _let(self, service: str, **conditions: Any) -> None:
        self.messages.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.ServicePrincipal(service)],
                actions=["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*", "kms:DescribeKey"],
                resources=["*"],  # In the policy of a key this is the key.
                conditions=conditions,
            )
        )
