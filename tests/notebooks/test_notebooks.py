"""The notebooks: stripped in the repository, and each executed as a user runs it, from its first cell to its last."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from tasks.media.probe import probe
from tests.waiting import eventually

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "notebooks"
NAMES: Final = (
    "01_first_upscale",
    "02_compare_models",
    "03_quality_and_speed",
    "04_plan_an_archive",
    "05_slurm_pools",
)

#: What no output may say.
TROUBLE: Final = ("Traceback", "Warning:", "| WARNING", "| ERROR", "Error:")


@dataclass
class Executed:
    """A notebook that ran in a folder of its own."""

    folder: Path
    cells: list[Any]
    widgets: Any
    """State of its widgets; empty where it has none."""

    @property
    def outputs(self) -> list[Any]:
        return [output for cell in self.cells for output in cell.get("outputs", [])]

    @property
    def text(self) -> str:
        """Everything that is there to be read."""
        said = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in self.outputs]
        return "\n".join(said)

    def shown(self, kind: str) -> list[str]:
        """What was shown of one MIME type."""
        return [output.data[kind] for output in self.outputs if kind in output.get("data", {})]


def named(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Executed]:
    """Run a notebook on this interpreter and this checkout, with records and scratch of its own."""
    for variable in [variable for variable in os.environ if variable.startswith(("PREFECT_", "SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(variable)
    for variable, folder in (("SUPERRES_HOME", "home"), ("SUPERRES_SCRATCH", "scratch"), ("PREFECT_HOME", "prefect")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("NOTEBOOK_TEST", str(tmp_path))  # Every process of the notebook inherits it.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # The kernel `python3` of this interpreter before the user's.

    def run(name: str) -> Executed:
        notebook, folder = named(name), tmp_path / "work"
        folder.mkdir()
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", timeout=300, resources=place).execute()
        executed = Executed(folder, notebook.cells, notebook.metadata.get("widgets", {}))
        assert [word for word in TROUBLE if word in executed.text] == [], executed.text
        eventually(lambda: not processes_of(tmp_path), 15)
        return executed

    return run


def processes_of(folder: Path) -> list[int]:
    """Processes of a notebook that are still there, however far from its kernel."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("NOTEBOOK_TEST") == str(folder):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_all_notebooks_are_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stripped_and_valid(name: str) -> None:
    notebook = named(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 20


def test_a_first_upscale(execute: Callable[[str], Executed]) -> None:
    executed = execute("01_first_upscale")
    large = probe(executed.folder / "output" / "town-large.mp4")
    assert (large.width, large.height, large.declared_frames) == (640, 360, 48)
    assert "'verified': True" in executed.text
    assert len(executed.shown("image/png")) == 1
    assert any("data:video/mp4;base64," in page for page in executed.shown("text/html"))


def test_models_are_compared(execute: Callable[[str], Executed]) -> None:
    executed = execute("02_compare_models")
    assert "['bicubic', 'lanczos', 'compact-x2', 'compact-x4'" in executed.text
    assert len(executed.shown("image/png")) == 2
    [view] = executed.shown("application/vnd.jupyter.widget-view+json")
    # Not `interact`: it shows through a widget whose messages nbclient answers on the socket on which it waits, and now
    # and then it then waits until the timeout.
    states = executed.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    kinds = [state["model_name"] for state in states.values()]
    assert view["model_id"] in states
    assert (kinds.count("IntSliderModel"), kinds.count("DropdownModel"), kinds.count("ImageModel")) == (2, 1, 1)


def test_quality_and_speed_are_measured(execute: Callable[[str], Executed]) -> None:
    executed = execute("03_quality_and_speed")
    folder = executed.folder / "output" / "evaluation"
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".parquet", ".svg"}
    tables = [page for page in executed.shown("text/html") if "compact-x4" in page]
    assert len(tables) == 2 and "town.mp4" in tables[0] and "fractal.mp4" in tables[0]
    assert len(executed.shown("image/png")) == 2


def test_an_archive_is_planned(execute: Callable[[str], Executed]) -> None:
    executed = execute("04_plan_an_archive")
    videos, speeds, plan, workers = executed.shown("text/html")
    assert all(name in videos for name in ("news.mp4", "talk.mp4", "town.mp4"))
    for table in (speeds, plan, workers):
        assert table.count(">measured<") == 2 and "estimated" in table
    assert len(executed.shown("image/png")) == 1


def test_pools_grow_and_shrink(execute: Callable[[str], Executed]) -> None:
    executed = execute("05_slurm_pools")
    calls, workers = executed.shown("text/html")
    assert calls.count("True") == 2
    assert "ready" in workers
    assert "{'cpu': 0, 'gpu': 0}" in executed.text
    [timeline] = executed.shown("image/svg+xml")
    assert all(stage in timeline for stage in ("extract", "upscale", "encode"))
    for number in (1, 2):
        assert probe(executed.folder / "output" / f"town-{number}.mp4").declared_frames == 48
