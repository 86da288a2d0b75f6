"""Encoder profiles, and encoding one chunk file.

The unit of encoding is a **group of pictures of one second**, counted on a grid that starts at frame 0 of the source.
Each group is encoded by an ffmpeg process of its own with one thread, and starts with a key frame that nothing refers
across. So the result depends neither on where chunks begin nor on how many cores a machine has, the groups of a chunk
encode side by side, and joining is a copy of packets. The price is one key frame a second: about 3 % more bytes than
with groups of four seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import av
import av.error
import ffmpeg as ffmpeg_python
import xxhash

from tasks.errors import FrameError, SettingsError
from tasks.media import ffmpeg
from tasks.media.chunk_file import ChunkReader, partial_path
from tasks.media.closeness import Closeness
from tasks.media.light import Light
from tasks.media.pixels import PictureFormat

#: Version of what `encode_chunk` writes; part of every chunk key.
ENCODE_VERSION: Final = 2

#: What an encoder takes instead of planes: the same samples in packs.
_PACKED: Final = {("ffv1", "gbrp"): "bgr0", ("ffv1", "gbrap"): "bgra"}

#: Full range in the numbers of libavutil.
_FULL_RANGE: Final = 2

#: Frames handed to an encoder at a time: a few megabytes, so that memory stays flat at any picture size.
_FEED_FRAMES: Final = 2


@dataclass(frozen=True)
class EncoderProfile:
    """How the result is encoded."""

    name: str
    encoder: str
    """ffmpeg's name of the encoder."""
    options: dict[str, str] = field(default_factory=dict)
    """Output options of ffmpeg, without the leading dash."""
    containers: tuple[str, ...] = ("mp4", "mov", "mkv")
    """File name endings that can hold it."""
    best_for: str = ""
    pix_fmts: tuple[str, ...] = ("yuv420p",)
    """Layouts it takes, of `PIXEL_LAYOUTS`."""
    qualities: tuple[int, int] | None = None
    """Least and largest rate factor, the best one first; `None` if it has none."""
    presets: tuple[str, ...] = ()
    """What it calls its compromises between speed and size."""
    limited_only: bool = False
    """Whether its stream cannot say that samples are of full range."""
    shapeless: bool = False
    """Whether its stream cannot say of what shape samples are, so that the container has to."""

    def tuned(self, crf: int | None, preset: str | None) -> EncoderProfile:
        """With another rate factor or preset.

        Raises:
            SettingsError: It has none, or not this one.
        """
        options = dict(self.options)
        if crf is not None:
            if self.qualities is None:
                raise SettingsError(f"profile {self.name} has no rate factor", "Leave --crf out")
            least, most = self.qualities
            if not least <= crf <= most:
                raise SettingsError(
                    f"a rate factor of {crf} is out of range", f"Give {least} (best) to {most} to {self.name}"
                )
            options["crf"] = str(crf)
        if preset is not None:
            if preset not in self.presets:
                remedy = f"Choose one of {', '.join(self.presets)}" if self.presets else "Leave --preset out"
                raise SettingsError(f"profile {self.name} has no preset {preset!r}", remedy)
            options["preset"] = preset
        return replace(self, options=options)

    def lit(self, light: Light) -> EncoderProfile:
        """Saying what a source says about its mastering display and content light."""
        options = dict(self.options)
        for name, value in light.options(self.encoder).items():
            options[name] = f"{options[name]}:{value}" if name in options else value
        return replace(self, options=options)

    @property
    def tells_light(self) -> bool:
        """Whether `lit` makes a difference."""
        return bool(_ANY_LIGHT.options(self.encoder))


_ANY_LIGHT: Final = Light((1,) * 10, (1, 1))


def _formats(models: str, bits: tuple[int, ...]) -> tuple[str, ...]:
    """Names of layouts such as `yuv420p10le` for each model such as `yuv420p` and each depth."""
    ends = ["" if depth == 8 else f"{depth}le" for depth in bits]
    return tuple(f"{model}{end}" for end in ends for model in models.split())


_X26_PRESETS: Final = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"),
)

