"""The one command that builds an installation, against an AWS on this machine, with the templates as they are kept."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import boto3
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.cloudformation.models import cloudformation_backends

from infra.aws.cloudformation import TEMPLATE_BYTES, DeploymentError, Wanted
from infra.aws.deploy import STACKS, main
from infra.aws.profiles import DEV, PROFILES
from infra.aws.release import handler_key, handler_zip
from infra.aws.synthesis import imports, kept
from tasks.aws import AwsSettings
from tasks.errors import SettingsError
from tests.infra.aws.moto_cloudformation import running_cloudformation
from tests.infra.releases import commit, copy_checkout

pytestmark = pytest.mark.infra

DOMAIN: Final = "video.example.com"


@dataclass(frozen=True)
class Account:
    """An account of AWS, and a checkout to deploy from.

    Attributes:
        root: The checkout.
        said: Of the commands, anew.
    """

    root: Path
    said: Callable[[], tuple[str, str]]

    def client(self, service: str) -> Any:
        return boto3.client(service, region_name=DEV.region)

    def deploy(self, *arguments: str) -> int:
        return main(list(arguments), self.root, pause=0.01)

    def done(self, *arguments: str) -> list[str]:
        """Lines of a command that succeeds."""
        code = self.deploy(*arguments)
        out, err = self.said()
        assert code == 0, err
        return out.splitlines()

    def refused(self, *arguments: str, code: int = SettingsError.exit_code) -> str:
        """What a command says that is refused."""
        given = self.deploy(*arguments)
        out, err = self.said()
        assert given == code, out + err
        assert err.startswith("error: ")
        return err

    def certificate(self, *names: str) -> str:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        pem = made.public_bytes(serialization.Encoding.PEM)
        arn: str = self.client("acm").import_certificate(Certificate=pem, PrivateKey=private)["CertificateArn"]
        return arn

    def first(self, profile: str) -> list[str]:
        """Arguments of the first deployment."""
        arn = self.certificate(f"*.{DOMAIN}")
        options = ["--domain", DOMAIN, "--certificate", arn, "--alarms", "operators@example.com"]
        return [profile, "--release", "1.0.0", *options]

    def push(self, profile: str, release: str) -> None:
        for image in ("server", "worker"):
            manifest = {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": {"digest": f"{image} {release}"},
            }
            self.client("ecr").put_image(
                repositoryName=f"superres-{profile}/{image}", imageManifest=json.dumps(manifest), imageTag=release
            )

    def stacks(self) -> dict[str, dict[str, Any]]:
        """By the last part of their names."""
        found = self.client("cloudformation").describe_stacks()["Stacks"]
        return {each["StackName"].rpartition("-")[2]: each for each in found}

    def parameters(self, stack: str) -> dict[str, str]:
        return {each["ParameterKey"]: each["ParameterValue"] for each in self.stacks()[stack]["Parameters"]}

    def events(self) -> int:
        """How much has ever happened to stacks."""
        backend = cloudformation_backends["123456789012"][DEV.region]
        return sum(len(stack.events) for stack in [*backend.stacks.values(), *backend.deleted_stacks.values()])

    def objects(self) -> dict[str, bytes]:
        """What lies in the artifacts bucket."""
        outputs = {each["OutputKey"]: each["OutputValue"] for each in self.stacks()["Storage"]["Outputs"]}
        s3, bucket = self.client("s3"), outputs["ArtifactsBucket"]
        keys = [each["Key"] for each in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
        return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def change(self, path: str, old: str, new: str) -> None:
        """Change a file of the checkout, and commit it."""
        file = self.root / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
        commit(self.root)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A clone that tests may change."""
    subprocess.run(["git", "clone", "--quiet", original, tmp_path / "clone"], check=True)
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsSettings]:
    with running_cloudformation() as settings:
        yield settings


@pytest.fixture
def account(aws: AwsSettings, root: Path, capsys: pytest.CaptureFixture[str]) -> Account:
    """An empty account."""
    requests.post(f"{aws.endpoint_url}/moto-api/reset", timeout=30)
    return Account(root, lambda: tuple(capsys.readouterr()))  # type: ignore[arg-type, return-value]


