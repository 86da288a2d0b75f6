"""Verify: read the written result back and compare it with what was promised. Nothing is published before."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import av.error
import xxhash
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.chunks import Chunk
from tasks.errors import SourceError, VerificationError
from tasks.failures import at
from tasks.media.encoders import EncodedChunk, read_manifest
from tasks.media.mux import MuxReport, is_blank, payload, times_of, units
from tasks.media.probe import SourceFacts, open_source, probe
from tasks.media.sound import SoundReader
from tasks.plan import Plan, load_plan

#: A frame whose brightness, in means of blocks, has less than this PSNR in dB against its source shows something else:
#: different shots of a film have about 10, the bundled models on their worst frames above 20.
_LEAST_PSNR = 12.0

#: Seconds by which a copied packet may move: the rounding of containers that hold times in milliseconds.
_LARGEST_SHIFT = 0.002


@task(name="verify", task_run_name="verify", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def verify(plan: str, muxed: MuxReport) -> None:
    """Check the result of the plan at path `plan`."""
    with at("verify"):
        verify_result(load_plan(Path(plan)), muxed)


def verify_result(plan: Plan, muxed: MuxReport) -> None:
    """Compare the result with the plan and with what was handed to the muxer.

    Every packet is read back: number, times and content of the video packets, number and content of all others. That
    the packets decode to whole frames was established when each chunk was encoded, and equal packets decode equally.
    Sound that could not be copied is decoded, and its samples compared with those of the source.

    Raises:
        VerificationError: Naming the first difference.
    """
    try:
        result = probe(plan.result)
    except SourceError as error:
        raise _difference(f"the written file cannot be read back ({error.problem})") from error
    _compare_pictures(plan, result)
    for chunk in plan.chunks:
        _expect_close(chunk, read_manifest(plan.encoded(chunk)))
    expected = plan.table.pts.astype(object) * plan.table.time_base - _start_seconds(plan)
    times: list[Fraction] = []
    streams = [result.video_index, *(index for index in range(len(result.streams)) if index != result.video_index)]
    digests = [xxhash.xxh3_128() for _ in streams]
    counts = [0] * len(streams)
    spans: list[tuple[float, float] | None] = [None] * len(streams)
    tick = Fraction(1, 1000)
    carried = list(plan.carried.indexes)
    heard = {carried.index(index) + 1: SoundReader(kept) for index, kept in muxed.kept.items()}
    with open_source(plan.result) as container:
        tick = container.streams[result.video_index].time_base or tick
        for packet in container.demux():
            position = streams.index(packet.stream.index)
            if position in heard:
                _listen(heard[position], packet, carried[position - 1])
                continue
            if packet.size == 0:
                continue
            if is_blank(packet) and counts[position] == muxed.other_packets.get(carried[position - 1]):
                continue
            digests[position].update(payload(packet))
            counts[position] += units(packet)
            if position == 0:
                times.append((packet.pts or 0) * tick)
            elif found := times_of(packet):
                spans[position] = ((spans[position] or found)[0], found[1])
    if len(times) != plan.frames:
        raise _difference(f"the result has {len(times)} frames, the source {plan.frames}")
    times.sort()
    # Half a tick of the container, plus what rounding the source's start to its own tick can add.
    tolerance = tick / 2 + Fraction(1, av.time_base)
    for number, (written, wanted) in enumerate(zip(times, expected, strict=True)):
        if abs(written - wanted) > tolerance:
            raise _difference(f"frame {number} is shown at {float(written):.6f} s instead of {float(wanted):.6f} s")
    if digests[0].hexdigest() != muxed.video_digest:
        raise _difference("the video packets read back differ from those written")
    for position, index in enumerate(carried, start=1):
        if position in heard:
            _expect_same_sound(heard[position], index)
            continue
        if position >= len(streams) or counts[position] != muxed.other_packets[index]:
            read = counts[position] if position < len(streams) else 0
            raise _difference(f"stream {index} has {read} packets, the source {muxed.other_packets[index]}")
        if digests[position].hexdigest() != muxed.other_digests[index]:
            raise _difference(f"the packets of stream {index} differ from the source's")
        codec, wanted_codec = result.streams[streams[position]].codec, plan.facts.streams[index].codec
        if index in plan.carried.by_program and codec != wanted_codec:
            raise _difference(f"stream {index} is read back as {codec} instead of {wanted_codec}")
        written_span, wanted_span = spans[position], muxed.other_spans.get(index)
        if written_span and wanted_span:
            shift = max(abs(written_span[0] - wanted_span[0]), abs(written_span[1] - wanted_span[1]))
            if shift > _LARGEST_SHIFT:
                raise _difference(f"stream {index} is shifted by {shift:.3f} s against the picture")


def _listen(heard: SoundReader, packet: av.Packet, index: int) -> None:
    try:
        heard.take(packet)
    except av.error.FFmpegError as error:
        raise _difference(f"the sound of stream {index} cannot be decoded ({error})") from error


def _expect_same_sound(heard: SoundReader, index: int) -> None:
    """Refuse sound that was decoded and kept, if it is not what the source's decoded to."""
    wanted = heard.wanted
    if heard.samples != wanted.samples:
        raise _difference(f"the sound of stream {index} has {heard.samples} samples, the source's {wanted.samples}")
    if heard.digest != wanted.digest:
        raise _difference(f"the samples of stream {index} differ from the source's")
    if heard.shift > _LARGEST_SHIFT:
        raise _difference(f"the sound of stream {index} is shifted by {heard.shift:.3f} s against the picture")


