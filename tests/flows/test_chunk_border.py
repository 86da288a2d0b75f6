"""The device of a worker does not wait between two chunks, when the next one is extracted in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.chunk_border import MODULE


def test_the_device_does_not_wait_at_the_border_of_a_chunk() -> None:
    # Before chunks got ready ahead, it waited 20 ms at the least.
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "--chunks", "8", "--size", "96x64", "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["chunks"] == 8
    assert result["wait_ms"]["median"] < 10
