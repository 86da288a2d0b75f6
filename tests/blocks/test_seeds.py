"""Blocks of pools from a TOML file, and the command that saves them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from blocks.pools import LocalPools, PoolsBlock, SlurmGpuNodes, SlurmNodes, SlurmPools
from blocks.seeds import read_seeds
from tasks.errors import SettingsError

ROOT: Final = Path(__file__).parents[2]

GOOD: Final = """
[slurm-pools.fsx]
interface = "ib0"
shared_directory = "/fsx/superres"
prologue = ["module load ffmpeg"]
gpu = { partition = "a100", gres = "gpu:1", maximum = 8 }

[slurm-pools.fsx.cpu]
partition = "short"
environment = { SPOOL = "$TMPDIR" }

[slurm-pools.plain]

[local-pools.workstation]
cpu_slots = 6
"""


def written(folder: Path, text: str | bytes) -> Path:
    """A file with this content."""
    path = folder / "pools.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


class TestReading:
    def test_good_file(self, tmp_path: Path) -> None:
        assert {seed.name: seed.block() for seed in read_seeds(written(tmp_path, GOOD))} == {
            "fsx": SlurmPools(
                interface="ib0",
                shared_directory="/fsx/superres",
                prologue=["module load ffmpeg"],
                cpu=SlurmNodes(partition="short", environment={"SPOOL": "$TMPDIR"}),
                gpu=SlurmGpuNodes(partition="a100", gres="gpu:1", maximum=8),
            ),
            "plain": SlurmPools(),
            "workstation": LocalPools(cpu_slots=6),
        }

    def test_empty_file(self, tmp_path: Path) -> None:
        assert read_seeds(written(tmp_path, "# Nothing yet.\n")) == []

    def test_example_of_the_documentation(self, tmp_path: Path) -> None:
        readme = (ROOT / "infra/pools/README.md").read_text()
        examples = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
        assert examples
        for example in examples:
            for seed in read_seeds(written(tmp_path, example)):
                block = seed.block()
                assert isinstance(block, PoolsBlock)
                assert [pool.name for pool in block.pools()] == ["cpu", "gpu"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[slurm-pools.fsx\n", "cannot be read as TOML"),
            ("[slurm-pools.fsx]\naccount = film\n", "cannot be read as TOML"),
            (b"[slurm-pools.fsx]\naccount = 'caf\xe9'\n", "cannot be read as TOML"),
            ("[slurm.fsx]\n", "there are no blocks called 'slurm'"),
            ("account = 'film'\n", "there are no blocks called 'account'"),
            ("[slurm-pools.fsx]\ndeath_timeout = 0\n", "slurm-pools.fsx.death_timeout: "),
            ("[slurm-pools.fsx]\ngpu = { maximum = 8 }\n", "slurm-pools.fsx.gpu.partition: "),
            ("[slurm-pools.fsx]\ncpu = { partition = 'c', slots = 0 }\n", "slurm-pools.fsx.cpu.slots: "),
            ("[slurm-pools.fsx]\ncpu = { partition = 'c', qos = 'low' }\n", "slurm-pools.fsx.cpu.qos: "),
            ("[slurm-pools.fsx]\nprologue = ['a', 3]\n", "slurm-pools.fsx.prologue.1: "),
            ("[slurm-pools.fsx]\ninterfce = 'ib0'\n", "slurm-pools.fsx.interfce: "),
            ("[local-pools.here]\ncpu_slots = 'many'\n", "local-pools.here.cpu_slots: "),
            ("[local-pools]\ncpu_slots = 3\n", "local-pools.cpu_slots: "),
            ("slurm-pools = 3\n", "slurm-pools"),
            ("[slurm-pools.twice]\n[local-pools.twice]\n", "twice"),
            ("[aws-credentials.a]\naws_secret_access_key = 'x'\n", "secrets do not belong here"),
            ("[media-store.a]\nkms = 'alias/a'\n", "media-store.a.kms: "),
            ("[job-ledger.a]\ntable = 3\n", "job-ledger.a.table: "),
        ],
        ids=[
            "syntax", "bare-word", "not-utf8", "unknown-table", "value-at-the-top", "number", "missing", "nested",
            "unknown-key-of-nodes", "in-a-list", "unknown-key", "text-for-number", "no-name", "no-table", "same-name",
            "secret", "unknown-key-of-a-store", "number-for-text",
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named_with_its_place(self, tmp_path: Path, text: str | bytes, said: str) -> None:
        path = written(tmp_path, text)
        with pytest.raises(SettingsError) as refusal:
            read_seeds(path)
        assert str(path) in str(refusal.value)
        assert said in str(refusal.value)

    def test_file_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read"):
            read_seeds(tmp_path / "nowhere.toml")


LOAD: Final = """
import sys
from blocks.pools import load_pools
from infra.prefect_server import ensure_api

with ensure_api():
    for name in sys.argv[1:]:
        block = load_pools(name)
        print(block.get_block_type_slug(), getattr(block, "account", None), getattr(block, "cpu_slots", None))
"""


class TestCommand:
    """`superres blocks save`, with the private server that a user has who configured nothing."""

    def run(self, folder: Path, *command: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Run Python in a home of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment |= {
            "HOME": str(folder / "user"),
            "SUPERRES_HOME": str(folder / "home"),
            "PREFECT_HOME": str(folder / "prefect"),
        }
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def test_saved_pools_are_found_by_name(self, tmp_path: Path) -> None:
        path = written(tmp_path, "[slurm-pools.fsx]\naccount = 'old'\n[local-pools.workstation]\ncpu_slots = 6\n")
        done = self.run(tmp_path, "-m", "flows.cli", "blocks", "save", str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["saved slurm-pools/fsx", "saved local-pools/workstation"]

        written(tmp_path, "[slurm-pools.fsx]\naccount = 'film'\n")
        done = self.run(tmp_path, "-m", "flows.cli", "blocks", "save", str(path))
        assert (done.returncode, done.stdout) == (0, "saved slurm-pools/fsx\n"), done.stderr

        done = self.run(tmp_path, "-c", LOAD, "fsx", "slurm-pools/fsx", "workstation", "slurm")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "slurm-pools film None",
            "slurm-pools film None",
            "local-pools None 6",
            "slurm-pools  None",
        ]

    def test_wrong_file_is_refused_before_a_server_starts(self, tmp_path: Path) -> None:
        path = written(tmp_path, "[slurm-pools.fsx]\ndeath_timeout = 0\n")
        done = self.run(tmp_path, "-m", "flows.cli", "blocks", "save", str(path))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"superres: error: {path}: slurm-pools.fsx.death_timeout: ")
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "home").exists()
