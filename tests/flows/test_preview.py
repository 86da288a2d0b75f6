"""The preview: excerpts through models on real pools, pictures, forecasts, and what comes of an approval."""

from __future__ import annotations

import io
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextvars import copy_context
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import av
import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.cli import main
from flows.parameters import PreviewOptions
from flows.pools import pools_of_this_machine
from flows.preview import preview
from flows.preview_checks import check_folder, check_models
from infra.pools import open_pools
from infra.prefect_server import Api
from tasks.errors import (
    ApprovalError,
    DestinationError,
    FrameError,
    ModelError,
    SettingsError,
    SuperResolutionError,
)
from tasks.media.pictures import MOST_BYTES
from tests.flows.libraries import make_bad_ones
from tests.waiting import eventually

#: Frames of each scene of the film, which is 64x48 at 25 frames per second.
SCENES: Final = (14, 22, 18)
SIZE: Final = (64, 48)


@pytest.fixture(scope="module", autouse=True)
def pools(prefect_api: Api) -> Iterator[None]:
    with open_pools(pools_of_this_machine()):
        yield


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes, each of tiles of its own that move."""
    path = tmp_path_factory.mktemp("preview") / "film.mp4"
    width, height = SIZE
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "threads": "1", "crf": "12"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for scene, frames in enumerate(SCENES):
            tiles = np.random.default_rng(scene).integers(40, 216, (height // 8, width // 8, 3), dtype=np.uint8)
            tiles[..., scene] = 230
            picture = tiles.repeat(8, 0).repeat(8, 1)
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, number, 1).copy(), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Preview:
    """Previews with folders of their own."""

    def __init__(self, folder: Path, film: Path) -> None:
        self.folder, self.film = folder, film
        self.scratch, self.pictures, self.destination = folder / "scratch", folder / "pictures", folder / "large.mp4"
        #: What the runs of this one are called: the name of the source says which they are.
        self.source = folder / f"{folder.name}.mp4"
        shutil.copy(film, self.source)

    def options(self, **more: Any) -> PreviewOptions:
        given = {"seconds": 0.4, "excerpts": 3, "scratch": str(self.scratch), "folder": str(self.pictures)}
        return PreviewOptions(**{**given, **more})

    def run(self, **more: Any) -> dict[str, Any]:
        return preview(str(self.source), self.options(**more))

    def flow_run(self) -> FlowRun:
        """The newest run."""
        name = FlowRunFilterName(any_=[f"{self.source.stem} preview"])
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(name=name), sort=FlowRunSort.START_TIME_DESC, limit=1
            )
        return runs[0]

    def left_behind(self) -> list[Path]:
        return [path for path in self.scratch.rglob("*") if path.is_file()]


@pytest.fixture
def place_of_preview(tmp_path: Path, film: Path) -> Preview:
    return Preview(tmp_path, film)


def artifact(run_id: UUID) -> str:
    """The report of a run."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), key=ArtifactFilterKey(any_=["preview"])
            )
        )
    assert len(found) == 1
    return str(found[0].data)


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def grey(picture: Image.Image) -> np.ndarray:
    """Brightness, which does not depend on how chroma was enlarged."""
    return np.asarray(picture.convert("RGB")) @ np.array([0.299, 0.587, 0.114])


def test_models_are_shown_side_by_side_with_what_they_take(place_of_preview: Preview) -> None:
    seen = place_of_preview.run(models=["compact-x2", "compact-x4"], frames=2)
    assert (seen["source"], seen["frames"]) == (str(place_of_preview.source), sum(SCENES))
    assert (seen["width"], seen["height"]) == (128, 96)

    starts = np.cumsum([0, *SCENES])
    scenes = [int(np.searchsorted(starts, excerpt["first"], side="right")) - 1 for excerpt in seen["excerpts"]]
    assert scenes == [0, 1, 2]
    for excerpt, scene in zip(seen["excerpts"], scenes, strict=True):
        assert excerpt["last"] < starts[scene + 1]
        assert excerpt["last"] - excerpt["first"] + 1 == 10
        assert excerpt["start_seconds"] == pytest.approx(excerpt["first"] / 25, abs=0.002)

    assert [row["model"] for row in seen["models"]] == ["compact-x2", "compact-x4"]
    for row in seen["models"]:
        assert row["frames_per_second"] > 0
        assert row["gpu_seconds"] == pytest.approx(sum(SCENES) / row["frames_per_second"], abs=0.1)
        assert row["wall_seconds"] > row["gpu_seconds"]
        assert row["cost"] is None
        assert "with excerpts of this video" in row["basis"]

    pictures = [Path(picture) for picture in seen["pictures"]]
    assert len(pictures) == 6
    assert {path.parent for path in pictures} == {place_of_preview.pictures}
    assert not place_of_preview.left_behind()
    decoded = frames_of(place_of_preview.film)
    for path in pictures:
        jpeg = path.read_bytes()
        assert len(jpeg) <= MOST_BYTES
        sheet = grey(Image.open(io.BytesIO(jpeg)))
        assert sheet.shape[1] == 3 * 128 + 2 * 8
        panels = [sheet[sheet.shape[0] - 96 :, left : left + 128] for left in (0, 136, 272)]
        # The frame that the name tells, by all three in the same place, and not the same three times.
        frame = Image.fromarray(decoded[int(path.stem.rpartition("-")[2])])
        expected = grey(frame.resize((128, 96), Image.Resampling.BICUBIC))
        assert np.abs(panels[0] - expected).mean() < 2
        one_frame_later = np.roll(expected, 2, 1)
        for panel in panels:
            assert np.abs(panel - expected).mean() < 0.75 * np.abs(panel - one_frame_later).mean()
        assert all(np.abs(a - b).mean() > 0.2 for a, b in pairwise(panels))

    report = artifact(place_of_preview.flow_run().id)
    assert "| compact-x4 |" in report
    assert report.count("](data:image/jpeg;base64,") == 6


