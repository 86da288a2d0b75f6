"""The network: nodes and servers in private subnets, no way in from outside, and who may talk to whom."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import Stack
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.keeping import removal, retention
from infra.aws.stacks.roles import allow, local_key, service_role
from infra.aws.stacks.security import SecurityStack

#: Ports. Databases are not at their usual ones, where everybody looks first.
UI_PORT: Final = 443
API_PORT: Final = 8443
SERVER_PORT: Final = 4200
PORTAL_PORT: Final = 8080
POSTGRESQL_PORT: Final = 5433
MYSQL_PORT: Final = 3307
CACHE_PORT: Final = 6380
LUSTRE_PORTS: Final = (ec2.Port.tcp(988), ec2.Port.tcp_range(1018, 1023))


class NetworkStack(Stack):
    """Subnets, endpoints and all security groups: rules between groups of several stacks would make circles of stacks.

    Attributes:
        vpc: Subnets `Nat` (nothing but NAT gateways), `Nodes` (out through these) and `Data` (no way out).
        balancer: Of the load balancer.
        servers: Of Prefect's servers and the portal.
        api_clients: Whoever calls the Prefect API: nodes that run the worker, event handlers.
        database: Of Prefect's database.
        accounting: Of Slurm's accounting database.
        accounting_clients: Head nodes.
        cache: Of the cache between Prefect servers.
        lustre: Of scratch.
        lustre_clients: Nodes that mount scratch.
    """

    def __init__(self, scope: Construct, name: str, profile: Profile, security: SecurityStack, **options: Any) -> None:
        super().__init__(scope, name, **options)
        self.vpc = ec2.Vpc(
            self,
            "Vpc",
            ip_addresses=ec2.IpAddresses.cidr(profile.cidr),
            availability_zones=profile.availability_zones,
            nat_gateways=profile.nat_gateways,
            subnet_configuration=[
                ec2.SubnetConfiguration(
                    name="Nat", subnet_type=ec2.SubnetType.PUBLIC, cidr_mask=28, map_public_ip_on_launch=False
                ),
                ec2.SubnetConfiguration(name="Nodes", subnet_type=ec2.SubnetType.PRIVATE_WITH_EGRESS, cidr_mask=20),
                ec2.SubnetConfiguration(name="Data", subnet_type=ec2.SubnetType.PRIVATE_ISOLATED, cidr_mask=24),
            ],
            restrict_default_security_group=False,  # It takes a function to do it; nothing uses that group.
        )
        self.nodes = ec2.SubnetSelection(subnet_group_name="Nodes")
        self.data = ec2.SubnetSelection(subnet_group_name="Data")
        self._log(profile, security)
        self._add_groups(profile)
        self._add_endpoints(profile)

    def _log(self, profile: Profile, security: SecurityStack) -> None:
        """Keep which connections were made and which refused."""
        group = logs.LogGroup(
            self,
            "Flows",
            encryption_key=local_key(self, "MessagesKey", security.messages),
            retention=retention(profile),
            removal_policy=removal(profile),
        )
        writing = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
        role = service_role(self, "FlowRole", "vpc-flow-logs.amazonaws.com", [allow(writing, [group.log_group_arn])])
        self.vpc.add_flow_log("FlowLog", destination=ec2.FlowLogDestination.to_cloud_watch_logs(group, role))

    def _group(self, name: str, description: str, *, goes_out: bool) -> ec2.SecurityGroup:
        return ec2.SecurityGroup(self, name, vpc=self.vpc, description=description, allow_all_outbound=goes_out)

    def known(self, scope: Construct, group: ec2.SecurityGroup) -> ec2.ISecurityGroup:
        """A group as another stack sees it, which adds no rules: all of them are here."""
        identity = f"{group.node.id}Group"
        found = scope.node.try_find_child(identity)
        if found is not None:
            return found
        return ec2.SecurityGroup.from_security_group_id(scope, identity, group.security_group_id, mutable=False)

    def _add_groups(self, profile: Profile) -> None:
        self.balancer = self._group("Balancer", "Load balancer", goes_out=True)  # It asks Cognito who somebody is.
        self.servers = self._group("Servers", "Prefect servers and portal", goes_out=True)
        self.api_clients = self._group("ApiClients", "Callers of the Prefect API", goes_out=True)
        self.database = self._group("Database", "Database of Prefect", goes_out=False)
        self.accounting = self._group("Accounting", "Database of Slurm accounting", goes_out=False)
        self.accounting_clients = self._group("AccountingClients", "Head nodes", goes_out=False)
        self.cache = self._group("Cache", "Cache between Prefect servers", goes_out=False)
        self.lustre = self._group("Lustre", "Scratch", goes_out=False)
        self.lustre_clients = self._group("LustreClients", "Nodes that mount scratch", goes_out=False)

        for network in profile.operators:
            self.balancer.add_ingress_rule(
                ec2.Peer.ipv4(network), ec2.Port.tcp(UI_PORT), "UI and portal for people in the organisation"
            )
        for target, source, port, what in (
            (self.balancer, self.api_clients, API_PORT, "Prefect API"),
            (self.balancer, self.servers, API_PORT, "Prefect API for the portal"),
            (self.servers, self.balancer, SERVER_PORT, "Prefect servers"),
            (self.servers, self.balancer, PORTAL_PORT, "Portal"),
            (self.database, self.servers, POSTGRESQL_PORT, "PostgreSQL"),
            (self.accounting, self.accounting_clients, MYSQL_PORT, "MySQL"),
            (self.cache, self.servers, CACHE_PORT, "Valkey"),
        ):
            target.add_ingress_rule(source, ec2.Port.tcp(port), what)
        self.accounting_clients.add_egress_rule(self.accounting, ec2.Port.tcp(MYSQL_PORT), "MySQL")
        # Servers of Lustre talk among themselves, and call clients back.
        for one, other in (
            (self.lustre, self.lustre_clients),
            (self.lustre_clients, self.lustre),
            (self.lustre, self.lustre),
        ):
            for port in LUSTRE_PORTS:
                one.add_ingress_rule(other, port, "Lustre")
                one.add_egress_rule(other, port, "Lustre")

    def _add_endpoints(self, profile: Profile) -> None:
        free = ec2.GatewayVpcEndpointAwsService
        self.vpc.add_gateway_endpoint("S3", service=free.S3, subnets=[self.nodes])
        self.vpc.add_gateway_endpoint("DynamoDb", service=free.DYNAMODB, subnets=[self.nodes])
        if not profile.endpoints:
            return
        group = self._group("Endpoints", "Services of AWS without the internet", goes_out=False)
        group.add_ingress_rule(ec2.Peer.ipv4(profile.cidr), ec2.Port.tcp(443), "HTTPS from this network")
        for service in profile.endpoints:
            self.vpc.add_interface_endpoint(
                service,
                service=ec2.InterfaceVpcEndpointAwsService(service),
                subnets=self.nodes,
                security_groups=[group],
                open=False,
            )
