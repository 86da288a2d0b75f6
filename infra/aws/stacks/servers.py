"""What runs on Fargate: servers, their settings, how they are replaced. Part of the orchestrator's stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aws_cdk import Duration
from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elb
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.aws.stacks.data import DataStack, local_secret
from infra.aws.stacks.network import CACHE_PORT, POSTGRESQL_PORT, NetworkStack


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
    role: iam.IRole
    count: int
    cpu: int = 1024
    memory: int = 2048


def prefect_server(
    scope: Construct,
    data: DataStack,
    name: str,
    command: list[str],
    role: iam.IRole,
    count: int,
    environment: dict[str, str],
    secrets: dict[str, ecs.Secret],
    *,
    migrates: bool,
) -> Server:
    """A Prefect server, or part of one.

    Args:
        scope: The stack.
        data: Where its database is, and the cache where there are several servers.
        name: Of the service.
        command: What runs: a program and its arguments, or `sh -c` and a line.
        role: What it may do.
        count: Containers.
        environment: Settings on top of those of every server.
        secrets: The same of those that are in secrets.
        migrates: Whether it is the one that brings the database up to date.
    """
    user = local_secret(scope, f"{name.capitalize()}DatabaseUser", data.prefect_secret)
    settings = {
        "PREFECT_HOME": "/tmp/prefect",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
        "PREFECT_SERVER_DATABASE_HOST": data.prefect.cluster_endpoint.hostname,
        "PREFECT_SERVER_DATABASE_PORT": str(POSTGRESQL_PORT),
        "PREFECT_SERVER_DATABASE_NAME": "prefect",
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": str(migrates).lower(),
        **environment,
    }
    hidden = {
        "PREFECT_SERVER_DATABASE_USER": ecs.Secret.from_secrets_manager(user, "username"),
        "PREFECT_SERVER_DATABASE_PASSWORD": ecs.Secret.from_secrets_manager(user, "password"),
        **secrets,
    }
    if data.cache_secret is not None:
        settings |= {
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_HOST": data.cache_host,
            "PREFECT_REDIS_MESSAGING_PORT": str(CACHE_PORT),
            "PREFECT_REDIS_MESSAGING_SSL": "true",
        }
        password = local_secret(scope, f"{name.capitalize()}CachePassword", data.cache_secret)
        hidden["PREFECT_REDIS_MESSAGING_PASSWORD"] = ecs.Secret.from_secrets_manager(password)
        # The one address that Prefect wants whole, password included; neither has signs that a shell would see.
        cache = "$PREFECT_REDIS_MESSAGING_"
        address = f"rediss://:{cache}PASSWORD@{cache}HOST:{cache}PORT/1"
        run = command[2] if command[:2] == ["sh", "-c"] else "exec " + " ".join(command)
        command = ["sh", "-c", f"export PREFECT_SERVER_DOCKET_URL={address} && {run}"]
    return Server(name, "server", command, settings, hidden, role, count)


def target_group(
    scope: Construct, network: NetworkStack, name: str, port: int, health: str
) -> elb.ApplicationTargetGroup:
    """Servers behind the load balancer, by their health."""
    return elb.ApplicationTargetGroup(
        scope,
        name,
        vpc=network.vpc,
        port=port,
        protocol=elb.ApplicationProtocol.HTTP,
        target_type=elb.TargetType.IP,
        deregistration_delay=Duration.seconds(30),
        health_check=elb.HealthCheck(path=health, interval=Duration.seconds(15), timeout=Duration.seconds(5)),
    )


@dataclass(frozen=True)
class Fleet:
    """Where servers run.

    Attributes:
        scope: The stack.
        network: Where they are.
        cluster: Of ECS.
        repositories: Of images, by name.
        release: Tag of the images.
        start_role: Fetches images, reads secrets and opens logs before a container starts.
        log_group: Of everything that they say.
        family: Beginning of the names of their tasks.
    """

    scope: Construct
    network: NetworkStack
    cluster: ecs.Cluster
    repositories: Mapping[str, ecr.IRepository]
    release: str
    start_role: iam.IRole
    log_group: logs.ILogGroup
    family: str

    def run(self, server: Server, port: int = 0, group: elb.ApplicationTargetGroup | None = None) -> None:
        """Run a server; new ones replace old ones when they are healthy, and are rolled back when they never are.

        Args:
            server: What runs.
            port: That it listens on; 0 for none.
            group: Behind the load balancer. A server without one is stopped before the next one starts.
        """
        title = server.name.capitalize()
        task = ecs.FargateTaskDefinition(
            self.scope,
            f"{title}Task",
            family=f"{self.family}-{server.name}",
            cpu=server.cpu,
            memory_limit_mib=server.memory,
            execution_role=self.start_role,
            task_role=server.role,
            volumes=[ecs.Volume(name="tmp")],
        )
        container = task.add_container(
            server.name,
            image=ecs.ContainerImage.from_ecr_repository(self.repositories[server.image], self.release),
            entry_point=server.command[:1],  # Images may have one of their own.
            command=server.command[1:],
            environment=server.environment,
            secrets=server.secrets,
            readonly_root_filesystem=True,
            logging=ecs.LogDrivers.aws_logs(stream_prefix=server.name, log_group=self.log_group),
            port_mappings=[ecs.PortMapping(container_port=port)] if port else None,
        )
        # The images declare it as a volume, or Fargate would let nobody but root write there.
        container.add_mount_points(ecs.MountPoint(container_path="/tmp", source_volume="tmp", read_only=False))
        service = ecs.FargateService(
            self.scope,
            f"{title}Service",
            cluster=self.cluster,
            task_definition=task,
            desired_count=server.count,
            min_healthy_percent=100 if group else 0,
            max_healthy_percent=200 if group else 100,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            assign_public_ip=False,
            vpc_subnets=self.network.nodes,
            security_groups=[self.network.known(self.scope, self.network.servers)],
            health_check_grace_period=Duration.minutes(3) if group else None,
        )
        if group:
            service.attach_to_application_target_group(group)
