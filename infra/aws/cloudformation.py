"""Brings one stack to its template by a change set of CloudFormation, and says what changed or why it failed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from botocore.exceptions import ClientError

from tasks.errors import SuperResolutionError

#: As long as a template may be that is sent in a call; longer ones would have to lie in a bucket.
TEMPLATE_BYTES: Final = 51_200

#: Roles are made and named, and ParallelCluster's own template is one that is transformed.
_CAPABILITIES: Final = ("CAPABILITY_IAM", "CAPABILITY_NAMED_IAM", "CAPABILITY_AUTO_EXPAND")

#: A stack that is nothing yet, and those that can be updated.
_UNMADE: Final = "REVIEW_IN_PROGRESS"
_SETTLED: Final = frozenset({"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE"})

#: What the reason of a change set begins with that would change nothing.
_NOTHING: Final = ("The submitted information didn't contain changes", "No updates are to be performed")

#: Seconds between two looks at something under way, and names that a line tells of.
_PAUSE: Final = 5.0
_NAMES: Final = 6


class DeploymentError(SuperResolutionError):
    """A stack cannot be brought to its template."""

    kind = "deployment"
    exit_code = 21


@dataclass(frozen=True)
class Wanted:
    """What a stack is to be.

    Attributes:
        name: Of the stack.
        template: Its template.
        parameters: Values of its parameters.
        tags: Of the stack, and of all that it makes.
        protected: Whether nobody can remove it by mistake.
    """

    name: str
    template: dict[str, Any]
    parameters: dict[str, str]
    tags: dict[str, str]
    protected: bool

    @property
    def body(self) -> str:
        """The template as it is sent."""
        return json.dumps(self.template, separators=(",", ":"))


@dataclass(frozen=True)
class Stack:
    """A stack as it is.

    Attributes:
        identity: Its ARN, under which it can be asked for after it was removed.
        status: What CloudFormation calls its state.
        parameters: Values of its parameters.
        tags: Of the stack.
        protected: Whether it cannot be removed.
        outputs: By name.
    """

    identity: str
    status: str
    parameters: dict[str, str]
    tags: dict[str, str]
    protected: bool
    outputs: dict[str, str]

    @property
    def failed(self) -> bool:
        """Whether its creation failed: nothing of it is there, and it can only be removed."""
        return self.status == "ROLLBACK_COMPLETE"


def find(client: Any, name: str) -> Stack | None:
    """The stack of a name or ARN, or None where there is none or it was never made."""
    try:
        found = client.describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if "does not exist" in error.response["Error"].get("Message", ""):
            return None
        raise
    if found["StackStatus"] == _UNMADE:
        return None
    return Stack(
        found["StackId"],
        found["StackStatus"],
        {each["ParameterKey"]: each.get("ParameterValue", "") for each in found.get("Parameters", [])},
        {each["Key"]: each["Value"] for each in found.get("Tags", [])},
        bool(found.get("EnableTerminationProtection")),
        {each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", [])},
    )


def check_state(name: str, stack: Stack | None) -> None:
    """Refuse a stack that cannot be brought to a template now.

    Raises:
        DeploymentError: It is being changed, or an earlier change left it in a state that only people can mend.
    """
    if stack is None or stack.failed or stack.status in _SETTLED:
        return
    if stack.status.endswith("_IN_PROGRESS"):
        raise DeploymentError(f"stack {name} is being changed ({stack.status})", "Wait until that has ended")
    remedy = "Remove the stack and what it left behind"
    if stack.status == "UPDATE_ROLLBACK_FAILED":
        remedy = f"Mend what it names, then: aws cloudformation continue-update-rollback --stack-name {name}"
    raise DeploymentError(f"stack {name} is in state {stack.status}", remedy)


def differences(client: Any, stack: Stack | None, wanted: Wanted) -> dict[str, list[str]]:
    """What would change, as far as templates tell: names of resources and parameters by what becomes of them."""
    new = wanted.template["Resources"]
    if stack is None or stack.failed:
        return {"added": sorted(new)}
    template = client.get_template(StackName=stack.identity, TemplateStage="Original")["TemplateBody"]
    template = json.loads(template) if isinstance(template, str) else template
    old = template["Resources"]
    found = {
        "added": sorted(set(new) - set(old)),
        "changed": sorted(name for name in set(new) & set(old) if new[name] != old[name]),
        "removed": sorted(set(old) - set(new)),
        "parameters": sorted(name for name, value in wanted.parameters.items() if stack.parameters.get(name) != value),
        "tags": sorted(name for name, value in wanted.tags.items() if stack.tags.get(name) != value),
        "sections": sorted(
            key for key in (template.keys() | wanted.template.keys()) - {"Resources"}
            if template.get(key) != wanted.template.get(key)
        ),
    }  # fmt: skip
    return {kind: names for kind, names in found.items() if names}


def said(changes: dict[str, list[str]]) -> str:
    """Changes in a few words: `2 added (Api, Logs), 1 removed (Old)`."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:_NAMES])}{', …' if len(names) > _NAMES else ''})"
        for kind, names in changes.items()
    )


