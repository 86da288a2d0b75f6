"""Layouts of raw frames: names, sizes, and which one an encoder gets."""

from __future__ import annotations

import av
import pytest

from tasks.media.encoders import PROFILES
from tasks.media.pixels import PIXEL_LAYOUTS, Colour, PictureFormat, closest, planar


@pytest.mark.parametrize("pix_fmt", PIXEL_LAYOUTS)
def test_a_layout_is_what_libav_means_by_its_name(pix_fmt: str) -> None:
    known = av.VideoFormat(pix_fmt, 30, 22)
    layout, picture = PIXEL_LAYOUTS[pix_fmt], PictureFormat(30, 22, pix_fmt, Colour("bt709", False))
    assert [component.bits for component in known.components] == [layout.bits] * len(picture.plane_shapes)
    assert layout.alpha == any(component.is_alpha for component in known.components)
    sizes = [(component.height, component.width) for component in known.components]
    assert sizes == list(picture.plane_shapes)


@pytest.mark.parametrize(
    ("pix_fmt", "layout"),
    [
        ("yuvj422p", "yuv422p"),
        ("nv12", "yuv420p"),
        ("uyvy422", "yuv422p"),
        ("bgr24", "gbrp"),
        ("rgba", "gbrap"),
        ("yuv420p16le", None),
        ("gbrpf32le", None),
        ("xyz12le", None),
    ],
)
def test_packed_pixels_are_unpacked_to_planes(pix_fmt: str, layout: str | None) -> None:
    assert planar(pix_fmt) == layout


@pytest.mark.parametrize(
    ("profile", "source", "target"),
    [
        ("h264", "yuv420p", "yuv420p"),
        ("h264", "yuv420p10le", "yuv420p10le"),
        ("h264", "yuv420p9le", "yuv420p10le"),
        ("h264", "yuv411p", "yuv422p"),
        ("h264", "yuv410p", "yuv420p"),
        ("h264", "yuv440p", "yuv444p"),
        ("h264", "gray", "yuv420p"),
        ("h264", "gbrp", "yuv444p"),
        ("h264", "yuv420p12le", None),
        ("h264", "yuva420p", None),
        ("h265", "gbrp10le", "gbrp10le"),
        ("h265-10", "yuv422p", "yuv422p10le"),
        ("av1", "yuv422p", None),
        ("prores", "yuv420p", "yuv422p10le"),
        ("prores", "yuva420p", "yuva444p10le"),
        ("prores", "gbrp", "yuv444p10le"),
        ("ffv1", "yuva422p10le", "yuva422p10le"),
        ("ffv1", "gray14le", "gray14le"),
    ],
)
def test_an_encoder_gets_the_layout_or_the_smallest_that_loses_nothing(
    profile: str, source: str, target: str | None
) -> None:
    assert closest(PIXEL_LAYOUTS[source], PROFILES[profile].pix_fmts) == target


def test_all_that_profiles_offer_is_known() -> None:
    assert {name for profile in PROFILES.values() for name in profile.pix_fmts} <= set(PIXEL_LAYOUTS)