_X265_PARAMS: Final = "log-level=error:open-gop=0:scenecut=0:pools=none:frame-threads=1:wpp=0:info=0"


_H265: Final = EncoderProfile(
    "h265",
    "libx265",
    {"preset": "fast", "crf": "18", "x265-params": _X265_PARAMS},
    best_for="4K at half the size of h264",
    pix_fmts=_formats("yuv420p yuv422p yuv444p gbrp gray", (8, 10, 12)),
    qualities=(0, 51),
    presets=_X26_PRESETS,
)

#: `stitchable` keeps x264 from tuning its headers to the content, so that all groups share one parameter set.
PROFILES: Final[dict[str, EncoderProfile]] = {
    profile.name: profile
    for profile in (
        EncoderProfile(
            "h264",
            "libx264",
            {"preset": "veryfast", "crf": "16", "x264-params": "stitchable=1:open-gop=0:scenecut=0"},
            best_for="playback everywhere",
            pix_fmts=_formats("yuv420p yuv422p yuv444p", (8, 10)),
            qualities=(0, 51),
            presets=_X26_PRESETS,
        ),
        _H265,
        replace(
            _H265,
            name="h265-10",
            best_for="gradients without bands, also from 8-bit sources",
            pix_fmts=_formats("yuv420p yuv422p yuv444p gbrp gray", (10,)),
        ),
        EncoderProfile(
            "av1",
            "libsvtav1",
            # One level of parallelism is one thread; two passes or a scene cut would look beyond a group.
            {"preset": "8", "crf": "24", "svtav1-params": "lp=1:scd=0"},
            containers=("mp4", "mkv"),
            best_for="the smallest files for streaming",
            pix_fmts=_formats("yuv420p", (8, 10)),
            qualities=(1, 63),
            presets=tuple(map(str, range(14))),
            shapeless=True,
        ),
        EncoderProfile(
            "prores",
            "prores_ks",
            {"vendor": "apl0"},  # Which of its profiles, `group_command` says: HQ, or 4444 for full chroma.
            containers=("mov", "mkv"),
            best_for="editing",
            pix_fmts=("yuv422p10le", "yuv444p10le", "yuva444p10le"),
            limited_only=True,
            shapeless=True,
        ),
        EncoderProfile(
            "ffv1",
            "ffv1",
            {"level": "3", "slicecrc": "1", "slices": "4", "g": "1"},
            containers=("mkv",),
            best_for="lossless masters",
            shapeless=True,
            pix_fmts=(
                *_formats("yuv420p yuv422p yuv444p gray", (8, 9, 10, 12, 14)),
                *_formats("yuva420p", (8, 9, 10)),
                *_formats("yuva422p yuva444p", (8, 9, 10, 12)),
                *_formats("gbrp", (8, 9, 10, 12, 14)),
                *_formats("gbrap", (8, 10, 12, 14)),
            ),
        ),
    )
}


def profile_from_dict(data: dict[str, Any]) -> EncoderProfile:
    """A profile that `asdict` made plain."""
    lists = ("containers", "pix_fmts", "qualities", "presets")
    return EncoderProfile(**{**data, **{name: tuple(data[name]) for name in lists if data[name] is not None}})


def find_profile(name: str) -> EncoderProfile:
    """Look an encoder profile up.

    Raises:
        SettingsError: There is no such profile, or the ffmpeg in use lacks its encoder.
    """
    profile = PROFILES.get(name)
    if profile is None:
        raise SettingsError(f"unknown encoder {name!r}", f"Choose one of {', '.join(PROFILES)}")
    if profile.encoder not in ffmpeg.encoder_names():
        raise SettingsError(f"this ffmpeg has no {profile.encoder} for profile {name}", "Choose another --encoder")
    return profile


def group_frames(rate: Fraction) -> int:
    """Frames of one group of pictures: one second, rounded."""
    return max(1, round(rate))


@dataclass(frozen=True)
class EncodedChunk:
    """What is known of an encoded chunk; written beside the file as JSON."""

    frames: int
    bytes: int
    digest: str
    """XXH3 (128 bits) of the file."""
    worst_psnr: float | None = None
    """Of the frame that is farthest from its source, in dB; `None` if nobody compared."""
    worst_frame: int = 0
    """Its number within the chunk."""
    misplaced: int = 0
    """Frames that are closer to a neighbour of their source than to their source."""

    @staticmethod
    def manifest_path(path: Path) -> Path:
        return path.with_name(path.name + ".json")


