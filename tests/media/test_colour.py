"""YUV to RGB and back, against formulas written out in float64 and against ffmpeg's own conversion."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.errors import UnsupportedSourceError
from tasks.media.colour import CHROMA_SITES, LUMA_WEIGHTS, PlanesToRgb, RgbToPlanes
from tasks.media.pixels import PIXEL_LAYOUTS, Colour, PictureFormat

CLIPS = Path(__file__).parents[3] / "shared" / "media"


def form(width: int, height: int, matrix: str = "bt709", full: bool = False, site: str = "left") -> PictureFormat:
    return PictureFormat(width, height, "yuv420p", Colour(matrix, full, chroma_location=site))


def smooth_picture(height: int, width: int) -> np.ndarray:
    """float64 `[height, width, 3]` in 0..1: slow waves in all three colours."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(x + 0.5 * y), np.sin(0.7 * y - x + 1), np.cos(0.9 * x + 0.3 * y)]
    return 0.5 + 0.4 * np.stack(waves, axis=-1)


def keys(d: float) -> float:
    """Keys' cubic kernel, a = -1/2."""
    d = abs(d)
    if d < 1:
        return 1 - 2.5 * d**2 + 1.5 * d**3
    return 2 - 4 * d + 2.5 * d**2 - 0.5 * d**3 if d < 2 else 0.0


def enlarging_matrix(size: int, site: float) -> np.ndarray:
    """Luma rows from chroma rows: sample k lies at luma position 2 k + site; beyond the edge the last one repeats."""
    chroma = -(-size // 2)
    matrix = np.zeros((size, chroma))
    for i, k in product(range(size), range(-3, chroma + 3)):
        matrix[i, min(max(k, 0), chroma - 1)] += keys((i - site) / 2 - k)
    return matrix


def reducing_matrix(size: int, site: float) -> np.ndarray:
    """Chroma rows from luma rows; an odd last row repeats, taps beyond the edge are left out."""
    chroma = -(-size // 2)
    matrix = np.zeros((chroma, size))
    for k in range(chroma):
        weights = [keys((i - (2 * k + site)) / 2) for i in range(2 * chroma)]
        for i, weight in enumerate(weights):
            matrix[k, min(i, size - 1)] += weight / sum(weights)
    return matrix


def reference_rgb(frame: np.ndarray, f: PictureFormat) -> np.ndarray:
    """float64 `[height, width, 3]`, one formula after the other."""
    luma, cb, cr = split(frame, f)
    site_x, site_y = CHROMA_SITES[f.colour.chroma_location]
    rows, columns = enlarging_matrix(f.height, site_y), enlarging_matrix(f.width, site_x)
    cb, cr = (rows @ plane.astype(float) @ columns.T for plane in (cb, cr))
    full = f.colour.full_range
    y = luma / 255 if full else (luma - 16.0) / 219
    pb, pr = ((plane - 128) / (255 if full else 224) for plane in (cb, cr))
    kr, kb = LUMA_WEIGHTS[f.colour.matrix]
    red, blue = y + 2 * (1 - kr) * pr, y + 2 * (1 - kb) * pb
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1)


def reference_planes(rgb: np.ndarray, f: PictureFormat) -> np.ndarray:
    """uint8 `[frame_bytes]` and, unrounded, float64 `[frame_bytes]`."""
    kr, kb = LUMA_WEIGHTS[f.colour.matrix]
    red, green, blue = np.moveaxis(rgb, -1, 0)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    site_x, site_y = CHROMA_SITES[f.colour.chroma_location]
    rows, columns = reducing_matrix(f.height, site_y), reducing_matrix(f.width, site_x)
    pb, pr = (rows @ (c - y) / (2 * (1 - k)) @ columns.T for c, k in ((blue, kb), (red, kr)))
    full = f.colour.full_range
    codes = [255 * y if full else 16 + 219 * y, *(128 + (255 if full else 224) * plane for plane in (pb, pr))]
    return np.clip(np.concatenate([plane.ravel() for plane in codes]), 0, 255)


def split(frame: np.ndarray, f: PictureFormat) -> list[np.ndarray]:
    planes, start = [], 0
    for rows, columns in f.plane_shapes:
        planes.append(frame[start : start + rows * columns].reshape(rows, columns))
        start += rows * columns
    return planes


def as_tensor(rgb: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].float()


CASES = [
    ("bt709", False, "left", (34, 26)),
    ("smpte170m", False, "center", (35, 27)),
    ("bt470bg", True, "center", (16, 17)),
    ("bt2020nc", False, "topleft", (33, 16)),
    ("fcc", False, "bottom", (20, 20)),
    ("smpte240m", True, "bottomleft", (21, 19)),
    ("bt709", True, "top", (2, 3)),
]


@pytest.mark.parametrize(("matrix", "full", "site", "size"), CASES)
def test_equals_the_formulas(matrix: str, full: bool, site: str, size: tuple[int, int]) -> None:
    f = form(*size, matrix, full, site)
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2, f.frame_bytes), dtype=np.uint8)
    rgb = PlanesToRgb(f)(torch.from_numpy(frames))
    assert rgb.shape == (2, 3, f.height, f.width)
    expected = np.stack([reference_rgb(frame, f) for frame in frames]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(rgb.numpy(), expected, atol=2e-6)

    pictures = random.random((2, f.height, f.width, 3))
    planes = RgbToPlanes(f)(torch.from_numpy(pictures).permute(0, 3, 1, 2).float()).numpy()
    exact = np.stack([reference_planes(image, f) for image in pictures])
    # Rounded to nearest: never farther than half a code value, save for what float32 cannot tell apart.
    assert np.abs(planes - exact).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("matrix", LUMA_WEIGHTS)
@pytest.mark.parametrize("full", [False, True])
def test_colours_that_fix_the_matrix(matrix: str, full: bool) -> None:
    f = form(2, 2, matrix, full)
    low, high, chroma = (0, 255, 255) if full else (16, 235, 240)
    for rgb, luma, cb, cr in [
        ((0.0, 0.0, 0.0), low, 128, 128),
        ((1.0, 1.0, 1.0), high, 128, 128),
        ((0.0, 0.0, 1.0), None, chroma, None),
        ((1.0, 0.0, 0.0), None, None, chroma),
    ]:
        planes = RgbToPlanes(f)(torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 2, 2)).numpy()[0]
        for expected, got in zip((luma, luma, luma, luma, cb, cr), planes, strict=True):
            assert expected is None or got == expected


