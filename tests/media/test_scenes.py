"""Excerpts of a video: inside one scene, different from one another, none black, the same every time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from tasks.media import scenes
from tasks.media.decode import decode_frames
from tasks.media.probe import SourceFacts, probe
from tasks.media.scenes import Excerpt, Look, choose_excerpts, find_cuts
from tasks.media.timestamps import FrameTable, scan_packets

WIDTH, HEIGHT = 64, 48

#: Frames and kind of each scene of the film; both looks of the town differ in where the camera is, not in colour.
SCENES = ((20, "black"), (30, "red"), (24, "town"), (40, "green"), (18, "grey"), (36, "blue"), (12, "black"))
STARTS = tuple(int(start) for start in np.cumsum([0, *(frames for frames, _ in SCENES)]))
COLOURS = {"red": (210, 60, 40), "green": (60, 190, 70), "blue": (50, 80, 220), "town": (200, 200, 190)}


def drawn(kind: str, number: int) -> np.ndarray:
    """A picture of a scene: tiles that move slowly; black and grey show nothing."""
    if kind in ("black", "grey"):
        return np.full((HEIGHT, WIDTH, 3), 0 if kind == "black" else 128, dtype=np.uint8)
    tiles = np.random.default_rng(len(kind)).integers(30, 100, (HEIGHT // 8, WIDTH // 8 + 8, 1)) / 100
    picture = (tiles * np.array(COLOURS[kind])).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    left = number // 2
    return np.ascontiguousarray(picture[:, left : left + WIDTH])


def write(path: Path, pieces: tuple[tuple[int, str], ...], keyframes: int = 250) -> Path:
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "threads": "1", "x264-params": f"keyint={keyframes}:scenecut=0:bframes=3"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frames, kind in pieces:
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(drawn(kind, number), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def opened(path: Path) -> tuple[SourceFacts, FrameTable]:
    facts = probe(path)
    return facts, scan_packets(facts).table


def scene_of(frame: int) -> int:
    return int(np.searchsorted(STARTS, frame, side="right")) - 1


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scenes") / "film.mp4", SCENES)


@pytest.fixture(scope="module", params=["mkv", "ts"])
def film_of_keyframes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The same with a key frame every four frames: enough of them to look at nothing else."""
    return write(tmp_path_factory.mktemp("scenes") / f"keyframes.{request.param}", SCENES, keyframes=4)


def test_cuts_are_found_to_the_frame(film: Path) -> None:
    facts, table = opened(film)
    frames = decode_frames(facts, table, 0, len(table) - 1)
    looks = [Look.at(number, planes, facts.picture) for number, planes in enumerate(frames)]
    assert find_cuts(looks) == list(STARTS[1:-1])
    assert find_cuts(looks[22:45]) == []
    assert find_cuts(looks[:1]) == []


def test_each_excerpt_lies_in_a_scene_of_its_own(film: Path) -> None:
    excerpts = choose_excerpts(*opened(film), count=4, frames=16)
    assert [excerpt.frames for excerpt in excerpts] == [16] * 4
    kinds = []
    for excerpt in excerpts:
        assert scene_of(excerpt.first) == scene_of(excerpt.last)
        kinds.append(SCENES[scene_of(excerpt.first)][1])
    assert kinds == ["red", "town", "green", "blue"]


def test_key_frames_alone_show_the_same_scenes(film_of_keyframes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, table = opened(film_of_keyframes)
    assert len(table.keyframes) >= scenes._FEWEST_KEYFRAMES
    excerpts = choose_excerpts(facts, table, count=4, frames=16)
    assert [SCENES[scene_of(excerpt.first)][1] for excerpt in excerpts] == ["red", "town", "green", "blue"]
    assert all(scene_of(excerpt.first) == scene_of(excerpt.last) for excerpt in excerpts)


def test_key_frames_are_looked_at_under_their_own_numbers(film_of_keyframes: Path) -> None:
    facts, table = opened(film_of_keyframes)
    looks = list(scenes._looks(facts, table))
    assert [look.frame for look in looks] == list(range(0, len(table), 4))
    for look in looks[::9]:
        (planes,) = decode_frames(facts, table, look.frame, look.frame)
        assert look.apart(Look.at(look.frame, planes, facts.picture)) == 0


def test_a_long_video_is_looked_at_a_bounded_number_of_times(
    film_of_keyframes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "MOST_LOOKS", 10)
    looks = list(scenes._looks(*opened(film_of_keyframes)))
    assert len(looks) == 10
    assert looks[0].frame < 20 and looks[-1].frame > len(opened(film_of_keyframes)[1]) - 20


def test_the_choice_is_the_same_every_time(film: Path) -> None:
    facts, table = opened(film)
    assert choose_excerpts(facts, table, 3, 12) == choose_excerpts(facts, table, 3, 12)


def test_a_longer_excerpt_than_its_scene_is_cut_at_the_scene(film: Path) -> None:
    for excerpt in choose_excerpts(*opened(film), count=3, frames=38):
        assert scene_of(excerpt.first) == scene_of(excerpt.last)
        assert excerpt.frames >= 19


def test_excerpts_of_one_scene_do_not_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "one.mp4", ((40, "green"),))
    excerpts = choose_excerpts(*opened(path), count=3, frames=10)
    assert len(excerpts) == 3
    assert all(before.last < after.first for before, after in pairwise(excerpts))


@pytest.mark.parametrize(("frames", "kind"), [(1, "green"), (2, "black"), (9, "black")])
def test_there_is_always_an_excerpt(tmp_path: Path, frames: int, kind: str) -> None:
    path = write(tmp_path / "short.mp4", ((frames, kind),))
    first, *others = choose_excerpts(*opened(path), count=3, frames=50)
    assert first == Excerpt(0, frames - 1)
    assert not others
