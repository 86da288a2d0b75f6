"""Quality measurement: luma PSNR and SSIM of models and classical kernels on frames of video clips.

A decoded frame is the reference. It is shrunk with antialiased bicubic and 8-bit rounding, optionally coded with H.264
at CRF 23 as part of its sequence, enlarged again by each method and compared on luma. Run it with
`python -m tasks.models.training.evaluate --clips a.mp4 b.mp4`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tasks.media import quality
from tasks.media.pixels import Colour, PictureFormat
from tasks.models.cards import find_model
from tasks.models.engine import Engine
from tasks.models.training.degradation import code_h264, rgb_pixels, shrink
from tasks.models.training.network import CompactNetwork

Picture = NDArray[np.uint8]
Upscaler = Callable[[Picture], Picture]

CRF = 23
BUNDLED = Path(__file__).resolve().parent.parent / "bundled"

_LUMA = np.array([0.299, 0.587, 0.114])
_LEAST_CONTRAST = 2.0
"""Frames whose luma deviates less than this (black, fades) say nothing about upscaling; in 8-bit levels."""


@dataclass(frozen=True)
class ClipScores:
    """How alike the enlarged frames of one clip are to its own, at one scale.

    Attributes:
        psnr: Per condition ("clean", "crf23") and method, one value in decibels per measured frame, of luma.
        ssim: The same with structural similarity, 1 for equal frames.
    """

    psnr: Mapping[str, Mapping[str, Sequence[float]]]
    ssim: Mapping[str, Mapping[str, Sequence[float]]]

    def gains(self, condition: str, method: str = "model") -> list[float]:
        """List a method's advantage over bicubic in decibels, frame by frame."""
        scores = self.psnr[condition]
        return [ours - theirs for ours, theirs in zip(scores[method], scores["bicubic"], strict=True)]


