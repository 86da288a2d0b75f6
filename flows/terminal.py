"""What the command line shows: the start, a live progress bar and the summary, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tasks.progress import Progress as JobProgress
from tasks.request import CheckedRequest, UpscaleRequest

_console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Without a terminal one line is printed per this share of the job.
_PLAIN_STEP = 0.1

#: What was kept of a job's pictures is said from this share on.
_WORTH_SAYING = 0.02


def show_start(request: UpscaleRequest, checked: CheckedRequest | None) -> None:
    """Say what is about to be done, in more detail where the video has been looked at."""
    if checked is None:
        _console.print(f"{request.source} -> {request.destination}", markup=False)
        return
    facts, target = checked.facts, checked.target
    _console.print(
        f"{facts.path}: {facts.width}x{facts.height} -> {target.width}x{target.height}"
        f" with {checked.card.name}, {checked.profile.name}",
        markup=False,
    )
    _show_treatment(checked.notes, checked.carried.left_out)


def _show_treatment(notes: Iterable[str], left_out: Mapping[int, str]) -> None:
    """Say what comes out otherwise than it went in, and what does not come out."""
    for note in (*notes, *(f"stream {index} is left out: {reason}" for index, reason in left_out.items())):
        _console.print(note, markup=False)


@contextmanager
def show_progress() -> Iterator[Callable[[JobProgress], None]]:
    """Show progress while the block runs.

    Yields:
        A function to call with each new look at the job.
    """
    if not _console.is_terminal:
        yield _plain_reporter()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[eta]}"),
    )
    with Progress(*columns, console=_console, transient=True) as bar:
        row = bar.add_task("starting", total=None, amount="", speed="", eta="")

        def observe(progress: JobProgress) -> None:
            bar.update(
                row,
                description=progress.phase,
                total=1.0,
                completed=progress.share,
                amount=_amount(progress),
                speed=f"{progress.frames_per_second:.2f} frames/s" if progress.frames_per_second else "measuring",
                eta=f"{duration(progress.eta_seconds)} left" if progress.eta_seconds else "",
            )

        yield observe


def _plain_reporter() -> Callable[[JobProgress], None]:
    said_share, said_phase = -1.0, ""

    def observe(progress: JobProgress) -> None:
        nonlocal said_share, said_phase
        share = progress.share
        if share < said_share + _PLAIN_STEP and progress.phase == said_phase:
            return
        said_share, said_phase = share, progress.phase
        speed = f", {progress.frames_per_second:.2f} frames/s" if progress.frames_per_second else ""
        eta = f", {duration(progress.eta_seconds)} left" if progress.eta_seconds else ""
        _console.print(f"{progress.phase} {_amount(progress)}{speed}{eta}", markup=False)

    return observe


def _amount(progress: JobProgress) -> str:
    if progress.bytes_total:
        return f"{progress.bytes_done / 1e6:.1f} of {progress.bytes_total / 1e6:.1f} MB"
    return f"{progress.frames_done}/{progress.frames_total} frames" if progress.frames_total else ""


def show_summary(result: dict[str, Any]) -> None:
    """Say what came out."""
    if result.get("skipped"):
        _console.print(f"{result['output']} has been made already: nothing to do", markup=False)
        return
    reused = f", {result['chunks_reused']} of {result['chunks']} chunks reused" if result["chunks_reused"] else ""
    size, speed = f"{result['width']}x{result['height']}", f"{result['fps']:.2f} frames/s"
    took = f"{duration(result['seconds'])} ({speed}, start-up {result['startup_seconds']:.1f} s{reused})"
    _console.print(f"{result['output']}: {result['frames_out']} frames {size} in {took}, verified", markup=False)
    _show_treatment(result["notes"], result["not_carried"])
    if result["int8_psnr"] is not None:
        used = result["engine"].get("precision") == "int8"
        verdict = "int8 keeps" if used else "computed in fp32: int8 would keep only"
        _console.print(f"{verdict} {result['int8_psnr']:.1f} dB against fp32 on frames of this video")
    if result["kept"] >= _WORTH_SAYING:
        _console.print(f"{result['kept']:.0%} of the picture had not changed and was kept")
    if result["damaged_frames"]:
        _console.print(
            f"salvaged: {result['damaged_frames']} frames of the source could not be decoded and are missing"
        )


@contextmanager
def show_download(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show downloads, one after the other; yields a function to call with bytes so far and bytes in all."""
    if not _console.is_terminal:
        yield _plain_download(name)
        return
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as bar:
        row = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _plain_download(name: str) -> Callable[[int, int], None]:
    said = -1

    def observe(done: int, total: int) -> None:
        nonlocal said
        step = int(done / total / _PLAIN_STEP)
        if step != said:
            said = step
            _console.print(f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", markup=False)

    return observe


def duration(seconds: float) -> str:
    """Seconds for people, such as `2 h 05 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
