"""Real jobs for the tests: clips, `superres` in processes of its own, and what such a process leaves behind.

A `Place` is a folder with a scratch folder, a home and results of its own. `Place.start()` starts the command as a
terminal would, in a process group of its own; every process that comes out of it carries a mark in its environment,
by which it is found again after its parent is dead. Only marked processes are ever signalled.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import psutil

from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.ledger import Ledger
from tests.media.clips import picture, run_ffmpeg, tone

#: The rate of all clips here, and the frames of one group of pictures at it.
RATE: Final = Fraction(24000, 1001)
GROUP: Final = 24

#: Seconds anything may take that is expected to happen: generous, for machines with other things to do.
PATIENCE: Final = 300.0

#: Seconds between two looks while waiting.
_LOOK: Final = 0.002

_MARK: Final = "SUPERRES_TEST_RUN"

SUBTITLES: Final = "1\n00:00:00,500 --> 00:00:01,250\nfirst\n\n2\n00:00:02,000 --> 00:00:02,750\nsecond\n"


def make_film(path: Path, frames: int, size: str, *, sound: tuple[str, ...] = ("aac",), subtitles: str = "") -> Path:
    """Write a clip with B-frames at 24000/1001 frames per second.

    Args:
        path: File to write.
        frames: Number of frames.
        size: Width and height, such as `96x64`.
        sound: Codec of each audio stream.
        subtitles: Codec of a subtitle stream; none by default.
    """
    seconds = float(frames / RATE) + 0.001
    inputs = [*picture(RATE, seconds, size)]
    maps = ["-map", "0"]
    codecs = []
    for index, codec in enumerate(sound):
        inputs += tone(440 + 220 * index, seconds)
        maps += ["-map", str(index + 1)]
        codecs += [f"-c:a:{index}", codec]
    if subtitles:
        text = path.with_suffix(".srt")
        text.write_text(SUBTITLES)
        inputs += ["-i", str(text)]
        maps += ["-map", str(len(sound) + 1)]
        codecs += ["-c:s", subtitles]
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    video = ("-c:v", "libx264", "-preset", "veryfast", "-threads", "1", "-pix_fmt", "yuv420p", "-bf", "3")
    groups = ("-x264-params", f"keyint={GROUP}:b-adapt=0:scenecut=0")
    run_ffmpeg(*inputs, *maps, "-vf", tags, *video, *groups, *codecs, "-frames:v", str(frames), path)
    return path


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        record = json.loads(self.stdout.splitlines()[-1])
        assert isinstance(record, dict)
        return record

    @property
    def complaints(self) -> list[str]:
        """What the command itself said went wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("superres: ")]


