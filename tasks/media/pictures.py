"""Pictures for people to look at: the same detail of a video, side by side, as one JPEG.

    x, y = detail_window(before, 120, 96)
    jpeg = side_by_side([("bicubic x4", left), ("compact-x4", right)])

What is compared is cut out, never scaled down: a difference between two enlargements is a matter of single pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.media.pixels import PictureFormat

#: Largest picture in bytes: some of them lie inside one report, as text.
MOST_BYTES: Final = 200_000

#: Panels go into another row beyond this many pixels.
_SHEET_WIDTH: Final = 2000
_GAP: Final = 8
_WORST_QUALITY: Final = 40
_QUALITY_STEP: Final = 9

_PAPER: Final = (255, 255, 255)
_INK: Final = (24, 24, 24)

#: Share of red, green and blue in brightness (BT.709), in 1/65536: whole numbers make equal windows exactly equal.
_BRIGHTNESS: Final = np.array([13933, 46871, 4732], dtype=np.int64)


def frame_rgb(planes: NDArray[np.uint8], picture: PictureFormat) -> NDArray[np.uint8]:
    """One frame as people see it, with the matrix, range and chroma location of its format.

    Args:
        planes: The frame, `uint8[picture.frame_bytes]`: planes Y, U, V without padding.
        picture: What these bytes are.

    Returns:
        RGB, `uint8[height, width, 3]`.

    Raises:
        UnsupportedSourceError: Unknown matrix or chroma location.
    """
    from tasks.media.colour import rgb_from_planes  # Loads torch, which takes seconds and not every picture needs.

    return rgb_from_planes(planes[None], picture)[0]


def detail_window(frame: NDArray[np.uint8], width: int, height: int) -> tuple[int, int]:
    """Where a picture has most detail: the window with the largest sum of differences between neighbouring pixels.

    Args:
        frame: RGB, `uint8[h, w, 3]`.
        width: Columns of the window; those of the frame where it has fewer.
        height: Rows of the window, likewise.

    Returns:
        Column and row of its first pixel. Of equal windows, the one nearest to the middle.
    """
    rows, columns = frame.shape[:2]
    width, height = min(width, columns), min(height, rows)
    brightness = frame.astype(np.int64) @ _BRIGHTNESS >> 16
    steps = np.zeros((rows, columns), dtype=np.int64)
    steps[:, 1:] += np.abs(np.diff(brightness, axis=1))
    steps[1:] += np.abs(np.diff(brightness, axis=0))
    total = np.zeros((rows + 1, columns + 1), dtype=np.int64)
    total[1:, 1:] = steps.cumsum(0).cumsum(1)
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    y, x = np.nonzero(sums == sums.max())
    nearest = np.argmin((2 * y - (rows - height)) ** 2 + (2 * x - (columns - width)) ** 2)
    return int(x[nearest]), int(y[nearest])


def cut(frame: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """The window of a picture `uint8[h, w, 3]` at column `x` and row `y`."""
    return frame[y : y + height, x : x + width]


def enlarge(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """A picture `uint8[h, w, 3]` by bicubic interpolation, as players do it: `uint8[height, width, 3]`."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BICUBIC))


def side_by_side(panels: Sequence[tuple[str, NDArray[np.uint8]]], quality: int = 85) -> bytes:
    """One JPEG of several pictures of equal size, each below its label.

    Colour keeps its full resolution. Where the JPEG would be larger than `MOST_BYTES`, it is written with less quality.

    Args:
        panels: Label and picture of each, RGB `uint8[h, w, 3]`, in reading order.
        quality: Of the JPEG, 1 to 95.

    Returns:
        The file.

    Raises:
        ValueError: There is no panel, or their sizes differ.
    """
    if len({picture.shape for _, picture in panels}) != 1:
        raise ValueError("panels must be pictures of one size, at least one")
    rows, columns = panels[0][1].shape[:2]
    font_size = max(11, min(18, columns // 16))
    head = round(font_size * 1.6)
    across = min(len(panels), max(1, (_SHEET_WIDTH + _GAP) // (columns + _GAP)))
    down = -(-len(panels) // across)
    sheet = Image.new("RGB", (across * (columns + _GAP) - _GAP, down * (head + rows + _GAP) - _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(font_size)
    for number, (label, picture) in enumerate(panels):
        left, top = number % across * (columns + _GAP), number // across * (head + rows + _GAP)
        while len(label) > 1 and draw.textlength(label, font) > columns:
            label = label[:-2] + "…"
        draw.text((left + columns / 2, top + head / 2), label, fill=_INK, font=font, anchor="mm")
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, top + head))
    while True:
        written = io.BytesIO()
        # Not `optimize`: its buffer is too small for noise at full colour resolution, and pillow gives up.
        sheet.save(written, "JPEG", quality=quality, subsampling=0)
        if written.tell() <= MOST_BYTES or quality <= _WORST_QUALITY:
            return written.getvalue()
        quality = max(_WORST_QUALITY, quality - _QUALITY_STEP)


def data_uri(picture: bytes, kind: str = "jpeg") -> str:
    """A picture as an address that holds it, for Markdown and HTML.

    Args:
        picture: Content of the file.
        kind: What follows `image/` in its media type.
    """
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
