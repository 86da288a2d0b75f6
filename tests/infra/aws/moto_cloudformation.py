"""CloudFormation on this machine: moto's, with what it leaves out where stacks are made by change sets.

Resources of types that moto makes are real ones of moto. The others are stand-ins that have a name and attributes, so
that every template of the installation can be deployed. A refused resource fails its stack, as on AWS.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import pytest
from moto.cloudformation import models, parsing
from moto.cloudformation.models import CloudFormationBackend, Event
from moto.cloudformation.responses import CloudFormationResponse
from moto.core.responses import EmptyResult

from tasks.aws import AwsSettings
from tests.aws import running_aws

#: Types that moto knows and cannot make of the templates, and why.
NOT_MADE: Final = {
    "AWS::KMS::Key": "reads tags by another name",
    "AWS::KMS::Alias": "needs the key",
    "AWS::RDS::DBInstance": "knows no Aurora",
    "AWS::ElasticLoadBalancingV2::LoadBalancer": "has no hosted zone",
    "AWS::ElasticLoadBalancingV2::TargetGroup": "has no attributes",
    "AWS::ElasticLoadBalancingV2::Listener": "needs the group",
    "AWS::ElasticLoadBalancingV2::ListenerRule": "needs the listener",
    "AWS::CloudFormation::Stack": "reads its template from a bucket of ours",
    "AWS::Lambda::Version": "has no attributes",
    "AWS::Lambda::EventSourceMapping": "needs the alias",
}

#: Types whose name is their ARN.
_KNOWN_BY_ARN: Final = frozenset(
    {"AWS::SecretsManager::Secret", "AWS::Lambda::Alias", "AWS::ElasticLoadBalancingV2::Listener"}
)

#: Templates are JSON: moto's way to read them as YAML takes a second for each.
_JSON: Final = SimpleNamespace(
    add_multi_constructor=lambda *_: None, load=lambda text, **_: json.loads(text), Loader=None
)


class StandIn:
    """A resource that has a name and every attribute, and is nothing else."""

    def __init__(self, name: str, kind: str) -> None:
        self.physical_resource_id = self._arn(name) if kind in _KNOWN_BY_ARN else name
        self._name = name

    @staticmethod
    def _arn(name: str) -> str:
        return f"arn:aws:none:us-east-1:123456789012:resource:{name}/one/two/three"

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: dict[str, Any], *_: Any, **__: Any
    ) -> StandIn:
        return cls(resource_name, cloudformation_json["Type"])

    @classmethod
    def update_from_cloudformation_json(cls, original_resource: StandIn, **_: Any) -> StandIn:
        return original_resource

    @classmethod
    def has_cfn_attr(cls, attr: str) -> bool:
        return True

    def get_cfn_attribute(self, attribute: str) -> str:
        said = f"{self._name}.{attribute}"
        return self._arn(said) if attribute.endswith("Arn") else said

    def is_created(self) -> bool:
        return True

    def delete(self, account_id: str, region_name: str) -> None:
        """It leaves nothing behind."""


class RefusedError(Exception):
    """A resource was refused."""

    def __init__(self, name: str, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.kind, self.reason = name, kind, reason


def _execute(backend: CloudFormationBackend, change_set_name: str, stack_name: str | None = None) -> None:
    """Carry a change set out with what other stacks export, and keep what the stack is then."""
    change = backend.describe_change_set(change_set_name)
    assert change is not None
    stack = backend.stacks[change.stack_id]
    kind = change.change_set_type
    stack._add_stack_event(f"{kind}_IN_PROGRESS", "User Initiated")
    stack.resource_map.cross_stack_resources = backend.exports
    try:
        change.apply()
    except RefusedError as refused:
        stack.events.append(
            Event(stack.stack_id, stack.name, refused.name, "", refused.kind, f"{kind}_FAILED", refused.reason, None)
        )
        stack.status = "ROLLBACK_COMPLETE" if kind == "CREATE" else "UPDATE_ROLLBACK_COMPLETE"
        stack._add_stack_event(stack.status)
        return
    stack.template, stack.parameters, stack.tags = change.template, change.parameters, change.tags or {}
    stack._parse_template()
    stack.output_map = stack._create_output_map()
    for export in stack.exports:
        backend.exports[export.name] = export
    stack.status = f"{kind}_COMPLETE"
    stack._add_stack_event(stack.status)


def _protect(response: CloudFormationResponse) -> EmptyResult:
    stack = response.cloudformation_backend.get_stack(response._get_param("StackName"))
    stack.enable_termination_protection = response._get_bool_param("EnableTerminationProtection")
    return EmptyResult()


@contextmanager
def running_cloudformation() -> Iterator[AwsSettings]:
    """Run an empty AWS in which stacks can be deployed while the block runs; the environment leads there."""
    plain_class, plain_create = parsing.resource_class_from_type, parsing.parse_and_create_resource

    def resource_class(kind: str) -> Any:
        made = kind in parsing.get_model_map() and kind not in NOT_MADE
        return plain_class(kind) if made else StandIn

    def create(logical_id: str, resource_json: dict[str, Any], *rest: Any, **options: Any) -> Any:
        try:
            return plain_create(logical_id, resource_json, *rest, **options)
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(logical_id, resource_json["Type"], str(error)) from error

    with running_aws() as aws, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", str(aws.endpoint_url))
        patch.setattr(models, "yaml", _JSON)
        patch.setattr(parsing, "resource_class_from_type", resource_class)
        patch.setattr(parsing, "parse_and_create_resource", create)
        patch.setattr(CloudFormationBackend, "execute_change_set", _execute)
        patch.setattr(CloudFormationResponse, "update_termination_protection", _protect, raising=False)
        yield aws
