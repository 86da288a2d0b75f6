"""Excerpts of a video for a preview: which ones, and the pictures that compare models on them.

Both tasks run on the CPU pool. Between them each model upscales the excerpts as the chunks of a plan of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.chunks import Chunk
from tasks.failures import at
from tasks.media.chunk_file import ChunkReader
from tasks.media.decode import decode_frames
from tasks.media.pictures import cut, detail_window, enlarge, frame_rgb, side_by_side
from tasks.media.scenes import choose_excerpts
from tasks.plan import Plan, load_plan

#: Largest detail, in pixels of the result.
_PANEL: Final = (480, 360)


@task(name="choose-excerpts", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def choose(plan: str, count: int, frames: int) -> list[tuple[int, int]]:
    """First and last frame of at most `count` excerpts of the video of the plan at path `plan`."""
    loaded = load_plan(Path(plan))
    with at("choose"):
        return [(found.first, found.last) for found in choose_excerpts(loaded.facts, loaded.table, count, frames)]


@task(name="compare", task_run_name="compare {index}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def compare(plans: list[str], index: int, pictures: int) -> list[str]:
    """Make pictures of excerpt `index`, with a panel for bicubic interpolation and one for each plan.

    Returns:
        Their paths, in the folder of the first plan.
    """
    loaded = [load_plan(Path(plan)) for plan in plans]
    with at("compare", chunk := loaded[0].chunks[index]):
        return [str(compare_frame(loaded, chunk, frame)) for frame in shown_frames(chunk, pictures)]


def shown_frames(chunk: Chunk, pictures: int) -> list[int]:
    """Numbers of the frames of an excerpt of which there are pictures: the middles of equal parts."""
    parts = min(pictures, chunk.frames)
    return [chunk.first + (2 * part + 1) * chunk.frames // (2 * parts) for part in range(parts)]


def compare_frame(plans: Sequence[Plan], chunk: Chunk, frame: int) -> Path:
    """Make one picture: the part of a frame with most detail, enlarged by interpolation and by each model.

    Args:
        plans: Of the same excerpts and target size, a model each.
        chunk: The excerpt, upscaled by all of them.
        frame: Number of the frame in the source.

    Raises:
        FrameError: It does not decode.
        ChunkFileError: An upscaled excerpt is missing or damaged.
    """
    plan = plans[0]
    (planes,) = decode_frames(plan.facts, plan.table, frame, frame)
    source, target = frame_rgb(planes, plan.facts.picture), plan.target
    factor = Fraction(target.height, plan.facts.height)
    width, height = min(_PANEL[0], target.width), min(_PANEL[1], target.height)
    x, y = detail_window(source, int(width / factor), int(height / factor))
    # An edge of the window need not be one of a pixel of the result; it must not be beyond its last one.
    left, top = min(int(x * factor), target.width - width), min(int(y * factor), target.height - height)

    def panel(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return cut(whole, left, top, width, height)

    panels = [(f"bicubic x{float(factor):.3g}", panel(enlarge(source, target.width, target.height)))]
    for each in plans:
        (upscaled,) = next(ChunkReader(each.upscaled(chunk)).batches(1, start=frame - chunk.first))
        panels.append((each.card.name, panel(frame_rgb(upscaled, target))))
    path = plan.folder / f"picture-{frame:07d}.jpg"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(side_by_side(panels))
    os.replace(partial, path)
    return path
