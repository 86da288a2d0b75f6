"""What is asked for, and everything about it that can be refused before any work starts.

`check_request` takes well under a second, touches nothing and needs neither Prefect, Dask nor torch, so the command
line can refuse bad input at once; the flow runs the same check as its first step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from tasks.chunks import Capacity, chunk_limit
from tasks.errors import DestinationError, ScratchError, SettingsError
from tasks.media.encoders import EncoderProfile, find_profile, group_frames
from tasks.media.mux import Carried, muxer_of, plan_carried
from tasks.media.pixels import PictureFormat
from tasks.media.probe import LARGEST_SIDE, SourceFacts, probe, refuse_unsupported
from tasks.media.timestamps import refuse_cut_off, scan_packets
from tasks.models.cards import ModelCard, all_cards, find_model
from tasks.models.weights import locate
from tasks.receipt import find_published

#: Stands for "the bundled model that fits the scale".
DEFAULT_MODEL: Final = "compact"

#: What a network may be computed in.
PRECISIONS: Final = ("auto", "fp32", "fp16", "bf16", "int8")

#: Factors by which a picture may be enlarged.
SMALLEST_SCALE: Final = 2
LARGEST_SCALE: Final = 4

#: Differences in code values above this are seen by everybody.
LARGEST_TOLERANCE: Final = 16

#: Bytes per pixel of encoded video, generously (about 10 times a streaming service's).
_ENCODED_BYTES_PER_PIXEL: Final = {"h264": 0.08, "h265": 0.06, "ffv1": 0.8}


@dataclass(frozen=True)
class UpscaleRequest:
    """One video in, one upscaled video out."""

    source: str
    """Path of the video."""
    destination: str
    """Path of the result; its ending names the container."""
    scale: int | None = None
    """Factor 2, 3 or 4; 2 when `height` is not given either."""
    height: int | None = None
    """Rows of the result instead of a factor; even; the width follows."""
    model: str = DEFAULT_MODEL
    """Name of a model card, path of a weight file, or `compact` for the bundled model that fits."""
    denoise: float | None = None
    """How much noise a model that comes in two strengths removes: 1 as it does by itself, 0 as its weaker partner."""
    encoder: str = "h264"
    """Name of an encoder profile."""
    precision: str = "auto"
    """`auto`, `fp32`, `fp16`, `bf16`, or `int8` where it proves to be good enough for the video."""
    tolerance: int = 0
    """Code values by which a part of the picture may differ from what was upscaled there last and still be kept."""
    scratch: str | None = None
    """Folder for chunk files; see `scratch_folder`."""
    chunk_seconds: float | None = None
    """Length of a chunk in seconds of video; `None` chooses about a minute of work."""
    overwrite: bool = False
    """Replace an existing destination."""
    salvage: bool = False
    """Keep what decodes of a damaged source instead of failing."""
    fresh: bool = False
    """Do not use chunks of an earlier, interrupted run."""

    @property
    def source_path(self) -> Path:
        return Path(self.source).expanduser().resolve()

    @property
    def destination_path(self) -> Path:
        """Absolute; a link at the destination itself is replaced, not followed."""
        path = Path(self.destination).expanduser()
        return path.parent.resolve() / path.name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be carried out, with what the check found out on the way."""

    request: UpscaleRequest
    facts: SourceFacts
    card: ModelCard
    weights: Path
    profile: EncoderProfile
    target: PictureFormat
    muxer: str
    carried: Carried
    scratch: Path
    capacity: Capacity

    @property
    def factor(self) -> Fraction:
        """Rows of the result per row of the source."""
        return Fraction(self.target.height, self.facts.height)

    def chunk_limit(self, rate: Fraction) -> int:
        """Frames of the longest chunk of this job at `rate` frames per second."""
        return chunk_limit(
            rate=rate,
            group=group_frames(rate),
            frame_flop=self.card.flop_per_input_pixel * self.facts.width * self.facts.height,
            target_frame_bytes=self.target.frame_bytes,
            chunk_seconds=self.request.chunk_seconds,
            flops=self.capacity.flops,
        )