def test_a_height_is_possible_too(place_of_preview: Preview) -> None:
    seen = place_of_preview.run(height=72, excerpts=1)
    assert (seen["width"], seen["height"]) == (96, 72)
    assert [row["model"] for row in seen["models"]] == ["compact-x2"]
    assert len(seen["pictures"]) == 1


def test_the_source_is_treated_as_in_the_whole_job(place_of_preview: Preview) -> None:
    """Two streams of the same video in Matroska; the second is anamorphic and has half the rows."""
    source = place_of_preview.source.with_suffix(".mkv")
    command = [get_ffmpeg_exe(), "-v", "error", "-i", place_of_preview.source, "-map", "0:v", "-map", "0:v"]
    command += ["-c:v:0", "copy", "-c:v:1", "libx264", "-filter:v:1", "scale=64:24,setsar=1/2", source]
    subprocess.run(command, check=True)
    seen = preview(str(source), place_of_preview.options(excerpts=1, stream=1, square_pixels=True))
    assert (seen["width"], seen["height"]) == (64, 48)
    options = place_of_preview.options(crf=9, preset="slow", deinterlace="off", encoder="h265")
    whole = options.request(str(source), "compact")
    assert (whole.crf, whole.preset, whole.deinterlace, whole.encoder) == (9, "slow", "off", "h265")


class Waiting:
    """A preview in a thread that waits for approval."""

    def __init__(self, place: Preview, **more: Any) -> None:
        self.place = place
        self.result: dict[str, Any] = {}
        self.error: BaseException | None = None
        options = place.options(approve=True, excerpts=1, models=["compact-x2", "compact-x4"], **more)
        self._thread = threading.Thread(target=copy_context().run, args=(self._run, options))
        self._thread.start()
        self.run_id = eventually(self._paused, 60)

    def _run(self, options: PreviewOptions) -> None:
        try:
            self.result = preview(str(self.place.source), options)
        except BaseException as error:
            self.error = error

    def _paused(self) -> UUID | None:
        assert self._thread.is_alive(), self.error
        try:
            run = self.place.flow_run()
        except IndexError:
            return None
        if not (run.state and run.state.is_paused()):
            return None
        with get_client(sync_client=True) as client:  # The form comes right after the state.
            inputs = client.filter_flow_run_input(run.id, key_prefix="paused", limit=10, exclude_keys=set())
        return run.id if any("schema" in found.key for found in inputs) else None

    def form(self) -> dict[str, Any]:
        with get_client(sync_client=True) as client:
            inputs = client.filter_flow_run_input(self.run_id, key_prefix="paused", limit=10, exclude_keys=set())
        (schema,) = [found.decoded_value for found in inputs if found.key.endswith("-schema")]
        return dict(schema)

    def answer(self, **given: Any) -> None:
        """Resume the run and wait for its end."""
        with get_client(sync_client=True) as client:
            client.resume_flow_run(self.run_id, run_input=given)
        self.wait()

    def wait(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()

    def state(self) -> Any:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.run_id).state


def test_an_approved_model_upscales_the_whole_video(place_of_preview: Preview) -> None:
    waiting = Waiting(place_of_preview)
    form = waiting.form()
    assert form["properties"]["model"]["enum"] == ["compact-x2", "compact-x4"]
    assert form["properties"]["go_on"]["type"] == "boolean"
    assert {field["title"] for field in form["properties"].values()} == {"Go on", "Model", "Destination"}
    assert not place_of_preview.left_behind()  # The excerpts are gone while people look.
    assert "](data:image/jpeg" in artifact(waiting.run_id)

    waiting.answer(go_on=True, model="compact-x4", destination=str(place_of_preview.destination))
    assert waiting.error is None
    result = waiting.result["result"]
    assert (result["status"], result["model"], result["frames_out"]) == ("published", "compact-x4", sum(SCENES))
    assert waiting.result["approved"] == {"model": "compact-x4", "destination": str(place_of_preview.destination)}
    assert len(frames_of(place_of_preview.destination)) == sum(SCENES)
    assert waiting.state().is_completed()
    assert not place_of_preview.left_behind()


