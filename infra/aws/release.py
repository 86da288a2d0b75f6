"""What a release is on AWS: one commit under one name, with images in the registry and files in the artifacts bucket.

A release that is there stays what it is: nodes use its environment for as long as runs do.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from infra.aws.cluster.configuration import BOOTSTRAP_PREFIX, RELEASE_ARCHIVE
from tasks.errors import SettingsError

CHECKOUT: Final = Path(__file__).parents[2]

#: As `build_environment.sh` takes it, no longer than a tag of an image.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_SCRIPTS: Final = "infra/aws/cluster/bootstrap"
_HANDLER: Final = "infra/aws/lambda/handler.py"


@dataclass(frozen=True)
class Release:
    """A commit under a name.

    Attributes:
        name: What it is called.
        root: The checkout.
        commit: Its commit.
    """

    name: str
    root: Path
    commit: str

    @property
    def folder(self) -> str:
        """Of the artifacts bucket."""
        return f"{BOOTSTRAP_PREFIX}/{self.name}"


def release_of(name: str, root: Path = CHECKOUT) -> Release:
    """The commit of a checkout, under a name.

    Raises:
        SettingsError: The name cannot be one, the folder is no checkout or has changes that are in no commit, or the
            name is a tag of another commit.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is no name of a release", "Use letters, digits, dots and hyphens")
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    changed = _git(root, "status", "--porcelain").decode().splitlines()
    if changed:
        raise SettingsError(
            f"{root} has changes that are in no commit ({changed[0].strip()}{', …' if changed[1:] else ''})",
            "Commit them or take them back: a release is a commit",
        )
    tag = _git(root, "for-each-ref", "--format=%(objectname) %(*objectname)", f"refs/tags/{name}").decode().split()
    if tag and tag[-1] != commit:
        raise SettingsError(f"the tag {name} is {tag[-1][:12]}, the checkout {commit[:12]}", f"git checkout {name}")
    return Release(name, root, commit)


def uploaded_commit(s3: Any, bucket: str, release: Release) -> str:
    """The commit that lies in the bucket under the name of a release; empty for none."""
    try:
        found = s3.head_object(Bucket=bucket, Key=f"{release.folder}/{RELEASE_ARCHIVE}")
    except s3.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return ""
        raise
    commit: str = found["Metadata"].get("commit", "unknown")
    return commit


def check_unchanged(s3: Any, bucket: str, release: Release) -> bool:
    """Whether the release lies in the bucket.

    Raises:
        SettingsError: Another commit lies there under its name.
    """
    there = uploaded_commit(s3, bucket, release)
    if there not in ("", release.commit):
        raise SettingsError(
            f"release {release.name} is {there[:12]} in {bucket}, and the checkout is {release.commit[:12]}",
            "A release stays what it is: give this one another name",
        )
    return bool(there)


def upload(s3: Any, bucket: str, release: Release) -> str:
    """Put scripts and code of a release where nodes look for them, unless they are there. Returns what was done.

    Raises:
        SettingsError: Another commit lies there under its name.
    """
    if check_unchanged(s3, bucket, release):
        return f"release {release.name} is there already"
    scripts = sorted((release.root / _SCRIPTS).glob("*.sh"))
    for script in scripts:
        s3.put_object(Bucket=bucket, Key=f"{release.folder}/{script.name}", Body=script.read_bytes())
    # Last, because it says that all are there; and only if nobody else was faster.
    s3.put_object(
        Bucket=bucket,
        Key=f"{release.folder}/{RELEASE_ARCHIVE}",
        Body=_git(release.root, "archive", "--format=tar.gz", release.commit),
        Metadata={"commit": release.commit},
        IfNoneMatch="*",
    )
    return f"release {release.name} uploaded, {len(scripts)} scripts and {RELEASE_ARCHIVE} of {release.commit[:12]}"


def missing_images(ecr: Any, repositories: list[str], release: Release) -> list[str]:
    """Commands that push the images of a release which the registry has not; those that are there are not looked at."""
    commands = []
    for found in ecr.describe_repositories(repositoryNames=repositories)["repositories"]:
        try:
            ecr.describe_images(repositoryName=found["repositoryName"], imageIds=[{"imageTag": release.name}])
        except ecr.exceptions.ImageNotFoundException:
            image = found["repositoryName"].rpartition("/")[2]
            commands.append(f"infra/images/build.sh {image} --tag {release.name} --push {found['repositoryUri']}")
    return sorted(commands)


def handler_key(root: Path = CHECKOUT) -> str:
    """Where the code of the event handler lies in the artifacts bucket: other code is another object."""
    return f"functions/handler-{hashlib.sha256((root / _HANDLER).read_bytes()).hexdigest()[:16]}.zip"


def handler_zip(root: Path = CHECKOUT) -> bytes:
    """The code of the event handler as Lambda takes it, the same for the same code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("handler.py")  # Of 1980, whenever it is made.
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, (root / _HANDLER).read_bytes(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except FileNotFoundError as error:
        raise SettingsError("there is no git on this machine", "Install it") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise SettingsError(f"{root} is no checkout that git can read ({said})", "Deploy from a clone") from error
    return done.stdout