def enlarge(frame: Picture, scale: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Picture:
    """Enlarge a frame with a classical kernel.

    Args:
        frame: Shape (height, width, 3), uint8 RGB.
        scale: Integer factor.
        kernel: Pillow resampling kernel.

    Returns:
        Shape (height * scale, width * scale, 3), uint8 RGB.
    """
    height, width = frame.shape[:2]
    return np.asarray(Image.fromarray(frame).resize((width * scale, height * scale), kernel))


def network_upscaler(network: nn.Module) -> Upscaler:
    """Wrap a network so that it maps an 8-bit frame (height, width, 3) to its 8-bit enlargement."""

    def upscale(frame: Picture) -> Picture:
        with torch.inference_mode():
            batch = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 255.0
            output = network(batch.contiguous(memory_format=torch.channels_last))
        levels = output[0].permute(1, 2, 0).mul(255.0).round().clamp(0.0, 255.0)
        return levels.to(torch.uint8).numpy()

    return upscale


def card_upscaler(name: str) -> Upscaler:
    """The model of a card, as an 8-bit frame (height, width, 3) to its 8-bit enlargement."""
    card = find_model(name)
    source = PictureFormat(16, 16, "yuv420p", Colour("bt709", full_range=False))
    engine = Engine(card, source, source.resized(16 * card.scale, 16 * card.scale), device="cpu", reuse=False)
    return lambda frame: engine.upscale_rgb(np.ascontiguousarray(frame)[None])[0]


def load_network(path: Path) -> CompactNetwork:
    """Load a weights file written by the training; its header tells the scale and the size."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    network = CompactNetwork(int(header["scale"]), int(header["num_conv"]), int(header["num_feat"]))
    network.load_state_dict(load_file(path))
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def luma_psnr(output: Picture, reference: Picture, border: int) -> float:
    """Compute the PSNR of BT.601 luma.

    Args:
        output: Shape (height, width, 3), uint8 RGB.
        reference: Same shape.
        border: Pixels to leave out on each side.

    Returns:
        PSNR in decibels, peak 255; infinite for equal pictures.
    """
    return quality.psnr(_luma(output, border), _luma(reference, border))


def luma_ssim(output: Picture, reference: Picture, border: int) -> float:
    """Compute the structural similarity of BT.601 luma; see `tasks.media.quality.ssim`.

    Args:
        output: Shape (height, width, 3), uint8 RGB.
        reference: Same shape.
        border: Pixels to leave out on each side.

    Returns:
        Mean over all places where the window of 11x11 fits, 1 for equal pictures.
    """
    return quality.ssim(_luma(output, border), _luma(reference, border))


def _luma(picture: Picture, border: int) -> NDArray[np.float64]:
    return np.asarray(quality.inner(picture, border).astype(np.float64) @ _LUMA)


def read_clip(path: Path) -> Iterator[Picture]:
    """Decode the largest real video stream of a clip, leaving out cover pictures, as uint8 RGB frames."""
    with av.open(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        best = max(streams, key=lambda s: s.width * s.height)
        for frame in container.decode(best):
            yield rgb_pixels(frame)


def score_clip(path: Path, scale: int, models: Mapping[str, Upscaler], count: int = 12) -> ClipScores:
    """Measure bicubic, Lanczos and models on frames spread evenly over a clip.

    Args:
        path: Video file.
        scale: Factor to shrink and enlarge by.
        models: The upscalers to compare, by name.
        count: Number of frames to measure; frames without contrast among them are left out.

    Returns:
        The scores; they leave out a border of `scale` pixels.
    """
    frames = []
    for frame in read_clip(path):
        # 4:2:0 coding of the shrunk frame needs even sides.
        height, width = (side - side % (2 * scale) for side in frame.shape[:2])
        frames.append(np.ascontiguousarray(frame[:height, :width]))
    small = [shrink(frame, scale) for frame in frames]
    coded = code_h264(small, CRF)
    chosen = np.unique(np.linspace(0, len(frames) - 1, count + 2).round().astype(int)[1:-1]).tolist()
    chosen = [i for i in chosen if float((frames[i] @ _LUMA).std()) >= _LEAST_CONTRAST]
    methods: dict[str, Upscaler] = {
        "bicubic": lambda frame: enlarge(frame, scale),
        "lanczos": lambda frame: enlarge(frame, scale, Image.Resampling.LANCZOS),
        **models,
    }
    psnr: dict[str, dict[str, list[float]]] = {}
    ssim: dict[str, dict[str, list[float]]] = {}
    for condition, source in (("clean", small), ("crf23", coded)):
        for name, upscale in methods.items():
            enlarged = [(upscale(source[i]), frames[i]) for i in chosen]
            psnr.setdefault(condition, {})[name] = [luma_psnr(ours, frame, scale) for ours, frame in enlarged]
            ssim.setdefault(condition, {})[name] = [luma_ssim(ours, frame, scale) for ours, frame in enlarged]
    return ClipScores(psnr, ssim)


def frames_per_second(model: Upscaler, width: int = 640, height: int = 360, runs: int = 5) -> float:
    """Time a model on noise frames of the given size, after one warm-up call."""
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    model(frame)
    began = time.perf_counter()
    for _ in range(runs):
        model(frame)
    return runs / (time.perf_counter() - began)


def report(clips: Sequence[Path], models: Sequence[Path], count: int = 12) -> str:
    """Measure weights files on clips and format the results as a markdown table.

    Args:
        clips: Video files.
        models: Weights files.
        count: Frames per clip.

    Returns:
        One row per model, clip and condition, plus the mean over all frames of all clips.
    """
    lines = [
        "| model | clip | source | bicubic dB | lanczos dB | model dB | gain dB | least gain dB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for path in models:
        network = load_network(path)
        model = {"model": network_upscaler(network)}
        scores = {clip.stem: score_clip(clip, network.scale, model, count) for clip in clips}
        for condition in ("clean", "crf23"):
            groups = {name: [score] for name, score in scores.items()} | {"all frames": list(scores.values())}
            for name, group in groups.items():
                means = [
                    float(np.mean([value for score in group for value in score.psnr[condition][method]]))
                    for method in ("bicubic", "lanczos", "model")
                ]
                gains = [gain for score in group for gain in score.gains(condition)]
                cells = " | ".join(f"{mean:.2f}" for mean in means)
                lines.append(
                    f"| {path.stem} | {name} | {condition} | {cells} | {np.mean(gains):+.2f} | {min(gains):+.2f} |"
                )
    return "\n".join(lines)


def compare(clips: Sequence[Path], names: Sequence[str], count: int = 12) -> str:
    """Measure models of cards beside one another and format the results as a markdown table.

    Args:
        clips: Video files.
        names: Models by name or path.
        count: Frames per clip.

    Returns:
        One row per scale and method, with means over all frames of all clips.
    """
    lines = [
        "| scale | method | clean dB | clean SSIM | crf23 dB | crf23 SSIM | frames/s from 640x360 |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for scale in sorted({find_model(name).scale for name in names}):
        models = {name: card_upscaler(name) for name in names if find_model(name).scale == scale}
        scores = [score_clip(clip, scale, models, count) for clip in clips]
        for method in ("bicubic", "lanczos", *models):
            cells = []
            for condition in ("clean", "crf23"):
                for digits, measure in ((2, "psnr"), (4, "ssim")):
                    values = [value for score in scores for value in getattr(score, measure)[condition][method]]
                    cells.append(f"{np.mean(values):.{digits}f}")
            speed = f"{frames_per_second(models[method]):.1f}" if method in models else ""
            lines.append(f"| {scale} | {method} | {' | '.join(cells)} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tasks.models.training.evaluate", description=__doc__)
    parser.add_argument("--clips", type=Path, nargs="+", required=True)
    parser.add_argument("--models", type=Path, nargs="+", help="weights files; default: the bundled ones")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME", help="other models to compare with them")
    parser.add_argument("--frames", type=int, default=12, help="frames per clip")
    arguments = parser.parse_args()
    models = arguments.models or sorted(BUNDLED.glob("*.safetensors"))
    print(report(arguments.clips, models, arguments.frames))
    print()
    names = [path.stem if path.parent == BUNDLED else str(path) for path in models]
    print(compare(arguments.clips, [*names, *arguments.beside], arguments.frames))


if __name__ == "__main__":
    main()
