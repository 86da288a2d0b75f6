"""Builds or updates an installation on AWS: `python -m infra.aws.deploy PROFILE --release NAME`.

From a checkout without changes, with credentials of the account as every tool of AWS finds them. The templates under
version control are deployed as they are; neither CDK nor node is needed. Stacks are created or updated in order, and
what nodes and functions need is put into the artifacts bucket between them. Run again, it goes on where it stopped, and
does nothing where there is nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from infra.aws.cloudformation import DeploymentError, Stack, Wanted, bring, check_state, differences, find, said
from infra.aws.cluster.configuration import BLOCKS
from infra.aws.profiles import PROFILES, Profile
from infra.aws.release import (
    CHECKOUT,
    Release,
    check_unchanged,
    handler_key,
    handler_zip,
    missing_images,
    release_of,
    upload,
)
from infra.aws.synthesis import imports, kept
from tasks.errors import SettingsError, SuperResolutionError

#: Each after those that it builds on. The registry comes early: what is in it has to be pushed before the servers, and
#: nothing that costs much is there until then.
STACKS: Final = (
    "Security",
    "Registry",
    "Network",
    "Storage",
    "Audit",
    "Lustre",
    "Data",
    "Orchestrator",
    "Cluster",
    "Events",
    "Observability",
)

#: Parameters of stacks that somebody has to give, and how. One that is not given keeps its value.
_OPTIONS: Final = {"AlarmAddress": "--alarms", "Domain": "--domain", "CertificateArn": "--certificate"}

#: Names in the domain that the certificate is for.
_HOSTS: Final = ("prefect", "media", "api")

#: While a cluster is made, for most of an hour, the network may be away for a minute.
_PATIENT: Final = Config(retries={"mode": "standard", "total_max_attempts": 8}, connect_timeout=5)

#: Answers of AWS to credentials that it does not take, or not any more.
_REFUSED: Final = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)


@dataclass
class Deployment:
    """A release on its way into one installation.

    Attributes:
        profile: Of the installation.
        release: What is deployed.
        given: Values of parameters that were given.
        stacks: Names of those that are deployed, in order.
        pause: Seconds between two looks at a stack under way.
    """

    profile: Profile
    release: Release
    given: dict[str, str]
    stacks: tuple[str, ...] = STACKS
    pause: float = 5.0
    _found: dict[str, Stack | None] = field(default_factory=dict)
    _clients: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def templates(self) -> dict[str, Any]:
        """By the names of stacks without profile."""
        return kept(self.profile.name, self.release.root / "infra/aws/templates")

    def check(self) -> None:
        """Refuse what cannot be done, before anything is.

        Raises:
            SettingsError: Something that was given, or is missing, stands in the way.
            DeploymentError: A stack does.
        """
        account = self._client("sts").get_caller_identity()
        print(f"{self.release.name} ({self.release.commit[:12]}) as {account['Arn']}, {self.profile.region}")
        self._found = {name: find(self._client("cloudformation"), self.profile.stack_name(name)) for name in STACKS}
        there = {name for name in STACKS if self._stands(name)}
        for name in self.stacks:
            check_state(self.profile.stack_name(name), self._found[name])
            missing = imports(self.templates[name]) - there
            if missing:
                raise SettingsError(f"{name} builds on {', '.join(sorted(missing))}", "Leave --only out, or add them")
            there.add(name)
            self._wanted(name)
        if "Orchestrator" in self.stacks:
            self._check_certificate()
            if self._stands("Registry"):
                self._check_images()
        if "Cluster" in self.stacks and self._stands("Storage"):
            check_unchanged(self._client("s3"), self._bucket(), self.release)
        if "Events" in self.stacks and handler_key(self.release.root) not in str(self.templates["Events"]):
            raise SettingsError("the templates are of another event handler", "make infra renews them; commit them")

    def preview(self) -> None:
        """Say what `run` would do."""
        for name in self.stacks:
            for what in self._before(name):
                print(f"{self.profile.stack_name(name)}: before it, {what}")
            changes = differences(self._client("cloudformation"), self._found[name], self._wanted(name))
            if not self._stands(name):
                would = f"would be created, {len(changes['added'])} resources"
            else:
                would = f"would be updated: {said(changes)}" if changes else "is current"
            print(f"{self.profile.stack_name(name)}: {would}")

    def run(self) -> None:
        """Bring all stacks to their templates.

        Raises:
            SuperResolutionError: What stopped it. The stacks before are done.
        """
        for name in self.stacks:
            for what in self._before(name, do=True):
                print(f"{self.profile.stack_name(name)}: {what}")
            client = self._client("cloudformation")
            self._found[name], changes = bring(client, self._wanted(name), pause=self.pause)
            print(f"{self.profile.stack_name(name)}: {changes}", flush=True)
            if name == "Registry" and "Orchestrator" in self.stacks:
                self._check_images()

    # What belongs to a stack.

    def _stands(self, name: str) -> bool:
        """Whether a stack is there, with all that it makes."""
        stack = self._found[name]
        return stack is not None and not stack.failed

    def _wanted(self, name: str) -> Wanted:
        template = self.templates[name]
        values, stack = {}, self._found[name]
        old = stack.parameters if stack else {}
        # What nodes that stay do when they start cannot be changed: it is of the release the cluster was made with.
        first = old.get("FirstRelease") if self._stands(name) else None
        known = {"Release": self.release.name, "FirstRelease": first or self.release.name}
        for key in template.get("Parameters", {}):
            value = known.get(key) or self.given.get(key) or old.get(key)
            if not value:
                raise SettingsError(f"{name} needs {key} when it is new", f"Give it by {_OPTIONS.get(key, key)}")
            values[key] = value
        return Wanted(self.profile.stack_name(name), template, values, self.profile.tags, self.profile.keep_data)

    def _before(self, name: str, *, do: bool = False) -> list[str]:
        """What comes before a stack, done or only said."""
        if name == "Cluster":
            if not do:
                return [f"release {self.release.name} and {BLOCKS} would be in the artifacts bucket"]
            done = upload(self._client("s3"), self._bucket(), self.release)
            return [done, self._put(BLOCKS, self._output("Orchestrator", "Blocks").encode())]
        if name == "Events":
            key = handler_key(self.release.root)
            if not do:
                return [f"{key} would be in the artifacts bucket"]
            return [self._put(key, handler_zip(self.release.root))]
        return []

    def _put(self, key: str, content: bytes) -> str:
        s3, bucket = self._client("s3"), self._bucket()
        try:
            if s3.get_object(Bucket=bucket, Key=key)["Body"].read() == content:
                return f"{key} is there already"
        except s3.exceptions.NoSuchKey:
            pass
        s3.put_object(Bucket=bucket, Key=key, Body=content)
        return f"{key} uploaded"

    def _bucket(self) -> str:
        return self._output("Storage", "ArtifactsBucket")

    def _output(self, name: str, key: str) -> str:
        stack = self._found[name]
        if stack is None or key not in stack.outputs:
            raise DeploymentError(f"stack {self.profile.stack_name(name)} has no output {key}", f"Deploy {name} again")
        return stack.outputs[key]

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            session = boto3.session.Session(region_name=self.profile.region)
            self._clients[service] = session.client(service, config=_PATIENT)
        return self._clients[service]

    # What must be there.

    def _check_images(self) -> None:
        repositories = [
            body["Properties"]["RepositoryName"]
            for body in self.templates["Registry"]["Resources"].values()
            if body["Type"] == "AWS::ECR::Repository"
        ]
        commands = missing_images(self._client("ecr"), repositories, self.release)
        for command in commands:
            print(command)
        if commands:
            raise SettingsError(
                f"the registry lacks images of release {self.release.name}",
                "Push them as the lines above say, and run this again",
            )

    def _check_certificate(self) -> None:
        """The certificate is there and covers the names that the load balancer answers to."""
        values = self._wanted("Orchestrator").parameters
        arn, domain = values["CertificateArn"], values["Domain"]
        if arn.split(":")[2:4] != ["acm", self.profile.region]:
            raise SettingsError(
                f"{arn} is no certificate of ACM in {self.profile.region}", "Request one there, or import it"
            )
        acm = self._client("acm")
        try:
            found = acm.describe_certificate(CertificateArn=arn)["Certificate"]
        except acm.exceptions.ResourceNotFoundException as error:
            raise SettingsError(f"there is no certificate {arn}", "Request one, or import it") from error
        if found["Status"] != "ISSUED":
            raise SettingsError(f"the certificate {arn} is {found['Status']}", "Wait until it is issued, or mend it")
        names = {found["DomainName"], *found.get("SubjectAlternativeNames", [])}
        hosts = [f"{host}.{domain}" for host in _HOSTS]
        uncovered = [] if f"*.{domain}" in names else [host for host in hosts if host not in names]
        if uncovered:
            raise SettingsError(
                f"the certificate is for {', '.join(sorted(names))}, and not for {', '.join(uncovered)}",
                f"Take one for *.{domain}",
            )


def _typed(error: BotoCoreError | ClientError) -> SuperResolutionError:
    """What boto3 says, with what to do about it."""
    if isinstance(error, ClientError):
        code = error.response["Error"].get("Code", "")
        if code not in _REFUSED:
            return DeploymentError(
                f"AWS refuses {error.operation_name}: {error.response['Error'].get('Message') or code}",
                "Correct it, and run this again; what is under way goes on by itself",
            )
    elif not isinstance(error, NoCredentialsError | PartialCredentialsError):
        return DeploymentError(f"AWS cannot be reached: {error}", "Run this again when it can")
    return SettingsError(
        f"AWS takes no credentials of yours: {error}", "Log in, or set AWS_PROFILE, and run this again"
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m infra.aws.deploy", description=summary.partition(":")[0] + ".", epilog=details
    )
    parser.add_argument("profile", choices=PROFILES, help="of the installation")
    parser.add_argument("--release", required=True, metavar="NAME", help="what this commit is called")
    parser.add_argument("--domain", help="domain in which prefect., media. and api. are made")
    parser.add_argument("--certificate", metavar="ARN", help="certificate (ACM, same region) for *. of the domain")
    parser.add_argument("--alarms", metavar="ADDRESS", help="mail address that alarms go to")
    parser.add_argument("--only", metavar="STACK,…", help=f"of: {', '.join(STACKS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    return parser.parse_args(arguments)


def _chosen(only: str | None) -> tuple[str, ...]:
    names = [each.strip() for each in only.split(",")] if only else STACKS
    unknown = [each for each in names if each not in STACKS]
    if unknown:
        raise SettingsError(f"there is no stack {unknown[0]!r}", f"Name some of {', '.join(STACKS)}")
    return tuple(each for each in STACKS if each in names)


def main(arguments: list[str] | None = None, root: Path = CHECKOUT, pause: float = 5.0) -> int:
    """Deploy as the arguments say.

    Args:
        arguments: Of the command line.
        root: The checkout.
        pause: Seconds between two looks at a stack under way.

    Returns:
        0, or the exit code of the error that was printed.
    """
    options = _arguments(arguments)
    values = {"AlarmAddress": options.alarms, "Domain": options.domain, "CertificateArn": options.certificate}
    given = {key: value for key, value in values.items() if value}
    try:
        try:
            release = release_of(options.release, root)
            deployment = Deployment(PROFILES[options.profile], release, given, _chosen(options.only), pause)
            deployment.check()
            deployment.preview() if options.dry_run else deployment.run()
        except (BotoCoreError, ClientError) as error:
            raise _typed(error) from error
    except SuperResolutionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
