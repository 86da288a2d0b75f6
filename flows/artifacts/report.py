"""What a run shows when it has ended: a page (`result`) and a table of its chunks (`chunks`).

A page is Markdown that the Prefect server keeps, so what is on it is bounded, whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from statistics import median
from typing import Any, Final

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.artifacts import shown
from flows.artifacts.progress import duration, grouped
from flows.artifacts.timeline import draw_small_timeline
from flows.chunk_runs import STAGES, FinishedChunk
from flows.outcome import UpscaleResult
from tasks.chunk_report import StageReport
from tasks.destinations import Output
from tasks.encode import is_encoded
from tasks.errors import SuperResolutionError
from tasks.ledger.record import JobError
from tasks.media.pictures import data_uri
from tasks.plan import Plan

#: Rows of the table of chunks.
_TABLE_ROWS: Final = 1000

#: Bytes of the timeline as SVG; in a page it takes a third more.
_TIMELINE_BYTES: Final = 220_000

#: Characters of a curve, and the levels that each of them can show.
_CURVE_COLUMNS: Final = 100
_LEVELS: Final = "▁▂▃▄▅▆▇█"

#: Decibels that are a whole curve at least: less is no difference to speak of.
_LEAST_SPAN: Final = 3.0

#: Characters of an error on a page.
_MESSAGE: Final = 2000


@dataclass
class Story:
    """What is known of a run so far, for its page however it ends.

    Attributes:
        source: URI of the video.
        job: Its plan, once there is one.
        finished: The chunks that this run has finished.
        is_cleared: Whether the files of finished chunks are gone, because another attempt would fail too.
    """

    source: str
    job: Plan | None = None
    finished: list[FinishedChunk] = field(default_factory=list)
    is_cleared: bool = False

    @property
    def reports(self) -> list[StageReport]:
        """Those of all stages of this run."""
        return [report for chunk in self.finished for report in chunk.reports]


def show_result(story: Story, result: UpscaleResult, output: Output, link: str) -> None:
    """Show what came out and who did what."""
    with shown("the result"):
        page = result_page(story, result, output, link)
        create_markdown_artifact(page, key="result", description=f"Result of {PurePosixPath(story.source).name}")
    _show_chunks(story)


def show_failure(story: Story, error: JobError, remedy: str) -> None:
    """Show what went wrong, where, and what to do."""
    with shown("the failure"):
        page = failure_page(story, error, remedy)
        create_markdown_artifact(page, key="result", description=f"Why {PurePosixPath(story.source).name} failed")
    _show_chunks(story)


def _show_chunks(story: Story) -> None:
    if story.finished:
        with shown("the chunks"):
            rows = chunk_rows(story.finished)[:_TABLE_ROWS]
            create_table_artifact(rows, key="chunks", description="Who worked on which chunk, and for how long")


def result_page(story: Story, result: UpscaleResult, output: Output, link: str = "") -> str:
    """The page of a published result.

    Args:
        story: The run.
        result: What it reports.
        output: The published file.
        link: Where its owner gets it.
    """
    job = story.job
    assert job is not None
    facts, target = job.facts, job.target
    rate = f"{float(job.table.rate):.3f} frames/s ({job.table.rate})"
    colour, result_colour = (
        f"{each.matrix}, {'full' if each.full_range else 'limited'} range" for each in (facts.colour, target.colour)
    )
    assumed = f" (assumed: {', '.join(facts.colour_assumed)})" if facts.colour_assumed else ""
    compared = [
        ("file", _code(story.source), _code(output.uri)),
        ("picture", f"{facts.width}x{facts.height}", f"{target.width}x{target.height}"),
        ("frames", grouped(result.frames_in), grouped(result.frames_out)),
        ("rate", rate, "each frame at its own time"),
        ("codec", f"{facts.codec}, {facts.pix_fmt}", f"{job.profile.name}, {target.pix_fmt}"),
        ("colour", colour + assumed, "the same" if result_colour == colour else result_colour),
        ("size", _bytes(facts.size_bytes), _bytes(output.bytes)),
    ]
    parts = [f"# {_code(PurePosixPath(output.uri).name)}", _headline(result), *_about_link(link)]
    parts.append(_table(("", "Source", "Result"), compared))
    parts.append(_table(("How", ""), _how(result)))
    parts += _treatment(result)
    parts += _warnings(result)
    parts += _fidelity(story.finished)
    parts += _timeline(story.reports)
    return "\n\n".join(parts) + "\n"


def failure_page(story: Story, error: JobError, remedy: str) -> str:
    """The page of a run that failed.

    Args:
        story: How far it came.
        error: What its record says.
        remedy: What can be done; empty if the error does not know.
    """
    problem = error.message.removesuffix(f" {remedy}.") if remedy else error.message
    where: list[tuple[str, ...]] = [("phase", error.phase), ("kind", error.kind)]
    if error.first_frame is not None:
        last = error.first_frame if error.last_frame is None else error.last_frame
        if story.job is not None:
            chunks = [chunk for chunk in story.job.chunks if chunk.first <= error.first_frame <= chunk.last]
            where += [("chunk", f"{chunk.index} (of 0 to {len(story.job.chunks) - 1})") for chunk in chunks]
        where.append(("frames", f"{error.first_frame}" if last == error.first_frame else f"{error.first_frame}–{last}"))
    where += [(name, _code(value)) for name, value in (("node", error.node), ("Slurm job", error.slurm_job)) if value]
    if error.log:
        where.append(("log", _code(error.log)))
    again = "Run it again when that is done" if remedy else "Retry, or run the same command again"
    parts = [
        f"# {_code(PurePosixPath(story.source).name)} was not upscaled",
        f"**{_text(problem[:_MESSAGE])}** Nothing was published.",
        f"**What to do:** {_text(remedy)}. {again}." if remedy else f"**What to do:** {again}.",
        f"**What is kept:** {_kept(story)}",
        _table(("Where", ""), where),
    ]
    parts += _fidelity(story.finished)
    parts += _timeline(story.reports)
    return "\n\n".join(parts) + "\n"


def chunk_rows(finished: Sequence[FinishedChunk]) -> list[dict[str, Any]]:
    """A row per chunk, in the order of the film: seconds and worker of each stage, speed, retries, fidelity."""
    rows = []
    for done in sorted(finished, key=lambda each: each.chunk.index):
        row: dict[str, Any] = {"chunk": done.chunk.index, "frames": f"{done.chunk.first}-{done.chunk.last}"}
        reports = {report.stage: report for report in done.reports}
        for stage in STAGES:
            report = reports[stage]
            row[f"{stage} s"] = None if report.was_reused else round(report.seconds, 3)
        upscaled = reports["upscale"]
        timed = upscaled.seconds > 0 and not upscaled.was_reused
        row["frames/s"] = round(done.chunk.frames / upscaled.seconds, 2) if timed else None
        for stage in STAGES:
            row[f"{stage} on"] = "done before" if reports[stage].was_reused else str(reports[stage].where)
        row["retries"] = ", ".join(stage or "?" for stage in done.failed) or 0
        row["fidelity dB"] = upscaled.fidelity
        if logs := dict.fromkeys(report.where.log for report in done.reports if report.where.log):
            row["logs"] = " ".join(logs)
        rows.append(row)
    return rows


def curve(values: Sequence[float]) -> str:
    """Numbers as a line of blocks, higher for more; of many numbers the least of those that share a block."""
    columns = min(len(values), _CURVE_COLUMNS)
    edges = [len(values) * column // columns for column in range(columns + 1)] if columns else [0]
    least = [min(values[begin:end]) for begin, end in pairwise(edges)]
    bottom, top = min(least, default=0.0), max(least, default=0.0)
    span = max(top - bottom, _LEAST_SPAN)
    return "".join(_LEVELS[round((len(_LEVELS) - 1) * (1 - (top - value) / span))] for value in least)


def _headline(result: UpscaleResult) -> str:
    speed = f", {result.fps:.2f} frames/s" if result.fps else ""
    return (
        f"**{grouped(result.frames_out)} frames {result.width}x{result.height} in {duration(result.seconds)}{speed}.** "
        "Read back and compared with the source before it was published."
    )


def _about_link(link: str) -> list[str]:
    return [f"[Result, for the owner]({link})"] if link else []


def _how(result: UpscaleResult) -> list[tuple[str, ...]]:
    engine = result.engine
    rows: list[tuple[str, ...]] = [("job", _code(result.job_id)), ("model", _code(result.model))]
    if engine:
        whole = "whole frames" if engine["tile"] is None else f"tiles of {engine['tile']} pixels"
        runs = (engine["device"], engine["backend"], engine["precision"], whole, f"{engine['batch']} frames at a time")
        rows.append(("engine", ", ".join(map(str, runs))))
    if result.int8_psnr is not None:
        rows.append(("int8", f"{result.int8_psnr:.1f} dB against fp32 on frames of this video"))
    rows.append(("encoder", result.encoder))
    reused = f", {result.chunks_reused} of them by an earlier run" if result.chunks_reused else ""
    rows.append(("chunks", f"{result.chunks}{reused}"))
    rows.append(("time", f"{result.seconds:.1f} s, after {result.startup_seconds:.1f} s of start-up"))
    if result.kept >= 0.005:
        rows.append(("unchanged", f"{result.kept:.0%} of the picture had not changed and was kept"))
    held = ", ".join(f"{pool} {seconds:.0f} s" for pool, seconds in result.node_seconds.items())
    rows.append(("workers", held or "none"))
    if result.cost is not None:
        rows.append(("cost", f"{result.cost:.4f}"))
    return rows


def _treatment(result: UpscaleResult) -> list[str]:
    lines = [f"* {_text(note)}" for note in result.notes]
    return ["## How the source was treated\n\n" + "\n".join(lines)] if lines else []


def _warnings(result: UpscaleResult) -> list[str]:
    lines = [f"* stream {index} is left out: {_text(why)}" for index, why in result.not_carried.items()]
    if result.damaged_frames:
        lines.append(f"* {grouped(result.damaged_frames)} frames of the source could not be decoded and are missing")
    return ["## What is missing\n\n" + "\n".join(lines)] if lines else []


def _fidelity(finished: Sequence[FinishedChunk]) -> list[str]:
    measured = [
        (report.fidelity, done.chunk)
        for done in sorted(finished, key=lambda each: each.chunk.index)
        for report in done.reports
        if report.fidelity is not None
    ]
    if not measured:
        return []
    least, chunk = min(measured, key=lambda each: each[0])
    values = [value for value, _ in measured]
    text = (
        f"{median(values):.1f} dB in the median of {len(values)} chunks, {least:.1f} dB at worst, in chunk "
        f"{chunk.index} (frames {chunk.first}–{chunk.last}): how close the middle frame of each chunk, shrunk back, "
        "is to its source."
    )
    return ["## Fidelity", f"`{curve(values)}`", text]


def _timeline(reports: Sequence[StageReport]) -> list[str]:
    done = [report for report in reports if not report.was_reused]
    svg = draw_small_timeline(done, _TIMELINE_BYTES) if done else None
    if svg is None:
        return []
    return ["## Who worked on which chunk", f"![timeline]({data_uri(svg.encode(), 'svg+xml')})"]


def _kept(story: Story) -> str:
    job = story.job
    if job is None or not job.folder.exists():
        why = ", for another attempt would fail too" if story.is_cleared else ", no work had begun"
        return f"nothing{why}."
    done = sum(is_encoded(job, chunk) for chunk in job.chunks)
    return f"{done} of {len(job.chunks)} chunks are finished, in {_code(str(job.folder))}; a next run continues there."


def remedy_of(error: BaseException) -> str:
    """What an error says can be done, without a full stop at its end."""
    return (error.remedy or "") if isinstance(error, SuperResolutionError) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """Text as it is, in a cell of a table too: names of files may hold anything."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _text(text: str) -> str:
    """Text in which nothing is markup."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#!~&" else char for char in " ".join(text.split()))


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
