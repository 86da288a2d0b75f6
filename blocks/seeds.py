"""Blocks from a file: what a site keeps under version control, saved into the Prefect API by `superres pools save`.

[slurm-pools.fsx]
interface = "ib0"
shared_directory = "/fsx/superres"
gpu = { partition = "a100", gres = "gpu:1", maximum = 8 }
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blocks.pools import LocalPools, PoolsBlock, SlurmPools
from tasks.errors import SettingsError


def read_pools(path: Path) -> dict[str, PoolsBlock]:
    """Read the blocks of pools that a TOML file describes, by name.

    Raises:
        SettingsError: The file cannot be read, or a value in it is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # Neither is a file that is not UTF-8.
        raise SettingsError(f"{path} cannot be read as TOML ({error})", "Correct it") from error
    kinds: dict[str, type[PoolsBlock]] = {kind.get_block_type_slug(): kind for kind in (SlurmPools, LocalPools)}
    blocks: dict[str, PoolsBlock] = {}
    for slug, entries in tables.items():
        if slug not in kinds:
            raise SettingsError(f"{path}: there are no blocks called {slug!r}", f"Use {' or '.join(kinds)}")
        for name, values in _table(path, slug, entries).items():
            if name in blocks:
                raise SettingsError(f"{path}: two blocks are called {name!r}", "Give each a name of its own")
            blocks[name] = _block(path, kinds[slug], f"{slug}.{name}", values)
    return blocks


def _block(path: Path, kind: type[PoolsBlock], where: str, values: Any) -> PoolsBlock:
    # A block takes any key: those that mean nothing are found here.
    for key in _table(path, where, values).keys() - kind.model_fields.keys():
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
