"""GPUs as their maker publishes them, and what a measurement on one says about another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tasks.errors import SettingsError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: As people call it.
        device: As its driver calls it, and so every measurement.
        fp16_tflops: Peak of dense products in `fp16` on its tensor cores, in TFLOP/s, from its data sheet (which often
            has twice that, for sparse ones).
        bandwidth: Of its memory, in GB/s, from there, too.
        capability: Its compute capability, from the CUDA programming guide.
    """

    name: str
    device: str
    fp16_tflops: float
    bandwidth: float
    capability: tuple[int, int]


GPUS: Final = {
    each.name: each
    for each in (
        Gpu("T4", "Tesla T4", 65, 320, (7, 5)),
        Gpu("L4", "NVIDIA L4", 121, 300, (8, 9)),
        Gpu("A10G", "NVIDIA A10G", 70, 600, (8, 6)),
        Gpu("L40S", "NVIDIA L40S", 362, 864, (8, 9)),
        Gpu("H100", "NVIDIA H100 80GB HBM3", 989, 3350, (9, 0)),
        Gpu("H200", "NVIDIA H200", 989, 4800, (9, 0)),
    )
}


def gpu_of(device: str) -> Gpu:
    """The GPU that a driver calls by this name.

    Raises:
        SettingsError: It is not in the table. Parts and other builds of a GPU that is have names of their own.
    """
    for gpu in GPUS.values():
        if gpu.device == device:
            return gpu
    raise SettingsError(f"the GPU {device!r} is not known", "Add it to infra/aws/gpus.py with what its data sheet says")


def estimated(fps: float, measured: Gpu, other: Gpu) -> float:
    """Frames per second of a GPU that nobody measured, in `fp16`.

    What bounds a network is arithmetic or memory (the roofline of Williams, Waterman and Patterson, 2009), and which of
    them may differ between the two: the smaller of both ratios promises least.

    Args:
        fps: Measured.
        measured: On this one.
        other: The one that is asked for.
    """
    return fps * min(other.fp16_tflops / measured.fp16_tflops, other.bandwidth / measured.bandwidth)
