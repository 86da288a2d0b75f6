"""Speed of the engine on this machine, and of `RealESRGANer` beside it: what `superres bench` measures.

Every contender has a process of its own, so that neither's settings (memory allocation, threads, cuDNN) touch the
other. They take turns, a short round each, and medians are compared: machines drift, and a turn of one is next to a
turn of the other. The yardstick is the fastest matrix product that torch does on the same device in the same process.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tasks.errors import ModelError
from tasks.media.pixels import Colour, PictureFormat
from tasks.models.cards import ModelCard, find_model

Rounds = Callable[[float], tuple[int, float]]
"""Upscales frames for some seconds; returns how many, and the seconds it took."""


class Contender:
    """A process that upscales frames when told to.

    Args:
        prepare: `prepare_engine` or `prepare_reference`.
        settings: Its arguments.

    Attributes:
        facts: What it told about itself.
        rates: Frames per second of each turn.
    """

    def __init__(self, prepare: Callable[..., tuple[dict[str, Any], Rounds]], settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, settings), daemon=True)
        self._process.start()
        theirs.close()
        self.rates: list[float] = []
        self.facts: dict[str, Any] = self._receive()

    def turn(self, seconds: float) -> None:
        """Let it upscale for some seconds."""
        self._connection.send(seconds)
        count, took = self._receive()
        self.rates.append(count / took)

    def end(self) -> None:
        """End the process; its last words join `facts`."""
        self._connection.send(None)
        self.facts |= self._receive()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError as error:
            raise ModelError("a process of the benchmark died", "Look for lack of memory") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(
    connection: Connection, prepare: Callable[..., tuple[dict[str, Any], Rounds]], settings: dict[str, Any]
) -> None:
    try:
        facts, rounds = prepare(**settings)
        connection.send(facts)
        while (seconds := connection.recv()) is not None:
            connection.send(rounds(seconds))
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send({"peak_memory_bytes": peak, **_peaks(facts)})
    except Exception as error:
        connection.send(error)


def _peaks(facts: dict[str, Any]) -> dict[str, Any]:
    """What can only be told at the end: the yardstick, and how much memory the GPU took."""
    if "device_type" not in facts:
        return {}
    import torch

    from tasks.models.hardware import matmul_peak

    peak = matmul_peak(facts["device_type"], facts["precision"], threads=facts["threads"])
    on_gpu = facts["device_type"] == "cuda"
    return {
        "matmul_peak": max(peak, facts["matmul_peak"]),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def prepare_engine(model: str, size: tuple[int, int], options: dict[str, Any]) -> tuple[dict[str, Any], Rounds]:
    """An engine and frames of noise around slow gradients."""
    from tasks.models.engine import Engine
    from tasks.models.hardware import matmul_peak

    card = find_model(model)
    source = PictureFormat(*size, "yuv420p", Colour("bt709", full_range=False))
    target = source.resized(size[0] * card.scale, size[1] * card.scale)
    frames = _pictures(source, 4)
    if options.get("precision") == "int8":
        from tasks.models.calibration import calibrate

        options = {**options, "quantised": calibrate(card, source, target, frames[:3])[0]}
    started = time.perf_counter()
    engine = Engine(card, source, target, reuse=False, **options)
    engine.upscale(frames[:1])
    first = time.perf_counter() - started
    frames = np.resize(frames, (max(4, 2 * engine.batch, engine.feed), source.frame_bytes))

    def rounds(seconds: float) -> tuple[int, float]:
        begun = time.perf_counter()

        def feed() -> Iterator[np.ndarray]:
            yield frames
            while time.perf_counter() - begun < seconds:
                yield frames

        count = sum(len(results) for results in engine.stream(feed()))
        return count, time.perf_counter() - begun

    rounds(0)
    description = engine.description
    facts = {
        **asdict(description),
        "target": f"{target.width}x{target.height}",
        "device_type": engine.device.type,
        "flop_per_frame": engine.flop_per_frame,
        "first_frame_seconds": first,
        "matmul_peak": matmul_peak(engine.device, engine.precision, threads=description.threads),
    }
    return facts, rounds


def prepare_reference(model: str, size: tuple[int, int], device: str) -> tuple[dict[str, Any], Rounds]:
    """`RealESRGANer.enhance` as its scripts call it: whole frames, half precision on a GPU."""
    import torch

    from tasks.models import networks
    from tasks.models.state import load_state

    card = find_model(model)
    upscaler = networks.official("realesrgan.utils", "RealESRGANer")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "params.pth"
        torch.save({"params": load_state(card)}, path)
        reference = upscaler(
            card.scale,
            str(path),
            model=networks.build(card),
            pre_pad=0,
            half=device != "cpu",
            device=torch.device(device),
        )
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    reference.enhance(image)

    def rounds(seconds: float) -> tuple[int, float]:
        begun, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begun < seconds:
            reference.enhance(image)
            count += 1
        return count, time.perf_counter() - begun

    return {}, rounds


def measure(
    model: str | ModelCard,
    size: tuple[int, int],
    *,
    turns: int = 5,
    seconds: float = 2.0,
    reference: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure one model at one size.

    Args:
        model: Name or path of a model.
        size: Columns and rows of the source.
        turns: How often each contender has its turn.
        seconds: Length of a turn; one frame at least.
        reference: Let `RealESRGANer` take turns with the engine.
        options: Further arguments of `Engine`: device, backend, precision, threads, tile, batch.

    Returns:
        What the engine ran with; `fps`, the median of the turns; `tflops` and `share_of_peak` from the network's
        arithmetic alone; memory, seconds to the first frame; with a reference its `reference_fps` and `ratio`.

    Raises:
        ModelError: The weights are not here.
        SettingsError: The engine cannot do what is asked.
    """
    name = str(model.path or model.name) if isinstance(model, ModelCard) else model
    contenders = [Contender(prepare_engine, {"model": name, "size": size, "options": options or {}})]
    if reference:
        device = contenders[0].facts["device_type"]
        contenders.append(Contender(prepare_reference, {"model": name, "size": size, "device": device}))
    for _ in range(turns):
        for contender in contenders:
            contender.turn(seconds)
    for contender in contenders:
        contender.end()
    engine = contenders[0]
    facts, rate = engine.facts, median(engine.rates)
    flops = rate * facts.pop("flop_per_frame")
    peak = facts.pop("matmul_peak")
    result = {
        **facts,
        "size": f"{size[0]}x{size[1]}",
        "fps": rate,
        "tflops": flops / 1e12,
        "matmul_peak_tflops": peak / 1e12,
        "share_of_peak": flops / peak,
    }
    if reference:
        pairs = zip(engine.rates, contenders[1].rates, strict=True)
        result["reference_fps"] = median(contenders[1].rates)
        result["reference_peak_memory_bytes"] = contenders[1].facts["peak_memory_bytes"]
        result["ratio"] = median(ours / theirs for ours, theirs in pairs)
    return result


def as_table(results: Iterable[dict[str, Any]]) -> str:
    """Results as lines for a terminal."""
    header = ("model", "size", "backend", "precision", "frames/s", "TFLOP/s", "of peak", "memory", "first", "ratio")
    rows = [header]
    for result in results:
        memory = result["peak_gpu_memory_bytes"] or result["peak_memory_bytes"]
        rows.append(
            (
                result["model"],
                result["size"],
                result["backend"],
                result["precision"],
                f"{result['fps']:.2f}",
                f"{result['tflops']:.3f}",
                f"{result['share_of_peak']:.0%}",
                f"{memory / 1e6:.0f} MB",
                f"{result['first_frame_seconds']:.1f} s",
                f"{result['ratio']:.2f}" if "ratio" in result else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _pictures(form: PictureFormat, count: int) -> np.ndarray:
    """uint8 `[count, frame_bytes]`: gradients with a little noise, each frame another."""
    random = np.random.default_rng(0)
    ramp = np.linspace(40, 200, form.frame_bytes)
    noise = random.normal(0, 6, (count, form.frame_bytes))
    return np.clip(ramp + 20 * np.sin(ramp[None] * np.arange(1, count + 1)[:, None] / 9) + noise, 16, 235).astype(
        np.uint8
    )
