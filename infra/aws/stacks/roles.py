"""Roles of services, each with one managed policy that says all it may do: nothing is added to it from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from constructs import Construct


def service_role(scope: Construct, name: str, service: str, statements: Sequence[iam.PolicyStatement]) -> iam.IRole:
    """A role that a service takes on.

    Args:
        scope: The stack.
        name: Id of the role; its policy is called the same with `Policy` behind it.
        service: Principal, such as `lambda.amazonaws.com`.
        statements: Everything the role may do; nothing if there are none.

    Returns:
        The role, closed: constructs that would write inline policies into it do not.
    """
    # The role names the policy, so that whatever needs the role finds it complete.
    policies = [iam.ManagedPolicy(scope, f"{name}Policy", statements=list(statements))] if statements else []
    role = iam.Role(scope, name, assumed_by=iam.ServicePrincipal(service), managed_policies=policies)
    return role.without_policy_updates()


def allow(actions: Sequence[str], resources: Sequence[str], **conditions: object) -> iam.PolicyStatement:
    """A statement; `conditions` are operators with their keys and values."""
    return iam.PolicyStatement(actions=list(actions), resources=list(resources), conditions=conditions or None)


def use_of(key: kms.IKey) -> iam.PolicyStatement:
    """Leave to read and write what a key encrypts."""
    return allow(["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey", "kms:DescribeKey"], [key.key_arn])


def local_key(scope: Construct, name: str, key: kms.IKey) -> kms.IKey:
    """A key of another stack, of which only the ARN is known here.

    Constructs of this stack would else write into the key's policy who they are, and both stacks would need the other
    one to be there first.
    """
    return kms.Key.from_key_arn(scope, name, key.key_arn)
