"""What H.264 does to pictures: encoded and decoded again in memory, a frame at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from tasks.media.decode import packed_planes
from tasks.media.pixels import PictureFormat


def recoded(
    frames: Iterable[av.VideoFrame], crf: int, preset: str = "medium", rate: Fraction = Fraction(25)
) -> Iterator[av.VideoFrame]:
    """Encode frames with H.264 in 4:2:0 and decode them again.

    Args:
        frames: Of one size, with even sides.
        crf: Constant rate factor of x264, 0 (best) to 51.
        preset: Of x264.
        rate: Frames per second, which the rate factor takes into account.

    Yields:
        As many frames in the same order, `yuv420p`.
    """
    encoder, decoder = av.CodecContext.create("libx264", "w"), av.CodecContext.create("h264", "r")
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", rate, 1 / rate
    # One thread: x264's rate control depends on the number of threads, and the same frames have to give the same ones.
    encoder.options = {"crf": str(crf), "preset": preset, "threads": "1"}
    for index, frame in enumerate(frames):
        if index == 0:
            encoder.width, encoder.height = frame.width, frame.height
        frame.pts = index
        for packet in encoder.encode(frame):
            yield from decoder.decode(packet)
    for packet in encoder.encode(None):
        yield from decoder.decode(packet)
    yield from decoder.decode(None)


def recoded_planes(
    frames: Iterable[NDArray[np.uint8]], picture: PictureFormat, crf: int, rate: Fraction
) -> Iterator[NDArray[np.uint8]]:
    """The same for packed frames, whose code values are neither converted before nor after.

    Args:
        frames: uint8 `[picture.frame_bytes]` each.
        picture: Their format, 8-bit 4:2:0 with even sides.
        crf: See `recoded`.
        rate: See `recoded`.

    Yields:
        uint8 `[picture.frame_bytes]`.
    """
    # PyAV takes the planes of 4:2:0 one after another, as rows of luma's width.
    rows = 3 * picture.height // 2
    given = (av.VideoFrame.from_ndarray(frame.reshape(rows, picture.width), format="yuv420p") for frame in frames)
    for frame in recoded(given, crf, rate=rate):
        yield packed_planes(frame, picture)
