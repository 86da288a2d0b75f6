"""Encoded chunks of a clip without a model: every picture is kept, or each of its pixels becomes four."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.media.carried import Carried, plan_carried
from tasks.media.chunk_file import ChunkWriter
from tasks.media.decode import decode_frames
from tasks.media.encoders import PROFILES, encode_chunk, group_frames
from tasks.media.mux import MuxReport, mux, muxer_of
from tasks.media.pixels import PictureFormat
from tasks.media.probe import SourceFacts, probe
from tasks.media.timestamps import FrameTable, scan_packets


def enlarged(frame: np.ndarray, source: PictureFormat, target: PictureFormat) -> np.ndarray:
    """Each pixel repeated as often as the target needs; uint8[target.frame_bytes]."""
    planes, offset = [], 0
    for (rows, columns), (more_rows, _) in zip(source.plane_shapes, target.plane_shapes, strict=True):
        plane = frame[offset : offset + rows * columns].reshape(rows, columns)
        times = more_rows // rows
        planes.append(plane.repeat(times, axis=0).repeat(times, axis=1).ravel())
        offset += rows * columns
    return np.concatenate(planes)


def encode_frames(
    facts: SourceFacts, table: FrameTable, first: int, last: int, path: Path, target: PictureFormat, profile: str
) -> None:
    """Write frames `first..last` of a source, enlarged to `target`, as the encoded chunk `path`."""
    raw = path.with_suffix(".yuv")
    with ChunkWriter(raw, target) as writer:
        for frame in decode_frames(facts, table, first, last, threads=1):
            writer.write(enlarged(frame, facts.picture, target)[None])
    encode_chunk(
        raw, path, PROFILES[profile], rate=table.rate, sample_aspect_ratio=facts.sample_aspect_ratio,
        first_frame=first, concurrency=2,
    )  # fmt: skip
    raw.unlink()


@dataclass(frozen=True)
class Joined:
    """A result and what was said about it."""

    path: Path
    facts: SourceFacts
    table: FrameTable
    carried: Carried
    report: MuxReport


def join(source: Path, target: Path, profile: str = "h264", groups_per_chunk: int = 2) -> Joined:
    """Send a clip through decode, encode and mux at its own size."""
    facts = probe(source)
    table = scan_packets(facts).table
    length = groups_per_chunk * group_frames(table.rate)
    chunks = []
    for first in range(0, len(table), length):
        chunks.append(target.with_name(f"{target.name}-{first}.mkv"))
        last = min(first + length, len(table)) - 1
        encode_frames(facts, table, first, last, chunks[-1], facts.picture, profile)
    carried = plan_carried(facts, muxer_of(target))
    report = mux(facts, table, chunks, carried, target, muxer_of(target))
    return Joined(target, facts, table, carried, report)
