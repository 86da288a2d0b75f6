"""Bad input on the command line: a non-zero exit, one clear line, one JSON object, and nothing left behind.

Every case runs through `main` in this process; one case of each kind runs as a real process too, where nothing can
hide a traceback or a module that was loaded for nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from flows.cli import main
from tests.media.clips import Clips, clips

__all__ = ["clips"]

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One refused command. `SRC`, `OUT`, `SCRATCH` and `CLIP:name` in arguments stand for paths."""

    name: str
    arguments: tuple[str, ...]
    kind: str
    exit_code: int
    said: str


def _case(name: str, kind: str, exit_code: int, said: str, *options: str, src: str = "SRC", out: str = "OUT/film.mp4"):
    return Case(name, (src, out, *options), kind, exit_code, said)


CASES: Final = (
    _case("missing", "source", 3, "does not exist", src="OUT/nowhere.mp4"),
    _case("empty", "source", 3, "is empty (0 bytes)", src="OUT/empty.mp4"),
    _case("directory", "source", 3, "is a directory", src="OUT"),
    _case("text", "source", 3, "is a text file", src="CLIP:notes.txt"),
    _case("text-as-video", "source", 3, "is a text file", src="CLIP:notes.mp4"),
    _case("audio-only", "source", 3, "holds no video", src="CLIP:sound.m4a"),
    _case("png", "source", 3, "is a picture", src="CLIP:still.png"),
    _case("jpg", "source", 3, "is a picture", src="CLIP:still.jpg"),
    _case("no-index", "source", 3, "moov", src="CLIP:no-index.mp4"),
    _case("playlist", "source", 3, "not a video", src="CLIP:playlist.m3u8"),
    _case("playlist-as-video", "source", 3, "not a video", src="CLIP:playlist.mp4"),
    _case("concat-script", "source", 3, "not a video", src="CLIP:script.ffconcat"),
    _case("concat-script-as-video", "source", 3, "not a video", src="CLIP:script.mkv"),
    _case("sixteen-bit", "unsupported-source", 4, "yuv420p16le", src="CLIP:sixteen-bit.mkv"),
    _case("telecined", "unsupported-source", 4, "telecined", src="CLIP:telecined.ts"),
    _case("untimed", "unsupported-source", 4, "have no timestamp", src="CLIP:untimed.h264"),
    _case("cut-off", "frame", 8, "is the first one missing", src="CLIP:cut.mp4"),
    _case("destination-is-source", "destination", 5, "is the source itself", out="SRC"),
    _case("destination-without-folder", "destination", 5, "does not exist", out="OUT/nowhere/film.mp4"),
    _case("destination-unwritable", "destination", 5, "cannot write into /proc", out="/proc/film.mp4"),
    _case("destination-taken", "destination", 5, "exists already", out="OUT/taken.mp4"),
    _case("destination-folder", "destination", 5, "is a folder", out="OUT/folder.mp4"),
    _case("destination-ending", "settings", 2, "cannot tell the container", out="OUT/film.xyz"),
    _case("destination-name-too-long", "destination", 5, "", out=f"OUT/{'x' * 300}.mp4"),
    _case("source-name-too-long", "source", 3, "", src=f"OUT/{'x' * 300}.mp4"),
    _case("line-break-in-name", "source", 3, "does not exist", src="OUT/two\nlines.mp4"),
    _case("model", "model", 7, "nonesuch", "--model", "nonesuch"),
    _case("model-file", "model", 7, "does not exist", "--model", "/nowhere/weights.pth"),
    _case("encoder", "settings", 2, "unknown encoder", "--encoder", "theora"),
    _case("precision", "settings", 2, "unknown precision", "--precision", "int4"),
    _case("denoise-without-partner", "settings", 2, "model compact-x2 has no denoise strength", "--denoise", "0.5"),
    _case("denoise-2", "settings", 2, "no denoise strength", "--model", "realesr-general-x4v3", "--denoise", "2"),
    _case("denoise-text", "settings", 2, "--denoise", "--denoise", "much"),
    _case("scale-0", "settings", 2, "scale 0", "--scale", "0"),
    _case("scale-5", "settings", 2, "scale 5", "--scale", "5"),
    _case("scale-text", "settings", 2, "--scale", "--scale", "large"),
    _case("scale-fraction", "settings", 2, "--scale", "--scale", "2.5"),
    _case("height-odd", "settings", 2, "143", "--height", "143"),
    _case("height-too-small", "settings", 2, "72", "--height", "72"),
    _case("scale-and-height", "settings", 2, "not allowed with", "--scale", "2", "--height", "144"),
    _case("chunk-seconds", "settings", 2, "makes no sense", "--chunk-seconds", "0"),
    _case("chunk-seconds-nan", "settings", 2, "makes no sense", "--chunk-seconds", "nan"),
    _case("unknown-option", "settings", 2, "--nonesuch", "--nonesuch"),
    _case("scratch-unwritable", "scratch", 6, "cannot write into scratch", "--scratch", "/proc/scratch"),
)
REAL: Final = ("missing", "cut-off", "no-index", "destination-taken", "model", "scale-text")


