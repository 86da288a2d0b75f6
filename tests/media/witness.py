"""What is in a file, told by ffmpeg and by PyAV alone: an independent witness of the project's own media code."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from tasks.media.ffmpeg import binary


@dataclass(frozen=True)
class Shown:
    """One frame as ffmpeg decodes it."""

    time: Fraction
    """Presentation time in seconds."""
    md5: str
    """Of its planes without padding."""


def shown_frames(path: Path, stream: str = "0:v:0") -> list[Shown]:
    """All frames of a video stream in one decode, with the times of the file."""
    command = [binary(), "-v", "error", "-nostdin", "-copyts", "-i", str(path), "-map", stream]
    command += ["-fps_mode", "passthrough", "-enc_time_base", "demux", "-f", "framemd5", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = [row for row in text.splitlines() if row]
    tick = next(Fraction(row.split(":")[1].strip()) for row in rows if row.startswith("#tb"))
    fields = [[field.strip() for field in row.split(",")] for row in rows if not row.startswith("#")]
    return [Shown(int(pts) * tick, digest) for _, _, pts, _, _, digest in fields]


def decoding_complaints(path: Path) -> str:
    """What ffmpeg says on stderr when it decodes every stream it can; empty for a sound file."""
    command = [binary(), "-v", "error", "-nostdin", "-i", str(path), "-map", "0:v", "-map", "0:a?"]
    command += ["-fps_mode", "passthrough", "-enc_time_base:v", "demux", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr}"


def heard_samples(path: Path, stream: str = "0:a:0") -> str:
    """MD5 of all decoded sound of a stream: what a player gives out, priming and edit lists obeyed."""
    command = [binary(), "-v", "error", "-nostdin", "-i", str(path), "-map", stream, "-f", "s16le", "-"]
    return hashlib.md5(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout).hexdigest()


def heard_exactly(path: Path, stream: str = "0:a:0") -> str:
    """MD5 of all decoded sound of a stream as doubles, which hold every integer and float of a decoder exactly."""
    command = [binary(), "-v", "error", "-nostdin", "-i", str(path), "-map", stream, "-c:a", "pcm_f64le"]
    command += ["-f", "f64le", "-"]
    return hashlib.md5(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout).hexdigest()


@dataclass(frozen=True)
class Packet:
    """One packet of a stream."""

    time: Fraction | None
    """Presentation time in seconds."""
    data: bytes


def packets(path: Path, index: int) -> list[Packet]:
    """All packets of a stream in the order of the file."""
    with av.open(str(path)) as container:
        stream = container.streams[index]
        return [
            Packet(None if packet.pts is None else packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]


def without_adts(data: bytes) -> bytes:
    """An AAC packet of a transport stream as other containers store it."""
    if len(data) > 7 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return data[7:] if data[1] & 1 else data[9:]
    return data


def start_time(path: Path) -> Fraction:
    """Where the file starts, in seconds."""
    with av.open(str(path)) as container:
        return Fraction(container.start_time or 0, av.time_base)