def test_nothing_follows_a_no(place_of_preview: Preview) -> None:
    waiting = Waiting(place_of_preview, destination=str(place_of_preview.destination))
    assert waiting.form()["properties"]["destination"]["default"] == str(place_of_preview.destination)
    waiting.answer(go_on=False)
    assert waiting.error is None
    assert waiting.result["approved"] is None
    assert waiting.state().is_completed()
    assert not place_of_preview.destination.exists()
    assert not place_of_preview.left_behind()


def test_an_approval_without_a_destination_fails(place_of_preview: Preview) -> None:
    waiting = Waiting(place_of_preview)
    waiting.answer(go_on=True, model="compact-x2")
    assert isinstance(waiting.error, ApprovalError)
    assert "without a destination" in str(waiting.error)
    assert waiting.state().is_failed()


def test_a_run_that_nobody_answers_fails_and_leaves_only_the_pictures(place_of_preview: Preview) -> None:
    waiting = Waiting(place_of_preview, hours=6 / 3600, destination=str(place_of_preview.destination))
    waiting.wait()
    assert isinstance(waiting.error, ApprovalError)
    assert "nobody chose a model within" in str(waiting.error)
    state = waiting.state()
    assert state.is_failed()
    assert not place_of_preview.destination.exists()
    assert not place_of_preview.left_behind()
    assert sorted(path.suffix for path in place_of_preview.pictures.iterdir()) == [".jpg"]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"scale": 4, "models": ["compact-x4", "compact-x2"]}, SettingsError, "enlarges 2 times, 4 times"),
        ({"models": ["compact-x2", "RealESRGAN_x4plus_anime_6B"]}, ModelError, "not on this machine"),
        ({"weights": ["/nowhere/own.pth"]}, ModelError, "does not exist"),
        ({"models": ["compact", "compact-x2"]}, SettingsError, "compact-x2 is named twice"),
        ({"models": []}, SettingsError, "no model"),
        ({"approve": True, "destination": "/nowhere/film.mp4"}, DestinationError, "does not exist"),
        ({"approve": True, "destination": "film.gif"}, SettingsError, "cannot tell the container"),
    ],
)
def test_what_cannot_be_done_is_refused(
    film: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[SuperResolutionError],
    said: str,
) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(tmp_path))  # Where nothing is.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(kind, match=said):
        check_models(str(film), PreviewOptions(**options))


def test_the_flow_refuses_before_anything_runs(place_of_preview: Preview) -> None:
    place = place_of_preview
    place.destination.write_bytes(b"somebody's work")
    before = sorted(place.folder.rglob("*"))
    with pytest.raises(DestinationError, match="exists already"):
        place.run(approve=True, destination=str(place.destination))
    assert sorted(place.folder.rglob("*")) == before
    place.pictures.write_text("no folder")
    with pytest.raises(DestinationError, match="is no folder"):
        check_folder(place.pictures)


def test_a_source_that_does_not_decode_fails_and_leaves_nothing(place_of_preview: Preview, tmp_path: Path) -> None:
    make_bad_ones(tmp_path / "bad")
    with pytest.raises(FrameError, match="cannot be decoded"):
        preview(str(tmp_path / "bad" / "noise.mkv"), place_of_preview.options())
    assert not place_of_preview.left_behind()
    assert not place_of_preview.pictures.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("OUT/nowhere.mp4",), 3, "does not exist"),
        (("FILM", "--models", "compact-x2,nonesuch"), 7, "nonesuch"),
        (("FILM", "--models", "compact-x2", "--scale", "4"), 2, "enlarges 2 times"),
        (("FILM", "--excerpts", "0"), 2, "excerpts"),
        (("FILM", "--precision", "int8"), 2, "precision"),
        (("FILM", "--folder", "/proc/pictures"), 5, "cannot write pictures"),
    ],
)
def test_the_command_refuses_in_one_line(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    meant = [text.replace("FILM", str(film)).replace("OUT", str(tmp_path)) for text in arguments]
    assert main(["preview", *meant, "--scratch", str(tmp_path / "scratch")]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_table_and_where_the_pictures_are(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUPERRES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "CRITICAL")
    short = ("--excerpts", "1", "--seconds", "0.2", "--scratch", str(tmp_path / "scratch"))
    assert main(["preview", str(film), *short]) == 0
    said = capsys.readouterr().out
    assert "| compact-x2 |" in said
    assert "excerpt 1: frames " in said
    picture = Path(said.splitlines()[-1])
    assert picture.parent.parent == tmp_path / "home" / "previews"
    assert Image.open(picture).format == "JPEG"
    assert not [path for path in tmp_path.joinpath("scratch").rglob("*") if path.is_file()]