def scratch_folder(named: str | None = None) -> Path:
    """The scratch folder: the one named, else `SUPERRES_SCRATCH`, else one in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = named or os.environ.get("SUPERRES_SCRATCH") or f"{cache}/media-super-resolution/scratch"
    return Path(chosen).expanduser().absolute()


def check_content(checked: CheckedRequest) -> None:
    """Refuse a source that its packets show to be unfit. Reads the whole file once, decodes nothing.

    Raises:
        FrameError: The source is cut off and nobody asked to salvage it.
        SourceError: Packets without timestamps, or two frames at one time.
        UnsupportedSourceError: A variable frame rate.
    """
    scan = scan_packets(checked.facts)
    if not checked.request.salvage:
        refuse_cut_off(checked.facts, scan)


def check_request(request: UpscaleRequest, capacity: Capacity | None = None) -> CheckedRequest:
    """Check everything that can be checked without decoding the video.

    Args:
        request: What is asked for.
        capacity: What the workers can do at one time; decides how long chunks are and how many exist at one time. By
            default, that of this machine without a GPU.

    Raises:
        SettingsError: A setting is out of range, contradicts another, or is not for the model.
        SourceError: The source is missing, empty, or not a video.
        UnsupportedSourceError: The source has a trait that cannot be processed faithfully yet.
        DestinationError: The destination exists, is the source, or cannot be written.
        ModelError: The model is unknown or its weights are not there.
        ScratchError: Scratch is not writable or too small.
    """
    _check_numbers(request)
    profile = find_profile(request.encoder)
    source, destination = request.source_path, request.destination_path
    facts = probe(source)
    refuse_unsupported(facts)
    muxer = muxer_of(destination)
    if destination.suffix.lower().removeprefix(".") not in profile.containers:
        endings = ", ".join("." + ending for ending in profile.containers)
        raise SettingsError(
            f"{destination.name}: this container cannot hold {profile.name}", f"End the name with {endings}"
        )
    # Other encoders write these into the stream itself; with ffv1 they do not survive joining.
    if profile.name == "ffv1" and (facts.sample_aspect_ratio != 1 or facts.colour.full_range):
        trait = "full range" if facts.colour.full_range else f"samples of shape {facts.sample_aspect_ratio}"
        raise SettingsError(f"{facts.path} has {trait}, which profile ffv1 cannot store", "Choose another --encoder")
    scratch = scratch_folder(request.scratch)
    check_destination(source, destination, request.overwrite or find_published(scratch, destination))
    target = _target_picture(request, facts)
    card = _choose_model(request, Fraction(target.height, facts.height))
    _check_precision(request, card)
    weights = locate(card)
    carried = plan_carried(facts, muxer)
    capacity = capacity or Capacity()
    checked = CheckedRequest(request, facts, card, weights, profile, target, muxer, carried, scratch, capacity)
    _check_space(checked)
    return checked


def _check_numbers(request: UpscaleRequest) -> None:
    if request.scale is not None and request.height is not None:
        raise SettingsError("both a scale and a height are given", "Give one of them")
    if request.scale is not None and not SMALLEST_SCALE <= request.scale <= LARGEST_SCALE:
        raise SettingsError(f"scale {request.scale} is out of range", f"Choose {SMALLEST_SCALE}, 3 or {LARGEST_SCALE}")
    if request.height is not None and (request.height < 2 or request.height % 2):
        raise SettingsError(
            f"height {request.height} is not an even number of rows", "Choose an even height, such as 1080"
        )
    if not 0 <= request.tolerance <= LARGEST_TOLERANCE:
        raise SettingsError(
            f"a tolerance of {request.tolerance} code values is out of range", f"Give 0 to {LARGEST_TOLERANCE}"
        )
    if request.chunk_seconds is not None and not 0 < request.chunk_seconds < float("inf"):
        raise SettingsError(f"a chunk of {request.chunk_seconds} seconds makes no sense", "Give a number above 0")


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse a destination that must not or cannot be written.

    Raises:
        DestinationError: It is the source, a folder, exists already, or its folder is missing or not writable.
    """
    try:
        exists = destination.exists()
    except OSError as error:
        raise DestinationError(
            f"{destination} is no possible name ({error.strerror})", "Choose another name"
        ) from error
    if exists and destination.samefile(source):
        raise DestinationError(f"the destination is the source itself ({destination})", "Choose another name")
    if destination.is_dir():
        raise DestinationError(f"{destination} is a folder", "Add a file name")
    if exists and not overwrite:
        raise DestinationError(f"{destination} exists already", "Choose another name, or add --overwrite to replace it")
    if not destination.parent.is_dir():
        raise DestinationError(f"the folder {destination.parent} does not exist", "Create it first")
    try:
        with tempfile.TemporaryFile(dir=destination.parent):
            pass
    except OSError as error:
        raise DestinationError(
            f"cannot write into {destination.parent} ({error.strerror})",
            "Choose another folder or change its permissions",
        ) from error


