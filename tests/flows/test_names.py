"""`from flows import upscale_video` gives the flow, whoever imported what before; and costs nothing until then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import flows
from infra.prefect_server.process import database_of, prepare_database
from tasks.media.sample import write_sample

ROOT: Final = Path(__file__).parents[2]

#: Ways to import that a program may have gone before, and in any order.
FLOW_FIRST: Final = "from flows import upscale_video\nimport flows.upscale_video"
MODULE_FIRST: Final = "import flows.upscale_video\nfrom flows import upscale_video"
BY_ANOTHER: Final = "import flows.upscale_library\nfrom flows import upscale_library, upscale_video"
ITS_MODULE: Final = "from flows.upscale_video import upscale_video as same, UpscaleResult\n" + MODULE_FIRST


def run(program: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("imports", [FLOW_FIRST, MODULE_FIRST, BY_ANOTHER, ITS_MODULE])
def test_the_name_is_the_flow_in_every_order(imports: str) -> None:
    said = run(
        f"{imports}\nimport flows, sys\n"
        "module = sys.modules['flows.upscale_video']\n"
        "assert upscale_video is flows.upscale_video is module.upscale_video\n"
        "print(type(upscale_video).__name__, upscale_video.name, module.__name__)"
    )
    assert said == "Flow upscale-video flows.upscale_video"


def test_the_package_loads_nothing() -> None:
    heavy = "('prefect', 'torch', 'dask', 'distributed', 'pydantic', 'numpy', 'flows.parameters')"
    assert run(f"import flows, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_every_name_is_there_and_no_other() -> None:
    for name in flows.__all__:
        value = getattr(flows, name)
        assert value.__module__.startswith("flows.")
        assert callable(value)
    assert set(flows.__all__) <= set(dir(flows))
    with pytest.raises(AttributeError, match="no_such_flow"):
        flows.no_such_flow  # noqa: B018
    with pytest.raises(ImportError):
        from flows import no_such_flow  # noqa: F401


PLAIN: Final = """
import json, sys
from flows import UpscaleOptions, upscale_video
if __name__ == "__main__":
    print(json.dumps(upscale_video(sys.argv[1], sys.argv[2], UpscaleOptions())))
"""


def test_a_flow_needs_nothing_around_it(tmp_path: Path) -> None:
    """No server, no pools: one server of Prefect's starts for all, not one more for each worker."""
    write_sample(tmp_path / "clip.mp4", frames=6)
    (tmp_path / "plain.py").write_text(PLAIN)
    (home := tmp_path / "prefect").mkdir()
    prepare_database(home, database_of(home))  # Prefect's own migrations would take many seconds.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database_of(home)}",
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "SUPERRES_HOME": str(tmp_path / "home"),
        "SUPERRES_SCRATCH": str(tmp_path / "scratch"),
    }
    command = [sys.executable, "plain.py", "clip.mp4", "large.mp4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["verified"] and result["frames_out"] == 6
    assert (tmp_path / "large.mp4").exists()
    assert (done.stdout + done.stderr).count("Starting temporary server") == 1
