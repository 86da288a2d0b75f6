"""What a job will take, before anything runs: seconds of each pool, and wall time.

    rates = estimated(checked, cpu_cores=2)             # or measured(record, ...), or what a preview has measured
    forecast = foresee(plan.chunks, rates, checked.capacity, shares_cores=True)

Every forecast says what it is based on. Measured speeds are those of earlier jobs or of a preview, scaled by pixels.
Without any, the speed of a device is assumed, as it is for the length of chunks: that is right to an order of
magnitude. Time in the queue of a batch system is never in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tasks.chunks import Capacity, Chunk
from tasks.ledger.record import JobRecord, JobState
from tasks.media.encoders import EncoderProfile
from tasks.media.pixels import PictureFormat
from tasks.models.cards import ModelCard

#: Seconds of one core per million pixels, measured on films of 480x270 and 640x360 enlarged twice, Xeon at 2 to 3 GHz:
#: decoding them (H.264), and encoding the result with each profile. Others are counted as the dearest one.
_DECODE_CORE_SECONDS: Final = 0.005
_ENCODE_CORE_SECONDS: Final = {"h264": 0.025, "h265": 0.07, "ffv1": 0.025}

#: Seconds from the start of a flow to its first chunk: workers start, the model loads.
_STARTUP_SECONDS: Final = 6.0

#: Phases of a job after its last chunk.
_TAIL: Final = ("assemble", "verify", "publish")


@dataclass(frozen=True)
class Rates:
    """What one frame of a job takes."""

    gpu_seconds: float
    """Of one slot of the `gpu` pool."""
    cpu_seconds: float
    """Of one slot of the `cpu` pool: decoding and encoding."""
    basis: str
    """Where these come from, for people."""
    tail_seconds: float = 0.0
    """Wall time after the last chunk, per frame: joining, verifying, publishing."""
    startup_seconds: float = _STARTUP_SECONDS


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    frames: int
    chunks: int
    chunk_frames: int
    """Of most chunks."""
    gpu_seconds: float
    """Seconds in which slots of the `gpu` pool are busy, all together."""
    cpu_seconds: float
    wall_seconds: float
    """From the start of the flow until the result is published."""
    node_seconds: dict[str, float]
    """Seconds that workers of each pool are held; idle ones are held on for a while, which is not counted."""
    basis: str


def estimated(
    card: ModelCard,
    source: PictureFormat,
    target: PictureFormat,
    profile: EncoderProfile,
    *,
    flops: float,
    cores: float,
) -> Rates:
    """Rates where nothing is measured: the work of the model at the speed that is assumed for the device.

    Args:
        card: The model.
        source: Format of the source.
        target: Format of the result.
        profile: How it is encoded.
        flops: FLOP/s that upscaling one chunk is assumed to sustain.
        cores: Of one slot of the `cpu` pool.
    """
    flop = card.flop_per_input_pixel * source.width * source.height
    encode = _ENCODE_CORE_SECONDS.get(profile.name, max(_ENCODE_CORE_SECONDS.values()))
    core_seconds = (_DECODE_CORE_SECONDS * _pixels(source) + encode * _pixels(target)) / 1e6
    return Rates(
        flop / flops,
        core_seconds / cores,
        f"estimated from {card.flop_per_input_pixel / 1e3:.0f} kFLOP per pixel at {flops / 1e12:g} TFLOP/s, which is"
        " assumed of such a device: right to an order of magnitude",
    )


def measured(record: JobRecord, source: PictureFormat, target: PictureFormat, estimate: Rates) -> Rates:
    """Rates of an earlier job with the same model, for another size.

    What the job kept of its pictures because nothing changed in them is counted as if it had been computed: another
    video may move more.

    Args:
        record: Of the job, one that `tells_speed_of` was true for.
        source: Format of the source.
        target: Format of the result.
        estimate: For the other parts, where the job was encoded differently.
    """
    result, phases = record.result, record.phase_seconds
    frames = int(result["frames_out"])
    source_scale = _pixels(source) / (int(record.probe["width"]) * int(record.probe["height"]))
    target_scale = _pixels(target) / (int(result["width"]) * int(result["height"]))
    computed = max(0.05, 1 - float(result.get("kept") or 0.0))
    engine = result["engine"]
    device = f"{engine['device']} ({engine['precision']}"
    device += f", {engine['threads']} threads)" if engine.get("threads") else ")"
    return replace(
        estimate,
        gpu_seconds=float(phases["upscale"]) / frames / computed * source_scale,
        cpu_seconds=(float(phases["extract"]) * source_scale + float(phases["encode"]) * target_scale) / frames,
        tail_seconds=sum(float(phases.get(phase, 0.0)) for phase in _TAIL) / frames * target_scale,
        startup_seconds=float(result.get("startup_seconds") or estimate.startup_seconds),
        basis=f"measured on {device} in job {record.job_id}, {record.probe['width']}x{record.probe['height']}, {frames}"
        " frames; scaled by pixels",
    )


def tells_speed_of(record: JobRecord, card: ModelCard, settings: dict[str, Any], *, on_gpu: bool) -> bool:
    """Whether an earlier job tells how fast a new one will be.

    Args:
        record: Of the earlier job.
        card: Model of the new one.
        settings: Of the new one, `UpscaleRequest.settings()` with `encoder`.
        on_gpu: Whether the new one's model will run on a GPU.
    """
    result, same = record.result, ("encoder", "precision", "tolerance")
    engine = result.get("engine") or {}
    threads = engine.get("threads")  # A CPU engine says how many it uses; a GPU has none.
    has_phases = all(record.phase_seconds.get(phase) for phase in ("extract", "upscale", "encode"))
    has_size = bool(record.probe.get("width") and record.probe.get("height"))
    # What an interrupted run did before is in no phase.
    is_whole = bool(result.get("frames_out")) and not result.get("chunks_reused")
    return (
        record.state == JobState.PUBLISHED
        and record.model == card.name
        and all(record.settings.get(name) == settings[name] for name in same)
        and bool(engine.get("device"))
        and (threads is None) == on_gpu
        and (has_phases and has_size and is_whole)
    )


def foresee(
    chunks: Sequence[Chunk],
    rates: Rates,
    capacity: Capacity,
    *,
    workers: dict[str, tuple[int, int]],
    shares_cores: bool,
) -> Forecast:
    """What a job with these chunks takes.

    The pools work side by side, so the slower one decides; in front of it one chunk is decoded, behind it one is
    encoded. Where both compute on the same cores, their times add up instead.

    Args:
        chunks: Of the job.
        rates: What a frame takes.
        capacity: Chunks at one time.
        workers: Most workers of each pool, and slots of one.
        shares_cores: Whether both pools compute on the same cores.
    """
    frames = sum(chunk.frames for chunk in chunks)
    longest = max(chunk.frames for chunk in chunks)
    gpu_seconds, cpu_seconds = frames * rates.gpu_seconds, frames * rates.cpu_seconds
    gpu_wall = max(gpu_seconds / capacity.gpu_slots, longest * rates.gpu_seconds)
    cpu_wall = max(cpu_seconds / capacity.cpu_slots, longest * rates.cpu_seconds)
    busy = gpu_wall + cpu_wall if shares_cores else max(gpu_wall, cpu_wall) + longest * rates.cpu_seconds
    wall = rates.startup_seconds + busy + frames * rates.tail_seconds
    return Forecast(
        frames=frames,
        chunks=len(chunks),
        chunk_frames=longest,
        gpu_seconds=gpu_seconds,
        cpu_seconds=cpu_seconds,
        wall_seconds=wall,
        node_seconds={
            "gpu": _held(gpu_seconds, wall, *workers["gpu"]),
            "cpu": _held(cpu_seconds, wall, *workers["cpu"]),
        },
        basis=rates.basis,
    )


def _held(busy: float, wall: float, most: int, slots: int) -> float:
    """Seconds for which workers are held: as many of them as have enough to do, from the start to the end."""
    return wall * min(most, max(1, -(-busy // (slots * wall))))


def _pixels(picture: PictureFormat) -> int:
    return picture.width * picture.height
