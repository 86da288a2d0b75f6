"""Procedural pictures: the only material the bundled models are trained on.

Every picture is a function of one integer seed. Most pictures are dead leaves images (occluding shapes whose sizes
follow a power law), because these share the edge, occlusion and scaling statistics of photographs; the rest covers
what dead leaves lack: text, line art, flat animation shading, periodic patterns and stochastic textures. Shapes are
drawn on a larger canvas and area-averaged, so that edges are band-limited the way a camera's or a renderer's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FloatField = NDArray[np.float32]
Picture = NDArray[np.uint8]

_GLYPHS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()-+=%&@#/"


def picture(seed: int, size: int = 384) -> Picture:
    """Draw one picture.

    Args:
        seed: Non-negative integer; the same seed always gives the same picture.
        size: Side length in pixels.

    Returns:
        Picture of shape (size, size, 3), uint8 RGB.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    oversampling = 2
    side = size * oversampling
    painters: list[tuple[float, Callable[[np.random.Generator, int], Image.Image]]] = [
        (0.52, _dead_leaves),
        (0.12, _strokes),
        (0.13, _flat_shading),
        (0.09, _text_page),
        (0.05, _gratings),
        (0.09, _texture_page),
    ]
    weights = np.array([weight for weight, _ in painters])
    canvas = painters[int(rng.choice(len(painters), p=weights / weights.sum()))][1](rng, side)
    if rng.random() < 0.12:
        _write_text(canvas, rng, count=int(rng.integers(1, 5)), palette=_palette(rng))
    if rng.random() < 0.12:
        _draw_curves(canvas, rng, count=int(rng.integers(2, 12)), palette=_palette(rng), fur=False)
    return _expose(canvas.reduce(oversampling), rng)


