"""Blocks from a file: what a site keeps under version control, saved into the Prefect API by `superres pools save`.

[slurm-pools.fsx]
interface = "ib0"
shared_directory = "/fsx/superres"
gpu = { partition = "a100", gres = "gpu:1", maximum = 8 }
"""

from __future__ import annotations

import tomllib
from pathlib import Path

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
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as TOML ({error})", "Correct it") from error
    kinds: dict[str, type[PoolsBlock]] = {kind.get_block_type_slug(): kind for kind in (SlurmPools, LocalPools)}
    blocks: dict[str, PoolsBlock] = {}
    for slug, entries in tables.items():
        if slug not in kinds:
            raise SettingsError(f"{path}: there are no blocks called {slug!r}", f"Use {' or '.join(kinds)}")
        for name, values in entries.items():
            try:
                blocks[name] = kinds[slug].model_validate(values)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, (slug, name, *first["loc"])))
                raise SettingsError(f"{path}: {where}: {first['msg']}", "Correct it") from error
    return blocks
