"""Prefect on Fargate: UI and portal for people who sign in with Cognito, the API for nodes and event handlers."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import CfnOutput, CfnParameter, Fn, Stack
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elb
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.aws.profiles import NAMESPACE, Profile
from infra.aws.stacks.data import DataStack
from infra.aws.stacks.entrance import SignIn, add_firewall, add_names, internal_balancer, sign_in
from infra.aws.stacks.keeping import removal, retention
from infra.aws.stacks.lustre import INPUTS, MOUNT
from infra.aws.stacks.network import API_PORT, PORTAL_PORT, SERVER_PORT, UI_PORT, NetworkStack
from infra.aws.stacks.registry import RegistryStack
from infra.aws.stacks.roles import allow, local_key, service_role, use_of
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.servers import Fleet, Server, prefect_server, target_group
from infra.aws.stacks.storage import UPLOADS, StorageStack

#: Names of the blocks that describe this installation to flows and portal.
BLOCK: Final = "aws"

#: Whoever starts tasks of Fargate, and runs in them.
_TASKS: Final = "ecs-tasks.amazonaws.com"


class OrchestratorStack(Stack):
    """Load balancer, sign-in, and the services behind it.

    Attributes:
        api_url: Of the Prefect API, for nodes and event handlers.
        api_secret: What the API is opened with.
        portal_url: Where owners get their results.
        balancer: The load balancer.
        api_targets: The API servers behind it.
    """

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        network: NetworkStack,
        storage: StorageStack,
        data: DataStack,
        registry: RegistryStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        self._profile, self._network, self._data, self._storage = profile, network, data, storage
        self._records = local_key(self, "RecordsKey", security.records)
        self._media = local_key(self, "MediaKey", security.media)
        messages = local_key(self, "MessagesKey", security.messages)
        self._domain = CfnParameter(
            self, "Domain", description="Domain in which prefect., media. and api. are made, such as video.example.com"
        ).value_as_string
        certificate = CfnParameter(
            self, "CertificateArn", description="Certificate (ACM, this region) for *. of the domain"
        ).value_as_string
        release = CfnParameter(
            self, "Release", description="Tag of the images in the registry that run"
        ).value_as_string
        self.api_url = Fn.join("", ["https://api.", self._domain, f":{API_PORT}/api"])
        self.portal_url = Fn.join("", ["https://media.", self._domain])
        self.api_secret = secretsmanager.Secret(
            self,
            "ApiPassword",
            description="What the Prefect API is opened with",
            encryption_key=self._records,
            # One string: the API knows no users. Without signs, so that it needs no quoting anywhere.
            generate_secret_string=secretsmanager.SecretStringGenerator(password_length=48, exclude_punctuation=True),
        )
        self._logs = logs.LogGroup(
            self,
            "Logs",
            encryption_key=messages,
            retention=retention(profile),
            removal_policy=removal(profile),
        )
        self.balancer = internal_balancer(self, network, storage.logs)
        add_firewall(self, profile, self.balancer, messages)
        self._add_doors(acm.Certificate.from_certificate_arn(self, "Certificate", certificate))
        fleet = Fleet(
            self,
            network,
            ecs.Cluster(self, "Servers", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENABLED),
            registry.repositories,
            release,
            self._start_role(registry),
            self._logs,
            f"superres-{profile.name}",
        )
        self._run_servers(fleet)
        CfnOutput(self, "ApiUrl", value=self.api_url)
        CfnOutput(self, "Blocks", value=self._blocks(), description="The blocks of this installation")

    def _blocks(self) -> str:
        """Blocks of this installation, as `superres blocks save` reads them and login nodes are given them."""
        uploads = f"s3://{self._storage.inputs.bucket_name}/{UPLOADS}"
        return Fn.join(
            "\n",
            [
                f"[media-store.{BLOCK}]",
                f'mounts = {{ "{uploads}" = "{MOUNT}{INPUTS}" }}',
                f"[job-ledger.{BLOCK}]",
                f'table = "{self._data.ledger.table_name}"',
                f'namespace = "{NAMESPACE}"',
                f'portal = "{self.portal_url}"',
            ],
        )

    # What containers may do.

    def _start_role(self, registry: RegistryStack) -> iam.IRole:
        """Of whoever fetches the images, reads the secrets and opens the logs before a container starts."""
        secrets = [self.api_secret.secret_arn, self._data.prefect_secret.secret_arn]
        if self._data.cache_secret is not None:
            secrets.append(self._data.cache_secret.secret_arn)
        pull = ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"]
        return service_role(
            self,
            "StartRole",
            _TASKS,
            [
                allow(["ecr:GetAuthorizationToken"], ["*"]),  # It has no resource.
                allow(pull, [repository.repository_arn for repository in registry.repositories.values()]),
                allow(["logs:CreateLogStream", "logs:PutLogEvents"], [self._logs.log_group_arn]),
                allow(["secretsmanager:GetSecretValue"], secrets),
                use_of(self._records),
            ],
        )

    def _portal_role(self) -> iam.IRole:
        """Of the portal, whose links and tickets can do no more than it may itself."""
        table = self._data.ledger.table_arn
        return service_role(
            self,
            "PortalRole",
            _TASKS,
            [
                allow(["dynamodb:GetItem", "dynamodb:Query"], [table, f"{table}/index/*"]),
                allow(["s3:PutObject"], [self._storage.inputs.arn_for_objects(f"{UPLOADS}/*")]),
                allow(["s3:GetObject", "s3:GetObjectVersion"], [self._storage.outputs.arn_for_objects("*")]),
                use_of(self._media),
                use_of(self._records),
            ],
        )

    # What runs.

    def _add_doors(self, certificate: acm.ICertificate) -> None:
        """One port for machines, one for people, who sign in as operators or as owners of videos."""
        self.api_targets = target_group(self, self._network, "Api", SERVER_PORT, "/api/health")
        self._portal_targets = target_group(self, self._network, "Portal", PORTAL_PORT, "/health")
        self._ui_targets = self.api_targets
        if self._profile.ui_servers:
            self._ui_targets = target_group(self, self._network, "Ui", SERVER_PORT, "/api/health")
        secure = {
            "protocol": elb.ApplicationProtocol.HTTPS,
            "certificates": [certificate],
            "ssl_policy": elb.SslPolicy.TLS13_RES,
            "open": False,
        }
        forward = elb.ListenerAction.forward([self.api_targets])
        self.balancer.add_listener("Nodes", port=API_PORT, default_action=forward, **secure)
        nothing = elb.ListenerAction.fixed_response(404, content_type="text/plain", message_body="Nothing here")
        people = self.balancer.add_listener("People", port=UI_PORT, default_action=nothing, **secure)
        self._owners = self._let_in(people, 2, "Owners", "media", self._portal_targets)
        self._let_in(people, 1, "Operators", "prefect", self._ui_targets)
        add_names(self, self._domain, self._network, self.balancer)

    def _let_in(
        self,
        listener: elb.ApplicationListener,
        priority: int,
        who: str,
        host: str,
        group: elb.ApplicationTargetGroup,
    ) -> SignIn:
        name = Fn.join("", [f"{host}.", self._domain])
        signed_in = sign_in(self, self._profile, who, Fn.join("", ["https://", name]))
        listener.add_action(
            who,
            priority=priority,
            conditions=[elb.ListenerCondition.host_headers([name])],
            action=signed_in.then(group),
        )
        CfnOutput(self, f"{who}Pool", value=signed_in.pool.user_pool_id)
        return signed_in

    def _run_servers(self, fleet: Fleet) -> None:
        several = self._profile.has_cache
        role = service_role(self, "ServerRole", _TASKS, [])
        start = ["prefect", "server", "start", "--host", "0.0.0.0", "--port", str(SERVER_PORT)]
        start += ["--no-services"] if several else []
        shown = {"PREFECT_UI_API_URL": Fn.join("", ["https://prefect.", self._domain, "/api"])}
        password = {"PREFECT_SERVER_API_AUTH_STRING": ecs.Secret.from_secrets_manager(self.api_secret)}

        def server(
            name: str, command: list[str], count: int, secrets: dict[str, ecs.Secret], *, migrates: bool = not several
        ) -> Server:
            return prefect_server(self, self._data, name, command, role, count, shown, secrets, migrates=migrates)

        fleet.run(server("api", start, self._profile.api_servers, password), SERVER_PORT, self.api_targets)
        if self._profile.ui_servers:
            # Whoever gets this far has signed in, and no way but through the load balancer leads here: it asks for no
            # password of its own, unlike the API.
            fleet.run(server("ui", start, self._profile.ui_servers, {}), SERVER_PORT, self._ui_targets)
        if several:
            # The database is brought up to date by the one that there is one of.
            work = ["sh", "-c", "prefect server database upgrade --yes && exec prefect server services start"]
            fleet.run(server("background", work, 1, {}, migrates=True))
        fleet.run(self._portal(), PORTAL_PORT, self._portal_targets)

    def _portal(self) -> Server:
        command = ["python", "-m", "deployments.portal", "--host", "0.0.0.0", "--port", str(PORTAL_PORT)]
        command += ["--uploads", f"s3://{self._storage.inputs.bucket_name}/{UPLOADS}"]
        command += ["--store", BLOCK, "--ledger", BLOCK]
        command += ["--load-balancer", self.balancer.load_balancer_arn]
        command += ["--issuer", self._owners.pool.user_pool_provider_url]
        command += ["--client", self._owners.client.user_pool_client_id]
        return Server(
            "portal",
            "worker",
            command,
            {
                "PREFECT_HOME": "/tmp/prefect",
                "SUPERRES_HOME": "/tmp/superres",
                "PREFECT_API_URL": self.api_url,
                "AWS_DEFAULT_REGION": self.region,
            },
            {"PREFECT_API_AUTH_STRING": ecs.Secret.from_secrets_manager(self.api_secret)},
            self._portal_role(),
            self._profile.portal_servers,
            cpu=512,
            memory=1024,
        )
