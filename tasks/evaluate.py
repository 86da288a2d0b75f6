"""Evaluate: the three stages of one excerpt and one contender, from frames to numbers.

Prepare decodes the excerpt, and shrinks and codes it where it is to be restored. Enlarge is a model on the `gpu` pool,
or a classical kernel on the `cpu` pool. Measure compares, and removes the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contenders import Contender
from tasks.cores import usable_cores
from tasks.errors import FrameError
from tasks.excerpts import Excerpt
from tasks.failures import at
from tasks.media.chunk_file import ChunkReader, ChunkWriter
from tasks.media.decode import decode_frames
from tasks.media.pixels import PictureFormat
from tasks.media.quality import WithoutReference, WithReference, luma_of
from tasks.media.recode import recoded_planes
from tasks.media.vmaf import has_vmaf, vmaf
from tasks.models.classical import Resampler
from tasks.models.engine import Work
from tasks.upscale import EngineKey, run_engine, shared_engine

#: Interpolation that shrinks frames, and beside which sharpness is judged.
_PLAIN: Final = "bicubic"

#: Seconds that the clock can tell apart.
_CLOCK: Final = 1e-4


@dataclass(frozen=True)
class Speed:
    """How fast a model enlarged an excerpt."""

    seconds: float
    """From when the device was free to its last result. The model was loaded and had seen a frame before; what else
    the machine did at the time, such as measuring other results, is not taken off."""
    frames_per_second: float
    kept: float
    """Share of the work that did not have to be done, because nothing had changed."""
    engine: dict[str, Any]
    """What the model ran with, as `EngineDescription`."""


@task(name="prepare", task_run_name="prepare {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def prepare(excerpt: Excerpt, folder: str, label: str) -> None:
    """Make the chunk files of an excerpt in a folder; see `prepare_excerpt`."""
    with at("prepare"):
        prepare_excerpt(excerpt, Path(folder))


@task(name="enlarge", task_run_name="enlarge {label}", tags={"pool:gpu"}, cache_policy=NO_CACHE)
def enlarge(excerpt: Excerpt, contender: Contender, number: int, precision: str, folder: str, label: str) -> Speed:
    """Enlarge an excerpt by a model; see `enlarge_by_model`."""
    with at("enlarge"):
        return enlarge_by_model(excerpt, contender, number, precision, Path(folder))


@task(name="interpolate", task_run_name="interpolate {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def interpolate(excerpt: Excerpt, contender: Contender, number: int, folder: str, label: str) -> None:
    """Enlarge an excerpt by a classical kernel; see `enlarge_by_kernel`."""
    with at("interpolate"):
        enlarge_by_kernel(excerpt, contender, number, Path(folder))


@task(name="measure", task_run_name="measure {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def measure(excerpt: Excerpt, number: int, folder: str, label: str) -> dict[str, float | None]:
    """Judge the result of the contender with this number; see `measure_result`."""
    with at("measure"):
        return measure_result(excerpt, number, Path(folder))


def prepare_excerpt(excerpt: Excerpt, folder: Path) -> None:
    """Decode an excerpt; to restore it, write its frames as the reference, and shrunk and coded ones to enlarge.

    Raises:
        FrameError: A frame does not decode.
    """
    if excerpt.mode == "no-reference":
        with ChunkWriter(excerpt.given_path(folder), excerpt.given) as given:
            for frame in _decoded(excerpt):
                given.write(frame[None])
        return
    shrink = Resampler(excerpt.target, excerpt.given, _PLAIN)

    def shrunk() -> Iterator[NDArray[np.uint8]]:
        for frame in _decoded(excerpt):
            cropped = crop(frame, excerpt.facts.picture, excerpt.target)[None]
            reference.write(cropped)
            yield shrink(cropped)[0]

    with (
        ChunkWriter(excerpt.given_path(folder), excerpt.given) as given,
        ChunkWriter(excerpt.reference_path(folder), excerpt.target) as reference,
    ):
        frames = shrunk()
        if excerpt.crf:
            frames = recoded_planes(frames, excerpt.given, excerpt.crf, excerpt.table.rate)
        for frame in frames:
            given.write(frame[None])


def enlarge_by_model(excerpt: Excerpt, contender: Contender, number: int, precision: str, folder: Path) -> Speed:
    """Enlarge an excerpt by a model, with the engine and the streaming that jobs are upscaled with.

    Raises:
        ModelError: The weights on this node are not those that were checked.
        FrameError: A frame does not fit into memory, or its result is not finite.
        SettingsError: The device of this worker cannot compute in this precision.
    """
    key = EngineKey(
        contender.model, contender.model_hash, excerpt.given, excerpt.target, precision, quantised=None, tolerance=0
    )
    reader = ChunkReader(excerpt.given_path(folder))
    with shared_engine.use(key) as engine:
        engine.warm_up()
        work = Work()
        with ChunkWriter(excerpt.result_path(folder, number), excerpt.target) as writer:
            began, ended = run_engine(engine, reader, writer, excerpt.first, work)
        description = asdict(engine.description)
    seconds = max(_CLOCK, ended - shared_engine.own_begin(began, began, ended))
    return Speed(round(seconds, 4), round(excerpt.frames / seconds, 3), round(work.kept, 4), description)


def enlarge_by_kernel(excerpt: Excerpt, contender: Contender, number: int, folder: Path) -> None:
    """Enlarge an excerpt by the kernel that the contender is called after."""
    resample = Resampler(excerpt.given, excerpt.target, contender.label)
    with ChunkWriter(excerpt.result_path(folder, number), excerpt.target) as writer:
        for frame in ChunkReader(excerpt.given_path(folder)).batches(1):
            writer.write(resample(frame))


def measure_result(excerpt: Excerpt, number: int, folder: Path) -> dict[str, float | None]:
    """Judge a result, and remove it.

    Returns:
        What `WithReference` and `vmaf` give, or `WithoutReference`. VMAF is `None` where the ffmpeg in use lacks it.

    Raises:
        ChunkFileError: A file is missing or damaged.
        FfmpegError: VMAF could not be computed.
    """
    path = excerpt.result_path(folder, number)
    result = ChunkReader(path).batches(1)
    measures: dict[str, float | None]
    if excerpt.mode == "restore":
        with_reference = WithReference(excerpt.scale)
        reference_path = excerpt.reference_path(folder)
        for output, reference in zip(result, ChunkReader(reference_path).batches(1), strict=True):
            with_reference.add(luma_of(output[0], excerpt.target), luma_of(reference[0], excerpt.target))
        perceived = None
        if has_vmaf():
            perceived = vmaf(path, reference_path, excerpt.table.rate, threads=usable_cores())
        measures = {**with_reference.summary(), "vmaf": perceived}
    else:
        without = WithoutReference(excerpt.scale, excerpt.scale)
        grow = Resampler(excerpt.given, excerpt.target, _PLAIN)
        shrink = Resampler(excerpt.target, excerpt.given, _PLAIN)
        for output, given in zip(result, ChunkReader(excerpt.given_path(folder)).batches(1), strict=True):
            without.add(
                luma_of(output[0], excerpt.target),
                luma_of(grow(given)[0], excerpt.target),
                luma_of(shrink(output)[0], excerpt.given),
                luma_of(given[0], excerpt.given),
            )
        measures = without.summary()
    path.unlink()
    return measures


def crop(frame: NDArray[np.uint8], picture: PictureFormat, target: PictureFormat) -> NDArray[np.uint8]:
    """The upper left part of a packed frame.

    Args:
        frame: uint8 `[picture.frame_bytes]`.
        picture: Its format.
        target: That of the part, with even sides.

    Returns:
        uint8 `[target.frame_bytes]`.
    """
    parts, offset = [], 0
    for (rows, columns), (wanted_rows, wanted_columns) in zip(picture.plane_shapes, target.plane_shapes, strict=True):
        plane = frame[offset : offset + rows * columns].reshape(rows, columns)
        parts.append(plane[:wanted_rows, :wanted_columns].ravel())
        offset += rows * columns
    return np.concatenate(parts)


def _decoded(excerpt: Excerpt) -> Iterator[NDArray[np.uint8]]:
    try:
        yield from decode_frames(excerpt.facts, excerpt.table, 0, excerpt.frames - 1, threads=usable_cores())
    except FrameError as error:
        frame = excerpt.first + (error.frame or 0)
        raise FrameError(
            f"{excerpt.facts.path}: frame {frame} cannot be decoded", "Leave the clip out", frame=frame
        ) from error
