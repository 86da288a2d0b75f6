"""Downloads on a terminal, without one, and by the command."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.terminal import show_download
from tasks.models.cards import ModelCard
from tests.models.twins import twins

__all__ = ["twins"]

ROOT = Path(__file__).parents[2]

_DOWNLOAD = """
from flows.terminal import show_download
with show_download("some-model") as progress:
    for done in range(0, 67_000_001, 6_700_000):
        progress(done, 67_000_000)
"""


def test_a_terminal_shows_a_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", _DOWNLOAD], stderr=theirs, cwd=ROOT, env=environment, check=True)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 1 << 16):
            shown += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    for said in (b"some-model", b"67.0/67.0 MB", b"/s"):
        assert said in shown


def test_without_a_terminal_there_is_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with show_download("some-model") as progress:
        for done in range(0, 1001):
            progress(done * 10_000, 10_000_000)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert (len(lines), lines[0], lines[-1]) == (11, "some-model: 0.0 of 10.0 MB", "some-model: 10.0 of 10.0 MB")


def test_fetching_a_blend_from_a_mirror(
    twins: tuple[ModelCard, ModelCard],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", str(tmp_path / "weights"))
    monkeypatch.delenv("SUPERRES_MODEL_DIR")
    assert main(["models", "fetch", "strong@0.5"]) == 0
    folder = tmp_path / "cache" / "media-super-resolution" / "models"
    assert capsys.readouterr().out == f"{folder / 'strong.pth'}\n"
    assert {path.name for path in folder.glob("*.pth")} == {"strong.pth", "weak.pth"}
    assert main(["models", "verify"]) == 0
    assert f"weak: good ({folder / 'weak.pth'})" in capsys.readouterr().out
