"""Calibration: may this network be computed in bytes for this video, and with what bytes?

A network in `int8` is up to twice as fast on a CPU. How weights and activations are rounded is found on some frames of
the video; on others, which took no part in that, the result is compared with that in `fp32`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tasks.media import quality
from tasks.media.pixels import PictureFormat
from tasks.models.cards import ModelCard

if TYPE_CHECKING:  # Torch loads only to calibrate, not to read what was found.
    from tasks.models.quantisation import Quantised

#: Least PSNR of an `int8` result against that in `fp32`, in dB: a mean error of 1.4 code values, below what encoding
#: with high quality adds.
LEAST_PSNR: Final = 45.0


@dataclass(frozen=True)
class Verdict:
    """What came out for a network and a video."""

    psnr: float
    """Of the worst frame it was tested on, against `fp32`, all samples of all planes, in dB; 100 for equal ones."""
    file: str
    """Name of the file that holds the network in bytes; its digest is in it."""

    @property
    def is_good(self) -> bool:
        """Whether `int8` may be used."""
        return self.psnr >= LEAST_PSNR


def calibrate(
    card: ModelCard, source: PictureFormat, target: PictureFormat, frames: np.ndarray, *, threads: int | None = None
) -> tuple[Quantised, float]:
    """Bring a network into bytes by two thirds of some frames and test it on the others.

    Args:
        card: A model of architecture `srvgg`.
        source: Format of the frames.
        target: Format of the results.
        frames: uint8 `[n, source.frame_bytes]`, at least two, from all over the video. Every third one is tested on.
        threads: CPU threads, by default as many as torch takes.

    Returns:
        The network in bytes, and its PSNR as in `Verdict.psnr`.

    Raises:
        ValueError: Fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError("calibration needs at least two frames")
    import torch

    from tasks.media.colour import PlanesToRgb
    from tasks.models.engine import Engine
    from tasks.models.quantisation import quantise
    from tasks.models.state import load_state

    is_test = np.arange(len(frames)) % 3 == 1
    to_rgb = PlanesToRgb(source)
    with torch.inference_mode():
        images = [to_rgb(torch.from_numpy(frame[None].copy())).clamp_(0, 1) for frame in frames[~is_test]]
        quantised = quantise(card, load_state(card), images, threads or torch.get_num_threads())
    settings: dict[str, Any] = {"device": "cpu", "backend": "openvino", "threads": threads}
    exact = Engine(card, source, target, precision="fp32", **settings).upscale(frames[is_test])
    quick = Engine(card, source, target, precision="int8", quantised=quantised, **settings).upscale(frames[is_test])
    return quantised, min(psnr(a, b) for a, b in zip(exact, quick, strict=True))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two arrays of 8-bit samples, in dB; 100 for equal ones."""
    return min(100.0, quality.psnr(a, b))
