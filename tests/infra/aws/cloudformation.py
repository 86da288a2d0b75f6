"""Reads CloudFormation templates as the tests of this folder need it: over all stacks of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from infra.aws.profiles import PROFILES, Profile
from infra.aws.synthesis import kept


class Resource(NamedTuple):
    """One resource of a stack. Where its properties name others, they read `STACK.ID` or `STACK.ID.ATTRIBUTE`."""

    stack: str
    id: str
    kind: str
    properties: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.id}"


@dataclass(frozen=True)
class Installation:
    """The templates of a profile."""

    profile: Profile
    templates: dict[str, Any]
    resources: tuple[Resource, ...]
    outputs: dict[str, Any]
    """By `STACK.NAME`."""

    def of(self, kind: str) -> list[Resource]:
        """All resources of a kind, such as `AWS::S3::Bucket`."""
        return [each for each in self.resources if each.kind == kind]

    def one(self, kind: str) -> Resource:
        """The only resource of a kind."""
        (found,) = self.of(kind)
        return found

    def named(self, beginning: str, kind: str = "") -> Resource:
        """The one resource whose name begins so: logical ids end with eight letters that CDK adds."""
        (found,) = (each for each in self.resources if each.name[:-8] == beginning and kind in ("", each.kind))
        return found


@lru_cache
def installation(profile: str) -> Installation:
    """The templates of a profile that are under version control; `test_synthesis` says whether they are current."""
    templates = kept(profile)
    exports: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    # Twice: what is exported may be made from what others export.
    for _ in range(2):
        for stack, template in templates.items():
            for name, output in template.get("Outputs", {}).items():
                value = outputs[f"{stack}.{name}"] = _resolved(output["Value"], stack, template, exports)
                if "Export" in output:
                    exports[output["Export"]["Name"]] = value
    resources = [
        Resource(stack, name, body["Type"], _resolved(body.get("Properties", {}), stack, template, exports))
        for stack, template in templates.items()
        for name, body in template["Resources"].items()
    ]
    return Installation(PROFILES[profile], templates, tuple(resources), outputs)


def _resolved(value: Any, stack: str, template: dict[str, Any], exports: dict[str, Any]) -> Any:
    def again(inner: Any) -> Any:
        return _resolved(inner, stack, template, exports)

    match value:
        case list():
            return [again(each) for each in value]
        case {"Fn::ImportValue": name}:
            return exports.get(name, name)
        case {"Ref": name}:
            return f"{stack}.{name}" if name in template["Resources"] else name
        case {"Fn::GetAtt": [name, attribute]}:
            return f"{stack}.{name}.{attribute}"
        case {"Fn::Join": [separator, parts]}:
            return separator.join(str(again(part)) for part in parts)
        case dict():
            return {key: again(each) for key, each in value.items()}
    return value


def statements(policy: Resource) -> list[dict[str, Any]]:
    """Statements of a policy, with actions and resources as lists."""
    return [
        statement | {key: _listed(statement[key]) for key in ("Action", "Resource") if key in statement}
        for statement in policy.properties["PolicyDocument"]["Statement"]
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
