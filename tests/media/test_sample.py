"""The sample clip: a real video with sound, the same every time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from tasks.media.sample import HEIGHT, RATE, WIDTH, write_sample
from tests.media.witness import decoding_complaints, shown_frames

FRAMES = 8


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.mp4"
    write_sample(path, FRAMES)
    return path


def test_sample_is_a_small_tagged_clip_with_sound_and_b_frames(sample: Path) -> None:
    assert decoding_complaints(sample) == ""
    shown = shown_frames(sample)
    assert [frame.time for frame in shown] == [number / Fraction(RATE) for number in range(FRAMES)]
    assert len({frame.md5 for frame in shown}) == FRAMES
    with av.open(str(sample)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        found = (video.width, video.height, video.pix_fmt, video.average_rate)
        assert found == (WIDTH, HEIGHT, "yuv420p", Fraction(RATE))
        assert audio.codec_context.name == "aac"
        frames = list(container.decode(video))
    assert PictureType.B in {PictureType(frame.pict_type) for frame in frames}
    assert {(int(frame.colorspace), int(frame.color_range)) for frame in frames} == {(1, 1)}


def test_the_camera_moves_over_a_detailed_picture(sample: Path) -> None:
    with av.open(str(sample)) as container:
        pictures = [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]
    assert np.abs(pictures[0] - pictures[-1]).mean() > 5
    assert pictures[0].std() > 20


def test_sample_is_the_same_every_time(sample: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.mp4"
    write_sample(again, FRAMES)
    assert again.read_bytes() == sample.read_bytes()
