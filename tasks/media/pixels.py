"""What the pixels of a stream are: size, layout, bit depth and colour.

`PictureFormat` describes one raw frame exactly as it lies in memory and in chunk files: the planes one after another,
rows without padding. All stages agree on it; nothing here touches a file or a tensor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

#: Layouts the whole path handles today: name -> (horizontal chroma shift, vertical chroma shift, bytes per sample).
PIXEL_LAYOUTS: Final[dict[str, tuple[int, int, int]]] = {"yuv420p": (1, 1, 1)}


@dataclass(frozen=True)
class Colour:
    """How sample values mean colours, in ffmpeg's names (`None`: the source does not say and nothing is guessed)."""

    matrix: str
    """YUV matrix used for the conversion: `bt709`, `smpte170m`, `bt470bg`, `fcc`, `smpte240m` or `bt2020nc`."""
    full_range: bool
    """`True`: 0..255 (pc). `False`: luma 16..235, chroma 16..240 (tv)."""
    primaries: str | None = None
    transfer: str | None = None
    chroma_location: str = "left"
    """Where a 4:2:0 chroma sample lies: `left` (MPEG-2 and later), `center` (MPEG-1, JPEG) or `topleft` (BT.2020)."""


@dataclass(frozen=True)
class PictureFormat:
    """One raw frame."""

    width: int
    """Luma columns."""
    height: int
    """Luma rows."""
    pix_fmt: str
    """ffmpeg's name of the layout, a key of `PIXEL_LAYOUTS`."""
    colour: Colour

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each plane in memory order: Y, U, V."""
        shift_x, shift_y, _ = PIXEL_LAYOUTS[self.pix_fmt]
        chroma = (-(-self.height >> shift_y), -(-self.width >> shift_x))
        return ((self.height, self.width), chroma, chroma)

    @property
    def bytes_per_sample(self) -> int:
        return PIXEL_LAYOUTS[self.pix_fmt][2]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame: all planes, no padding."""
        return sum(rows * columns for rows, columns in self.plane_shapes) * self.bytes_per_sample

    def resized(self, width: int, height: int) -> PictureFormat:
        """The same layout and colour at another size."""
        return replace(self, width=width, height=height)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PictureFormat:
        return cls(**{**data, "colour": Colour(**data["colour"])})
