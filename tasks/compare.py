"""Compare: a picture of what the model made of one detail, beside what a player would have made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import av
import av.error
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.chunks import Chunk
from tasks.errors import SuperResolutionError
from tasks.media.decode import decode_frames
from tasks.media.encoders import group_frames
from tasks.media.pictures import cut, detail_window, side_by_side
from tasks.media.pixels import PictureFormat
from tasks.media.probe import MATRICES
from tasks.plan import Plan, load_plan

#: Columns and rows of the detail in the result.
_WINDOW: Final = (480, 360)

_MATRIX_NUMBERS: Final = {name: number for number, name in MATRICES.items()}


@task(name="compare", task_run_name="compare {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def compare(plan: str, indexes: Sequence[int], label: str) -> str:
    """Draw one frame of an encoded chunk beside its source: of these chunks, that with the most detail.

    Returns:
        Path of a JPEG in the job's folder; empty if there is none, which is no reason for anything to fail.
    """
    loaded = load_plan(Path(plan))
    try:
        return str(draw_comparison(loaded, [loaded.chunks[index] for index in indexes]))
    except (OSError, SuperResolutionError, av.error.FFmpegError) as error:
        get_run_logger().debug("no picture: %s", error)  # The job may have ended meanwhile, or will say so itself.
        return ""


def draw_comparison(plan: Plan, chunks: Sequence[Chunk]) -> Path:
    """Write the picture.

    Args:
        plan: The job.
        chunks: Encoded chunks to choose from.

    Raises:
        FrameError: A frame of the source does not decode.
        OSError: A chunk is there no more, or the picture cannot be written.
        FFmpegError: A chunk is damaged.
    """
    source, target = plan.facts.picture, plan.target
    width, height = min(_WINDOW[0], target.width), min(_WINDOW[1], target.height)
    columns, rows = (-(-width * source.width // target.width), -(-height * source.height // target.height))
    found = []
    for chunk in chunks:
        offset = _offset(plan, chunk)
        (planes,) = decode_frames(plan.facts, plan.table, chunk.first + offset, chunk.first + offset, threads=1)
        frame = _rgb(_video_frame(planes, source), source)
        x, y = detail_window(frame, columns, rows)
        found.append((_detail(cut(frame, x, y, columns, rows)), chunk, frame, x, y))
    _, chunk, frame, x, y = max(found, key=lambda each: each[0])
    # Where the window begins in the result, in whole pixels, and the very same place in the source.
    across, down = target.width / source.width, target.height / source.height
    left, top = min(round(x * across), target.width - width), min(round(y * down), target.height - height)
    box = (left / across, top / down, (left + width) / across, (top + height) / down)
    bicubic = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box))
    upscaled = cut(_encoded_frame(plan, chunk), left, top, width, height)
    number = chunk.first + _offset(plan, chunk)
    path = plan.folder / "comparison.jpg"
    panels = [(f"frame {number}, bicubic", bicubic), (f"frame {number}, {plan.card.name}", upscaled)]
    path.write_bytes(side_by_side(panels))
    return path


def _offset(plan: Plan, chunk: Chunk) -> int:
    """Within a chunk, the first frame of its middle group: nothing before it need be decoded."""
    group = group_frames(plan.table.rate)
    return group * (chunk.frames // (2 * group))


def _encoded_frame(plan: Plan, chunk: Chunk) -> NDArray[np.uint8]:
    """That frame of a chunk as it was encoded, RGB `uint8[h, w, 3]`."""
    group = _offset(plan, chunk) // group_frames(plan.table.rate)
    with av.open(str(plan.encoded(chunk))) as container:
        stream = container.streams.video[0]
        begun = -1
        for packet in container.demux(stream):
            begun += packet.is_keyframe
            if begun >= group:
                for frame in packet.decode():
                    return _rgb(frame, plan.target)
    raise OSError(f"{plan.encoded(chunk)} has no frame to show")


def _video_frame(planes: NDArray[np.uint8], picture: PictureFormat) -> av.VideoFrame:
    """A frame of libav, of planes without padding."""
    frame = av.VideoFrame(picture.width, picture.height, picture.pix_fmt)
    offset = 0
    for plane, (rows, columns) in zip(frame.planes, picture.plane_shapes, strict=True):
        size = columns * picture.bytes_per_sample
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:rows, :size] = planes[offset : offset + rows * size].reshape(rows, size)
        plane.update(padded.tobytes())
        offset += rows * size
    return frame


def _rgb(frame: av.VideoFrame, picture: PictureFormat) -> NDArray[np.uint8]:
    """A frame as a player shows it, `uint8[h, w, 3]`; by libav, because torch takes seconds to load."""
    frame.colorspace = _MATRIX_NUMBERS[picture.colour.matrix]
    frame.color_range = 2 if picture.colour.full_range else 1
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def _detail(window: NDArray[np.uint8]) -> float:
    """Mean difference between neighbouring pixels."""
    levels = window.astype(np.int16)
    return float(np.abs(np.diff(levels, axis=1)).mean() + np.abs(np.diff(levels, axis=0)).mean())
