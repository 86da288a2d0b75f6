"""Draws `result.png`: a detail of the sample clip, enlarged by bicubic interpolation and by the bundled model.

python docs/make_result_picture.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tasks.media.pixels import Colour, PictureFormat
from tasks.media.sample import HEIGHT, WIDTH, write_sample
from tasks.models.cards import find_model
from tasks.models.engine import Engine

FRAME = 60
LEFT, TOP, COLUMNS, ROWS = 110, 66, 120, 96
ZOOM = 4


def main() -> None:
    """Draw the picture."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "sample.mp4"
        write_sample(clip)
        with av.open(str(clip)) as container:
            frame = next(frame for number, frame in enumerate(container.decode(video=0)) if number == FRAME)
            source = frame.to_ndarray(format="rgb24")
    picture = PictureFormat(WIDTH, HEIGHT, "yuv420p", Colour("bt709", False))
    engine = Engine(find_model("compact-x4"), picture, picture.resized(WIDTH * ZOOM, HEIGHT * ZOOM))
    model = Image.fromarray(engine.upscale_rgb(source[None])[0])
    small = Image.fromarray(np.ascontiguousarray(source))
    bicubic = small.resize((WIDTH * ZOOM, HEIGHT * ZOOM), Image.Resampling.BICUBIC)
    box = tuple(ZOOM * side for side in (LEFT, TOP, LEFT + COLUMNS, TOP + ROWS))
    panels = {"bicubic x4": bicubic.crop(box), "compact-x4": model.crop(box)}
    sheet = Image.new("RGB", (2 * COLUMNS * ZOOM + 12, ROWS * ZOOM + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(panels.items()):
        left = index * (COLUMNS * ZOOM + 12)
        sheet.paste(panel, (left, 28))
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(18))
    sheet.save(Path(__file__).with_name("result.png"), optimize=True)


if __name__ == "__main__":
    main()
