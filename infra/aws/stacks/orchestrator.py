"""Prefect on Fargate: UI and portal for people who sign in with Cognito, the API for nodes and event handlers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from aws_cdk import CfnOutput, CfnParameter, Duration, Fn, RemovalPolicy, Stack
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_cognito as cognito
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elb
from aws_cdk import aws_elasticloadbalancingv2_actions as actions
from aws_cdk import aws_logs as logs
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_route53_targets as targets
from aws_cdk import aws_secretsmanager as secretsmanager
from aws_cdk import aws_wafv2 as waf
from constructs import Construct

from infra.aws.profiles import NAMESPACE, Profile
from infra.aws.stacks.data import DataStack, local_secret
from infra.aws.stacks.lustre import INPUTS, MOUNT
from infra.aws.stacks.network import (
    API_PORT,
    CACHE_PORT,
    PORTAL_PORT,
    POSTGRESQL_PORT,
    SERVER_PORT,
    UI_PORT,
    NetworkStack,
    retention,
)
from infra.aws.stacks.registry import RegistryStack
from infra.aws.stacks.roles import allow, local_key, service_role, use_of
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import UPLOADS, StorageStack

#: Names of the blocks that describe this installation to flows and portal.
BLOCK: Final = "aws"

#: Whoever starts tasks of Fargate, and runs in them.
_TASKS: Final = "ecs-tasks.amazonaws.com"


@dataclass(frozen=True)
class Server:
    """A service of Fargate: the same container some times over.

    Attributes:
        name: Of the service.
        image: Repository of its image.
        command: What runs.
        environment: Settings.
        secrets: Settings whose values are in secrets.
        role: What it may do.
        count: Containers.
        cpu: Thousandths of a CPU.
        memory: MB.
    """

    name: str
    image: str
    command: list[str]
    environment: dict[str, str]
    secrets: dict[str, ecs.Secret]
    role: Any
    count: int
    cpu: int = 1024
    memory: int = 2048


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
        self._profile, self._network, self._data, self._registry = profile, network, data, registry
        self._storage = storage
        self._records = local_key(self, "RecordsKey", security.records)
        self._media = local_key(self, "MediaKey", security.media)
        self._messages = local_key(self, "MessagesKey", security.messages)
        self._database_user = local_secret(self, "DatabaseUser", data.prefect_secret)
        self._domain = CfnParameter(
            self, "Domain", description="Domain in which prefect., media. and api. are made, such as video.example.com"
        ).value_as_string
        certificate = CfnParameter(
            self, "CertificateArn", description="Certificate (ACM, this region) for *. of the domain"
        ).value_as_string
        self._release = CfnParameter(
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
            encryption_key=self._messages,
            retention=retention(profile),
            removal_policy=RemovalPolicy.RETAIN if profile.keep_data else RemovalPolicy.DESTROY,
        )
        self._execution = self._execution_role()
        self._cluster = ecs.Cluster(
            self, "Servers", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENABLED
        )
        self.balancer = self._add_balancer(storage)
        self._add_firewall()
        self._add_services(acm.Certificate.from_certificate_arn(self, "Certificate", certificate))
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

    def _execution_role(self) -> Any:
        """Of whoever fetches the images, reads the secrets and opens the logs before a container starts."""
        secrets = [self.api_secret.secret_arn, self._database_user.secret_arn]
        if self._data.cache_secret is not None:
            secrets.append(self._data.cache_secret.secret_arn)
        pull = ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"]
        return service_role(
            self,
            "StartRole",
            _TASKS,
            [
                allow(["ecr:GetAuthorizationToken"], ["*"]),  # It has no resource.
                allow(pull, [repository.repository_arn for repository in self._registry.repositories.values()]),
                allow(["logs:CreateLogStream", "logs:PutLogEvents"], [self._logs.log_group_arn]),
                allow(["secretsmanager:GetSecretValue"], secrets),
                use_of(self._records),
            ],
        )

    def _portal_role(self) -> Any:
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

    # Who comes in.

    def _add_balancer(self, storage: StorageStack) -> elb.ApplicationLoadBalancer:
        balancer = elb.ApplicationLoadBalancer(
            self,
            "Balancer",
            vpc=self._network.vpc,
            vpc_subnets=self._network.nodes,
            internet_facing=False,
            security_group=self._network.known(self, self._network.balancer),
            drop_invalid_header_fields=True,
            deletion_protection=True,
        )
        balancer.log_access_logs(storage.logs, "balancer")
        return balancer

    def _add_firewall(self) -> None:
        """Rules of AWS against what is known to be an attack; nodes send logs of runs, which may look like one."""
        api = waf.CfnWebACL.StatementProperty(
            byte_match_statement=waf.CfnWebACL.ByteMatchStatementProperty(
                field_to_match=waf.CfnWebACL.FieldToMatchProperty(single_header={"Name": "host"}),
                positional_constraint="STARTS_WITH",
                search_string="api.",
                text_transformations=[waf.CfnWebACL.TextTransformationProperty(priority=0, type="LOWERCASE")],
            )
        )
        people = waf.CfnWebACL.StatementProperty(not_statement=waf.CfnWebACL.NotStatementProperty(statement=api))
        wall = waf.CfnWebACL(
            self,
            "Firewall",
            scope="REGIONAL",
            default_action=waf.CfnWebACL.DefaultActionProperty(allow={}),
            visibility_config=_seen("Firewall"),
            rules=[
                waf.CfnWebACL.RuleProperty(
                    name=title,
                    priority=priority,
                    override_action=waf.CfnWebACL.OverrideActionProperty(none={}),
                    visibility_config=_seen(title),
                    statement=waf.CfnWebACL.StatementProperty(
                        managed_rule_group_statement=waf.CfnWebACL.ManagedRuleGroupStatementProperty(
                            vendor_name="AWS", name=f"AWSManagedRules{title}RuleSet", scope_down_statement=scope
                        )
                    ),
                )
                for priority, (title, scope) in enumerate([("KnownBadInputs", None), ("Common", people)])
            ],
        )
        waf.CfnWebACLAssociation(
            self, "FirewallOfBalancer", resource_arn=self.balancer.load_balancer_arn, web_acl_arn=wall.attr_arn
        )
        group = logs.LogGroup(
            self,
            "FirewallLogs",
            log_group_name=f"aws-waf-logs-superres-{self._profile.name}",  # The service takes no other beginning.
            encryption_key=self._messages,
            retention=retention(self._profile),
            removal_policy=RemovalPolicy.DESTROY,
        )
        waf.CfnLoggingConfiguration(
            self, "FirewallLogging", resource_arn=wall.attr_arn, log_destination_configs=[group.log_group_arn]
        )

    def _sign_in(self, people: str, host: str) -> tuple[cognito.UserPool, cognito.UserPoolClient, Any]:
        """Users of one kind, whom an administrator invites, with a second factor."""
        pool = cognito.UserPool(
            self,
            people,
            self_sign_up_enabled=False,
            sign_in_aliases=cognito.SignInAliases(email=True),
            mfa=cognito.Mfa.REQUIRED,
            mfa_second_factor=cognito.MfaSecondFactor(sms=False, otp=True),
            account_recovery=cognito.AccountRecovery.EMAIL_ONLY,
            password_policy=cognito.PasswordPolicy(
                min_length=14,
                require_lowercase=True,
                require_uppercase=True,
                require_digits=True,
                require_symbols=True,
            ),
            feature_plan=cognito.FeaturePlan.PLUS,
            standard_threat_protection_mode=cognito.StandardThreatProtectionMode.FULL_FUNCTION,
            deletion_protection=self._profile.keep_data,
            removal_policy=RemovalPolicy.RETAIN if self._profile.keep_data else RemovalPolicy.DESTROY,
        )
        client = pool.add_client(
            "Balancer",
            generate_secret=True,
            prevent_user_existence_errors=True,
            supported_identity_providers=[cognito.UserPoolClientIdentityProvider.COGNITO],
            o_auth=cognito.OAuthSettings(
                flows=cognito.OAuthFlows(authorization_code_grant=True),
                scopes=[cognito.OAuthScope.OPENID],
                callback_urls=[Fn.join("", [f"https://{host}.", self._domain, "/oauth2/idpresponse"])],
            ),
        )
        domain = pool.add_domain(
            "Domain",
            cognito_domain=cognito.CognitoDomainOptions(
                domain_prefix=f"superres-{self._profile.name}-{people.lower()}-{self.account}"
            ),
        )
        return pool, client, domain

    # What runs.

    def _add_services(self, certificate: acm.ICertificate) -> None:
        profile = self._profile
        api = self._targets("Api", SERVER_PORT, "/api/health")
        portal = self._targets("Portal", PORTAL_PORT, "/health")
        self.api_targets = api
        secure = {
            "protocol": elb.ApplicationProtocol.HTTPS,
            "certificates": [certificate],
            "ssl_policy": elb.SslPolicy.TLS13_RES,
            "open": False,
        }
        self.balancer.add_listener("Nodes", port=API_PORT, default_action=elb.ListenerAction.forward([api]), **secure)
        people = self.balancer.add_listener(
            "People",
            port=UI_PORT,
            default_action=elb.ListenerAction.fixed_response(
                404, content_type="text/plain", message_body="Nothing here"
            ),
            **secure,
        )
        ui = self._targets("Ui", SERVER_PORT, "/api/health") if profile.ui_servers else api
        for priority, (who, host, group) in enumerate((("Operators", "prefect", ui), ("Owners", "media", portal)), 1):
            pool, client, domain = self._sign_in(who, host)
            people.add_action(
                who,
                priority=priority,
                conditions=[elb.ListenerCondition.host_headers([Fn.join("", [f"{host}.", self._domain])])],
                action=actions.AuthenticateCognitoAction(
                    user_pool=pool,
                    user_pool_client=client,
                    user_pool_domain=domain,
                    session_timeout=Duration.hours(8),
                    next=elb.ListenerAction.forward([group]),
                ),
            )
            CfnOutput(self, f"{who}Pool", value=pool.user_pool_id)
            if who == "Owners":
                portal_service = self._portal(pool, client)
        self._add_names()
        several = profile.api_servers > 1
        role = service_role(self, "ServerRole", _TASKS, [])
        services = [] if not several else ["--no-services"]
        password = {"PREFECT_SERVER_API_AUTH_STRING": ecs.Secret.from_secrets_manager(self.api_secret)}
        ui_url = Fn.join("", ["https://prefect.", self._domain, "/api"])
        start = ["prefect", "server", "start", "--host", "0.0.0.0", "--port", str(SERVER_PORT), *services]
        api_server = self._prefect("api", start, role, profile.api_servers, {"PREFECT_UI_API_URL": ui_url}, password)
        self._service(api_server, SERVER_PORT, api)
        if profile.ui_servers:
            # Whoever gets this far has signed in, and no way but through the load balancer leads here: it asks for no
            # password of its own, unlike the API.
            ui_server = self._prefect("ui", start, role, profile.ui_servers, {"PREFECT_UI_API_URL": ui_url}, {})
            self._service(ui_server, SERVER_PORT, ui)
        if several:
            # The database is brought up to date by the one that there is one of.
            work = ["sh", "-c", "prefect server database upgrade --yes && exec prefect server services start"]
            self._service(self._prefect("background", work, role, 1, {}, {}, migrates=True))
        self._service(portal_service, PORTAL_PORT, portal)

    def _prefect(
        self,
        name: str,
        command: list[str],
        role: Any,
        count: int,
        environment: dict[str, str],
        secrets: dict[str, ecs.Secret],
        *,
        migrates: bool = False,
    ) -> Server:
        """A Prefect server, or part of one."""
        user = self._database_user
        settings = {
            "PREFECT_HOME": "/tmp/prefect",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": self._data.prefect.cluster_endpoint.hostname,
            "PREFECT_SERVER_DATABASE_PORT": str(POSTGRESQL_PORT),
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": str(migrates or self._profile.api_servers == 1).lower(),
            **environment,
        }
        hidden = {
            "PREFECT_SERVER_DATABASE_USER": ecs.Secret.from_secrets_manager(user, "username"),
            "PREFECT_SERVER_DATABASE_PASSWORD": ecs.Secret.from_secrets_manager(user, "password"),
            **secrets,
        }
        if self._data.cache_secret is not None:
            settings |= {
                "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
                "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
                "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
                "PREFECT_REDIS_MESSAGING_HOST": self._data.cache_host,
                "PREFECT_REDIS_MESSAGING_PORT": str(CACHE_PORT),
                "PREFECT_REDIS_MESSAGING_SSL": "true",
            }
            password = local_secret(self, f"{name.capitalize()}CachePassword", self._data.cache_secret)
            hidden["PREFECT_REDIS_MESSAGING_PASSWORD"] = ecs.Secret.from_secrets_manager(password)
            # The one address that Prefect wants whole, password included; neither has signs that a shell would see.
            address = "rediss://:$PREFECT_REDIS_MESSAGING_PASSWORD@$PREFECT_REDIS_MESSAGING_HOST:$PREFECT_REDIS_MESSAGING_PORT/1"
            run = command[2] if command[:2] == ["sh", "-c"] else "exec " + " ".join(command)
            command = ["sh", "-c", f"export PREFECT_SERVER_DOCKET_URL={address} && {run}"]
        return Server(name, "server", command, settings, hidden, role, count)

    def _portal(self, pool: cognito.UserPool, client: cognito.UserPoolClient) -> Server:
        command = ["python", "-m", "deployments.portal", "--host", "0.0.0.0", "--port", str(PORTAL_PORT)]
        command += ["--uploads", f"s3://{self._storage.inputs.bucket_name}/{UPLOADS}"]
        command += ["--store", BLOCK, "--ledger", BLOCK]
        command += ["--load-balancer", self.balancer.load_balancer_arn]
        command += ["--issuer", pool.user_pool_provider_url, "--client", client.user_pool_client_id]
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

    def _targets(self, name: str, port: int, health: str) -> elb.ApplicationTargetGroup:
        return elb.ApplicationTargetGroup(
            self,
            name,
            vpc=self._network.vpc,
            port=port,
            protocol=elb.ApplicationProtocol.HTTP,
            target_type=elb.TargetType.IP,
            deregistration_delay=Duration.seconds(30),
            health_check=elb.HealthCheck(path=health, interval=Duration.seconds(15), timeout=Duration.seconds(5)),
        )

    def _service(self, server: Server, port: int = 0, group: elb.ApplicationTargetGroup | None = None) -> None:
        title = server.name.capitalize()
        task = ecs.FargateTaskDefinition(
            self,
            f"{title}Task",
            family=f"superres-{self._profile.name}-{server.name}",
            cpu=server.cpu,
            memory_limit_mib=server.memory,
            execution_role=self._execution,
            task_role=server.role,
            volumes=[ecs.Volume(name="tmp")],
        )
        container = task.add_container(
            server.name,
            image=ecs.ContainerImage.from_ecr_repository(self._registry.repositories[server.image], self._release),
            entry_point=server.command[:1],  # Images may have one of their own.
            command=server.command[1:],
            environment=server.environment,
            secrets=server.secrets,
            readonly_root_filesystem=True,
            logging=ecs.LogDrivers.aws_logs(stream_prefix=server.name, log_group=self._logs),
            port_mappings=[ecs.PortMapping(container_port=port)] if port else None,
        )
        # The images declare it as a volume, or Fargate would let nobody but root write there.
        container.add_mount_points(ecs.MountPoint(container_path="/tmp", source_volume="tmp", read_only=False))
        service = ecs.FargateService(
            self,
            f"{title}Service",
            cluster=self._cluster,
            task_definition=task,
            desired_count=server.count,
            min_healthy_percent=100 if group else 0,
            max_healthy_percent=200 if group else 100,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            assign_public_ip=False,
            vpc_subnets=self._network.nodes,
            security_groups=[self._network.known(self, self._network.servers)],
            health_check_grace_period=Duration.minutes(3) if group else None,
        )
        if group:
            service.attach_to_application_target_group(group)

    def _add_names(self) -> None:
        """Names of the three doors, known inside the network alone."""
        zone = route53.PrivateHostedZone(self, "Zone", zone_name=self._domain, vpc=self._network.vpc)
        target = route53.RecordTarget.from_alias(targets.LoadBalancerTarget(self.balancer))
        for host in ("prefect", "media", "api"):
            route53.ARecord(self, f"{host.capitalize()}Name", zone=zone, record_name=host, target=target)


def _seen(name: str) -> waf.CfnWebACL.VisibilityConfigProperty:
    return waf.CfnWebACL.VisibilityConfigProperty(
        cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=True
    )
