"""What is asked for, and everything about it that can be refused before any work starts.

`check_request` takes well under a second, touches nothing and needs neither Prefect, Dask nor torch, so the command
line can refuse bad input at once; the flow runs the same check as its first step.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Final

from tasks.chunks import Capacity, chunk_limit
from tasks.destinations import LocalFile, StoredObject, destination_of
from tasks.errors import ModelError, ScratchError, SettingsError
from tasks.media.carried import Carried, plan_carried
from tasks.media.encoders import PROFILES, EncoderProfile, find_profile, group_frames
from tasks.media.fields import decide_fields
from tasks.media.light import Light
from tasks.media.mux import muxer_of, shape_argument
from tasks.media.pixels import PIXEL_LAYOUTS, PictureFormat, closest
from tasks.media.probe import LARGEST_SIDE, SourceFacts, probe, refuse_unsupported
from tasks.media.timestamps import Fields, refuse_cut_off, scan_packets
from tasks.models.cards import ModelCard, all_cards, find_model
from tasks.models.weights import content_hash, is_present, locate
from tasks.receipt import find_published
from tasks.store.settings import StoreSettings

#: S3 as the credentials of this machine reach it.
_OWN_STORE: Final = StoreSettings()

#: Stands for "the bundled model that fits the scale".
DEFAULT_MODEL: Final = "compact"
_BUNDLED: Final = ("compact-x2", "compact-x4")

#: What a network may be computed in.
PRECISIONS: Final = ("auto", "fp32", "fp16", "bf16", "int8")

#: Factors by which a picture may be enlarged.
SMALLEST_SCALE: Final = 2
LARGEST_SCALE: Final = 4

#: Differences in code values above this are seen by everybody.
LARGEST_TOLERANCE: Final = 16

#: Bytes written to see whether that is possible: a full disk and an exhausted quota let empty files be made.
_SCRATCH_SAMPLE: Final = 1 << 16

#: Files that the smallest jobs make, with some to spare.
_SCRATCH_FILES: Final = 100

#: Bytes per pixel of encoded video, generously (about 10 times a streaming service's).
_ENCODED_BYTES_PER_PIXEL: Final = {"h264": 0.08, "h265": 0.06, "h265-10": 0.06, "av1": 0.05, "prores": 0.6, "ffv1": 0.8}


@dataclass(frozen=True)
class UpscaleRequest:
    """One video in, one upscaled video out."""

    source: str
    """Path of the video, where all nodes can read it."""
    destination: str
    """Path or `s3://` URI of the result; its ending names the container."""
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
    crf: int | None = None
    """Rate factor instead of the profile's own."""
    preset: str | None = None
    """Preset of the encoder instead of the profile's own."""
    stream: int | None = None
    """Index of the video stream; the largest that is no cover by default."""
    deinterlace: str = "auto"
    """`auto` makes a frame of each interlaced picture, `field-rate` one of each field, `off` keeps pictures."""
    square_pixels: bool = False
    """Widen or narrow the result until its samples are square."""
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on besides the source: two requests with equal ones have equal results."""
        names = (
            *("scale", "height", "model", "denoise", "encoder", "crf", "preset", "precision", "tolerance", "salvage"),
            *("stream", "deinterlace", "square_pixels"),
        )
        return {**{name: getattr(self, name) for name in names}, "weights": self._weights()}

    def _weights(self) -> str:
        """Hash of the weights; of both where the size of the video chooses. Empty for a model that there is not."""
        bundled = self.model == DEFAULT_MODEL
        try:
            cards = [_card(self, name) for name in (_BUNDLED if bundled else (self.model,))]
        except (ModelError, SettingsError):
            return ""
        return "-".join(content_hash(card)[:16] for card in cards)


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
    destination: LocalFile | StoredObject | None
    """`None` where nothing is going to be published: for plans and previews."""
    store: StoreSettings
    fields: Fields | None = None
    """What is made of the fields of interlaced pictures."""
    notes: tuple[str, ...] = ()
    """What whoever asked should know about how the source is treated."""

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


def check_scratch(scratch: Path) -> Path:
    """Refuse a scratch folder that cannot be written.

    Returns:
        The folder, or the first one above it that exists.

    Raises:
        ScratchError: It is not writable, is full, or knows no locks.
    """
    try:
        existing = next(folder for folder in (scratch, *scratch.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * _SCRATCH_SAMPLE)
            file.flush()
            _check_locks(file.fileno(), scratch)
        room = os.statvfs(existing)
    except OSError as error:
        raise ScratchError(
            f"cannot write into scratch {scratch} ({error.strerror})", "Make room, or choose another --scratch"
        ) from error
    if room.f_files and room.f_favail < _SCRATCH_FILES:  # Some file systems do not count.
        raise ScratchError(
            f"scratch {scratch} has room for only {room.f_favail} more files",
            "Remove some, or choose another --scratch",
        )
    return existing


def check_room(scratch: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse work that a scratch folder cannot take.

    Args:
        scratch: The folder.
        needed: Bytes.
        what: The work, such as `this job needs about`.
        remedy: What else to do than to free some space.

    Raises:
        ScratchError: It is too full, or see `check_scratch`.
    """
    free = shutil.disk_usage(check_scratch(scratch)).free
    if free < needed:
        raise ScratchError(
            f"scratch {scratch} has {free / 1e9:.2f} GB free, {what} {needed / 1e9:.2f} GB",
            f"Free some space, {remedy}",
        )