def encode_chunk(
    source: Path,
    target: Path,
    profile: EncoderProfile,
    *,
    rate: Fraction,
    sample_aspect_ratio: Fraction,
    first_frame: int,
    concurrency: int,
    closeness: Closeness | None = None,
) -> EncodedChunk:
    """Encode a chunk file to a Matroska file of closed groups of pictures, and check that it decodes.

    Args:
        source: Chunk file of upscaled frames.
        target: Encoded file; appears only when complete and checked. Its manifest lies beside it.
        profile: Encoder and settings.
        rate: Frames per second, for rate control; the file's own timestamps only order the frames.
        sample_aspect_ratio: Width to height of one sample.
        first_frame: Number of the first frame in the whole source, a multiple of the group length.
        concurrency: Groups encoded at the same time, one thread each.
        closeness: Compares what is decoded with the frames of the source.

    Raises:
        ChunkFileError: The source fails its checksums.
        FrameError: A group could not be encoded, or its frames do not come back.
        FfmpegError: ffmpeg was killed or failed.
    """
    reader = ChunkReader(source)
    length = group_frames(rate)
    starts = range(0, len(reader), length)
    partial = partial_path(target)
    with TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as folder:
        groups = [Path(folder) / f"{start:08d}.mkv" for start in starts]

        def encode(start: int, path: Path) -> None:
            stop = min(start + length, len(reader))
            _encode_group(reader, start, stop, path, profile, rate, sample_aspect_ratio)

        with ThreadPoolExecutor(max(1, concurrency), thread_name_prefix="encode") as pool:
            try:
                for done in [pool.submit(encode, *job) for job in zip(starts, groups, strict=True)]:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # The chunk is lost; do not encode the rest of it.
                raise
        try:
            _concatenate(groups, partial, rate, reader.picture)
            _expect_frames(partial, len(reader), reader.picture, first_frame, closeness)
            manifest = EncodedChunk(len(reader), partial.stat().st_size, file_digest(partial))
            if closeness is not None:
                worst = round(closeness.worst, 2)
                manifest = replace(
                    manifest, worst_psnr=worst, worst_frame=closeness.worst_frame, misplaced=closeness.misplaced
                )
            record = Path(folder) / "manifest.json"
            record.write_text(json.dumps(asdict(manifest)))
            os.replace(partial, target)
            os.replace(record, EncodedChunk.manifest_path(target))
        finally:
            partial.unlink(missing_ok=True)
    return manifest


def read_manifest(path: Path) -> EncodedChunk:
    """What the manifest of an encoded chunk says, unchecked."""
    return EncodedChunk(**json.loads(EncodedChunk.manifest_path(path).read_text()))


def read_encoded(path: Path, frames: int) -> EncodedChunk | None:
    """The manifest of an encoded chunk that is complete and undamaged; anything else is removed and gives `None`."""
    manifest_path = EncodedChunk.manifest_path(path)
    try:
        manifest = read_manifest(path)
        if manifest.frames == frames and manifest.bytes == path.stat().st_size and manifest.digest == file_digest(path):
            return manifest
    except (OSError, ValueError, TypeError):
        pass
    manifest_path.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return None