def _expect_close(chunk: Chunk, found: EncodedChunk) -> None:
    """Refuse a chunk that shows something else than its source, or the same at another time."""
    which = f"chunk {chunk.index} (frames {chunk.first}-{chunk.last})"
    if 2 * found.misplaced > chunk.frames:
        raise _difference(f"{which} drifts: {found.misplaced} of its frames show a moment beside their own")
    if found.worst_psnr is not None and found.worst_psnr < _LEAST_PSNR:
        frame = chunk.first + found.worst_frame
        raise _difference(f"{which}: frame {frame} is far from its source, with a PSNR of {found.worst_psnr:.1f} dB")


def _start_seconds(plan: Plan) -> Fraction:
    with open_source(Path(plan.facts.path)) as source:
        return Fraction(source.start_time or 0, av.time_base)


def _compare_pictures(plan: Plan, result: SourceFacts) -> None:
    wanted, found = plan.target, result.picture
    # A decoder may give more bits than were encoded: ProRes 4444 has 12 for whoever reads it.
    same_pixels = replace(found.layout, bits=0) == replace(wanted.layout, bits=0) and (
        found.layout.bits >= wanted.layout.bits
    )
    if (found.width, found.height) != (wanted.width, wanted.height) or not same_pixels:
        raise _difference(f"the picture is {found.width}x{found.height} {found.pix_fmt}")
    if (found.colour.matrix, found.colour.full_range) != (wanted.colour.matrix, wanted.colour.full_range):
        raise _difference(f"the colour is tagged {found.colour.matrix}, full range {found.colour.full_range}")
    for name in ("primaries", "transfer"):
        said, meant = getattr(found.colour, name), getattr(wanted.colour, name)
        if meant not in (None, said):
            raise _difference(f"the {name} of its colours are tagged {said} instead of {meant}")
    if result.sample_aspect_ratio != plan.sample_aspect_ratio:
        raise _difference(
            f"the sample aspect ratio is {result.sample_aspect_ratio} instead of {plan.sample_aspect_ratio}"
        )
    if result.display_matrix != plan.facts.display_matrix:
        raise _difference(
            f"players would turn the picture by {result.rotation} degrees, the source's by {plan.facts.rotation}"
        )
    if plan.profile.tells_light and result.light != plan.facts.light:
        raise _difference(f"the mastering display is {result.light} instead of {plan.facts.light}")


def _difference(what: str) -> VerificationError:
    return VerificationError(
        f"verification failed: {what}; nothing was published", "Run the same command again with --fresh"
    )