def _check_locks(file: int, scratch: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ScratchError(
            f"scratch {scratch} knows no locks ({error.strerror})", "Mount it with them: Lustre with -o flock"
        ) from error


def check_content(checked: CheckedRequest) -> None:
    """Refuse a source that its packets show to be unfit. Reads the whole file once, decodes nothing.

    Raises:
        FrameError: The source is cut off and nobody asked to salvage it.
        SourceError: Two frames at one time.
        UnsupportedSourceError: Packets without timestamps.
    """
    scan = scan_packets(checked.facts)
    if not checked.request.salvage:
        refuse_cut_off(checked.facts, scan)


def check_settings(request: UpscaleRequest, store: StoreSettings = _OWN_STORE, *, publishes: bool = True) -> None:
    """Check what can be checked without the video.

    Args:
        request: What is asked for.
        store: How to reach S3, where the destination is there.
        publishes: Whether there is a destination to check.

    Raises:
        SettingsError: A setting is out of range, contradicts another, or is not for the model.
        ModelError: The model is unknown or its weights are not there.
    """
    _check_numbers(request)
    profile = find_profile(request.encoder).tuned(request.crf, request.preset)
    if publishes:
        name = destination_of(request.destination, store).file_name
        muxer_of(name)
        if name.suffix.lower().removeprefix(".") not in profile.containers:
            endings = ", ".join("." + ending for ending in profile.containers)
            raise SettingsError(f"{name}: this container cannot hold {profile.name}", f"End the name with {endings}")
    if request.model != DEFAULT_MODEL:
        card = _card(request, request.model)
        _check_precision(request, card)
        if not is_present(card):
            locate(card)  # Says what is missing; whether the file is the right one, `check_request` finds out.


def check_request(
    request: UpscaleRequest,
    capacity: Capacity | None = None,
    store: StoreSettings = _OWN_STORE,
    *,
    publishes: bool = True,
) -> CheckedRequest:
    """Check everything that can be checked without decoding the video.

    Args:
        request: What is asked for.
        capacity: What the workers can do at one time; decides how long chunks are and how many exist at one time. By
            default, that of this machine without a GPU.
        store: How to reach S3, where the destination is there.
        publishes: Whether there is a destination, and room needed for a whole result; not for plans and previews.

    Raises:
        SettingsError: A setting is out of range, contradicts another, or is not for the model.
        SourceError: The source is missing, empty, or not a video.
        UnsupportedSourceError: The source has a trait that cannot be processed faithfully yet.
        DestinationError: The destination exists, is the source, or cannot be written.
        ModelError: The model is unknown or its weights are not there.
        ScratchError: Scratch is not writable or too small.
    """
    check_settings(request, store, publishes=publishes)
    profile = find_profile(request.encoder).tuned(request.crf, request.preset)
    source, destination = request.source_path, destination_of(request.destination, store) if publishes else None
    facts = probe(source, request.stream)
    refuse_unsupported(facts)
    muxer = muxer_of(destination.file_name if destination else PurePath(f"result.{profile.containers[0]}"))
    profile = profile.lit(facts.light)
    scratch = scratch_folder(request.scratch)
    if destination is not None:
        destination.check(source, overwrite=request.overwrite or find_published(scratch, destination))
    target = _target_picture(request, facts, profile)
    card = _choose_model(request, max(Fraction(target.height, facts.height), Fraction(target.width, facts.width)))
    _check_precision(request, card)
    weights = locate(card)
    carried = plan_carried(facts, muxer)
    capacity = capacity or Capacity()
    decision = decide_fields(facts, request.deinterlace)
    checked = CheckedRequest(
        request,
        facts,
        card,
        weights,
        profile,
        target,
        muxer,
        carried,
        scratch,
        capacity,
        destination,
        store,
        decision.fields,
        tuple(note for note in (decision.note, *_colour_notes(facts, target, profile), *carried.notes()) if note),
    )
    if destination is not None:
        _check_space(checked, destination)
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


def _target_picture(request: UpscaleRequest, facts: SourceFacts, profile: EncoderProfile) -> PictureFormat:
    if request.height is None:
        factor = Fraction(request.scale or SMALLEST_SCALE)
        height = 2 * round(facts.height * factor / 2)
    else:
        height = request.height
        factor = Fraction(height, facts.height)
        if not 1 < factor <= LARGEST_SCALE:
            raise SettingsError(
                f"height {height} is {float(factor):.2f} times the source's {facts.height} rows",
                f"Choose a height above {facts.height} and up to {facts.height * LARGEST_SCALE}",
            )
    shape = facts.sample_aspect_ratio if request.square_pixels else Fraction(1)
    width = 2 * round(facts.width * factor * shape / 2)
    if not request.square_pixels and profile.shapeless:
        shape_argument(width, height, facts.sample_aspect_ratio, profile.name)  # Refuses what cannot be said.
    if max(width, height) > LARGEST_SIDE:
        raise SettingsError(f"the result would be {width}x{height}", f"Sides of at most {LARGEST_SIDE} are possible")
    source = facts.picture
    pix_fmt = closest(source.layout, profile.pix_fmts)
    if pix_fmt is None:
        able = [other.name for other in PROFILES.values() if closest(source.layout, other.pix_fmts)]
        remedy = f"Choose --encoder {' or '.join(able)}" if able else "Convert it to fewer bits first"
        raise SettingsError(f"{facts.path}: profile {profile.name} cannot hold its pixels ({facts.pix_fmt})", remedy)
    colour = source.colour
    if colour.matrix == "gbr" and PIXEL_LAYOUTS[pix_fmt].model == "yuv":
        colour = replace(colour, matrix="bt709", full_range=False)
    if profile.limited_only:
        colour = replace(colour, full_range=False)
    return PictureFormat(width, height, pix_fmt, colour)


def _colour_notes(facts: SourceFacts, target: PictureFormat, profile: EncoderProfile) -> Iterator[str]:
    """What the encoder makes necessary."""
    source = facts.picture
    if source.pix_fmt != target.pix_fmt:
        yield f"pixels become {target.pix_fmt} (before: {facts.pix_fmt}), which profile {profile.name} holds"
    if source.colour.full_range and not target.colour.full_range:
        yield f"samples become limited range, which is all that profile {profile.name} holds for them"
    if facts.light != Light() and not profile.tells_light:
        yield f"profile {profile.name} cannot say what the source says about its mastering display"


def _choose_model(request: UpscaleRequest, factor: Fraction) -> ModelCard:
    model = request.model
    if model == DEFAULT_MODEL:
        model = _BUNDLED[0] if factor <= 2 else _BUNDLED[1]
    card = _card(request, model)
    if card.scale < factor:
        fitting = [other.name for other in all_cards().values() if other.scale >= factor]
        raise SettingsError(
            f"model {card.name} enlarges {card.scale} times, {float(factor):g} times was asked for",
            f"Choose a model that reaches it: {', '.join(fitting)}",
        )
    return card


def _card(request: UpscaleRequest, model: str) -> ModelCard:
    return find_model(model if request.denoise is None else f"{model}@{request.denoise}")


def _check_precision(request: UpscaleRequest, card: ModelCard) -> None:
    if request.precision not in PRECISIONS:
        raise SettingsError(f"unknown precision {request.precision!r}", f"Choose one of {', '.join(PRECISIONS)}")
    if request.precision == "int8" and card.architecture != "srvgg":
        # The residuals of dense networks outgrow 256 steps.
        raise SettingsError(
            f"model {card.name} cannot be computed in int8", "Choose a compact model, or another --precision"
        )


def _check_space(checked: CheckedRequest, destination: LocalFile | StoredObject) -> None:
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
    check_room(
        checked.scratch,
        raw + 2 * encoded,
        "this job needs about",
        "choose another --scratch, or shorter chunks with --chunk-seconds",
    )
    destination.check_space(encoded)