def _target_picture(request: UpscaleRequest, facts: SourceFacts) -> PictureFormat:
    if request.height is None:
        factor = Fraction(request.scale or SMALLEST_SCALE)
        height = facts.height * int(factor)
    else:
        height = request.height
        factor = Fraction(height, facts.height)
        if not 1 < factor <= LARGEST_SCALE:
            raise SettingsError(
                f"height {height} is {float(factor):.2f} times the source's {facts.height} rows",
                f"Choose a height above {facts.height} and up to {facts.height * LARGEST_SCALE}",
            )
    width = 2 * round(facts.width * factor / 2)
    if max(width, height) > LARGEST_SIDE:
        raise SettingsError(f"the result would be {width}x{height}", f"Sides of at most {LARGEST_SIDE} are possible")
    return facts.picture.resized(width, height)


def _choose_model(request: UpscaleRequest, factor: Fraction) -> ModelCard:
    model = request.model
    if model == DEFAULT_MODEL:
        model = "compact-x2" if factor <= 2 else "compact-x4"
    card = find_model(model if request.denoise is None else f"{model}@{request.denoise}")
    if card.scale < factor:
        fitting = [other.name for other in all_cards().values() if other.scale >= factor]
        raise SettingsError(
            f"model {card.name} enlarges {card.scale} times, {float(factor):g} times was asked for",
            f"Choose a model that reaches it: {', '.join(fitting)}",
        )
    return card


def _check_precision(request: UpscaleRequest, card: ModelCard) -> None:
    if request.precision not in PRECISIONS:
        raise SettingsError(f"unknown precision {request.precision!r}", f"Choose one of {', '.join(PRECISIONS)}")
    if request.precision == "int8" and card.architecture != "srvgg":
        # The residuals of dense networks outgrow 256 steps.
        raise SettingsError(
            f"model {card.name} cannot be computed in int8", "Choose a compact model, or another --precision"
        )


def _check_space(checked: CheckedRequest) -> None:
    """Refuse a job whose chunk files or result would not fit.

    The estimate counts the raw chunks that can exist at one time and twice the encoded video, once as chunks and once
    as the joined result.
    """
    facts, target = checked.facts, checked.target
    rate = facts.frame_rate or Fraction(25)
    frames = facts.declared_frames or int((facts.duration_seconds or 0) * rate) or 1
    chunk_frames = min(frames, checked.chunk_limit(rate))
    chunks = min(checked.capacity.window, -(-frames // chunk_frames))
    raw = chunks * chunk_frames * (facts.picture.frame_bytes + target.frame_bytes)
    encoded = int(frames * target.width * target.height * _ENCODED_BYTES_PER_PIXEL.get(checked.profile.name, 0.8))
    encoded += facts.size_bytes
    existing = next(folder for folder in (checked.scratch, *checked.scratch.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ScratchError(
            f"cannot write into scratch {checked.scratch} ({error.strerror})", "Choose another --scratch"
        ) from error
    free = shutil.disk_usage(existing).free
    if free < raw + 2 * encoded:
        raise ScratchError(
            f"scratch {checked.scratch} has {_gigabytes(free)} free,"
            f" this job needs about {_gigabytes(raw + 2 * encoded)}",
            "Free some space, choose another --scratch, or shorter chunks with --chunk-seconds",
        )
    destination = checked.request.destination_path.parent
    free = shutil.disk_usage(destination).free
    if free < encoded:
        raise DestinationError(
            f"{destination} has {_gigabytes(free)} free, the result may take {_gigabytes(encoded)}", "Free some space"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
