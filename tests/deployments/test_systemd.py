"""The units: systemd accepts them, and the commands in them exist with these options."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from deployments.bootstrap import CHECKOUT, LIBRARY_VARIABLE, RESULTS_VARIABLE

FOLDER: Final = CHECKOUT / "deployments/systemd"
UNITS: Final = sorted(FOLDER.glob("*.service"))


def commands(unit: Path) -> list[str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return [value for name, value in parser["Service"].items() if name.startswith("ExecStart")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_commands_exist_with_these_options(unit: Path) -> None:
    assert commands(unit)
    for command in commands(unit):
        program, *arguments = shlex.split(command)
        installed = CHECKOUT / Path(program).relative_to("/opt/superres")
        options = [word for word in arguments if word.startswith("--")]
        words = arguments[: arguments.index(options[0])]
        shown = subprocess.run([installed, *words, "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
        assert all(re.search(rf"{option}\b", shown.stdout) for option in options), shown.stdout


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_them(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    # What it would run is checked above: here it need only be there.
    text = unit.read_text().replace("/opt/superres/.venv/bin/", "/bin/").replace("/bin/prefect", "/bin/true")
    (tmp_path / unit.name).write_text(text.replace("/bin/python", "/bin/true").replace("User=superres", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []


def test_the_example_names_what_is_read() -> None:
    text = (FOLDER / "environment.example").read_text()
    names = set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE))
    assert {LIBRARY_VARIABLE, RESULTS_VARIABLE, "PREFECT_API_AUTH_STRING", "SUPERRES_MODEL_DIR"} <= names
