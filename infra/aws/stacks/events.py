"""Runs by event: a video in the input bucket, EventBridge, a queue, and the handler that asks Prefect for a run."""

from __future__ import annotations

import json
from typing import Any, Final

from aws_cdk import Duration, Stack
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as alarm_actions
from aws_cdk import aws_codedeploy as codedeploy
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_lambda as functions
from aws_cdk import aws_lambda_event_sources as sources
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sqs as sqs
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.release import handler_key
from infra.aws.stacks.data import local_secret
from infra.aws.stacks.keeping import removal, retention
from infra.aws.stacks.network import NetworkStack
from infra.aws.stacks.orchestrator import BLOCK, OrchestratorStack
from infra.aws.stacks.roles import allow, local_key, service_role, use_of
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import RESULTS, UPLOADS, StorageStack

#: As infra/aws/lambda/README.md asks: ten messages in two minutes; given out again after six times that, five times.
_BATCH: Final = 10
_TIMEOUT: Final = Duration.seconds(120)
_VISIBILITY: Final = Duration.seconds(6 * 120)
_ATTEMPTS: Final = 5

#: Of the version that gets the events.
_ALIAS: Final = "live"

#: Handlers at a time: the API answers them, and nobody waits for them.
_SIDE_BY_SIDE: Final = 5


class EventsStack(Stack):
    """The way of an event.

    Attributes:
        queue: Of events that wait.
        dead: Of those that failed too often.
    """

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        network: NetworkStack,
        storage: StorageStack,
        orchestrator: OrchestratorStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        self._profile = profile
        self._messages = local_key(self, "MessagesKey", security.messages)
        self._records = local_key(self, "RecordsKey", security.records)
        encrypted = {"encryption": sqs.QueueEncryption.KMS, "encryption_master_key": self._messages}
        self.dead = sqs.Queue(self, "Dead", retention_period=Duration.days(14), enforce_ssl=True, **encrypted)
        self.queue = sqs.Queue(
            self,
            "Uploads",
            visibility_timeout=_VISIBILITY,
            retention_period=Duration.days(14),
            dead_letter_queue=sqs.DeadLetterQueue(queue=self.dead, max_receive_count=_ATTEMPTS),
            enforce_ssl=True,
            **encrypted,
        )
        events.Rule(
            self,
            "Uploaded",
            description="A video arrived in the input bucket",
            event_pattern=events.EventPattern(
                source=["aws.s3"],
                detail_type=["Object Created"],
                detail={
                    "bucket": {"name": [storage.inputs.bucket_name]},
                    "object": {"key": [{"prefix": f"{UPLOADS}/"}]},
                },
            ),
            targets=[targets.SqsQueue(self.queue, dead_letter_queue=self.dead)],
        )
        handler = self._handler(network, storage, orchestrator)
        alias = functions.Alias(
            self,
            "Live",
            alias_name=_ALIAS,
            version=handler.current_version,
            provisioned_concurrent_executions=profile.warm_functions or None,
        )
        alias.add_event_source(
            sources.SqsEventSource(
                self.queue, batch_size=_BATCH, report_batch_item_failures=True, max_concurrency=_SIDE_BY_SIDE
            )
        )
        self._roll_out(handler, alias, security)

    def _handler(
        self, network: NetworkStack, storage: StorageStack, orchestrator: OrchestratorStack
    ) -> functions.Function:
        secret = local_secret(self, "ApiPassword", orchestrator.api_secret)
        group = logs.LogGroup(
            self,
            "Logs",
            encryption_key=self._messages,
            retention=retention(self._profile),
            removal_policy=removal(self._profile),
        )
        interfaces = ["ec2:CreateNetworkInterface", "ec2:DescribeNetworkInterfaces", "ec2:DeleteNetworkInterface"]
        role = service_role(
            self,
            "HandlerRole",
            "lambda.amazonaws.com",
            [
                allow(["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"], [self.queue.queue_arn]),
                allow(["sqs:SendMessage"], [self.dead.queue_arn]),
                allow(["secretsmanager:GetSecretValue"], [secret.secret_arn]),
                allow(["logs:CreateLogStream", "logs:PutLogEvents"], [group.log_group_arn]),
                # Neither has a resource: what connects a function to a network, and traces.
                allow([*interfaces, "ec2:AssignPrivateIpAddresses", "ec2:UnassignPrivateIpAddresses"], ["*"]),
                allow(["xray:PutTraceSegments", "xray:PutTelemetryRecords"], ["*"]),
                use_of(self._messages),
                use_of(self._records),
            ],
        )
        return functions.Function(
            self,
            "Handler",
            description="Asks Prefect for a run for each uploaded video",
            runtime=functions.Runtime.PYTHON_3_14,
            architecture=functions.Architecture.ARM_64,
            # Put there before this stack, by infra/aws/deploy.py. Another code has another key, which makes a version.
            code=functions.Code.from_bucket(storage.artifacts, handler_key()),
            handler="handler.handler",
            timeout=_TIMEOUT,
            memory_size=256,
            dead_letter_queue=self.dead,  # Of events that somebody gives it without the queue.
            reserved_concurrent_executions=2 * _SIDE_BY_SIDE,
            vpc=network.vpc,
            vpc_subnets=network.nodes,
            security_groups=[network.known(self, network.api_clients)],
            role=role,
            log_group=group,
            tracing=functions.Tracing.ACTIVE,
            environment_encryption=self._records,
            environment={
                "PREFECT_API_URL": orchestrator.api_url,
                "SUPERRES_API_SECRET": secret.secret_arn,
                "SUPERRES_DEPLOYMENT": "upscale-video/slurm",
                "SUPERRES_DESTINATION": f"s3://{storage.outputs.bucket_name}/{RESULTS}",
                "SUPERRES_INPUT_PREFIX": UPLOADS,
                "SUPERRES_OWNER_FROM_KEY": "1",  # Where the portal has people upload to.
                "SUPERRES_OPTIONS": json.dumps({"store": BLOCK, "ledger": BLOCK}),
            },
        )

    def _roll_out(self, handler: functions.Function, alias: functions.Alias, security: SecurityStack) -> None:
        """A new version gets a tenth of the events for five minutes, and all of them unless it fails."""
        called = f"superres-{self._profile.name}-handler-failing"
        failing = cloudwatch.Alarm(
            self,
            "Failing",
            alarm_name=called,
            alarm_description="The event handler fails; a version that is rolled out is rolled back",
            metric=alias.metric_errors(period=Duration.minutes(1), statistic="Sum"),
            threshold=1,
            evaluation_periods=1,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        failing.add_alarm_action(alarm_actions.SnsAction(security.alarms))
        # Named, not referred to: alias and alarm wait for the deployment group, which waits for this.
        alarm = f"arn:{self.partition}:cloudwatch:{self.region}:{self.account}:alarm:{called}"
        role = service_role(
            self,
            "RolloutRole",
            "codedeploy.amazonaws.com",
            [
                allow(
                    ["lambda:GetAlias", "lambda:UpdateAlias", "lambda:GetProvisionedConcurrencyConfig"],
                    [handler.function_arn, f"{handler.function_arn}:{_ALIAS}"],
                ),
                allow(["cloudwatch:DescribeAlarms"], [alarm]),
            ],
        )
        codedeploy.LambdaDeploymentGroup(
            self,
            "Rollout",
            alias=alias,
            deployment_config=codedeploy.LambdaDeploymentConfig.CANARY_10_PERCENT_5_MINUTES,
            alarms=[failing],
            auto_rollback=codedeploy.AutoRollbackConfig(failed_deployment=True, deployment_in_alarm=True),
            role=role,
        )
