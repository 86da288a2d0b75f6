"""Records: the job ledger in DynamoDB, Prefect's PostgreSQL, Slurm's MySQL, and the cache between Prefect servers."""

from __future__ import annotations

import json
from typing import Any

from aws_cdk import Duration, RemovalPolicy, Stack
from aws_cdk import aws_backup as backup
from aws_cdk import aws_dynamodb as dynamodb
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_elasticache as elasticache
from aws_cdk import aws_events as events
from aws_cdk import aws_iam as iam
from aws_cdk import aws_rds as rds
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.aws.profiles import MYSQL, POSTGRESQL, VALKEY, Profile
from infra.aws.stacks.keeping import removal
from infra.aws.stacks.network import CACHE_PORT, MYSQL_PORT, POSTGRESQL_PORT, NetworkStack
from infra.aws.stacks.roles import allow, local_key, service_role
from infra.aws.stacks.security import SecurityStack
from tasks.ledger import table as ledger


class DataStack(Stack):
    """Everything whose loss would be one, and how it is kept.

    Attributes:
        ledger: The table of `tasks.ledger`.
        prefect: Prefect's database.
        prefect_secret: User and password of it.
        accounting: Slurm's database.
        accounting_secret: Password of its user `slurm`.
        cache_host: Of the cache; empty without one.
        cache_secret: Password of the cache.
    """

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        network: NetworkStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        self._profile = profile
        self._network = network
        self._key = local_key(self, "RecordsKey", security.records)
        self._keep = removal(profile)
        self.ledger = self._ledger()
        self._monitoring = service_role(
            self,
            "MonitoringRole",
            "monitoring.rds.amazonaws.com",
            [
                allow(
                    ["logs:CreateLogGroup", "logs:PutRetentionPolicy", "logs:CreateLogStream", "logs:PutLogEvents",
                     "logs:DescribeLogStreams", "logs:GetLogEvents"],
                    [f"arn:{self.partition}:logs:{self.region}:{self.account}:log-group:RDSOSMetrics:*"],
                )
            ],
        )  # fmt: skip
        self.prefect_secret = self._secret("PrefectUser", "prefect")
        self.prefect = self._database(
            "Prefect",
            rds.DatabaseClusterEngine.aurora_postgres(
                version=rds.AuroraPostgresEngineVersion.of(POSTGRESQL, POSTGRESQL.split(".")[0])
            ),
            "prefect",
            rds.Credentials.from_secret(self.prefect_secret),
            network.database,
            POSTGRESQL_PORT,
            profile.database_readers,
            logs=["postgresql"],
            parameters={"log_statement": "ddl", "log_min_duration_statement": "1000", "rds.force_ssl": "1"},
        )
        # As plain text: ParallelCluster takes no other.
        self.accounting_secret = secretsmanager.Secret(
            self,
            "AccountingPassword",
            encryption_key=self._key,
            generate_secret_string=secretsmanager.SecretStringGenerator(password_length=32, exclude_punctuation=True),
            removal_policy=self._keep,
        )
        self.accounting = self._database(
            "Accounting",
            rds.DatabaseClusterEngine.aurora_mysql(
                version=rds.AuroraMysqlEngineVersion.of(f"8.0.mysql_aurora.{MYSQL}")
            ),
            "slurm",
            rds.Credentials.from_password("slurm", self.accounting_secret.secret_value),
            network.accounting,
            MYSQL_PORT,
            profile.accounting_instances - 1,
            logs=["audit", "error", "general", "slowquery"],
            parameters={
                "require_secure_transport": "ON",
                "server_audit_logging": "1",
                "server_audit_events": "CONNECT,QUERY_DCL,QUERY_DDL",
                "general_log": "1",
                "slow_query_log": "1",
                # What slurmdbd asks of its database before it starts.
                "innodb_lock_wait_timeout": "900",
            },
        )
        self.cache_host = ""
        self.cache_secret: secretsmanager.Secret | None = None
        if profile.has_cache:
            self._add_cache()
        self._back_up()

    def _ledger(self) -> dynamodb.Table:
        text, number = dynamodb.AttributeType.STRING, dynamodb.AttributeType.NUMBER
        table = dynamodb.Table(
            self,
            "Ledger",
            partition_key=dynamodb.Attribute(name=ledger.KEY, type=text),
            time_to_live_attribute=ledger.TIME_TO_LIVE,
            billing_mode=dynamodb.BillingMode.PAY_PER_REQUEST,
            encryption=dynamodb.TableEncryption.CUSTOMER_MANAGED,
            encryption_key=self._key,
            point_in_time_recovery_specification=dynamodb.PointInTimeRecoverySpecification(
                point_in_time_recovery_enabled=True
            ),
            deletion_protection=self._profile.keep_data,
            removal_policy=self._keep,
        )
        for index in ledger.INDEXES:
            table.add_global_secondary_index(
                index_name=index.name,
                partition_key=dynamodb.Attribute(name=index.partition, type=text),
                sort_key=dynamodb.Attribute(name=index.order, type=number),
                projection_type=dynamodb.ProjectionType.ALL,
            )
        return table

    def _secret(self, name: str, user: str) -> secretsmanager.Secret:
        return secretsmanager.Secret(
            self,
            name,
            encryption_key=self._key,
            generate_secret_string=secretsmanager.SecretStringGenerator(
                secret_string_template=json.dumps({"username": user}),
                generate_string_key="password",
                password_length=32,
                exclude_punctuation=True,  # It stands in addresses.
            ),
            removal_policy=self._keep,
        )

    def _database(
        self,
        name: str,
        engine: rds.IClusterEngine,
        database: str,
        credentials: rds.Credentials,
        group: ec2.ISecurityGroup,
        port: int,
        readers: int,
        *,
        logs: list[str],
        parameters: dict[str, str],
    ) -> rds.DatabaseCluster:
        instance = {"enable_performance_insights": True, "performance_insight_encryption_key": self._key}
        least, most = self._profile.database_units
        return rds.DatabaseCluster(
            self,
            name,
            engine=engine,
            credentials=credentials,
            default_database_name=database,
            port=port,
            vpc=self._network.vpc,
            vpc_subnets=self._network.data,
            security_groups=[group],
            writer=rds.ClusterInstance.serverless_v2("Writer", **instance),
            readers=[
                # Of the capacity of the writer, so that it can take over at once.
                rds.ClusterInstance.serverless_v2(f"Reader{number}", scale_with_writer=True, **instance)
                for number in range(1, readers + 1)
            ],
            serverless_v2_min_capacity=least,
            serverless_v2_max_capacity=most,
            storage_encrypted=True,
            storage_encryption_key=self._key,
            iam_authentication=True,
            backup=rds.BackupProps(retention=Duration.days(self._profile.backup_days)),
            copy_tags_to_snapshot=True,
            cloudwatch_logs_exports=logs,
            monitoring_interval=Duration.minutes(1),
            monitoring_role=self._monitoring,
            parameter_group=rds.ParameterGroup(
                self, f"{name}Parameters", engine=engine, parameters=parameters, description=name
            ),
            deletion_protection=True,
            removal_policy=RemovalPolicy.SNAPSHOT,
        )

    def _add_cache(self) -> None:
        """A Valkey of two nodes in two zones; what is in it may be lost."""
        self.cache_secret = secretsmanager.Secret(
            self,
            "CachePassword",
            encryption_key=self._key,
            generate_secret_string=secretsmanager.SecretStringGenerator(password_length=64, exclude_punctuation=True),
        )
        subnets = elasticache.CfnSubnetGroup(
            self,
            "CacheSubnets",
            description="Cache between Prefect servers",
            subnet_ids=self._network.vpc.select_subnets(subnet_group_name="Data").subnet_ids,
        )
        group = elasticache.CfnReplicationGroup(
            self,
            "Cache",
            replication_group_description="Cache between Prefect servers",
            engine="valkey",
            engine_version=VALKEY,
            cache_node_type="cache.t4g.small",
            num_cache_clusters=2,
            automatic_failover_enabled=True,
            multi_az_enabled=True,
            port=CACHE_PORT,
            cache_subnet_group_name=subnets.ref,
            security_group_ids=[self._network.cache.security_group_id],
            at_rest_encryption_enabled=True,
            kms_key_id=self._key.key_arn,
            transit_encryption_enabled=True,
            auth_token=self.cache_secret.secret_value.unsafe_unwrap(),  # A reference, which CloudFormation resolves.
            snapshot_retention_limit=self._profile.backup_days,
        )
        self.cache_host = group.attr_primary_end_point_address

    def _back_up(self) -> None:
        """Copies that AWS Backup keeps beside those of the services, out of reach of who may write here."""
        vault = backup.BackupVault(self, "Vault", encryption_key=self._key, removal_policy=RemovalPolicy.RETAIN)
        plan = backup.BackupPlan(
            self,
            "Backups",
            backup_vault=vault,
            backup_plan_rules=[
                backup.BackupPlanRule(
                    rule_name="daily",
                    schedule_expression=events.Schedule.cron(hour="3", minute="30"),
                    delete_after=Duration.days(self._profile.backup_days),
                )
            ],
        )
        role = iam.Role(
            self,
            "BackupRole",
            assumed_by=iam.ServicePrincipal("backup.amazonaws.com"),
            managed_policies=[
                iam.ManagedPolicy.from_aws_managed_policy_name("service-role/AWSBackupServiceRolePolicyForBackup")
            ],
        )
        plan.add_selection(
            "Records",
            role=role.without_policy_updates(),
            resources=[
                backup.BackupResource.from_dynamo_db_table(self.ledger),
                *(backup.BackupResource.from_arn(cluster.cluster_arn) for cluster in (self.prefect, self.accounting)),
            ],
        )


def local_secret(scope: Construct, name: str, secret: secretsmanager.ISecret) -> secretsmanager.ISecret:
    """A secret of another stack, of which only the ARN is known here; see `roles.local_key`."""
    return secretsmanager.Secret.from_secret_complete_arn(scope, name, secret.secret_arn)