class Place:
    """Folders of one command."""

    def __init__(self, folder: Path, clips: Clips) -> None:
        self.out, self.scratch, self.home = folder / "out", folder / "scratch", folder / "home"
        self.source = folder / "in" / "clip.mp4"
        self.clips = clips
        for path in (self.out, self.out / "folder.mp4", self.source.parent):
            path.mkdir()
        (self.out / "empty.mp4").touch()
        (self.out / "taken.mp4").write_bytes(b"somebody's work")
        shutil.copy(clips.path("rate-25-1.mp4"), self.source)

    @property
    def environment(self) -> dict[str, str]:
        """Points every default place into the folder."""
        return {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "PREFECT_HOME": str(self.home / "prefect"),
            "SUPERRES_SCRATCH": str(self.scratch),
        }

    def command(self, case: Case) -> list[str]:
        def meant(text: str) -> str:
            if text.startswith("CLIP:"):
                return str(self.clips.path(text.removeprefix("CLIP:")))
            return text.replace("OUT", str(self.out)).replace("SRC", str(self.source))

        return ["upscale", *map(meant, case.arguments), "--json"]

    def files(self) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in self.source.parents[1].rglob("*")}


@pytest.fixture
def place(tmp_path: Path, clips: Clips) -> Place:
    return Place(tmp_path, clips)


def _check(case: Case, code: int, stdout: str, stderr: str) -> None:
    assert code == case.exit_code, stderr
    assert "Traceback" not in stderr + stdout
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("superres: error: ")
    assert case.said in stderr
    record = json.loads(stdout.splitlines()[-1])
    assert (record["status"], record["kind"]) == ("failed", case.kind)
    assert case.said in record["error"] or "\n" in record["error"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_and_leaves_nothing(
    case: Case, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    command = place.command(case)
    before = place.files()
    capfd.readouterr()
    code = main(command)
    said = capfd.readouterr()
    _check(case, code, said.out, said.err)
    assert place.files() == before


def _process(place: Place, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *command],
        cwd=ROOT, env={**os.environ, **place.environment, **environment}, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name in REAL], ids=lambda case: case.name)
def test_bad_input_is_refused_by_a_real_process(case: Case, place: Place) -> None:
    before = place.files()
    done = _process(place, place.command(case))
    _check(case, done.returncode, done.stdout, done.stderr)
    assert place.files() == before


def test_without_json_nothing_is_printed_on_stdout(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", str(place.out / "nowhere.mp4"), str(place.out / "film.mp4")]) == 3
    assert capfd.readouterr().out == ""


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("full", "kind", "exit_code"), [("scratch", "scratch", 6), ("destination", "destination", 5)])
def test_too_little_room_is_refused_before_any_work(
    tiny: Path, place: Place, capfd: pytest.CaptureFixture[str], full: str, kind: str, exit_code: int
) -> None:
    out, scratch = (place.out, tiny / "scratch") if full == "scratch" else (tiny, place.scratch)
    code = main(["upscale", str(place.source), str(out / "film.mp4"), "--scratch", str(scratch), "--json"])
    said = capfd.readouterr()
    _check(Case("", (), kind, exit_code, "GB free"), code, said.out, said.err)
    assert list(tiny.iterdir()) == []
    assert not place.scratch.exists()


def test_an_ffmpeg_that_is_not_there_is_said_in_one_line(place: Place) -> None:
    command = ["upscale", str(place.source), str(place.out / "film.mp4"), "--json"]
    done = _process(place, command, SUPERRES_FFMPEG="/nowhere/ffmpeg")
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "/nowhere/ffmpeg" in done.stderr


_LOADED = """
import sys
from flows.cli import main
code = main(sys.argv[1:])
heavy = sorted({"prefect", "prefect_dask", "distributed", "dask"} & set(sys.modules))
sys.exit(f"loaded {heavy}" if heavy else code)
"""


def test_a_refusal_loads_neither_prefect_nor_dask(place: Place) -> None:
    command = ["upscale", str(place.source), str(place.out / "taken.mp4"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *command],
        cwd=ROOT, env={**os.environ, **place.environment}, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr


@pytest.mark.parametrize(
    ("pools", "code", "words"),
    [("nonesuch", 2, "there are no pools called 'nonesuch'"), ("slurm", 11, "sbatch is not on the PATH")],
)
def test_pools_that_cannot_work_are_refused_before_any_worker_starts(
    place: Place, pools: str, code: int, words: str
) -> None:
    # Blocks are known to the Prefect API only, so this takes the seconds that its start takes.
    environment = {**os.environ, **place.environment, "PATH": "/usr/bin:/bin", "PREFECT_API_URL": ""}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "upscale", str(place.source), str(place.out / "f.mp4"), "--pools", pools],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("superres: ")]
    assert len(complaints) == 1
    assert words in complaints[0]
    assert "Traceback" not in done.stderr
    assert not place.scratch.exists()
    assert not (place.out / "f.mp4").exists()