def bring(client: Any, wanted: Wanted, *, pause: float = _PAUSE) -> tuple[Stack, str]:
    """Create or update a stack, and wait until it is what it is to be. Nothing is done where it is already.

    Args:
        client: Of CloudFormation.
        wanted: What the stack is to be.
        pause: Seconds between two looks.

    Returns:
        The stack, and what changed, in a few words.

    Raises:
        DeploymentError: It cannot be changed now, or the change failed; CloudFormation has undone it then.
    """
    stack = find(client, wanted.name)
    check_state(wanted.name, stack)
    if stack is not None and stack.failed:
        _remove(client, stack, wanted.name, pause)
        stack = None
    done = "is current"
    if stack is None or differences(client, stack, wanted):
        changes = _change(client, stack, wanted, pause)
        if changes:
            done = said(changes) if stack else f"created, {len(changes['added'])} resources"
    made = find(client, wanted.name)
    assert made is not None
    if made.protected != wanted.protected:
        client.update_termination_protection(StackName=wanted.name, EnableTerminationProtection=wanted.protected)
    return made, done


def _change(client: Any, stack: Stack | None, wanted: Wanted, pause: float) -> dict[str, list[str]]:
    """Make a change set and carry it out; returns what it changed, empty for nothing."""
    created = client.create_change_set(
        StackName=wanted.name,
        ChangeSetName=f"deploy-{uuid.uuid4()}",
        ChangeSetType="UPDATE" if stack else "CREATE",
        TemplateBody=wanted.body,
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in wanted.parameters.items()],
        Capabilities=list(_CAPABILITIES),
        Tags=[{"Key": key, "Value": value} for key, value in wanted.tags.items()],
    )
    changes: dict[str, list[str]] = {}
    while True:
        answer = client.describe_change_set(ChangeSetName=created["Id"])
        if not answer["Status"].endswith(("_PENDING", "_IN_PROGRESS")):
            break
        time.sleep(pause)
    if answer["Status"] == "FAILED":
        client.delete_change_set(ChangeSetName=created["Id"])
        reason = answer.get("StatusReason", "no reason given")
        if reason.startswith(_NOTHING):
            return {}
        raise DeploymentError(
            f"stack {wanted.name} cannot be changed: {reason}", "Correct the cause, and run this again"
        )
    for each in _all_changes(client, created["Id"], answer):
        kind = {"Add": "added", "Remove": "removed"}.get(each["Action"], "changed")
        kind = "replaced" if each.get("Replacement") == "True" else kind
        changes.setdefault(kind, []).append(each["LogicalResourceId"])
    client.execute_change_set(ChangeSetName=created["Id"])
    status = _settled(client, created["StackId"], pause)
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise DeploymentError(
            f"stack {wanted.name} failed ({status}): {_cause(client, created['StackId'])}",
            "Correct the cause, and run this again",
        )
    # A change of tags or outputs alone is one of no resource.
    return changes or {"changed": []}


def _all_changes(client: Any, identity: str, answer: dict[str, Any]) -> Iterable[dict[str, Any]]:
    while True:
        yield from (each["ResourceChange"] for each in answer.get("Changes", []) if "ResourceChange" in each)
        if not answer.get("NextToken"):
            return
        answer = client.describe_change_set(ChangeSetName=identity, NextToken=answer["NextToken"])


def _settled(client: Any, identity: str, pause: float) -> str:
    """The status of a stack once nothing happens to it any more."""
    while True:
        status: str = client.describe_stacks(StackName=identity)["Stacks"][0]["StackStatus"]
        if not status.endswith("_IN_PROGRESS"):
            return status
        time.sleep(pause)


def _remove(client: Any, stack: Stack, name: str, pause: float) -> None:
    """Remove a stack whose creation failed: nothing else can be done with it."""
    client.delete_stack(StackName=stack.identity)
    if _settled(client, stack.identity, pause) != "DELETE_COMPLETE":
        raise DeploymentError(
            f"stack {name}, whose creation failed, cannot be removed: {_cause(client, stack.identity)}",
            "Remove it and what it left behind",
        )


def _cause(client: Any, identity: str) -> str:
    """The first failure since the last change of a stack began, with the reason that the service gave."""
    failed: list[str] = []
    for page in client.get_paginator("describe_stack_events").paginate(StackName=identity):
        for event in page["StackEvents"]:  # The newest first.
            status = event["ResourceStatus"]
            if event["PhysicalResourceId"] == identity and status in ("CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS"):
                return failed[-1] if failed else "no reason given"
            reason = event.get("ResourceStatusReason", "")
            if status.endswith("_FAILED") and "cancelled" not in reason:
                failed.append(f"{event['LogicalResourceId']} ({event['ResourceType']}): {reason}")
    return failed[-1] if failed else "no reason given"
