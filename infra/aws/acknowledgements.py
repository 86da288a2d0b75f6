"""Findings of the rules that stay, each with its reason: the only place for them. `docs/aws/security.md` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from aws_cdk import App

_AT_START: Final = (
    "Read once, when a server starts: one that changed by itself would cut it off. It is changed by hand, with a new"
    " start after it"
)
_OBJECTS: Final = "All objects of one folder of one bucket: their names are those of videos"
_INDEXES: Final = "All indexes of one table, which hold the same records"
_NO_RESOURCE: Final = "These actions take no resource"


class Finding(NamedTuple):
    """What a rule found, and why it stays."""

    stack: str
    path: str
    """Of the construct in its stack."""
    rule: str
    """With what was found in brackets; `{inputs}` and the like stand for the names of what other stacks export."""
    reason: str


FINDINGS: Final = (
    Finding(
        "Network",
        "Vpc",
        "NIST.800.53.R5-VPCDefaultSecurityGroupClosed",
        "Nothing is in this group. To empty it takes a function with rights over all groups",
    ),
    *(
        Finding(
            "Network",
            f"Vpc/NatSubnet{number}/DefaultRoute",
            "NIST.800.53.R5-VPCNoUnrestrictedRouteToIGW",
            "The way out of the NAT gateways, which are alone in these subnets",
        )
        for number in (1, 2, 3)
    ),
    Finding(
        "Storage",
        "Logs/Resource",
        "NIST.800.53.R5-S3DefaultEncryptionKMS",
        "S3 and load balancers write their logs into no bucket with a key of one's own; it is encrypted with one of S3",
    ),
    *(
        Finding(
            stack,
            f"{bucket}/Resource",
            "NIST.800.53.R5-S3BucketReplicationEnabled",
            "One region, three zones, versions kept; a copy elsewhere doubles the price and is the owner's decision",
        )
        for stack, bucket in (
            *(("Storage", each) for each in ("Logs", "Inputs", "Outputs", "Artifacts")),
            ("Audit", "Trails"),
        )
    ),
    Finding(
        "Data",
        "MonitoringRolePolicy/Resource",
        "AwsSolutions-IAM5[Resource::arn:aws:logs:us-east-1:<AWS::AccountId>:log-group:RDSOSMetrics:*]",
        "Streams of one log group, which RDS names after its instances",
    ),
    Finding(
        "Data",
        "BackupRole/Resource",
        "AwsSolutions-IAM4[Policy::arn:<AWS::Partition>:iam::aws:policy/service-role/"
        "AWSBackupServiceRolePolicyForBackup]",
        "What AWS Backup needs changes with the service; the role backs up two databases and a table",
    ),
    Finding("Data", "Accounting/Resource", "AwsSolutions-RDS14", "Aurora MySQL 3 has no backtrack"),
    *(
        Finding(
            "Data",
            f"{database}/{instance}/Resource",
            "NIST.800.53.R5-RDSInBackupPlan",
            "Its cluster is in the plan: of Aurora, instances are not what is backed up",
        )
        for database in ("Prefect", "Accounting")
        for instance in ("Writer", "Reader1")
    ),
    *(
        Finding(stack, f"{secret}/Resource", rule, _AT_START)
        for stack, secret in (
            *(("Data", each) for each in ("PrefectUser", "AccountingPassword", "CachePassword")),
            ("Orchestrator", "ApiPassword"),
            ("Cluster", "WorkerSettings"),
        )
        for rule in ("AwsSolutions-SMG4", "NIST.800.53.R5-SecretsManagerRotationEnabled")
    ),
    *(
        Finding(
            "Orchestrator",
            f"{server}Task/Resource",
            "AwsSolutions-ECS2",
            "Names and addresses; what is secret comes from Secrets Manager",
        )
        for server in ("Api", "Ui", "Background", "Portal")
    ),
    Finding("Orchestrator", "StartRolePolicy/Resource", "AwsSolutions-IAM5[Resource::*]", _NO_RESOURCE),
    *(
        Finding("Orchestrator", "PortalRolePolicy/Resource", f"AwsSolutions-IAM5[Resource::{found}]", reason)
        for found, reason in (
            ("{ledger}/index/*", _INDEXES),
            ("{inputs}/incoming/*", _OBJECTS),
            ("{outputs}/*", _OBJECTS),
        )
    ),
    *(
        Finding("Cluster", "NodePolicy/Resource", f"AwsSolutions-IAM5[Resource::{found}]", reason)
        for found, reason in (
            ("*", "To put metrics takes no resource; the namespace is fixed by a condition"),
            ("{ledger}/index/*", _INDEXES),
            ("{inputs}/*", _OBJECTS),
            ("{outputs}/*", _OBJECTS),
            ("{artifacts}/bootstrap/*", _OBJECTS),
            ("{artifacts}/models/*", _OBJECTS),
        )
    ),
    Finding("Cluster", "HeadPolicy/Resource", "AwsSolutions-IAM5[Resource::{artifacts}/bootstrap/*]", _OBJECTS),
    *(
        Finding("Cluster", "ProviderPolicy/Resource", f"AwsSolutions-IAM5[Resource::{found}]", reason)
        for found, reason in (
            ("{artifacts}/bootstrap/*", _OBJECTS),
            ("{artifacts}/parallelcluster/*", _OBJECTS),
            (
                "arn:aws:iam::<AWS::AccountId>:role/parallelcluster/*",
                "Roles that ParallelCluster makes and names; only two policies can be attached to them",
            ),
        )
    ),
    Finding("Events", "HandlerRolePolicy/Resource", "AwsSolutions-IAM5[Resource::*]", _NO_RESOURCE),
)


def acknowledge(app: App, exports: Mapping[str, str]) -> None:
    """Have the findings pass, where a profile has what they are about.

    Args:
        app: With all its stacks.
        exports: Names under which stacks export what the placeholders of findings stand for.
    """
    from aws_cdk import Acknowledgment, Stack, Validations  # Here: the list is also read where there is no CDK.

    stacks = {each.stack_name.rpartition("-")[2]: each for each in app.node.children if isinstance(each, Stack)}
    for finding in FINDINGS:
        construct = stacks[finding.stack]
        for part in finding.path.split("/"):
            construct = construct.node.try_find_child(part) if construct else None
        if construct is None:
            continue
        rule = finding.rule.format_map(exports) if "{" in finding.rule else finding.rule
        pack = rule.rpartition("[")[0] or rule
        Validations.of(construct).acknowledge(
            Acknowledgment(id=f"{pack.rpartition('-')[0]}::{rule}", reason=finding.reason)
        )
