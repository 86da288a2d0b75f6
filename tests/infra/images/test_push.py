"""Images are pushed to a real registry by their script, pulled by the digest that it gave, and never replaced."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.infra.images.builder import IMAGES, Builder, builder_or_skip
from tests.infra.images.registry import MANIFEST, PASSWORD, USER, Registry, registry_or_skip, running_registry
from tests.ports import free_port

pytestmark = pytest.mark.infra

REPOSITORY: Final = "superres-dev/server"
BASE: Final = "localhost/busybox:1"

#: Small, and with what the project's own have that pushing could lose.
DOCKERFILE: Final = """\
ARG BASE
FROM ${BASE}
COPY sbom.json /opt/superres/sbom.json
USER 4200
HEALTHCHECK --interval=15s CMD ["cat", "/opt/superres/sbom.json"]
CMD ["cat", "/opt/superres/sbom.json"]
"""
SBOM: Final = {"bomFormat": "CycloneDX", "components": [{"name": "busybox", "version": "1"}]}


@dataclass(frozen=True)
class Site:
    """Somebody who builds images, and the registry they push to.

    Attributes:
        builder: Knows the password of the registry.
        registry: It runs.
        checkout: The script and the file of an image.
        dist: What the script writes to.
    """

    builder: Builder
    registry: Registry
    checkout: Path
    dist: Path

    @property
    def repository(self) -> str:
        return f"{self.registry.address}/{REPOSITORY}"

    def script(self, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [self.checkout / "infra/images/build.sh", "server", "--base", BASE, "--output", self.dist, *options]
        settings = {**self.builder.environment, "BUILD_ARGS": "--pull-never", **environment}
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    def done(self, *options: str | Path, **environment: str) -> str:
        """The reference that the script prints."""
        done = self.script(*options, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def refused(self, *options: str | Path, **environment: str) -> str:
        """What the script says when it fails; nothing has changed then."""
        before = self.state()
        done = self.script(*options, **environment)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert self.state() == before
        return done.stderr

    def state(self) -> tuple[dict[Path, bytes], list[str]]:
        """Files that the script wrote, and what lies in the registry."""
        files = [path for path in self.dist.rglob("*") if path.is_file()] if self.dist.exists() else []
        tags = self.registry.tags(REPOSITORY)
        return {path: path.read_bytes() for path in files}, [self.registry.digest(REPOSITORY, tag) for tag in tags]

    def images(self) -> str:
        return self.builder.buildah("images", "--all", "--no-trunc", "--quiet")


def trust(builder: Builder, registry: Registry) -> None:
    """Let a builder speak to a registry without TLS."""
    settings = Path(builder.environment["CONTAINERS_REGISTRIES_CONF"])
    with settings.open("a") as file:
        file.write(f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n')


def log_in(builder: Builder, registry: Registry) -> None:
    builder.run(["buildah", "login", "--username", USER, "--password-stdin", registry.address], input=PASSWORD)


@pytest.fixture(scope="module")
def programs() -> tuple[Path, Path]:
    return registry_or_skip()


@pytest.fixture(scope="module")
def builder(programs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    folder = tmp_path_factory.mktemp("builder")
    builder = builder_or_skip(folder)
    builder.commit(BASE, {programs[1]: "/bin/cat"})
    yield builder
    shutil.rmtree(folder / "storage")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with the script as it is, and a small image."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "infra/images").mkdir(parents=True)
    shutil.copy(IMAGES / "build.sh", root / "infra/images")
    (root / "infra/images/server.Dockerfile").write_text(DOCKERFILE)
    (root / "sbom.json").write_text(json.dumps(SBOM))
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def site(programs: tuple[Path, Path], builder: Builder, checkout: Path, tmp_path: Path) -> Iterator[Site]:
    with running_registry(programs[0], tmp_path / "registry") as registry:
        trust(builder, registry)
        log_in(builder, registry)
        yield Site(builder, registry, checkout, tmp_path / "dist")


def test_the_digest_is_that_of_the_registry(site: Site) -> None:
    reference = site.done("--tag", "1.0.0", "--push", site.repository)
    name, _, digest = reference.partition("@")
    assert name == site.repository
    assert {path.name for path in site.dist.iterdir()} == {"server.digest", "server.sbom.json"}
    assert (site.dist / "server.digest").read_text() == digest == site.registry.digest(REPOSITORY, "1.0.0")
    manifest = site.registry.get(f"{REPOSITORY}/manifests/{digest}")
    assert manifest.json()["mediaType"] == MANIFEST
    assert f"sha256:{hashlib.sha256(manifest.content).hexdigest()}" == digest
    assert json.loads((site.dist / "server.sbom.json").read_text()) == SBOM


def test_can_be_pulled_by_its_digest(site: Site, tmp_path: Path) -> None:
    reference = site.done("--tag", "1.0.0", "--push", site.repository)
    (tmp_path / "node").mkdir()
    node = builder_or_skip(tmp_path / "node")
    trust(node, site.registry)
    log_in(node, site.registry)
    container = node.buildah("from", "--pull", f"docker://{reference}")
    assert json.loads(node.buildah("run", container, "--", "cat", "/opt/superres/sbom.json")) == SBOM
    settings = json.loads(node.buildah("inspect", container))["Docker"]["config"]
    assert settings["User"] == "4200"
    assert settings["Healthcheck"]["Test"] == ["CMD", "cat", "/opt/superres/sbom.json"]
    node.buildah("rm", container)


def test_a_tag_stays_what_it_is(site: Site) -> None:
    _, _, digest = site.done("--tag", "1.0.0", "--push", site.repository).partition("@")
    images = site.images()
    said = site.refused("--tag", "1.0.0", "--push", site.repository)
    assert f"{site.repository}:1.0.0 is there, as {digest}, and a tag stays what it is" in said
    assert site.images() == images, "it is refused before anything is built"
    site.done("--tag", "1.0.1", "--push", site.repository)
    assert site.registry.tags(REPOSITORY) == ["1.0.0", "1.0.1"]


def test_without_a_password(site: Site, tmp_path: Path) -> None:
    (nothing := tmp_path / "nothing.json").write_text("{}")
    images = site.images()
    said = site.refused("--push", site.repository, REGISTRY_AUTH_FILE=str(nothing))
    assert f"{site.repository}:" in said and "authentication required" in said
    assert f"Log in with 'buildah login {site.registry.address}'" in said
    assert site.images() == images


@pytest.mark.parametrize(
    ("repository", "complaint"),
    [
        ("127.0.0.1:{port}/superres", "connection refused"),
        ("{registry}/Superres", "invalid reference format"),
    ],
)
def test_a_wrong_registry(site: Site, repository: str, complaint: str) -> None:
    images = site.images()
    named = repository.format(port=free_port(), registry=site.registry.address)
    said = site.refused("--tag", "1.0.0", "--push", named)
    assert f"build: error: {named}:1.0.0 cannot be looked up (" in said and complaint in said
    assert said.count("\n") == 1
    assert site.images() == images and not site.dist.exists()


def test_a_registry_that_takes_nothing(
    site: Site, programs: tuple[Path, Path], builder: Builder, tmp_path: Path
) -> None:
    site.done("--tag", "1.0.0", "--push", site.repository)
    with running_registry(programs[0], tmp_path / "readonly", readonly=True) as other:
        trust(builder, other)
        log_in(builder, other)
        said = site.refused("--tag", "2.0.0", "--push", f"{other.address}/{REPOSITORY}")
    assert f"{other.address}/{REPOSITORY} did not take localhost/superres-server:2.0.0, which was built" in said
    assert "Method not allowed" in said


def test_without_a_registry_it_is_a_file(site: Site) -> None:
    reference = site.done("--tag", "1.0.0")
    assert reference.startswith("localhost/superres-server:1.0.0@sha256:")
    assert {path.name for path in site.dist.iterdir()} == {"server.digest", "server.sbom.json", "server.tar"}
    site.done("--tag", "1.0.1")
    assert "1.0.1" in str((site.dist / "server.tar").read_bytes()), "the file of before is replaced"
    site.done("--tag", "1.0.1", "--push", site.repository)
    assert not (site.dist / "server.tar").exists(), "what lies there is one image"


class TestEnroot:
    """No distribution has the program: what it is asked for is looked at, and what is said when it fails."""

    def test_is_asked_for_what_was_pushed_by_its_digest(self, site: Site, tmp_path: Path) -> None:
        asked = tmp_path / "asked"
        folder = program(tmp_path, f'printf "%s\\n" "$@" >{asked}')
        file = tmp_path / "server.sqsh"
        options = ("--tag", "1.0.0", "--push", site.repository, "--enroot", file)
        _, _, digest = site.done(*options, PATH=f"{folder}:{site.builder.environment['PATH']}").partition("@")
        uri = f"docker://{site.registry.address}#{REPOSITORY}:{digest}"
        assert asked.read_text().splitlines() == ["import", "--output", str(file), uri]

    def test_says_what_was_pushed_when_it_fails(self, site: Site, tmp_path: Path) -> None:
        folder = program(tmp_path, "echo 'no space left' >&2; exit 1")
        options = ("--tag", "1.0.0", "--push", site.repository, "--enroot", tmp_path / "server.sqsh")
        done = site.script(*options, PATH=f"{folder}:{site.builder.environment['PATH']}")
        digest = site.registry.digest(REPOSITORY, "1.0.0")
        assert done.returncode == 1 and "no space left" in done.stderr
        assert f"{site.repository}@{digest} was pushed, but not written to {tmp_path}/server.sqsh" in done.stderr

    def test_needs_a_registry_and_a_new_file(self, site: Site, tmp_path: Path) -> None:
        file = tmp_path / "server.sqsh"
        assert "--enroot takes what was pushed" in site.refused("--enroot", file)
        file.touch()
        assert f"{file} is there" in site.refused("--push", site.repository, "--enroot", file)


def program(folder: Path, script: str) -> Path:
    """A folder with what stands for enroot."""
    path = folder / "programs/enroot"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path.parent
