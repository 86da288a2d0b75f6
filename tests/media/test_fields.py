"""Fields: whether a video is interlaced is seen, whatever its flags say, and frames are those that ffmpeg makes."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import SettingsError, UnsupportedSourceError
from tasks.media.decode import decode_frames
from tasks.media.ffmpeg import binary
from tasks.media.fields import Seen, decide_fields
from tasks.media.probe import probe
from tasks.media.timestamps import Fields, scan_packets
from tests.corpus.samples import SAMPLES
from tests.media.clips import GOOD, Clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fields")


def _sample(name: str, folder: Path) -> Path:
    return next(sample for sample in SAMPLES if sample.name == name).path(folder)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("fields-top.ts", "tff"),
        ("fields-bottom.avi", "bff"),
        ("fields-h264.mkv", "tff"),
        ("fields-unsaid.mkv", "tff"),
        ("fields-only-said.mkv", None),
    ],
)
def test_pictures_tell_the_order_of_their_fields(folder: Path, name: str, order: str | None) -> None:
    decision = decide_fields(probe(_sample(name, folder)), "auto")
    assert decision.fields == (Fields(order) if order else None)
    assert decision.note


@pytest.mark.parametrize("name", GOOD)
def test_progressive_pictures_are_left_alone(clips: Clips, name: str) -> None:
    assert decide_fields(probe(clips.path(name)), "auto").fields is None


def test_telecined_film_is_refused_unless_somebody_says_what_to_do(clips: Clips) -> None:
    facts = probe(clips.path("telecined.ts"))
    with pytest.raises(UnsupportedSourceError, match="telecined film") as refusal:
        decide_fields(facts, "auto")
    assert "field-rate" in refusal.value.remedy
    doubled = decide_fields(facts, "field-rate").fields
    assert doubled is not None
    assert doubled.doubled
    assert decide_fields(facts, "off").fields is None


def test_other_ways_to_deinterlace_are_refused(clips: Clips) -> None:
    with pytest.raises(SettingsError, match="unknown way to deinterlace 'yes'"):
        decide_fields(probe(clips.path("one-frame.mp4")), "yes")


def test_what_stands_still_tells_nothing() -> None:
    seen = Seen()
    still = np.random.default_rng(3).uniform(0, 255, (48, 64)).astype(np.float32)
    seen.add(still, still)
    assert (seen.pictures, seen.interlaced, seen.progressive, seen.is_telecined) == (1, 0, 0, False)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("name", ["fields-top.ts", "fields-bottom.avi"])
def test_frames_are_those_of_one_pass_wherever_chunks_begin(folder: Path, name: str, doubled: bool) -> None:
    source = _sample(name, folder)
    facts = probe(source)
    order = decide_fields(facts, "auto").fields
    assert order is not None
    mode = "send_field" if doubled else "send_frame"
    command = [binary(), "-v", "error", "-i", str(source), "-vf", f"bwdif=mode={mode}:parity={order.order}:deint=all"]
    command += ["-fps_mode", "passthrough", "-f", "framemd5", "-"]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = [row.split(",")[-1].strip() for row in rows if not row.startswith("#")]
    table = scan_packets(facts).table.of_fields(Fields(order.order, doubled))
    assert len(table) == len(wanted)
    found = {
        length: [
            hashlib.md5(frame.tobytes()).hexdigest()
            for first in range(0, len(table), length)
            for frame in decode_frames(facts, table, first, min(first + length, len(table)) - 1, threads=1)
        ]
        for length in (1, 7, len(table))
    }
    assert found[1] == found[7] == found[len(table)]
    # At the very ends, where a neighbour is missing, libavfilter 11 and 12 make lines up differently.
    assert found[1][1:-1] == wanted[1:-1]
