"""Faults that published pipelines of this kind have, each with a test that ours has not: named after what goes wrong.

Numbers are those of the list in `docs/media.md`.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tasks.assemble import assemble_result
from tasks.errors import ChunkFileError, DestinationError, FrameError, VerificationError
from tasks.media.pixels import Colour, PictureFormat
from tasks.media.probe import probe
from tasks.media.timestamps import scan_packets
from tasks.models.cards import find_model
from tasks.models.engine import Engine
from tasks.models.weights import content_hash
from tasks.plan import make_plan
from tasks.request import UpscaleRequest, check_request
from tests.corpus.judge import shown_times
from tests.corpus.samples import SAMPLES, X264, clip
from tests.corpus.work import upscaled
from tests.media.clips import run_ffmpeg
from tests.media.witness import packets


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def _sample(name: str, corpus: Path) -> Path:
    return next(sample for sample in SAMPLES if sample.name == name).path(corpus)


def _video(path: Path) -> int:
    with av.open(str(path)) as container:
        return container.streams.video[0].index


def test_5_1_a_long_clip_is_a_few_chunks_and_not_a_job_per_frame(tmp_path: Path) -> None:
    film = tmp_path / "long.mkv"
    run_ffmpeg(
        "-f", "lavfi", "-i", "color=gray:s=32x32:r=24:d=500", "-c:v", "libx264", "-preset", "ultrafast", film
    )  # fmt: skip
    request = UpscaleRequest(str(film), str(tmp_path / "out.mkv"), scratch=str(tmp_path / "scratch"))
    checked = check_request(request)
    plan = make_plan(checked, content_hash(checked.card))
    assert plan.frames == 12_000
    assert len(plan.chunks) < 20
    assert [chunk.first for chunk in plan.chunks[1:]] == [chunk.last + 1 for chunk in plan.chunks[:-1]]


def test_5_2_a_frame_that_is_missing_fails_the_job_and_never_shortens_the_result(corpus: Path, tmp_path: Path) -> None:
    plan = upscaled(_sample("rgb.avi", corpus), tmp_path / "result.mkv", 0.5)
    plan.encoded(plan.chunks[1]).unlink()
    with pytest.raises(VerificationError, match=r"chunk 1 .* is missing"):
        assemble_result(plan)


def test_5_3_a_job_makes_the_folders_it_writes_to(corpus: Path, tmp_path: Path) -> None:
    source = _sample("untagged.mkv", corpus)
    assert upscaled(source, tmp_path / "result.mkv", 1000.0).result.is_file()  # In scratch that was not there.
    with pytest.raises(DestinationError, match="does not exist"):
        upscaled(source, tmp_path / "not" / "there" / "result.mkv", 1000.0)
    assert not (tmp_path / "not").exists()


def test_5_4_a_rate_of_film_stays_a_ratio_over_an_hour(tmp_path: Path) -> None:
    rate = Fraction(24000, 1001)
    film = tmp_path / "film.mp4"
    clip(*X264, rate=str(rate), size="32x32", seconds=2)(tmp_path, film)
    table = scan_packets(probe(film)).table
    assert table.rate == rate
    hour = 3600 * rate
    assert abs(hour / table.rate - 3600) == 0
    assert abs(hour / Fraction("23.97") - 3600) > Fraction(9, 20), "what two decimals would do"


def test_5_5_a_variable_rate_keeps_every_time(corpus: Path, tmp_path: Path) -> None:
    source = _sample("vfr.mp4", corpus)
    result = upscaled(source, tmp_path / "result.mp4", 0.5).result
    assert shown_times(result, _video(result)) == shown_times(source, _video(source))
    assert len(set(np.diff(shown_times(source, _video(source))))) > 5, "the source varies"


def test_5_6_sound_is_copied_and_not_encoded_again(corpus: Path, tmp_path: Path) -> None:
    source = _sample("opus.mkv", corpus)
    result = upscaled(source, tmp_path / "result.mp4", 1000.0).result
    assert [p.data for p in packets(result, 1)] == [p.data for p in packets(source, 1)]


def test_5_7_several_sounds_stay_several(corpus: Path, tmp_path: Path) -> None:
    source = _sample("laden.mkv", corpus)
    result = upscaled(source, tmp_path / "result.mkv", 1000.0).result
    with av.open(str(result)) as container:
        assert [stream.codec_context.name for stream in container.streams.audio] == ["ac3", "aac"]
    for index in (1, 2):
        assert [p.data for p in packets(result, index)] == [p.data for p in packets(source, index)]


@pytest.mark.parametrize("name", ["pcm.mov", "pcm.mkv"])
def test_5_8_uncompressed_sound_and_containers_without_bit_rates_work(name: str, corpus: Path, tmp_path: Path) -> None:
    source = _sample(name, corpus)
    result = upscaled(source, tmp_path / f"result{source.suffix}", 1000.0).result
    assert b"".join(p.data for p in packets(result, 1)) == b"".join(p.data for p in packets(source, 1))


def test_5_9_sound_that_ends_early_takes_no_picture_with_it(corpus: Path, tmp_path: Path) -> None:
    source = _sample("short-sound.mp4", corpus)
    result = upscaled(source, tmp_path / "result.mp4", 1000.0).result
    assert len(shown_times(result, 0)) == len(shown_times(source, 0)) == 18
    assert packets(result, 1)[-1].time < shown_times(result, 0)[-1]  # type: ignore[operator]


def test_5_10_a_rotated_picture_has_a_size_and_stays_rotated(corpus: Path, tmp_path: Path) -> None:
    facts = probe(upscaled(_sample("rotated.mp4", corpus), tmp_path / "result.mp4", 1000.0).result)
    assert (facts.width, facts.height, facts.rotation) == (128, 96, 90)


def test_5_18_out_of_memory_makes_tiles_smaller_and_then_fails_with_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real errors of torch's allocator, from asking for more than an address space holds."""
    source = PictureFormat(128, 128, "yuv420p", Colour("bt709", full_range=False))
    engine = Engine(find_model("compact-x2"), source, source.resized(256, 256), device="cpu", backend="torch")
    tiles: list[int | None] = []
    network = engine._network("fp32")
    run = network.run

    def hungry(x: torch.Tensor) -> torch.Tensor:
        tiles.append(engine.tile)
        if x.shape[-1] > 96:
            torch.empty(1 << 62, dtype=torch.uint8)
        return run(x)

    monkeypatch.setattr(network, "run", hungry)
    frame = np.random.default_rng(1).integers(16, 235, (1, source.frame_bytes), dtype=np.uint8)
    tiled = engine.upscale(frame)
    assert tiles[0] is None
    assert engine.tile is not None
    monkeypatch.setattr(network, "run", run)
    whole = Engine(find_model("compact-x2"), source, source.resized(256, 256), device="cpu", backend="torch")
    assert np.array_equal(tiled, whole.upscale(frame))

    monkeypatch.setattr(network, "run", lambda x: torch.empty(1 << 62, dtype=torch.uint8))
    with pytest.raises(FrameError, match=r"Frame 41 .* does not fit into the memory") as failure:
        engine.upscale(255 - frame, first_frame=41)
    assert failure.value.frame == 41


def test_5_19_no_name_of_a_file_reaches_a_shell_or_names_a_file_of_ours(corpus: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    name = f"a b'c\"d;touch {trap.name}`touch {trap.name}`$(touch {trap.name})&%03d.mkv"
    source = tmp_path / name
    source.write_bytes(_sample("untagged.mkv", corpus).read_bytes())
    plan = upscaled(source, tmp_path / f"result of {name}", 1000.0)
    assert plan.result.name == "result.mkv"
    assert not trap.exists()
    assert not Path(trap.name).exists()
    for path in plan.folder.iterdir():
        assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-."), path.name


def test_a_chunk_file_of_another_picture_is_not_believed(corpus: Path, tmp_path: Path) -> None:
    """Of 5.2: what lies between stages is checked as well."""
    plan = upscaled(_sample("untagged.mkv", corpus), tmp_path / "result.mkv", 0.5)
    shorter = replace(plan, table=replace(plan.table, pts=plan.table.pts[:-1]))
    with pytest.raises((ChunkFileError, VerificationError)):
        assemble_result(shorter)
