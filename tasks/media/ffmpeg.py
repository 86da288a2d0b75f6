"""The one place where an ffmpeg process is started.

Commands are built with ffmpeg-python and run as argument lists, never through a shell, with a protocol whitelist, so
that neither a file name nor a playlist inside a "video" can reach the network or another program. The binary is the one
that the `imageio-ffmpeg` wheel carries: the same version on every machine, which is what makes a resumed or repeated
job bit-identical. `SUPERRES_FFMPEG` names another binary.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Final

import imageio_ffmpeg

from tasks.errors import SettingsError

#: Protocols an input may use: the file itself and our own pipes.
PROTOCOLS: Final = "file,pipe"

#: Lines of stderr that are kept in an error message.
_STDERR_LINES: Final = 4


class FfmpegError(RuntimeError):
    """ffmpeg ended with an error.

    Args:
        message: The last lines it wrote to stderr.
        returncode: Its exit status; negative for a signal.
    """

    def __init__(self, message: str, returncode: int) -> None:
        super().__init__(message, returncode)
        self.message = message
        self.returncode = returncode

    def __str__(self) -> str:
        ended = f"signal {-self.returncode}" if self.returncode < 0 else f"exit status {self.returncode}"
        return f"ffmpeg ended with {ended}: {self.message or 'no message'}"


@lru_cache(maxsize=1)
def binary() -> str:
    """Path of the ffmpeg executable.

    Raises:
        SettingsError: `SUPERRES_FFMPEG` names no program.
    """
    named = os.environ.get("SUPERRES_FFMPEG")
    if named and shutil.which(named) is None:
        raise SettingsError(f"SUPERRES_FFMPEG names {named}, which is no program", "Correct it or leave it out")
    return named or imageio_ffmpeg.get_ffmpeg_exe()


@lru_cache(maxsize=1)
def version() -> str:
    """The first line of `ffmpeg -version`: part of the key of everything ffmpeg writes."""
    return subprocess.run([binary(), "-version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@lru_cache(maxsize=1)
def encoder_names() -> frozenset[str]:
    """Names of the encoders built into the binary."""
    return _listed("-encoders", "------")


@lru_cache(maxsize=1)
def filter_names() -> frozenset[str]:
    """Names of the filters built into the binary."""
    return _listed("-filters", "sink filter")


def _listed(what: str, end_of_legend: str) -> frozenset[str]:
    """The second word of each line of one of ffmpeg's lists, below the legend."""
    listing = subprocess.run([binary(), "-hide_banner", what], capture_output=True, text=True, check=True).stdout
    rows = listing.partition(end_of_legend)[2].splitlines()
    return frozenset(row.split()[1] for row in rows if len(row.split()) > 1)


class FfmpegProcess:
    """A running ffmpeg whose stderr is collected and whose failure is an exception.

    A context manager: leaving it by an exception kills the process, leaving it normally waits for it.

    Args:
        arguments: The command line after the program's name, as ffmpeg-python's `get_args()` gives it.
        stdin: `True` to write to the process through `.stdin`.
        stdout: `True` to read from the process through `.stdout`.
    """

    def __init__(self, arguments: Sequence[str], *, stdin: bool = False, stdout: bool = False) -> None:
        command = [binary(), "-hide_banner", "-nostats", "-loglevel", "error", "-y", *arguments]
        if not stdin:
            command.insert(1, "-nostdin")
        # A file, not a pipe: nobody reads stderr while frames flow, and a full pipe would stop the process for ever.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is waited for
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
            stderr=self._stderr,
        )

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> FfmpegProcess:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None and not issubclass(exc_type, BrokenPipeError):
            self._process.kill()
            self._process.communicate()
            self._stderr.close()
            return
        # A broken pipe means that ffmpeg left first: what it said on stderr is the real cause.
        self.wait()

    def wait(self) -> None:
        """Close stdin, wait for the end.

        Raises:
            FfmpegError: The process ended with an error or by a signal.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        returncode = self._process.wait()
        with self._stderr:
            self._stderr.seek(0)
            lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        if returncode != 0:
            raise FfmpegError(" | ".join(lines[-_STDERR_LINES:]), returncode)


def run(arguments: Sequence[str]) -> None:
    """Run one ffmpeg command to its end.

    Raises:
        FfmpegError: It failed.
    """
    with FfmpegProcess(arguments):
        pass


def said_by(arguments: Sequence[str]) -> str:
    """What ffmpeg tells on stderr about a file, whether it succeeds or not."""
    command = [binary(), "-hide_banner", "-nostdin", "-nostats", "-protocol_whitelist", PROTOCOLS, *arguments]
    return subprocess.run(command, capture_output=True, check=False).stderr.decode(errors="replace")


def file_argument(path: Path) -> str:
    """`path` as ffmpeg must be given it: with an explicit protocol, so that no file name can name another one."""
    return f"file:{path}"
