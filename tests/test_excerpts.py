"""Excerpts: which frames they hold, what is refused, and that all refusals are said at once."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tasks.contenders import find_contender, with_baselines
from tasks.errors import (
    FrameError,
    ModelError,
    SettingsError,
    SourceError,
    SuperResolutionError,
    UnsupportedSourceError,
)
from tasks.evaluate import crop, prepare_excerpt
from tasks.excerpts import Excerpt, check_named, find_all, find_excerpt, numbered, refuse
from tasks.media.chunk_file import ChunkReader
from tasks.media.quality import luma_of, psnr
from tasks.models.classical import Resampler
from tests.flows.jobs import RATE, make_film
from tests.flows.libraries import make_bad_ones, make_clip
from tests.models.samples import picture_format


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five groups of pictures with B-frames; neither side is a multiple of 3 or 4 twice."""
    return make_film(tmp_path_factory.mktemp("films") / "film.mp4", 115, "90x70", sound=())


def excerpt_of(path: Path, mode: str = "restore", scale: int = 2, seconds: float = 0.5, crf: int = 0) -> Excerpt:
    return find_excerpt(str(path), path, mode, scale, seconds, crf)  # type: ignore[arg-type]


def frames_of(path: Path) -> np.ndarray:
    return np.concatenate(list(ChunkReader(path).batches(8)))


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="yuv420p").ravel() for frame in container.decode(video=0)]


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0, 100.0])
def test_an_excerpt_is_the_middle_of_its_clip(film: Path, tmp_path: Path, seconds: float) -> None:
    excerpt = excerpt_of(film, "no-reference", seconds=seconds)
    assert excerpt.frames == min(115, round(seconds * RATE))
    assert abs(excerpt.first - (115 - excerpt.first - excerpt.frames)) <= 1
    prepare_excerpt(excerpt, tmp_path)
    expected = decoded(film)[excerpt.first : excerpt.first + excerpt.frames]
    np.testing.assert_array_equal(frames_of(excerpt.given_path(tmp_path)), np.stack(expected))
    assert [path.name for path in tmp_path.iterdir()] == [excerpt.given_path(tmp_path).name]
    assert (excerpt.target.width, excerpt.target.height) == (180, 140)


@pytest.mark.parametrize(("scale", "size"), [(2, (88, 68)), (3, (90, 66)), (4, (88, 64))])
def test_to_restore_it_whole_pixels_of_the_shrunk_picture_are_kept(
    film: Path, tmp_path: Path, scale: int, size: tuple[int, int]
) -> None:
    excerpt = excerpt_of(film, scale=scale, seconds=0.2)
    assert (excerpt.target.width, excerpt.target.height) == size
    assert (excerpt.given.width * scale, excerpt.given.height * scale) == size
    assert excerpt.given.width % 2 == excerpt.given.height % 2 == 0
    prepare_excerpt(excerpt, tmp_path)
    reference, given = frames_of(excerpt.reference_path(tmp_path)), frames_of(excerpt.given_path(tmp_path))
    whole = decoded(film)[excerpt.first]
    luma = luma_of(whole, excerpt.facts.picture)[: size[1], : size[0]]
    np.testing.assert_array_equal(luma_of(reference[0], excerpt.target), luma)
    chroma = whole[90 * 70 :].reshape(2, 35, 45)[:, : size[1] // 2, : size[0] // 2]
    np.testing.assert_array_equal(reference[0][size[0] * size[1] :], chroma.ravel())
    np.testing.assert_array_equal(given, Resampler(excerpt.target, excerpt.given)(reference))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) >= excerpt.bytes


def test_coding_the_shrunk_frames_loses_something(film: Path, tmp_path: Path) -> None:
    lumas = {}
    for crf in (0, 20, 40):
        excerpt = excerpt_of(film, crf=crf)
        prepare_excerpt(excerpt, tmp_path)
        lumas[crf] = [luma_of(frame, excerpt.given) for frame in frames_of(excerpt.given_path(tmp_path))]
        assert len(lumas[crf]) == excerpt.frames
    fine, coarse = (np.mean([psnr(*pair) for pair in zip(lumas[crf], lumas[0], strict=True)]) for crf in (20, 40))
    assert 30 < fine < 60
    assert coarse < fine - 3


