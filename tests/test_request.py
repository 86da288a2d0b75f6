"""Requests: whatever cannot be done is refused before any work, by a typed error, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.parameters import UpscaleOptions
from tasks.destinations import LocalFile
from tasks.errors import (
    DestinationError,
    ModelError,
    ScratchError,
    SettingsError,
    SourceError,
    SuperResolutionError,
    UnsupportedSourceError,
)
from tasks.media.encoders import file_digest
from tasks.models.cards import ModelCard, find_model
from tasks.models.weights import content_hash, locate
from tasks.plan import make_plan
from tasks.receipt import write_receipt
from tasks.request import UpscaleRequest, check_request, scratch_folder
from tests.media.clips import Clips, clips
from tests.models.twins import twins

__all__ = ["clips", "twins"]


class Places(NamedTuple):
    """A source, and where its result and chunk files would go."""

    source: Path
    out: Path
    scratch: Path

    def request(self, **changes: object) -> UpscaleRequest:
        fields = {"source": str(self.source), "destination": str(self.out / "film.mp4"), "scratch": str(self.scratch)}
        return UpscaleRequest(**{**fields, **changes})  # type: ignore[arg-type]

    def files(self) -> set[str]:
        return {str(path) for folder in (self.out, self.scratch, self.source.parent) for path in folder.rglob("*")}


@pytest.fixture
def places(clips: Clips, tmp_path: Path) -> Places:
    found = Places(tmp_path / "in" / "clip.mp4", tmp_path / "out", tmp_path / "scratch")
    for folder in (found.source.parent, found.out):
        folder.mkdir()
    shutil.copy(clips.path("rate-25-1.mp4"), found.source)
    return found


def _refused(places: Places, request: UpscaleRequest, kind: type[SuperResolutionError]) -> SuperResolutionError:
    before = places.files()
    with pytest.raises(kind) as refusal:
        check_request(request)
    assert places.files() == before
    assert not places.scratch.exists()
    error = refusal.value
    assert type(error) is kind
    assert error.remedy, "says what to do next"
    assert "\n" not in str(error)
    return error


def test_a_good_request_is_accepted_and_touches_nothing(places: Places) -> None:
    before = places.files()
    checked = check_request(places.request(scale=2))
    assert places.files() == before
    assert not places.scratch.exists()
    assert (checked.target.width, checked.target.height) == (256, 144)
    assert (checked.card.name, checked.profile.name, checked.muxer) == ("compact-x2", "h264", "mp4")
    assert checked.target.colour == checked.facts.colour
    assert checked.factor == 2


@pytest.mark.parametrize(
    ("changes", "size", "model"),
    [
        ({}, (256, 144), "compact-x2"),
        ({"scale": 3}, (384, 216), "compact-x4"),
        ({"scale": 4}, (512, 288), "compact-x4"),
        ({"height": 144}, (256, 144), "compact-x2"),
        ({"height": 108}, (192, 108), "compact-x2"),
        ({"height": 100}, (178, 100), "compact-x2"),
        ({"height": 288}, (512, 288), "compact-x4"),
        ({"scale": 2, "model": "compact-x4"}, (256, 144), "compact-x4"),
    ],
)
def test_size_and_model_follow_from_scale_or_height(
    places: Places, changes: dict[str, object], size: tuple[int, int], model: str
) -> None:
    checked = check_request(places.request(**changes))
    assert (checked.target.width, checked.target.height) == size
    assert checked.card.name == model
    assert checked.factor == Fraction(size[1], 72)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": 0}, "scale 0"),
        ({"scale": 1}, "scale 1"),
        ({"scale": 5}, "scale 5"),
        ({"scale": -2}, "scale -2"),
        ({"scale": 2, "height": 144}, "both a scale and a height"),
        ({"height": 143}, "143 is not an even number"),
        ({"height": 0}, "height 0"),
        ({"height": -144}, "height -144"),
        ({"height": 72}, "72 is 1.00 times"),
        ({"height": 290}, "up to 288"),
        ({"height": 10**9}, "up to 288"),
        ({"chunk_seconds": 0.0}, "0.0 seconds"),
        ({"chunk_seconds": -1.0}, "-1.0 seconds"),
        ({"chunk_seconds": float("nan")}, "nan seconds"),
        ({"chunk_seconds": float("inf")}, "inf seconds"),
        ({"encoder": "theora"}, "unknown encoder 'theora'"),
        ({"tolerance": -1}, "a tolerance of -1 code values"),
        ({"tolerance": 17}, "a tolerance of 17 code values is out of range"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"precision": "int8", "model": "RealESRGAN_x4plus"}, "RealESRGAN_x4plus cannot be computed in int8"),
        ({"denoise": 0.5}, "model compact-x2 has no denoise strength"),
        ({"denoise": 1.0, "model": "RealESRGAN_x4plus"}, "Choose realesr-general-x4v3"),
        ({"denoise": 1.01, "model": "realesr-general-x4v3"}, "'1.01' is no denoise strength"),
        ({"denoise": float("nan"), "model": "realesr-general-x4v3"}, "'nan' is no denoise strength"),
        ({"denoise": 0.5, "model": "realesr-general-x4v3@0.5"}, "has a denoise strength already"),
        ({"encoder": ""}, "unknown encoder"),
        ({"encoder": "ffv1"}, "cannot hold ffv1"),
        ({"scale": 4, "model": "compact-x2"}, "Choose a model that reaches it: compact-x4"),
    ],
)
def test_settings_out_of_range_are_refused(places: Places, changes: dict[str, object], said: str) -> None:
    assert said in str(_refused(places, places.request(**changes), SettingsError))


@pytest.mark.parametrize("name", ["film", "film.avi", "film.mp4.part", "film."])
def test_a_destination_of_unknown_kind_is_refused_by_name(places: Places, name: str) -> None:
    error = _refused(places, places.request(destination=str(places.out / name)), SettingsError)
    assert name in str(error)
    assert ".mkv" in str(error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sound.m4a", SourceError),
        ("still.png", SourceError),
        ("still.jpg", SourceError),
        ("notes.txt", SourceError),
        ("playlist.m3u8", SourceError),
        ("playlist.mp4", SourceError),
        ("script.ffconcat", SourceError),
        ("script.mkv", SourceError),
        ("relative.ffconcat", SourceError),
        ("no-index.mp4", SourceError),
        ("bomb.y4m", SourceError),
        ("sixteen-bit.mkv", UnsupportedSourceError),
        ("ictcp.mkv", UnsupportedSourceError),
        ("telecined.ts", UnsupportedSourceError),
    ],
)
def test_a_source_that_cannot_be_done_is_refused_by_name(
    places: Places, clips: Clips, name: str, kind: type[SuperResolutionError]
) -> None:
    clips.path("plain.ts")
    assert name in str(_refused(places, places.request(source=str(clips.path(name))), kind))


@pytest.mark.parametrize(
    ("name", "settings", "wrong", "way_out"),
    [
        ("cover-art.mp4", {"stream": 1}, "stream 1 is no video", "0, 2"),
        ("full-chroma.mkv", {"encoder": "av1"}, "profile av1 cannot hold its pixels (yuv444p)", "h264"),
        ("wide-pixels.mp4", {"encoder": "ffv1"}, "ffv1 cannot store", "--square-pixels"),
        ("interlaced.ts", {"deinterlace": "sometimes"}, "unknown way to deinterlace", "field-rate"),
        ("plain.ts", {"crf": 99}, "a rate factor of 99 is out of range", "0 (best) to 51"),
    ],
)
def test_settings_that_do_not_fit_the_video_are_refused_with_the_way_out(
    places: Places, clips: Clips, name: str, settings: dict[str, Any], wrong: str, way_out: str
) -> None:
    request = places.request(source=str(clips.path(name)), destination=str(places.out / "result.mkv"), **settings)
    refusal = _refused(places, request, SettingsError)
    assert wrong in str(refusal)
    assert way_out in refusal.remedy


def test_missing_and_empty_sources_and_folders_are_refused(places: Places) -> None:
    empty = places.source.with_name("empty.mp4")
    empty.touch()
    for source, said in [
        (places.source.with_name("nowhere.mp4"), "nowhere.mp4 does not exist"),
        (empty, "empty.mp4 is empty"),
        (places.source.parent, "is a directory"),
    ]:
        assert said in str(_refused(places, places.request(source=str(source)), SourceError))


def test_destinations_that_must_not_or_cannot_be_written_are_refused(places: Places) -> None:
    taken, link, folder = places.out / "taken.mp4", places.out / "link.mp4", places.out / "folder.mp4"
    taken.write_bytes(b"somebody's work")
    link.symlink_to(places.source)
    folder.mkdir()
    for destination, said in [
        (places.source, "is the source itself"),
        (link, "is the source itself"),
        (places.source.parent / ".." / "in" / "clip.mp4", "is the source itself"),
        (taken, "exists already"),
        (folder, "is a folder"),
        (places.out / "nowhere" / "film.mp4", "does not exist"),
        (Path("/proc/film.mp4"), "cannot write into /proc"),
        (places.source / "film.mp4", "does not exist"),
    ]:
        error = _refused(places, places.request(destination=str(destination)), DestinationError)
        assert said in str(error), str(error)
    assert taken.read_bytes() == b"somebody's work"


def test_the_source_is_never_overwritten(places: Places) -> None:
    request = places.request(destination=str(places.source), overwrite=True)
    assert "is the source itself" in str(_refused(places, request, DestinationError))


def test_an_existing_destination_is_accepted_when_it_may_be_replaced(places: Places) -> None:
    (places.out / "film.mp4").write_bytes(b"old")
    check_request(places.request(overwrite=True))
    assert (places.out / "film.mp4").read_bytes() == b"old"


def test_an_existing_destination_is_accepted_when_an_interrupted_job_published_it(places: Places) -> None:
    published = places.out / "film.mp4"
    published.write_bytes(b"the result")
    job = places.scratch / "job"
    job.mkdir(parents=True)
    write_receipt(job, LocalFile(published), file_digest(published))
    check_request(places.request())
    published.write_bytes(b"something else")
    with pytest.raises(DestinationError, match="exists already"):
        check_request(places.request())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nonesuch", "nonesuch"),
        ("compact-x3", "Did you mean"),
        ("/nowhere/weights.pth", "does not exist"),
        ("RealESRGAN_x4plus", "superres models fetch RealESRGAN_x4plus"),
    ],
)
def test_models_that_are_not_there_are_refused(
    places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, said: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUPERRES_MODEL_DIR", raising=False)
    assert said in str(_refused(places, places.request(model=model), ModelError))


def test_a_denoise_strength_names_the_model(places: Places, twins: tuple[ModelCard, ModelCard]) -> None:
    for denoise, name in ((None, "strong"), (1, "strong"), (0.25, "strong@0.25"), (0, "weak")):
        checked = check_request(places.request(model="strong", denoise=denoise))
        assert checked.card == find_model(name)
        assert make_plan(checked, content_hash(checked.card)).card == checked.card
    weights = locate(twins[1])
    weights.unlink()
    said = str(_refused(places, places.request(model="strong", denoise=0.25), ModelError))
    assert "superres models fetch weak" in said


@pytest.mark.parametrize(("denoise", "name"), [(1, "strong"), (0.25, "strong@0.25"), (0, "weak")])
def test_the_form_asks_for_the_same(
    places: Places, twins: tuple[ModelCard, ModelCard], denoise: float, name: str
) -> None:
    options = UpscaleOptions(weights="strong", denoise=denoise, scratch=str(places.scratch))
    request = options.request(str(places.source), str(places.out / "film.mp4"))
    assert check_request(request).card.name == name
    assert UpscaleOptions.from_request(request) == options
    assert UpscaleOptions().request("in.mp4", "out.mp4").denoise is None
    with pytest.raises(ValueError, match="less than or equal to 1"):
        UpscaleOptions(denoise=1.5)


def test_scratch_that_cannot_be_written_is_refused(places: Places) -> None:
    error = _refused(places, places.request(scratch="/proc/scratch"), ScratchError)
    assert "cannot write into scratch /proc/scratch" in str(error)
    assert "--scratch" in str(error)


def test_scratch_that_is_a_file_is_refused(places: Places) -> None:
    file = places.out / "file"
    file.touch()
    _refused(places, places.request(scratch=str(file)), ScratchError)
    _refused(places, places.request(scratch=str(file / "below")), ScratchError)


@pytest.mark.parametrize(
    ("place", "kind", "said"),
    [("scratch", ScratchError, "--chunk-seconds"), ("out", DestinationError, "the result may take")],
)
def test_too_little_room_is_refused_with_numbers(
    places: Places, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[SuperResolutionError], said: str
) -> None:
    real: Callable[[Path], object] = shutil.disk_usage

    def nearly_full(path: Path) -> object:
        usage = real(path)
        is_out = Path(path) == places.out
        return usage._replace(free=1000) if is_out == (place == "out") else usage  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    error = _refused(places, places.request(), kind)
    assert said in str(error)
    assert "GB free" in str(error)


def test_scratch_is_the_one_named_else_the_environments_else_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    monkeypatch.delenv("SUPERRES_SCRATCH", raising=False)
    assert scratch_folder() == Path("/users/cache/media-super-resolution/scratch")
    monkeypatch.setenv("SUPERRES_SCRATCH", "/fast")
    assert scratch_folder() == Path("/fast")
    assert scratch_folder("here") == Path.cwd() / "here"
    assert scratch_folder("~/here") == Path.home() / "here"


def test_requests_survive_as_plain_data(places: Places) -> None:
    request = replace(places.request(), scale=4, chunk_seconds=1.5)
    assert UpscaleRequest(**request.to_dict()) == request
