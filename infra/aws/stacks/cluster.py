"""The cluster, with a standby if wanted: ParallelCluster's own resource, configured by `infra.aws.cluster`."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import Aws, CfnParameter, CfnStack, CustomResource, Fn, SecretValue, Stack
from aws_cdk import aws_iam as iam
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.aws.cluster import PARALLELCLUSTER_VERSION, Accounting, Site, cluster_configuration, standby_site
from infra.aws.cluster.configuration import BLOCKS
from infra.aws.profiles import NAMESPACE, Profile
from infra.aws.stacks.data import DataStack, local_secret
from infra.aws.stacks.lustre import MOUNT, WEIGHTS, LustreStack
from infra.aws.stacks.network import MYSQL_PORT, NetworkStack
from infra.aws.stacks.orchestrator import BLOCK, OrchestratorStack
from infra.aws.stacks.roles import allow, local_key, use_of
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import MODELS, RESULTS, UPLOADS, StorageStack

#: Objects of the artifacts bucket: scripts of nodes.
_SCRIPTS: Final = "bootstrap/*"


class ClusterStack(Stack):
    """One cluster, or two in different zones.

    Attributes:
        names: Of the clusters.
    """

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        network: NetworkStack,
        storage: StorageStack,
        lustre: LustreStack,
        data: DataStack,
        orchestrator: OrchestratorStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        self._profile, self._storage, self._data = profile, storage, data
        self._media = local_key(self, "MediaKey", security.media)
        self._records = local_key(self, "RecordsKey", security.records)
        release = CfnParameter(
            self, "Release", description="Environment below /fsx/envs that nodes run; the head node makes it"
        ).value_as_string
        first = CfnParameter(
            self,
            "FirstRelease",
            description="Release that the clusters were made with: what nodes that stay start with",
        ).value_as_string
        settings = self._settings(orchestrator)
        nodes = iam.ManagedPolicy(self, "NodePolicy", statements=self._node_rights(settings))
        head = iam.ManagedPolicy(self, "HeadPolicy", statements=self._head_rights())
        subnets = network.vpc.select_subnets(subnet_group_name="Nodes").subnet_ids
        site = Site(
            region=profile.region,
            head_subnet=subnets[0],
            compute_subnets=tuple(subnets),
            login_subnets=tuple(subnets[: profile.login_zones]),
            file_system_id=lustre.file_system_id,
            lustre_client_group=network.lustre_clients.security_group_id,
            artifacts_bucket=storage.artifacts.bucket_name,
            release=release,
            first_release=first,
            worker_settings_secret=settings.secret_arn,
            blocks=f"s3://{storage.artifacts.bucket_name}/{BLOCKS}",
            accounting=Accounting(
                host=data.accounting.cluster_endpoint.hostname,
                password_secret=data.accounting_secret.secret_arn,
                port=MYSQL_PORT,
                client_group=network.accounting_clients.security_group_id,
            ),
            api_client_group=network.api_clients.security_group_id,
            policies=(nodes.managed_policy_arn,),
            head_policies=(head.managed_policy_arn,),
            log_days=profile.log_days,
            partition=Aws.PARTITION,
            tags=tuple(profile.tags.items()),
        )
        provider = self._provider([nodes, head])
        sites = {"a": site}
        if profile.standby:
            sites["b"] = standby_site(site, subnets[1])
        self.names = []
        for letter, each in sites.items():
            called = f"superres-{profile.name}-{letter}"
            self.names.append(called)
            CustomResource(
                self,
                f"Cluster{letter.upper()}",
                service_token=provider.get_att("Outputs.ServiceToken").to_string(),
                resource_type="Custom::PclusterCluster",
                properties={
                    "ClusterName": called,
                    "ClusterConfiguration": cluster_configuration(profile.queues, each, profile.queues_name),
                    # Running jobs outlive a mistake with a stack.
                    "DeletionPolicy": "Retain" if profile.keep_data else "Delete",
                },
            )

    def _provider(self, policies: list[iam.ManagedPolicy]) -> CfnStack:
        """ParallelCluster as a resource of CloudFormation: a function of AWS with its own rights, and a few of ours."""
        artifacts = self._storage.artifacts
        ours = iam.ManagedPolicy(
            self,
            "ProviderPolicy",
            statements=[
                # Policies of ours, and roles of its own, alone.
                allow(
                    ["iam:AttachRolePolicy", "iam:DetachRolePolicy"],
                    [f"arn:{self.partition}:iam::{self.account}:role/parallelcluster/*"],
                    ArnEquals={"iam:PolicyARN": [policy.managed_policy_arn for policy in policies]},
                ),
                allow(
                    [
                        "s3:ListBucket",
                        "s3:GetBucketLocation",
                        "s3:GetBucketVersioning",
                        "s3:GetEncryptionConfiguration",
                    ],
                    [artifacts.bucket_arn],
                ),
                allow(
                    [
                        "s3:GetObject",
                        "s3:GetObjectVersion",
                        "s3:PutObject",
                        "s3:DeleteObject",
                        "s3:DeleteObjectVersion",
                    ],
                    [artifacts.arn_for_objects("parallelcluster/*"), artifacts.arn_for_objects(_SCRIPTS)],
                ),
                allow(["secretsmanager:DescribeSecret"], [self._data.accounting_secret.secret_arn]),
                use_of(self._media),
            ],
        )
        template = (
            f"https://{self.region}-aws-parallelcluster.s3.{self.region}.{self.url_suffix}/parallelcluster/"
            f"{PARALLELCLUSTER_VERSION}/templates/custom_resource/cluster.yaml"
        )
        return CfnStack(
            self,
            "Provider",
            template_url=template,
            parameters={"AdditionalIamPolicies": ours.managed_policy_arn},
        )

    def _settings(self, orchestrator: OrchestratorStack) -> secretsmanager.Secret:
        """`/etc/superres/environment` of the login nodes; see deployments/systemd."""
        password = local_secret(self, "ApiPassword", orchestrator.api_secret)
        lines = {
            "PREFECT_API_URL": orchestrator.api_url,
            # A reference that CloudFormation resolves: the password is in no template.
            "PREFECT_API_AUTH_STRING": password.secret_value.unsafe_unwrap(),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "SUPERRES_HOME": f"{MOUNT}/superres/home",
            "SUPERRES_SCRATCH": f"{MOUNT}/superres/scratch",
            "SUPERRES_MODEL_DIR": f"{MOUNT}{WEIGHTS}",
            "SUPERRES_STORE": BLOCK,
            "SUPERRES_LEDGER": BLOCK,
            "SUPERRES_LIBRARY": f"s3://{self._storage.inputs.bucket_name}/{UPLOADS}",
            "SUPERRES_LIBRARY_RESULTS": f"s3://{self._storage.outputs.bucket_name}/{RESULTS}",
            "AWS_DEFAULT_REGION": self.region,
        }
        text = Fn.join("\n", [Fn.join("=", [key, value]) for key, value in lines.items()])
        return secretsmanager.Secret(
            self,
            "WorkerSettings",
            description="Settings of the Prefect workers on login nodes",
            encryption_key=self._records,
            secret_string_value=SecretValue.unsafe_plain_text(text),
        )

    def _node_rights(self, settings: secretsmanager.Secret) -> list[iam.PolicyStatement]:
        """What runs, workers and the command line on nodes may do."""
        inputs, outputs, artifacts = self._storage.inputs, self._storage.outputs, self._storage.artifacts
        table = self._data.ledger.table_arn
        buckets = [inputs.bucket_arn, outputs.bucket_arn, artifacts.bucket_arn]
        return [
            allow(["s3:ListBucket", "s3:ListBucketVersions", "s3:GetBucketLocation"], buckets),
            allow(
                ["s3:GetObject", "s3:GetObjectVersion", "s3:GetObjectAttributes", "s3:GetObjectVersionAttributes"],
                [inputs.arn_for_objects("*"), outputs.arn_for_objects("*")],
            ),
            allow(
                ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
                [outputs.arn_for_objects("*")],
            ),
            allow(
                ["s3:GetObject"],
                [artifacts.arn_for_objects(key) for key in (_SCRIPTS, BLOCKS, f"{MODELS}/*")],
            ),
            allow(
                ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:DeleteItem", "dynamodb:Query"],
                [table, f"{table}/index/*"],
            ),
            # It has no resource.
            allow(["cloudwatch:PutMetricData"], ["*"], StringEquals={"cloudwatch:namespace": NAMESPACE}),
            allow(["secretsmanager:GetSecretValue"], [settings.secret_arn]),
            use_of(self._media),
            use_of(self._records),
        ]

    def _head_rights(self) -> list[iam.PolicyStatement]:
        """What the head node may do beyond what ParallelCluster gives it."""
        return [
            allow(["s3:GetObject"], [self._storage.artifacts.arn_for_objects(_SCRIPTS)]),
            allow(["secretsmanager:GetSecretValue"], [self._data.accounting_secret.secret_arn]),
            use_of(self._media),
            use_of(self._records),
        ]
