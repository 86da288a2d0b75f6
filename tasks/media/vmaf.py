"""VMAF of one chunk file against another, computed by ffmpeg's filter `libvmaf` with the model that is built into it.

VMAF (Netflix) predicts what viewers would say of a picture on a television, from 0 to 100: detail and motion together.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import ffmpeg as ffmpeg_python

from tasks.media import ffmpeg
from tasks.media.chunk_file import ChunkReader

FILTER: Final = "libvmaf"

SMALLEST_SIDE: Final = 32
"""Pictures of 16 rows end libvmaf with a crash; of what is this small it says little anyhow."""


def has_vmaf() -> bool:
    """Whether the ffmpeg in use can compute it."""
    return FILTER in ffmpeg.filter_names()


def vmaf(result: Path, reference: Path, rate: Fraction, *, threads: int = 1) -> float:
    """Compare a result with its original.

    Args:
        result: Chunk file.
        reference: Chunk file of as many frames of the same format, with sides of at least `SMALLEST_SIDE`.
        rate: Frames per second.
        threads: CPU threads.

    Returns:
        Mean over all frames, 0 to 100.

    Raises:
        ChunkFileError: One of the files is missing or not complete.
        FfmpegError: ffmpeg failed.
    """
    frames = [_frames(path, rate) for path in (result, reference)]
    # Written to standard output: a path would have to be quoted for the language of filters.
    judged = ffmpeg_python.filter(frames, FILTER, log_fmt="json", log_path="/dev/stdout", n_threads=threads)
    output = ffmpeg_python.output(judged, "pipe:1", format="null")
    with ffmpeg.FfmpegProcess(output.get_args(), stdout=True) as process:
        report = process.stdout.read()
    return float(json.loads(report)["pooled_metrics"]["vmaf"]["mean"])


def _frames(path: Path, rate: Fraction) -> Any:
    """A chunk file as an input: its frames without what follows them."""
    reader = ChunkReader(path)
    picture = reader.picture
    return ffmpeg_python.input(
        f"subfile,,start,0,end,{len(reader) * picture.frame_bytes},,:{path}",
        format="rawvideo",
        pix_fmt=picture.pix_fmt,
        video_size=(picture.width, picture.height),
        framerate=str(rate),
        protocol_whitelist=f"{ffmpeg.PROTOCOLS},subfile",
    )