class Run:
    """A running command.

    Args:
        command: Its arguments.
        environment: Its environment, without the mark.
        folder: Its working directory, which also takes its output.
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._stdout, self._stderr = (folder / f"{kind}-{self.mark}" for kind in ("stdout", "stderr"))
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**environment, _MARK: self.mark},
                cwd=folder,
                process_group=0,
            )
        self.pid = self._process.pid
        self.usual_niceness = os.getpriority(os.PRIO_PROCESS, 0)

    @property
    def said(self) -> str:
        """What it wrote to stderr so far."""
        return self._stderr.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        """Whether the command itself still runs."""
        return self._process.poll() is None

    def wait(self, timeout: float = PATIENCE) -> Finished:
        """Wait for the end of the command itself."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:.0f} s: {self.said}") from None
        return Finished(code, self._stdout.read_text(), self.said)

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """Wait until `condition` gives something true, while the command runs.

        Returns:
            What it gave.
        """
        deadline = time.monotonic() + timeout
        while not (given := condition()):
            assert self.is_alive, f"ended before {what}: {self.said}{self._stdout.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"no {what} within {timeout:.0f} s: {self.said}"
            time.sleep(_LOOK)
        return given

    def looks(self) -> Iterator[None]:
        """Give the caller a look now and then, for as long as the command runs."""
        while self.is_alive:
            yield
            time.sleep(_LOOK)

    def interrupt(self) -> None:
        """Send what Ctrl-C sends: SIGINT to the whole foreground group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the command with SIGKILL; what it started is left to itself."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)

    def processes(self) -> list[psutil.Process]:
        """All processes that came out of this command and still run, the command itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self, pool: str) -> list[psutil.Process]:
        """The worker processes of a pool: those of the `cpu` pool are niced, those of the `gpu` pool are not."""
        found = []
        for process in _children(self.pid):
            try:
                if "spawn_main" in " ".join(process.cmdline()):
                    is_niced = process.nice() > self.usual_niceness
                    if is_niced == (pool == "cpu"):
                        found.append(process)
            except psutil.Error:
                continue
        return found

    def encoders(self) -> list[tuple[psutil.Process, str]]:
        """The ffmpeg processes that encode groups now, each with the name of its chunk attempt's folder."""
        found = []
        for worker in self.workers("cpu"):
            for process in _children(worker.pid):
                try:
                    target = process.cmdline()[-1]
                except (psutil.Error, IndexError):
                    continue
                if match := re.search(r"/(encode-[^/]+\.partial-[^/]+)/", target):
                    found.append((process, match.group(1)))
        return found

    def wait_for_orphans(self, timeout: float) -> float:
        """Wait until no process of this command is left.

        Returns:
            Seconds it took.
        """
        began = time.monotonic()
        while left := self.processes():
            lines = [f"{process.pid}: {_command(process)}" for process in left]
            assert time.monotonic() - began < timeout, "\n".join([f"left after {timeout:.0f} s:", *lines])
            time.sleep(_LOOK)
        return time.monotonic() - began

    def clear_away(self) -> None:
        """End whatever is left of it; for fixtures."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(PATIENCE)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error as error:
        return str(error)


@dataclass
class Place:
    """Where commands run: a folder with a scratch folder and a home of its own."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "out").mkdir(exist_ok=True)

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def ledger(self) -> Ledger:
        """The records of what ran here."""
        return open_ledger(LedgerSettings(file=str(self.folder / "home" / "jobs.sqlite")))

    def result(self, name: str) -> Path:
        """Path for a result; nothing else is written into its folder."""
        return self.folder / "out" / name

    def start(self, source: Path | str, destination: Path | str, *options: str) -> Run:
        """Start `superres upscale ... --json`."""
        return self.start_command("upscale", str(source), str(destination), "--json", *options)

    def start_command(self, *arguments: str) -> Run:
        """Start `superres` with these arguments and the scratch folder of this place."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment |= {"SUPERRES_HOME": str(self.folder / "home"), "PREFECT_HOME": str(self.folder / "profile")}
        command = [str(Path(sys.executable).with_name("superres")), *arguments, "--scratch", str(self.scratch)]
        run = Run(command, environment, self.folder)
        self.runs.append(run)
        return run

    def clear_away(self) -> None:
        """End whatever still runs here."""
        for run in self.runs:
            run.clear_away()


@dataclass(frozen=True)
class Identity:
    """Which file a name stood for, and when it was written."""

    inode: int
    written: int

    @classmethod
    def of(cls, path: Path) -> Identity:
        status = path.stat()
        return cls(status.st_ino, status.st_mtime_ns)


class Scratch:
    """What lies in the scratch folder of one job.

    Args:
        folder: The scratch folder, which holds the folder of the job once there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._left_behind: set[str] = set()
        self._seen: dict[str, Identity] = {}

    def files(self) -> list[Path]:
        """All files and folders of the job."""
        try:
            return [path for job in os.scandir(self.folder) if job.is_dir() for path in _entries(Path(job.path))]
        except FileNotFoundError:
            return []

    def finished(self) -> dict[str, Identity]:
        """The encoded chunks that are complete, manifest included."""
        manifests = [path for path in self.files() if re.fullmatch(r"encode-.*\.mkv\.json", path.name)]
        found = {}
        for manifest in manifests:
            chunk = manifest.with_suffix("")
            try:
                if chunk.stat().st_size == json.loads(manifest.read_text())["bytes"]:
                    found[chunk.name] = Identity.of(chunk)
            except FileNotFoundError:
                continue
        return found

    def upscaled(self) -> list[Path]:
        """The upscaled chunk files that are complete."""
        return [path for path in self.files() if re.fullmatch(r"upscale-.*\.yuv", path.name)]

    def being_written(self, stage: str) -> list[str]:
        """Names of what a stage is writing now."""
        names = (path.name for path in self.files())
        return [name for name in names if _is_partial(name, stage) and name not in self._left_behind]

    def abandon(self, *stages: str) -> None:
        """Take what these stages were writing for dead, after their worker was killed."""
        for stage in stages:
            self._left_behind.update(self.being_written(stage))

    def check_kept(self) -> None:
        """Check that no chunk seen finished was made again."""
        for name, identity in self.finished().items():
            assert self._seen.setdefault(name, identity) == identity, f"{name} was made again"


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from (Path(entry.path) for entry in os.scandir(folder))
    except FileNotFoundError:
        return


def _is_partial(name: str, stage: str) -> bool:
    return name.startswith(f"{stage}-") and ".partial-" in name
