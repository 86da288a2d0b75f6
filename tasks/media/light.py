"""How bright a picture is meant to be shown: the static metadata of HDR10, kept from source to result.

Mastering display (SMPTE ST 2086) and content light level (CTA-861.3) say nothing about single samples, so that they
hold for the enlarged picture as they did for the source.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import av
from av.sidedata.sidedata import SideData as SideDataItem
from av.sidedata.sidedata import Type as SideData

#: AVMasteringDisplayMetadata: primaries R, G, B as x and y, white point, least and most luminance, each a rational;
#: then whether primaries and luminance are given.
_MASTERING: Final = struct.Struct("=22i")

#: AVContentLightMetadata: brightest pixel, brightest frame on average.
_CONTENT: Final = struct.Struct("=2I")

_SAYS: Final = (SideData.MASTERING_DISPLAY_METADATA, SideData.CONTENT_LIGHT_LEVEL)

#: Units of x265: 0.00002 of a chromaticity and 0.0001 cd/m2.
_CHROMATICITY: Final = 50_000
_LUMINANCE: Final = 10_000


@dataclass(frozen=True)
class Light:
    """What a stream says about light."""

    mastering: tuple[int, ...] = ()
    """x and y of G, B, R and the white point in 0.00002; most and least luminance in 0.0001 cd/m2. Or nothing."""
    content: tuple[int, ...] = ()
    """Brightest pixel and brightest frame on average, in cd/m2. Or nothing."""

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Light:
        """That of a frame."""
        found = cls.side_data(frame)
        mastering, content = (found.get(kind) for kind in _SAYS)
        return cls(_mastering(mastering) if mastering else (), _CONTENT.unpack_from(content) if content else ())

    @staticmethod
    def side_data(frame: av.VideoFrame) -> dict[SideData, bytes]:
        """All that is attached to a frame, by its kind."""
        attached: Iterable[SideDataItem] = iter(frame.side_data)  # type: ignore[assignment]
        return {data.type: bytes(data) for data in attached}

    def options(self, encoder: str) -> dict[str, str]:
        """What to say to an encoder, by the names of ffmpeg's private options: parameters joined by colons."""
        if encoder == "libsvtav1":
            scales = [_CHROMATICITY] * 8 + [_LUMINANCE] * 2
            values = [f"{value / scale:.5f}" for value, scale in zip(self.mastering, scales, strict=False)]
        else:
            values = [str(value) for value in self.mastering]
        names = {
            "libx264": ("x264-params", "mastering-display", "cll"),
            "libx265": ("x265-params", "master-display", "max-cll"),
            "libsvtav1": ("svtav1-params", "mastering-display", "content-light"),
        }
        if encoder not in names or self == Light():
            return {}
        option, display, level = names[encoder]
        said = []
        if values:
            g, b, r, white, light = (",".join(values[at : at + 2]) for at in range(0, 10, 2))
            said.append(f"{display}=G({g})B({b})R({r})WP({white})L({light})")
        if self.content:
            said.append(f"{level}={self.content[0]},{self.content[1]}")
        return {option: ":".join(said)}


def _mastering(data: bytes) -> tuple[int, ...]:
    numbers = _MASTERING.unpack_from(data)
    if not (numbers[20] and numbers[21]):  # Encoders take both or nothing.
        return ()
    values = [Fraction(numbers[at], numbers[at + 1] or 1) for at in range(0, 20, 2)]
    red, green, blue, white, (least, most) = (values[at : at + 2] for at in range(0, 10, 2))
    chromaticities = [round(value * _CHROMATICITY) for value in (*green, *blue, *red, *white)]
    return (*chromaticities, round(most * _LUMINANCE), round(least * _LUMINANCE))
