"""Blocks from a file: what a site keeps under version control, saved into the Prefect API by `superres blocks save`.

[slurm-pools.fsx]
interface = "ib0"
shared_directory = "/fsx/superres"
gpu = { partition = "a100", gres = "gpu:1", maximum = 8 }

[aws-credentials.archive]
region_name = "eu-central-1"
profile_name = "archive"

[media-store.archive]
credentials = "archive"
kms_key = "alias/media"

[job-ledger.archive]
credentials = "archive"
table = "superres-jobs"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefect.blocks.core import Block
from prefect_aws import AwsCredentials
from pydantic import ValidationError

from blocks.job_ledger import JobLedger
from blocks.media_store import MediaStore
from blocks.pools import LocalPools, PoolsBlock, SlurmPools
from tasks.errors import SettingsError

#: The kinds of blocks that a file may describe, in the order in which they are saved.
KINDS: Final[tuple[type[Block], ...]] = (AwsCredentials, SlurmPools, LocalPools, MediaStore, JobLedger)

#: What does not belong into a file that is kept under version control.
_SECRETS: Final = ("aws_secret_access_key", "aws_session_token")


@dataclass(frozen=True)
class Seed:
    """A block that a file describes."""

    path: Path
    kind: type[Block]
    name: str
    values: dict[str, Any]

    def block(self) -> Block:
        """The block; one that names credentials needs the API in which they are saved.

        Raises:
            SettingsError: A value is wrong, or there are no such credentials.
        """
        values, where = self.values, f"{self.kind.get_block_type_slug()}.{self.name}"
        if isinstance(credentials := values.get("credentials"), str):
            try:
                values = {**values, "credentials": AwsCredentials.load(credentials)}
            except ValueError as error:
                raise SettingsError(
                    f"{self.path}: {where}: there are no AWS credentials called {credentials!r}", "Save them first"
                ) from error
        return _block(self.path, self.kind, where, values)

    def save(self) -> str:
        """Save the block, over one of the same name.

        Returns:
            `TYPE/NAME`.
        """
        self.block().save(self.name, overwrite=True)
        return f"{self.kind.get_block_type_slug()}/{self.name}"


def read_seeds(path: Path) -> list[Seed]:
    """The blocks that a TOML file describes, checked, in the order to save them in.

    Raises:
        SettingsError: The file cannot be read, or a value in it is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # Neither is a file that is not UTF-8.
        raise SettingsError(f"{path} cannot be read as TOML ({error})", "Correct it") from error
    kinds = {kind.get_block_type_slug(): kind for kind in KINDS}
    if unknown := tables.keys() - kinds.keys():
        raise SettingsError(f"{path}: there are no blocks called {min(unknown)!r}", f"Use {', '.join(kinds)}")
    found: list[Seed] = []
    pools: set[str] = set()
    for slug, kind in kinds.items():
        for name, values in _table(path, slug, tables.get(slug, {})).items():
            if issubclass(kind, PoolsBlock) and name in pools:
                raise SettingsError(f"{path}: two blocks of pools are called {name!r}", "Give each a name of its own")
            pools |= {name} if issubclass(kind, PoolsBlock) else set()
            where = f"{slug}.{name}"
            values = _table(path, where, values)
            for key in values.keys() & set(_SECRETS):
                raise SettingsError(
                    f"{path}: {where}.{key}: secrets do not belong here", "Name a profile, or use the UI"
                )
            # References are looked up when they are saved.
            _block(path, kind, where, {key: value for key, value in values.items() if key != "credentials"})
            found.append(Seed(path, kind, name, values))
    return found


def _block(path: Path, kind: type[Block], where: str, values: Any) -> Block:
    # A block takes any key: those that mean nothing are found here.
    for key in values.keys() - kind.model_fields.keys():
        raise SettingsError(f"{path}: {where}.{key}: there is no such setting", "Correct it")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (where, *first["loc"])))
        raise SettingsError(f"{path}: {place}: {first['msg']}", "Correct it") from error


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: {where}: is no table", f"Begin one with [{where}...]")
    return value