def _expose(image: Image.Image, rng: np.random.Generator) -> Picture:
    """Apply what lies between a scene and a stored frame: optics, exposure, grain and the source's own coding.

    Args:
        image: Anti-aliased RGB scene.
        rng: Source of randomness.

    Returns:
        Picture of the image's size, shape (height, width, 3), uint8 RGB.
    """
    if rng.random() < 0.45:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.3))))
    values = np.asarray(image, dtype=np.float32) / 255.0
    if rng.random() < 0.5:
        values = values ** np.float32(math.exp(rng.normal(0.0, 0.25)))
    if rng.random() < 0.4:
        low, high = rng.uniform(0.0, 0.25), rng.uniform(0.6, 1.0)
        values = low + values * (high - low)
    if rng.random() < 0.25:
        grain = rng.standard_normal((*values.shape[:2], 1), dtype=np.float32)
        if rng.random() < 0.5:
            grain = grain + 0.4 * rng.standard_normal(values.shape, dtype=np.float32)
        values = values + grain * rng.uniform(0.002, 0.014)
    stored = np.clip(values * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    if rng.random() < 0.25:
        # Most video keeps colour at half resolution, so colour edges softer than luma edges are the normal case.
        luma, *chroma = Image.fromarray(stored).convert("YCbCr").split()
        half = (image.width // 2, image.height // 2)
        chroma = [c.resize(half, Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR) for c in chroma]
        stored = np.asarray(Image.merge("YCbCr", (luma, *chroma)).convert("RGB"))
    return stored


def _palette(rng: np.random.Generator) -> FloatField:
    """Draw a small palette of muted to vivid colours around one or two hues.

    Args:
        rng: Source of randomness.

    Returns:
        Colours of shape (count, 3), float32 RGB in 0..255.
    """
    count = int(rng.integers(3, 10))
    hue = (rng.random() + rng.normal(0.0, 0.08, count) + 0.5 * (rng.random(count) < 0.25)) % 1.0
    saturation = rng.beta(1.2, rng.uniform(1.0, 5.0), count)
    value = rng.beta(1.1, 1.1, count)
    # HSV to RGB written as three shifted, clipped triangle waves.
    waves = np.abs((hue[:, None] * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0
    colours = value[:, None] * (1.0 - saturation[:, None] * (1.0 - np.clip(waves, 0.0, 1.0)))
    return (colours * 255.0).astype(np.float32)


def _colour(palette: FloatField, rng: np.random.Generator) -> FloatField:
    """Pick a palette colour and vary it a little; returns shape (3,), float32 RGB in 0..255."""
    jitter = rng.normal(0.0, 14.0) + rng.normal(0.0, 6.0, 3)
    return np.clip(palette[int(rng.integers(len(palette)))] + jitter, 0.0, 255.0).astype(np.float32)


def _ink(colour: FloatField) -> tuple[int, int, int]:
    """Convert a float colour of shape (3,) to the integer triple Pillow draws with."""
    red, green, blue = (int(c) for c in colour)
    return red, green, blue


def _spectral_noise(rng: np.random.Generator, side: int) -> FloatField:
    """Filter white noise to a power-law spectrum, sometimes stretched along one direction (grain, grass, fur).

    Args:
        rng: Source of randomness.
        side: Side length in pixels.

    Returns:
        Field of shape (side, side), float32, zero mean and unit variance.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    fy = np.fft.fftfreq(side)[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(side)[None, :].astype(np.float32)
    if rng.random() < 0.45:
        angle, stretch = rng.uniform(0.0, math.pi), rng.uniform(2.0, 12.0)
        along = fx * math.cos(angle) + fy * math.sin(angle)
        across = fy * math.cos(angle) - fx * math.sin(angle)
        radius = np.hypot(along * stretch, across)
    else:
        radius = np.hypot(fx, fy)
    lowest = 1.0 / rng.uniform(8.0, side)
    spectrum *= np.maximum(radius, lowest) ** -rng.uniform(0.6, 2.0)
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    return field / (field.std() + 1e-6)


def _pattern(rng: np.random.Generator, side: int) -> FloatField:
    """Draw one regular or cellular pattern: stripes, weave, checker, bricks or Voronoi cells.

    Args:
        rng: Source of randomness.
        side: Side length in pixels.

    Returns:
        Field of shape (side, side), float32, zero mean and unit variance.
    """
    angle = rng.uniform(0.0, math.pi)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    # Periods are in canvas pixels; eight of them are four picture pixels.
    period = math.exp(rng.uniform(math.log(8.0), math.log(90.0)))
    kind = int(rng.integers(5))
    if kind == 0:
        field = np.clip(np.sin(u * (2 * math.pi / period)) * rng.uniform(1.0, 8.0), -1.0, 1.0)
    elif kind == 1:
        field = np.sin(u * (2 * math.pi / period)) * np.sign(np.sin(v * (math.pi / period)))
    elif kind == 2:
        field = ((u // period + v // (period * rng.uniform(0.5, 2.0))) % 2).astype(np.float32)
    elif kind == 3:
        row = u // period
        joint = period * rng.uniform(0.06, 0.25)
        offset = v + (row % 2) * period
        field = np.where((u % period < joint) | (offset % (2 * period) < joint), -1.0, np.sin(row * 7.3) * 0.3)
    else:
        field = _voronoi(rng, u, v, period)
    field = field.astype(np.float32) - np.float32(field.mean())
    return field / (field.std() + 1e-6)


def _voronoi(rng: np.random.Generator, u: FloatField, v: FloatField, cell: float) -> FloatField:
    """Shade by distance to the nearest point of a jittered grid; `u`, `v` and the result have shape (side, side)."""
    column, row = np.floor(u / cell), np.floor(v / cell)
    nearest = np.full(u.shape, np.inf, dtype=np.float32)
    shade = np.zeros(u.shape, dtype=np.float32)
    salt = rng.uniform(10.0, 50.0)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            # A sine hash stands in for a table of random offsets: it needs no bounds on the rotated coordinates.
            hashed = np.sin((column + dx) * 12.9898 + (row + dy) * 78.233 + salt) * 43758.5453
            jitter = hashed - np.floor(hashed)
            distance = np.hypot((column + dx + jitter) * cell - u, (row + dy + (jitter * 7.0) % 1.0) * cell - v)
            closer = distance < nearest
            nearest = np.where(closer, distance, nearest)
            shade = np.where(closer, jitter, shade)
    return (shade * rng.uniform(0.0, 2.0) - nearest / cell).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int) -> FloatField:
    """Make a smooth linear ramp of shape (height, width), float32, spanning about -1..1 in a random direction."""
    angle = rng.uniform(0.0, 2 * math.pi)
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
    return x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))


def _fill(
    rng: np.random.Generator, colour: FloatField, textures: list[FloatField], box: tuple[int, int]
) -> Image.Image:
    """Paint a rectangle with a colour, a shading ramp and, usually, a texture.

    Args:
        rng: Source of randomness.
        colour: Base colour, shape (3,), float32 RGB in 0..255.
        textures: Unit-variance fields of shape (side, side) to crop from.
        box: Width and height in pixels, at most the textures' side.

    Returns:
        RGB image of the box's size.
    """
    width, height = box
    shading = np.zeros((height, width), dtype=np.float32)
    if rng.random() < 0.6:
        shading += _ramp(rng, height, width) * np.float32(rng.uniform(4.0, 45.0))
    if rng.random() < 0.75:
        field = textures[int(rng.integers(len(textures)))]
        top = int(rng.integers(field.shape[0] - height + 1))
        left = int(rng.integers(field.shape[1] - width + 1))
        shading += field[top : top + height, left : left + width] * np.float32(rng.gamma(1.6, 8.0))
    tint = (1.0 + rng.normal(0.0, 0.12, 3)).astype(np.float32)
    values = colour + shading[..., None] * tint
    return Image.fromarray(np.clip(values, 0.0, 255.0).astype(np.uint8))


def _outline(rng: np.random.Generator, kind: str, radius: float) -> NDArray[np.float64]:
    """Make the corner points of one shape around the origin.

    Args:
        rng: Source of randomness.
        kind: "rectangle", "ellipse", "polygon" or "blob".
        radius: Size of the shape in pixels.

    Returns:
        Corner points of shape (count, 2), float64 x and y in pixels.
    """
    turn, aspect = rng.uniform(0.0, 2 * math.pi), rng.uniform(0.25, 1.0)
    if kind == "rectangle":
        points = np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]])
    elif kind == "polygon":
        angles = np.sort(rng.uniform(0.0, 2 * math.pi, int(rng.integers(3, 8))))
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.5, 1.0, (len(angles), 1))
    else:
        angles = np.linspace(0.0, 2 * math.pi, int(np.clip(radius, 16, 120)), endpoint=False)
        reach = np.ones_like(angles)
        if kind == "blob":
            for harmonic in range(2, 7):
                reach += rng.normal(0.0, 0.28 / harmonic) * np.cos(harmonic * angles + rng.uniform(0.0, 2 * math.pi))
        points = np.stack([np.cos(angles) * reach, np.sin(angles) * reach * aspect], axis=1)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return points @ rotation.T * radius


def _dead_leaves(rng: np.random.Generator, side: int) -> Image.Image:
    """Cover the canvas with occluding shapes whose radii follow a power law; returns an RGB canvas."""
    palette = _palette(rng)
    textures = [_spectral_noise(rng, side), _spectral_noise(rng, side)]
    if rng.random() < 0.6:
        textures.append(_pattern(rng, side))
    canvas = _fill(rng, _colour(palette, rng), textures, (side, side))
    draw = ImageDraw.Draw(canvas)
    smallest, largest = math.exp(rng.uniform(math.log(3.0), math.log(14.0))), side * rng.uniform(0.2, 0.5)
    exponent = rng.uniform(2.3, 3.2)
    count = int(min(3500, 2.2 * side * side / (2 * math.pi * smallest**2 * math.log(largest / smallest))))
    count = max(count, 60)
    # Inverse-transform sampling of r**-exponent between the two bounds.
    power = 1.0 - exponent
    radii = (smallest**power + rng.random(count) * (largest**power - smallest**power)) ** (1.0 / power)
    kinds = ("ellipse", "polygon", "rectangle", "blob")
    mixture = rng.dirichlet(np.ones(len(kinds)))
    # A defocused picture has some leaves off the focal plane; their whole outline is soft.
    defocus = rng.uniform(1.0, 10.0) if rng.random() < 0.3 else 0.0
    shadowed = rng.random() < 0.4
    for radius in radii:
        points = _outline(rng, kinds[int(rng.choice(len(kinds), p=mixture))], radius) + rng.uniform(0.0, side, 2)
        colour = _colour(palette, rng)
        if radius < 18.0:
            draw.polygon(points.ravel().tolist(), fill=_ink(colour))
            continue
        margin = 24
        left, top = np.maximum(np.floor(points.min(axis=0)) - margin, 0).astype(int).tolist()
        right, bottom = np.minimum(np.ceil(points.max(axis=0)) + margin, side).astype(int).tolist()
        if right - left < 2 or bottom - top < 2:
            continue
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).polygon((points - (left, top)).ravel().tolist(), fill=255)
        if shadowed and rng.random() < 0.6:
            shadow = mask.filter(ImageFilter.BoxBlur(float(rng.uniform(2.0, 12.0)))).point(lambda level: level * 0.5)
            canvas.paste((0, 0, 0), (left + int(rng.integers(-8, 9)), top + int(rng.integers(0, 12))), shadow)
        if defocus and rng.random() < 0.4:
            mask = mask.filter(ImageFilter.GaussianBlur(defocus * float(rng.random())))
        canvas.paste(_fill(rng, colour, textures, mask.size), (left, top), mask)
    return canvas


def _bezier(rng: np.random.Generator, side: int, reach: float) -> NDArray[np.float64]:
    """Sample one cubic Bezier curve as a polyline of shape (count, 2), float64 x and y in pixels."""
    start = rng.uniform(-0.1 * side, 1.1 * side, 2)
    control = start + np.cumsum(np.vstack([np.zeros(2), rng.normal(0.0, reach, (3, 2))]), axis=0)
    t = np.linspace(0.0, 1.0, int(np.clip(reach / 4, 8, 60)))[:, None]
    return (
        (1 - t) ** 3 * control[0]
        + 3 * t * (1 - t) ** 2 * control[1]
        + 3 * t**2 * (1 - t) * control[2]
        + t**3 * control[3]
    )


def _draw_curves(canvas: Image.Image, rng: np.random.Generator, count: int, palette: FloatField, fur: bool) -> None:
    """Draw curves on the canvas in place: long free ones, or many short ones in a common direction (fur, grass)."""
    draw = ImageDraw.Draw(canvas)
    side = canvas.width
    direction = rng.uniform(0.0, 2 * math.pi)
    length, thickest = rng.uniform(20.0, 90.0), rng.uniform(1.5, 7.0)
    for _ in range(count):
        if fur:
            angle = direction + rng.normal(0.0, 0.25)
            start, bend = rng.uniform(0.0, side, 2), rng.normal(0.0, 0.25)
            steps = np.linspace(0.0, 1.0, 7)[:, None]
            heading = np.array([math.cos(angle), math.sin(angle)])
            points = start + length * (steps * heading + bend * steps**2 * np.array([-heading[1], heading[0]]))
        else:
            points = _bezier(rng, side, side * float(rng.uniform(0.05, 0.35)))
        width = max(1, round(float(rng.uniform(1.0, thickest))))
        draw.line(points.ravel().tolist(), fill=_ink(_colour(palette, rng)), width=width, joint="curve")


def _backdrop(rng: np.random.Generator, side: int, palette: FloatField) -> Image.Image:
    """Make a flat, shaded or textured RGB background canvas."""
    textures = [_spectral_noise(rng, side)] if rng.random() < 0.4 else [np.zeros((side, side), dtype=np.float32)]
    return _fill(rng, _colour(palette, rng), textures, (side, side))


def _strokes(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw fur, hatching or free curves on a background; returns an RGB canvas."""
    palette = _palette(rng)
    canvas = _backdrop(rng, side, palette)
    kind = int(rng.integers(3))
    if kind == 0:
        for _ in range(int(rng.integers(1, 4))):
            _draw_curves(canvas, rng, count=int(rng.integers(500, 2500)), palette=_palette(rng), fur=True)
    elif kind == 1:
        draw = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(1, 5))):
            angle, gap = rng.uniform(0.0, math.pi), rng.uniform(6.0, 60.0)
            along = np.array([math.cos(angle), math.sin(angle)]) * side
            across = np.array([-math.sin(angle), math.cos(angle)])
            middle, half = rng.uniform(0.0, side, 2), float(rng.uniform(0.15, 0.8))
            width, ink = max(1, round(float(rng.uniform(1.0, 8.0)))), _ink(_colour(palette, rng))
            for step in range(int(rng.integers(6, 60))):
                origin = middle + across * gap * step
                draw.line([*(origin - along * half), *(origin + along * half)], fill=ink, width=width)
    else:
        _draw_curves(canvas, rng, count=int(rng.integers(15, 160)), palette=palette, fur=False)
    return canvas


def _flat_shading(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw flat or softly shaded regions with dark outlines, as in animation; returns an RGB canvas."""
    palette = _palette(rng)
    canvas = _backdrop(rng, side, palette)
    draw = ImageDraw.Draw(canvas)
    outlined = rng.random() < 0.7
    line = _ink(_colour(palette, rng) * np.float32(0.25))
    untextured = [np.zeros((side, side), dtype=np.float32)]
    for _ in range(int(rng.integers(8, 90))):
        radius = side * float(rng.beta(1.2, 6.0)) + 6.0
        kind = ("blob", "ellipse", "polygon", "rectangle")[int(rng.choice(4, p=[0.6, 0.2, 0.1, 0.1]))]
        points = _outline(rng, kind, radius)
        points += rng.uniform(0.0, side, 2)
        flat = points.ravel().tolist()
        if rng.random() < 0.5:
            draw.polygon(flat, fill=_ink(_colour(palette, rng)))
        else:
            mask = Image.new("L", canvas.size, 0)
            ImageDraw.Draw(mask).polygon(flat, fill=255)
            canvas.paste(_fill(rng, _colour(palette, rng), untextured, (side, side)), (0, 0), mask)
        if outlined:
            width = max(1, round(float(rng.uniform(1.0, 8.0))))
            draw.line([*flat, *flat[:4]], fill=line, width=width, joint="curve")
    return canvas


def _write_text(canvas: Image.Image, rng: np.random.Generator, count: int, palette: FloatField) -> None:
    """Write random strings at random sizes and angles on the canvas, in place."""
    for _ in range(count):
        font = ImageFont.load_default(float(math.exp(rng.uniform(math.log(14.0), math.log(130.0)))))
        words = "".join(_GLYPHS[int(i)] for i in rng.integers(0, len(_GLYPHS), int(rng.integers(2, 24))))
        words = words[: len(words) // 2] + " " + words[len(words) // 2 :]
        right, bottom = (int(edge) for edge in font.getbbox(words)[2:])
        mask = Image.new("L", (max(right, 1) + 8, max(bottom, 1) + 8), 0)
        ImageDraw.Draw(mask).text((4, 4), words, fill=255, font=font)
        if rng.random() < 0.4:
            angle = float(rng.normal(0.0, 25.0))
            mask = mask.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
        x = int(rng.integers(-mask.width // 2, canvas.width))
        y = int(rng.integers(-mask.height // 2, canvas.height))
        canvas.paste(_ink(_colour(palette, rng)), (x, y), mask)


def _text_page(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a page of text on a background; returns an RGB canvas."""
    palette = _palette(rng)
    canvas = _backdrop(rng, side, palette)
    _write_text(canvas, rng, count=int(rng.integers(15, 60)), palette=palette)
    return canvas


def _gratings(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw zone plates or gratings in patches; returns an RGB canvas."""
    palette = _palette(rng)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    values = np.empty((side, side, 3), dtype=np.float32)
    values[:] = _colour(palette, rng)
    for _ in range(int(rng.integers(1, 6))):
        centre = rng.uniform(0.0, side, 2)
        # Frequencies stay below half a cycle per picture pixel, that is a quarter cycle per canvas pixel.
        fastest = rng.uniform(0.02, 0.2)
        if rng.random() < 0.5:
            phase = math.pi * fastest / side * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)
        else:
            angle = rng.uniform(0.0, math.pi)
            phase = 2 * math.pi * fastest * (x * math.cos(angle) + y * math.sin(angle))
        window = np.hypot(x - centre[0], y - centre[1]) < side * rng.uniform(0.2, 0.8)
        wave = (0.5 + 0.5 * np.sin(phase))[..., None]
        values = np.where(window[..., None], wave * _colour(palette, rng) + (1 - wave) * _colour(palette, rng), values)
    return Image.fromarray(np.clip(values, 0.0, 255.0).astype(np.uint8))


def _texture_page(rng: np.random.Generator, side: int) -> Image.Image:
    """Blend two colours by one to three stochastic or regular textures; returns an RGB canvas."""
    palette = _palette(rng)
    values = np.empty((side, side, 3), dtype=np.float32)
    values[:] = _colour(palette, rng)
    for _ in range(int(rng.integers(1, 4))):
        field = _spectral_noise(rng, side) if rng.random() < 0.6 else _pattern(rng, side)
        values += field[..., None] * (_colour(palette, rng) - _colour(palette, rng)) * np.float32(rng.uniform(0.1, 0.5))
    return Image.fromarray(np.clip(values, 0.0, 255.0).astype(np.uint8))