@contextmanager
def _expired() -> Iterator[str]:
    """A service that answers as AWS does when a session is over; yields its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = (
                b"<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredToken</Code>"
                b"<Message>The security token included in the request is expired</Message></Error>"
                b"<RequestId>1</RequestId></ErrorResponse>"
            )
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("profile", PROFILES)
def test_stacks_come_after_those_they_build_on(profile: str) -> None:
    templates = kept(profile)
    assert set(templates) == set(STACKS)
    for position, name in enumerate(STACKS):
        assert imports(templates[name]) <= set(STACKS[:position]), name


@pytest.mark.parametrize("profile", PROFILES)
def test_templates_can_be_sent_and_need_nothing_of_cdk(profile: str) -> None:
    for name, template in kept(profile).items():
        assert len(Wanted(name, template, {}, {}, False).body.encode()) <= TEMPLATE_BYTES
        assert "cdk-" not in json.dumps(template) and "BootstrapVersion" not in template.get("Parameters", {})
    assert handler_key() in json.dumps(kept(profile)["Events"])


@pytest.mark.parametrize("profile", PROFILES)
def test_from_nothing_to_an_installation(account: Account, profile: str) -> None:
    first = account.first(profile)
    assert account.deploy(*first) == SettingsError.exit_code
    said, why = account.said()
    assert "the registry lacks images of release 1.0.0" in why
    push = [line for line in said.splitlines() if "build.sh" in line]
    registry = f"123456789012.dkr.ecr.{DEV.region}.amazonaws.com/superres-{profile}"
    assert push == [
        f"infra/images/build.sh {image} --tag 1.0.0 --push {registry}/{image}" for image in ("server", "worker")
    ]
    assert list(account.stacks()) == ["Security", "Registry"], "nothing that costs much is made before the images"
    account.push(profile, "1.0.0")

    lines = account.done(*first)
    names = [line.partition(":")[0].rpartition("-")[2] for line in lines[1:]]
    assert sorted(set(names), key=names.index) == list(STACKS)
    assert [name for name, stack in account.stacks().items()] == list(STACKS)
    for name, stack in account.stacks().items():
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        assert stack["EnableTerminationProtection"] is PROFILES[profile].keep_data, name
        assert {each["Key"]: each["Value"] for each in stack["Tags"]} == {"project": "superres", "profile": profile}
    assert account.parameters("Orchestrator")["Domain"] == DOMAIN
    assert account.parameters("Cluster") == {"Release": "1.0.0", "FirstRelease": "1.0.0"}
    _check_objects(account)

    happened, objects = account.events(), account.objects()
    again = account.done(profile, "--release", "1.0.0")
    assert all("is current" in line or "is there already" in line for line in again[1:])
    assert (account.events(), account.objects()) == (happened, objects)


def _check_objects(account: Account) -> None:
    """What nodes and functions need lies in the artifacts bucket."""
    objects = account.objects()
    scripts = {path.name: path.read_bytes() for path in account.root.glob("infra/aws/cluster/bootstrap/*.sh")}
    assert len(scripts) >= 5
    for name, content in scripts.items():
        assert objects[f"bootstrap/1.0.0/{name}"] == content
    with tarfile.open(fileobj=io.BytesIO(objects["bootstrap/1.0.0/release.tar.gz"])) as archive:
        assert {"deployments/environment.sh", "flows/cli.py"} <= set(archive.getnames())
    blocks = tomllib.loads(objects["blocks.toml"].decode())
    assert blocks["job-ledger"]["aws"]["portal"] == f"https://media.{DOMAIN}"
    tables = account.client("dynamodb").list_tables()["TableNames"]
    assert [blocks["job-ledger"]["aws"]["table"]] == tables
    key = handler_key(account.root)
    with zipfile.ZipFile(io.BytesIO(objects[key])) as archive:
        assert archive.namelist() == ["handler.py"]
    functions = account.client("lambda").list_functions()["Functions"]
    assert [each["Handler"] for each in functions] == ["handler.handler"]


def test_another_release(account: Account) -> None:
    first = account.first("dev")
    account.refused(*first)
    account.push("dev", "1.0.0")
    account.done(*first)
    account.change("infra/aws/templates/dev/Registry.json", '"IMMUTABLE"', '"MUTABLE"')
    before = handler_key(account.root)
    account.change("infra/aws/lambda/handler.py", '"""', '"""Another. ')

    happened, objects = account.events(), account.objects()
    account.push("dev", "1.1.0")
    assert "make infra renews them" in account.refused("dev", "--release", "1.1.0")
    account.change("infra/aws/templates/dev/Events.json", before, handler_key(account.root))
    said = account.refused("dev", "--release", "1.0.0")
    assert "release 1.0.0 is " in said and "give this one another name" in said
    assert "lacks images of release 1.2.0" in account.refused("dev", "--release", "1.2.0")
    assert (account.events(), account.objects()) == (happened, objects)

    would = account.done("dev", "--release", "1.1.0", "--dry-run")
    assert "Superres-Dev-Security: is current" in would
    assert (account.events(), account.objects()) == (happened, objects)
    lines = account.done("dev", "--release", "1.1.0")
    (registry,) = (line for line in lines if line.startswith("Superres-Dev-Registry"))
    assert registry.startswith("Superres-Dev-Registry: 1 changed (Server"), registry
    assert registry.replace(": ", ": would be updated: ", 1) in would
    assert "Superres-Dev-Network: is current" in lines
    repositories = account.client("ecr").describe_repositories()["repositories"]
    found = {each["repositoryName"]: each["imageTagMutability"] for each in repositories}
    assert found == {"superres-dev/server": "MUTABLE", "superres-dev/worker": "IMMUTABLE"}
    assert account.parameters("Orchestrator")["Release"] == "1.1.0"
    assert account.parameters("Cluster") == {"Release": "1.1.0", "FirstRelease": "1.0.0"}
    assert {"bootstrap/1.0.0/release.tar.gz", "bootstrap/1.1.0/release.tar.gz"} <= set(account.objects())
    # Both codes of the handler are there: the one before is what CloudFormation goes back to.
    assert len([key for key in account.objects() if key.startswith("functions/")]) == 2


def test_a_stack_that_fails_says_why_and_is_made_anew(account: Account) -> None:
    account.change("infra/aws/templates/dev/Registry.json", '"superres-dev/worker"', '"superres-dev/server"')
    said = account.refused(*account.first("dev"), code=DeploymentError.exit_code)
    assert "stack Superres-Dev-Registry failed (ROLLBACK_COMPLETE): Worker" in said
    assert "(AWS::ECR::Repository): " in said and "already exists" in said
    assert {name: stack["StackStatus"] for name, stack in account.stacks().items()} == {
        "Security": "CREATE_COMPLETE",
        "Registry": "ROLLBACK_COMPLETE",
    }
    account.change("infra/aws/templates/dev/Registry.json", '"superres-dev/server"', '"superres-dev/worker"')
    lines = account.done("dev", "--release", "1.0.0", "--only", "Registry")
    assert lines[1:] == ["Superres-Dev-Registry: created, 2 resources"]


def test_an_update_that_fails_leaves_the_stack_as_it_was(account: Account) -> None:
    account.done("dev", "--release", "1.0.0", "--only", "Security,Registry", "--alarms", "a@example.com")
    template = account.root / "infra/aws/templates/dev/Registry.json"
    changed = json.loads(template.read_text())
    server = next(name for name in changed["Resources"] if name.startswith("Server"))
    changed["Resources"]["Another"] = changed["Resources"][server]
    template.write_text(json.dumps(changed))
    commit(account.root)
    said = account.refused("dev", "--release", "1.0.0", "--only", "Registry,Network", code=DeploymentError.exit_code)
    assert "Superres-Dev-Registry failed (UPDATE_ROLLBACK_COMPLETE): Another (AWS::ECR::Repository)" in said
    assert list(account.stacks()) == ["Security", "Registry"]


def test_a_dry_run_makes_nothing(account: Account) -> None:
    lines = account.done(*account.first("prod"), "--dry-run")
    said = [line for line in lines[1:] if "would be created" in line]
    assert [line.partition(":")[0] for line in said] == [f"Superres-Prod-{name}" for name in STACKS]
    assert "release 1.0.0 and blocks.toml would be in the artifacts bucket" in "\n".join(lines)
    assert account.events() == 0 and account.stacks() == {}
    assert account.client("s3").list_buckets()["Buckets"] == []


class TestRefusals:
    """Whatever is refused is refused before anything is made."""

    @pytest.fixture(autouse=True)
    def nothing_is_made(self, account: Account) -> Iterator[None]:
        yield
        assert account.events() == 0

    def test_changes_that_are_in_no_commit(self, account: Account) -> None:
        first = account.first("dev")
        (account.root / "more.py").write_text("")
        assert "has changes that are in no commit (?? more.py)" in account.refused(*first)

    def test_a_folder_that_is_no_checkout(self, account: Account, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        assert "is no checkout" in Account(tmp_path / "folder", account.said).refused(*account.first("dev"))

    def test_a_tag_of_another_commit(self, account: Account) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", account.root, *who, "tag", "-a", "1.0.0", "-m", "1.0.0"], check=True)
        account.change("prefect.yaml", "\n", "\n# Later.\n")
        assert "git checkout 1.0.0" in account.refused(*account.first("dev"))

    @pytest.mark.parametrize("name", ["../1.0.0", "", "1 0", "-1"])
    def test_a_name_that_is_none(self, account: Account, name: str) -> None:
        assert "is no name of a release" in account.refused("dev", f"--release={name}")

    def test_a_stack_that_is_none(self, account: Account) -> None:
        assert "there is no stack 'Nothing'" in account.refused("dev", "--release", "1", "--only", "Nothing")

    def test_a_stack_without_those_it_builds_on(self, account: Account) -> None:
        said = account.refused("dev", "--release", "1.0.0", "--only", "Storage,Lustre")
        assert "Storage builds on Security" in said

    @pytest.mark.parametrize("option", ["--alarms", "--domain", "--certificate"])
    def test_what_is_needed_and_not_given(self, account: Account, option: str) -> None:
        first = account.first("dev")
        place = first.index(option)
        assert f"Give it by {option}" in account.refused(*first[:place], *first[place + 2 :])

    @pytest.mark.parametrize(
        ("make", "complaint"),
        [
            (lambda account: account.certificate("*.example.com"), "and not for prefect.video.example.com"),
            (lambda account: account.certificate(f"media.{DOMAIN}"), "not for prefect.video.example.com, api."),
            (lambda account: account.first("dev")[-3].rpartition("/")[0] + "/none", "there is no certificate arn:"),
            (lambda account: "arn:aws:acm:eu-west-1:123456789012:certificate/a", "no certificate of ACM in us-east-1"),
            (lambda account: "certificate", "no certificate of ACM in us-east-1"),
        ],
    )
    def test_a_certificate_that_does_not_do(
        self, account: Account, make: Callable[[Account], str], complaint: str
    ) -> None:
        first = account.first("dev")
        first[first.index("--certificate") + 1] = make(account)
        assert complaint in account.refused(*first)

    def test_without_credentials(self, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        said = account.refused("dev", "--release", "1.0.0")
        assert "AWS takes no credentials of yours" in said and "AWS_PROFILE" in said

    def test_with_credentials_that_are_over(self, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
        with _expired() as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            said = account.refused("dev", "--release", "1.0.0")
        assert "AWS takes no credentials of yours" in said and "expired" in said


def test_a_stack_under_way_is_left_alone(account: Account) -> None:
    account.done("dev", "--release", "1.0.0", "--only", "Security", "--alarms", "a@example.com")
    happened = account.events()
    (stack,) = cloudformation_backends["123456789012"][DEV.region].stacks.values()
    for status, complaint in (
        ("UPDATE_IN_PROGRESS", "is being changed (UPDATE_IN_PROGRESS). Wait until that has ended"),
        ("UPDATE_ROLLBACK_FAILED", "aws cloudformation continue-update-rollback --stack-name Superres-Dev-Security"),
        ("DELETE_FAILED", "is in state DELETE_FAILED. Remove the stack"),
    ):
        stack.status = status
        assert complaint in account.refused(*account.first("dev"), code=DeploymentError.exit_code)
    assert account.events() == happened


def test_the_code_of_the_handler_is_packed_the_same_every_time(original: Path) -> None:
    packed = handler_zip(original)
    (original / "infra/aws/lambda/handler.py").touch()
    assert handler_zip(original) == packed