def test_a_part_of_a_frame_is_its_upper_left() -> None:
    whole, part = picture_format(8, 6), picture_format(4, 2)
    frame = np.arange(whole.frame_bytes, dtype=np.uint8)
    assert crop(frame, whole, part).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 48, 49, 60, 61]


def test_a_frame_that_does_not_decode_is_named_by_its_number_in_the_clip(tmp_path: Path) -> None:
    make_bad_ones(tmp_path / "bad")
    excerpt = excerpt_of(tmp_path / "bad" / "noise.mkv", "no-reference", seconds=0.16)
    assert (excerpt.first, excerpt.frames) == (1, 4)
    with pytest.raises(FrameError, match=r"noise\.mkv: frame 3 cannot be decoded") as caught:
        prepare_excerpt(excerpt, tmp_path)
    assert caught.value.frame == 3
    assert not excerpt.given_path(tmp_path).exists()


def test_pictures_that_leave_nothing_to_measure_are_refused(tmp_path: Path) -> None:
    small = make_clip(tmp_path / "small.mp4", 1, size=(32, 32))
    assert excerpt_of(small, scale=4).given.width == 8
    with pytest.raises(UnsupportedSourceError, match=r"32x32.*at scale 3.*at least 37 rows"):
        excerpt_of(small, scale=3)
    with pytest.raises(UnsupportedSourceError, match="would become 20000x128"):
        wide = make_clip(tmp_path / "wide.mp4", 1, frames=1, size=(5000, 32))
        excerpt_of(wide, "no-reference", scale=4)


def test_clips_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [make_clip(tmp_path / name, 1) for name in ("a/film.mp4", "b/film.mp4", "b/other.mp4")]
    excerpts = numbered(map(excerpt_of, paths))
    assert [excerpt.label for excerpt in excerpts] == [str(paths[0]), str(paths[1]), "other.mp4"]
    assert [excerpt.index for excerpt in excerpts] == [0, 1, 2]


def test_all_refusals_are_said_at_once_in_the_narrowest_class() -> None:
    refuse([])
    one = ModelError("no such model", "Look again")
    with pytest.raises(ModelError) as caught:
        refuse([one])
    assert caught.value is one
    sources: list[SuperResolutionError] = [
        UnsupportedSourceError("a is interlaced", "Convert it"),
        SourceError("b is empty", "Copy it"),
    ]
    with pytest.raises(SourceError, match=r"2 things are wrong: a is interlaced \(Convert it\); b is empty") as caught:
        refuse(sources)
    assert type(caught.value) is SourceError
    with pytest.raises(SettingsError, match=r"3 things are wrong: .*no such model"):
        refuse([*sources, one])


def test_what_cannot_be_found_joins_the_refusals() -> None:
    refusals: list[SuperResolutionError] = []
    found = find_all(lambda name: find_contender(name, 4), ["compact-x2", "compact-x4", "compakt"], refusals)
    assert [contender.label for contender in found] == ["compact-x4"]
    assert [type(refusal) for refusal in refusals] == [SettingsError, ModelError]


def test_lists_that_make_no_evaluation_are_refused(tmp_path: Path) -> None:
    for clips, models, said in (([], ["m"], "no clip"), (["c"], [], "no model"), (["c", "./c"], ["m"], "twice: .*/c")):
        with pytest.raises(SettingsError, match=said):
            check_named(clips, models)
    twice = [find_contender("compact-x2", 2), find_contender("COMPACT-x2", 2)]
    with pytest.raises(SettingsError, match="two contenders are called compact-x2"):
        with_baselines(twice)
    assert [contender.label for contender in with_baselines(twice[:1])] == ["bicubic", "lanczos", "compact-x2"]