@pytest.mark.parametrize("site", CHROMA_SITES)
def test_flat_and_smooth_pictures_come_back(site: str) -> None:
    f = form(62, 45, site=site)
    to_rgb, to_planes = PlanesToRgb(f), RgbToPlanes(f)
    for colour in ((16, 128, 128), (235, 128, 128), (81, 90, 240), (145, 54, 34), (126, 120, 133)):
        frame = np.concatenate(
            [np.full(rows * columns, c) for (rows, columns), c in zip(f.plane_shapes, colour, strict=True)]
        )
        frames = torch.from_numpy(frame.astype(np.uint8))[None]
        assert torch.equal(to_planes(to_rgb(frames)), frames)
    smooth = to_planes(as_tensor(smooth_picture(45, 62)))
    again = to_planes(to_rgb(smooth).clamp(0, 1))
    assert (again.int() - smooth.int()).abs().max() <= 1


@pytest.mark.parametrize("clip", ["bbb-10s.mp4", "nasa_13013.mp4"])
@pytest.mark.parametrize("site", ["left", "center", "topleft"])
def test_natural_frames_come_back(clip: str, site: str) -> None:
    if not (CLIPS / clip).exists():
        pytest.skip(f"{clip} is not beside this checkout")
    with av.open(str(CLIPS / clip)) as container:
        frame = next(f for i, f in enumerate(container.decode(video=0)) if i == 100)
    source = frame.to_ndarray().reshape(1, -1)
    f = form(frame.width, frame.height, site=site)
    again = RgbToPlanes(f)(PlanesToRgb(f)(torch.from_numpy(source)).clamp_(0, 1)).numpy()
    luma = f.width * f.height
    assert psnr(source[:, :luma], again[:, :luma]) >= 55
    assert psnr(source[:, luma:], again[:, luma:]) >= 50


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-12, np.mean((a.astype(float) - b) ** 2))))


@pytest.mark.parametrize(("scale", "size"), [(2, (16, 12)), (4, (16, 12)), (2, (15, 11)), (6, (5, 3))])
def test_picture_that_is_not_put_together_yet(scale: int, size: tuple[int, int]) -> None:
    f = form(size[0] * scale, size[1] * scale)
    convert = RgbToPlanes(f)
    assert convert.takes_phases(scale)
    assert not convert.takes_phases(3)
    phases = torch.rand(2, 3 * scale**2, size[1], size[0]).contiguous(memory_format=torch.channels_last)
    whole = convert(F.pixel_shuffle(phases, scale)).int()
    apart = convert.from_phases(phases, scale).int()
    # Same sums in another order: a value on the very border between two codes may fall to either side.
    assert (whole - apart).abs().max() <= 1
    assert (whole != apart).float().mean() < 1e-3


@pytest.mark.parametrize("pix_fmt", ["yuv422p", "yuv444p"])
def test_fine_chroma_holds_a_smooth_picture_up_to_its_borders(pix_fmt: str) -> None:
    f = PictureFormat(24, 18, pix_fmt, Colour("bt709", False))
    picture = as_tensor(smooth_picture(18, 24))
    planes = RgbToPlanes(f)(picture)
    assert planes.shape == (1, f.frame_bytes)
    assert (PlanesToRgb(f)(planes) - picture).abs().max() < 4 / 255


