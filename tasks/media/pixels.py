"""What the pixels of a stream are: size, layout, bit depth and colour.

`PictureFormat` describes one raw frame exactly as it lies in memory and in chunk files: the planes one after another,
rows without padding. All stages agree on it; nothing here touches a file or a tensor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final


@dataclass(frozen=True)
class PixelLayout:
    """How the samples of a raw frame are laid out: in planes, one after another."""

    model: str
    """`yuv`, `gray` or `rgb`; the planes of `rgb` are G, B and R."""
    bits: int
    """Per sample; above 8 each takes two bytes, the low one first."""
    shift_x: int = 0
    """Luma columns of a chroma sample, as a power of two."""
    shift_y: int = 0
    alpha: bool = False
    """Whether a plane of opacity comes last."""

    @property
    def bytes_per_sample(self) -> int:
        return 1 if self.bits == 8 else 2

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Of each plane, vertical and horizontal."""
        colour = {"gray": (), "rgb": ((0, 0), (0, 0)), "yuv": ((self.shift_y, self.shift_x),) * 2}[self.model]
        return ((0, 0), *colour, *([(0, 0)] if self.alpha else []))


#: Horizontal and vertical shift of chroma by the digits in ffmpeg's names.
_SUBSAMPLING: Final = {"420": (1, 1), "422": (1, 0), "444": (0, 0), "440": (0, 1), "411": (2, 0), "410": (2, 2)}


#: Depths at which libav knows each family of layouts.
_DEPTHS: Final = {
    "gray": (8, 9, 10, 12, 14),
    "gbrp": (8, 9, 10, 12, 14),
    "gbrap": (8, 10, 12, 14),
    **dict.fromkeys(("yuv420p", "yuv422p", "yuv444p"), (8, 9, 10, 12, 14)),
    **dict.fromkeys(("yuva422p", "yuva444p"), (8, 9, 10, 12)),
    **{"yuva420p": (8, 9, 10), "yuv440p": (8, 10, 12), "yuv411p": (8,), "yuv410p": (8,)},
}


def _layouts() -> dict[str, PixelLayout]:
    found = {}
    for family, depths in _DEPTHS.items():
        for bits in depths:
            name = family if bits == 8 else f"{family}{bits}le"
            if family.startswith("yuv"):
                shifts = _SUBSAMPLING[family.removeprefix("yuv").strip("ap")]
                found[name] = PixelLayout("yuv", bits, *shifts, alpha="a" in family)
            else:
                found[name] = PixelLayout("gray" if family == "gray" else "rgb", bits, alpha=family == "gbrap")
    return found


#: Layouts the whole path handles, by ffmpeg's names.
PIXEL_LAYOUTS: Final[dict[str, PixelLayout]] = _layouts()

#: Formats that decoders give and that hold the same samples in another order -> the layout they are unpacked to.
_UNPACKED: Final = {
    **{f"yuvj{digits}p": f"yuv{digits}p" for digits in ("420", "422", "444", "440", "411")},
    **dict.fromkeys(("rgb24", "bgr24", "rgb0", "bgr0", "0rgb", "0bgr"), "gbrp"),
    **dict.fromkeys(("rgba", "bgra", "argb", "abgr", "pal8"), "gbrap"),
    **{"nv12": "yuv420p", "nv21": "yuv420p", "nv16": "yuv422p", "yuyv422": "yuv422p", "uyvy422": "yuv422p"},
}


def planar(pix_fmt: str) -> str | None:
    """The layout that holds the samples of a decoder's format bit for bit; `None` if none does."""
    name = _UNPACKED.get(pix_fmt, pix_fmt)
    return name if name in PIXEL_LAYOUTS else None


def closest(wanted: PixelLayout, offered: tuple[str, ...]) -> str | None:
    """The layout out of `offered` that loses least of the size of a file while it loses nothing of `wanted`.

    Nothing is lost by more bits, more chroma samples, or chroma for grey. Red, green and blue may become YUV of full
    chroma, whose code values cannot tell all of them apart, if nothing better is offered.

    Returns:
        One of `offered`; `None` if none will do.
    """

    def cost(name: str) -> tuple[int, int, int, int] | None:
        layout = PIXEL_LAYOUTS[name]
        if layout.bits < wanted.bits or layout.alpha < wanted.alpha:
            return None
        if wanted.model != "gray" and layout.model == "gray":
            return None
        if wanted.model == "yuv" and (layout.model == "rgb" or not _at_least(layout, wanted)):
            return None
        if wanted.model == "rgb" and layout.model == "yuv" and layout.shift_x + layout.shift_y:
            return None
        samples = sum(64 >> sum(shifts) for shifts in layout.shifts)
        return (layout.model != wanted.model, layout.bits, int(layout.alpha), samples)

    costs = {name: found for name in offered if (found := cost(name)) is not None}
    return min(costs, key=lambda name: costs[name], default=None)


def _at_least(layout: PixelLayout, wanted: PixelLayout) -> bool:
    return layout.shift_x <= wanted.shift_x and layout.shift_y <= wanted.shift_y


@dataclass(frozen=True)
class Colour:
    """How sample values mean colours, in ffmpeg's names (`None`: the source does not say and nothing is guessed)."""

    matrix: str
    """YUV matrix used for the conversion: `bt709`, `smpte170m`, `bt470bg`, `fcc`, `smpte240m`, `bt2020nc` or `ycgco`;
    `gbr` for samples that are red, green and blue."""
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
        """(rows, columns) of each plane in memory order: Y, U, V, or G, B, R, or Y alone; opacity comes last."""
        return tuple((-(-self.height >> down), -(-self.width >> across)) for down, across in self.layout.shifts)

    @property
    def layout(self) -> PixelLayout:
        return PIXEL_LAYOUTS[self.pix_fmt]

    @property
    def bytes_per_sample(self) -> int:
        return self.layout.bytes_per_sample

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
