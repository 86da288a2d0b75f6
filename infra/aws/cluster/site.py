"""The facts of a site from a TOML file, for those who make a cluster without the stacks around it.

region = "eu-central-1"
head_subnet = "subnet-..."
compute_subnets = ["subnet-...", "subnet-..."]
login_subnets = ["subnet-..."]
file_system_id = "fs-..."
lustre_client_group = "sg-..."
artifacts_bucket = "..."
release = "1.0.0"

[accounting]
host = "..."
password_secret = "arn:..."
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from infra.aws.cluster.configuration import Site
from tasks.errors import SettingsError


def read_site(path: Path) -> Site:
    """The site that a file describes.

    Raises:
        SettingsError: The file cannot be read, or a value in it is missing, unknown or of the wrong type.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # Neither is a file that is not UTF-8.
        raise SettingsError(f"{path} cannot be read as TOML ({error})", "Correct it") from error
    try:
        return TypeAdapter(Site).validate_python(values, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}", "Correct it") from error