@pytest.mark.parametrize("pix_fmt", [name for name, layout in PIXEL_LAYOUTS.items() if layout.model != "gray"])
def test_every_layout_holds_a_smooth_picture(pix_fmt: str) -> None:
    is_rgb = PIXEL_LAYOUTS[pix_fmt].model == "rgb"
    f = PictureFormat(48, 40, pix_fmt, Colour("gbr" if is_rgb else "bt709", full_range=is_rgb))
    picture = as_tensor(smooth_picture(40, 48))
    planes = RgbToPlanes(f)(picture)
    assert planes.shape == (1, f.frame_bytes)
    # At its borders a picture goes on as it ends, and a slope does not.
    error = (PlanesToRgb(f)(planes) - picture).abs()[..., 8:-8, 8:-8]
    assert error.max() < 4 / 255


@pytest.mark.parametrize("site", CHROMA_SITES)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p"])
def test_there_and_back_keeps_50_decibels_of_smooth_chroma(pix_fmt: str, site: str) -> None:
    f = PictureFormat(96, 64, pix_fmt, Colour("bt709", False, chroma_location=site))
    planes = RgbToPlanes(f)(as_tensor(smooth_picture(64, 96)))
    back = RgbToPlanes(f)(PlanesToRgb(f)(planes).clamp(0, 1))
    kind = torch.uint8 if f.bytes_per_sample == 1 else torch.int16
    error = (back.view(kind).double() - planes.view(kind).double()).square().mean()
    peak = (1 << f.layout.bits) - 1
    assert 10 * torch.log10(peak**2 / error) > 50


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14])
def test_grey_of_every_depth_is_kept_to_the_sample(bits: int) -> None:
    f = PictureFormat(64, 4, "gray" if bits == 8 else f"gray{bits}le", Colour("bt709", full_range=True))
    samples = np.linspace(0, (1 << bits) - 1, 256).round().astype(np.uint8 if bits == 8 else "<u2")
    planes = torch.from_numpy(samples.view(np.uint8)[None].copy())
    assert torch.equal(RgbToPlanes(f)(PlanesToRgb(f)(planes)), planes)


@pytest.mark.parametrize("matrix", [*LUMA_WEIGHTS, "ycgco"])
@pytest.mark.parametrize("full", [False, True])
def test_every_sample_in_gamut_comes_back_at_full_chroma(matrix: str, full: bool) -> None:
    """All 8-bit YUV 4:4:4 samples on a grid of three, and those beside it, that lie within 0..1 as RGB."""
    values = np.arange(0, 256, 3, dtype=np.uint8)
    y, u, v = (axis.ravel() for axis in np.meshgrid(values, values, values, indexing="ij"))
    f = PictureFormat(len(y), 1, "yuv444p", Colour(matrix, full))
    planes = torch.from_numpy(np.concatenate([y, u, v])[None])
    rgb = PlanesToRgb(f)(planes)
    inside = ((rgb >= 0) & (rgb <= 1)).all(dim=1).reshape(-1)
    assert inside.sum() > 10_000
    back = RgbToPlanes(f)(rgb.clamp(0, 1))
    error = (back.int() - planes.int()).abs().reshape(3, -1)
    assert error[:, inside].max() <= 1


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("full", [False, True])
def test_agrees_with_ffmpeg(matrix: str, full: bool) -> None:
    width, height = 96, 64
    f = form(width, height, matrix, full)
    planes = RgbToPlanes(f)(as_tensor(smooth_picture(height, width))).numpy()
    flags = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    names = f"in_color_matrix={matrix}:in_range={'pc' if full else 'tv'}:out_range=pc"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "yuv420p"]
    command += ["-s", f"{width}x{height}", "-i", "-", "-vf", f"scale={names}:flags={flags}"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = subprocess.run(command, input=planes.tobytes(), capture_output=True, check=True).stdout
    theirs = np.frombuffer(out, np.uint8).reshape(height, width, 3).astype(float)
    ours = PlanesToRgb(f)(torch.from_numpy(planes))[0].permute(1, 2, 0).numpy().clip(0, 1) * 255
    difference = np.abs(ours - theirs)
    assert difference.mean() < 0.6
    assert np.percentile(difference, 99) < 2.5


def test_unknown_colours_are_refused() -> None:
    for bad in (form(4, 4, "ictcp"), form(4, 4, site="somewhere")):
        with pytest.raises(UnsupportedSourceError, match="not supported"):
            PlanesToRgb(bad)
        with pytest.raises(UnsupportedSourceError, match="not supported"):
            RgbToPlanes(bad)
