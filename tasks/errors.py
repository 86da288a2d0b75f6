"""Typed errors: what is wrong, where, and what to do about it.

Every refusal or failure a user can meet is one of these classes. `kind` is stable and machine-readable (it goes into
`--json` output and job records), `exit_code` is what the command line returns, and the message is one line that names
the file, stream, frame or chunk concerned and ends with the remedy.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SuperResolutionError(Exception):
    """Base of all errors this project raises on purpose.

    Args:
        problem: What is wrong and where, one sentence without a trailing full stop.
        remedy: What the user can do, one sentence without a trailing full stop.
    """

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}." if self.remedy else f"{self.problem}."


class SettingsError(SuperResolutionError):
    """A parameter is out of range or two parameters contradict each other."""

    kind = "settings"
    exit_code = 2


class SourceError(SuperResolutionError):
    """The source is missing, is not a video, or is damaged beyond use."""

    kind = "source"
    exit_code = 3


class UnsupportedSourceError(SourceError):
    """The source is a valid video of a kind that cannot be processed faithfully yet."""

    kind = "unsupported-source"
    exit_code = 4


class DestinationError(SuperResolutionError):
    """The result cannot be written where it was asked for."""

    kind = "destination"
    exit_code = 5


class ScratchError(SuperResolutionError):
    """Scratch space is missing, not writable or too small for this job."""

    kind = "scratch"
    exit_code = 6


class ModelError(SuperResolutionError):
    """A model is unknown, its weights are missing, or its file fails a check."""

    kind = "model"
    exit_code = 7


class FrameError(SuperResolutionError):
    """A frame could not be decoded, upscaled or encoded.

    Args:
        problem: What went wrong.
        remedy: What to do.
        frame: Index of the first frame concerned, counted from 0 in presentation order over the whole source.
    """

    kind = "frame"
    exit_code = 8

    def __init__(self, problem: str, remedy: str | None = None, *, frame: int | None = None) -> None:
        super().__init__(problem, remedy)
        self.frame = frame

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_frame_error, (type(self), self.problem, self.remedy, self.frame), self.__dict__)


class ChunkFileError(SuperResolutionError):
    """A chunk file between two stages is missing, truncated or does not match its checksums."""

    kind = "chunk-file"
    exit_code = 9


class VerificationError(SuperResolutionError):
    """The written result differs from what was promised; it was not published."""

    kind = "verification"
    exit_code = 10


class PoolError(SuperResolutionError):
    """Workers of a pool could not start or were lost more often than allowed."""

    kind = "pool"
    exit_code = 11


class StoreError(SuperResolutionError):
    """The media store cannot be reached, refuses access, or gave or kept something else than it should."""

    kind = "store"
    exit_code = 13


class LedgerError(SuperResolutionError):
    """The job ledger cannot be reached, or its record says that this job is somebody else's now."""

    kind = "ledger"
    exit_code = 14


class AccessError(SuperResolutionError):
    """There is no such job, as far as the one who asks may know."""

    kind = "access"
    exit_code = 15


class LibraryError(SuperResolutionError):
    """Some videos of a library failed.

    Args:
        problem: How many.
        rows: What became of each video.
    """

    kind = "library"
    exit_code = 16

    def __init__(self, problem: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(problem, "See the reasons in the table; what lies in the videos is not tried again by itself")
        self.rows = rows

    def __reduce__(self) -> tuple[object, ...]:
        return (LibraryError, (self.problem, self.rows), self.__dict__)


class FlightCheckError(SuperResolutionError):
    """A part of the installation does not work."""

    kind = "flight-check"
    exit_code = 17


class BootstrapError(SuperResolutionError):
    """The Prefect server cannot be set up."""

    kind = "bootstrap"
    exit_code = 18


class EvaluationError(SuperResolutionError):
    """Some models could not be judged on some clips.

    Args:
        problem: Which.
        remedy: What to do.
        result: What the flow would have returned, with a row for each clip and model.
    """

    kind = "evaluation"
    exit_code = 19

    def __init__(self, problem: str, remedy: str, result: dict[str, Any]) -> None:
        super().__init__(problem, remedy)
        self.result = result

    def __reduce__(self) -> tuple[object, ...]:
        return (EvaluationError, (self.problem, self.remedy, self.result), self.__dict__)


class StoppedError(SuperResolutionError):
    """Somebody cancelled the run on the Prefect server."""

    kind = "cancelled"
    exit_code = 130


class ApprovalError(SuperResolutionError):
    """Nobody approved what was waiting for it, or with something that cannot be done."""

    kind = "approval"
    exit_code = 20


def _rebuild_frame_error(cls: type[FrameError], problem: str, remedy: str | None, frame: int | None) -> FrameError:
    return cls(problem, remedy, frame=frame)