def file_digest(path: Path) -> str:
    """XXH3 (128 bits) of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _encode_group(
    reader: ChunkReader,
    start: int,
    stop: int,
    path: Path,
    profile: EncoderProfile,
    rate: Fraction,
    sample_aspect_ratio: Fraction,
) -> None:
    with ffmpeg.FfmpegProcess(
        group_command(reader.picture, path, profile, rate, sample_aspect_ratio), stdin=True
    ) as process:
        for batch in reader.batches(_FEED_FRAMES, start, stop):
            process.stdin.write(batch.data)


def group_command(
    picture: PictureFormat, path: Path, profile: EncoderProfile, rate: Fraction, sample_aspect_ratio: Fraction
) -> Sequence[str]:
    """Ffmpeg arguments that encode raw frames from standard input to one closed group of pictures."""
    colour = picture.colour
    tags = {
        "range": "pc" if colour.full_range else "tv",
        "colorspace": colour.matrix,
        "color_primaries": colour.primaries or "unknown",
        "color_trc": colour.transfer or "unknown",
    }
    frames = ffmpeg_python.input(
        "pipe:0",
        format="rawvideo",
        pix_fmt=picture.pix_fmt,
        video_size=(picture.width, picture.height),
        framerate=str(rate),
    )
    if profile.encoder == "ffv1" and colour.full_range:
        del tags["range"]  # Its encoder would have it converted; what is not said is not touched.
    # Tags go through filters: options of the output do not reach the stream in every version of ffmpeg.
    # Left is what is taken for granted where nothing is said.
    if picture.layout.shift_y and colour.chroma_location != "left":
        tags["chroma_location"] = colour.chroma_location
    frames = frames.filter("setparams", field_mode="prog", **tags)
    frames = frames.filter("setsar", f"{sample_aspect_ratio.numerator}/{sample_aspect_ratio.denominator}")
    options = {"g": "100000", **profile.options}
    if profile.encoder == "prores_ks":
        options["profile:v"] = "3" if picture.layout.shift_x else "4"
    if packed := _PACKED.get((profile.encoder, picture.pix_fmt)):
        frames = frames.filter("format", packed)
    output = frames.output(
        ffmpeg.file_argument(path),
        format="matroska",
        fps_mode="passthrough",
        threads="1",
        fflags="+bitexact",
        **{"c:v": profile.encoder, "flags:v": "+cgop", **options},
    )
    arguments: list[str] = output.get_args()
    return ["-protocol_whitelist", ffmpeg.PROTOCOLS, "-filter_threads", "1", *arguments]


def packets_in_decoding_order(path: Path) -> Iterator[tuple[av.Packet, int]]:
    """Yield each packet of a file of one video stream with its rank in presentation order."""
    with av.open(f"file:{path}", options={"protocol_whitelist": ffmpeg.PROTOCOLS}) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
    order = sorted(range(len(packets)), key=lambda index: packets[index].pts or 0)
    ranks = {index: rank for rank, index in enumerate(order)}
    for index, packet in enumerate(packets):
        yield packet, ranks[index]


def _concatenate(groups: Sequence[Path], target: Path, rate: Fraction, picture: PictureFormat) -> None:
    """Copy the packets of all groups into one file; times are frame numbers, which is all that later stages need."""
    with av.open(f"file:{target}", "w", format="matroska", options={"fflags": "+bitexact"}) as output:
        stream = None
        base = 0
        for group in groups:
            if stream is None:
                with av.open(f"file:{group}") as first:
                    stream = output.add_stream_from_template(first.streams.video[0], opaque=True)
                    if picture.colour.full_range:
                        stream.codec_context.color_range = _FULL_RANGE
            count = 0
            for packet, rank in packets_in_decoding_order(group):
                packet.stream = stream
                packet.time_base = 1 / rate
                packet.pts = base + rank
                packet.dts = min(packet.pts, base + count - 2)
                count += 1
                output.mux(packet)
            base += count


def _expect_frames(
    path: Path, frames: int, picture: PictureFormat, first_frame: int, closeness: Closeness | None
) -> None:
    """Decode an encoded chunk, count, and compare with the source.

    Raises:
        FrameError: A frame is missing or of another size.
    """
    seen = 0
    try:
        with av.open(f"file:{path}") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            for frame in container.decode(stream):
                if (frame.width, frame.height) != (picture.width, picture.height):
                    break
                if closeness is not None:
                    closeness.add(frame, picture)
                seen += 1
    except av.error.FFmpegError as error:
        raise FrameError(
            f"frame {first_frame + seen} was encoded but does not decode ({error})", frame=first_frame + seen
        ) from error
    if seen != frames:
        raise FrameError(
            f"frame {first_frame + seen} did not survive encoding ({seen} of {frames} frames)", frame=first_frame + seen
        )
