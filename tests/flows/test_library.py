"""The sweep: what is published, what is left alone, what fails and why, and that one bad video harms no other."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.sorting import FlowRunSort

from flows.parameters import UpscaleOptions
from flows.upscale_library import LibraryOptions, upscale_library
from flows.upscale_video import upscale_video
from tasks.destinations import result_name
from tasks.errors import LibraryError, SettingsError, SourceError
from tasks.ledger.holder import this_holder
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobRecord, JobState, NewJob
from tasks.store.listing import VIDEO_SUFFIXES
from tests.flows.clouds import Cloud, running_cloud
from tests.flows.jobs import Place
from tests.flows.libraries import BAD, FRAMES, make_bad_ones, make_clip
from tests.waiting import eventually

HANDLER: Final = Path(__file__).parents[2] / "infra/aws/lambda/handler.py"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A cloud of its own for the tests of this module."""
    with running_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@dataclass
class Library:
    """A folder of videos, a folder for results, and the sweeps between them."""

    cloud: Cloud
    folder: Path

    @property
    def videos(self) -> Path:
        return self.folder / "videos"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def ledger(self) -> Ledger:
        return self.cloud.ledger

    def options(self, **more: Any) -> UpscaleOptions:
        return self.cloud.options(scratch=str(self.scratch), **more)

    def sweep(self, source: Any = None, destination: Any = None, **options: Any) -> dict[str, dict[str, Any]]:
        """Sweep, and give the row of each video by its name in the library."""
        upscale = options.pop("upscale", None) or self.options()
        source, destination = str(source or self.videos), str(destination or self.results)
        try:
            rows = upscale_library(source, destination, LibraryOptions(upscale=upscale, **options))["rows"]
        except LibraryError as error:
            rows = error.rows
        return {row["video"].removeprefix(f"{source.rstrip('/')}/"): row for row in rows}

    def left_in_scratch(self) -> list[Path]:
        """Everything in scratch but the folder of sources."""
        return [path for path in self.scratch.rglob("*") if path != self.scratch / "sources"]

    def published(self) -> set[str]:
        return {str(path.relative_to(self.results)) for path in self.results.rglob("*") if path.is_file()}


@pytest.fixture
def library(cloud: Cloud, tmp_path: Path) -> Library:
    library = Library(cloud, tmp_path / "library")
    library.videos.mkdir(parents=True)
    return library


def outcomes(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["outcome"] for name, row in rows.items()}


def last_sweep() -> Any:
    with get_client(sync_client=True) as client:
        return next(
            run
            for run in client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=100)
            if run.parent_task_run_id is None
        )


def runs_within(run: Any) -> list[Any]:
    """The flow runs that are parts of one."""
    within = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    found: list[Any] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=within, limit=100, offset=len(found)):
            found += page
    return found


def most_at_once(records: list[JobRecord]) -> int:
    """How many jobs were between their first and their last second at the same time."""
    steps = [(record.history[0].at, 1) for record in records] + [(record.history[-1].at, -1) for record in records]
    return max(itertools.accumulate(step for _, step in sorted(steps)))


def test_good_videos_are_published_and_bad_ones_have_reasons(library: Library) -> None:
    good = {"one.mp4", "two.avi", "deep/er/three.MKV", "deep/two.mp4"}
    for seed, name in enumerate(sorted(good)):
        clip = make_clip(library.folder / "making" / f"{seed}{Path(name).suffix.lower()}", seed)
        (library.videos / name).parent.mkdir(parents=True, exist_ok=True)
        clip.rename(library.videos / name)
    make_bad_ones(library.videos)
    (library.videos / "notes.txt").write_text("not for the sweep")
    rows = library.sweep(parallel=2)
    assert outcomes(rows) == {**dict.fromkeys(good, "published"), **dict.fromkeys(BAD, "failed")}
    for name, (kind, said) in BAD.items():
        assert (rows[name]["kind"], said in rows[name]["reason"]) == (kind, True), rows[name]
    assert library.published() == {"one.mp4", "two.avi.mp4", "deep/er/three.MKV.mp4", "deep/two.mp4"}
    assert library.left_in_scratch() == []

    records = {name: library.ledger.get(row["job_id"], "ann") for name, row in rows.items()}
    assert {record.state for name, record in records.items() if name in good} == {JobState.PUBLISHED}
    for name, (kind, said) in BAD.items():
        error = records[name].error
        assert error is not None
        assert (records[name].state, error.kind, said in error.message) == (JobState.FAILED, kind, True)
    noise = records["noise.mkv"].error
    assert noise is not None and noise.phase == "extract" and noise.node
    assert noise.first_frame is not None and FRAMES // 2 <= noise.first_frame < FRAMES
    assert most_at_once(list(records.values())) == 2

    # Scheduled sweeps come again and again: what cannot succeed is not tried, and is no news either.
    again = upscale_library(str(library.videos), str(library.results), LibraryOptions(upscale=library.options()))
    assert again["counts"] == {"skipped": len(good), "failed earlier": len(BAD)}
    assert runs_within(last_sweep()) == []
    assert {row["reason"] for row in again["rows"] if row["outcome"] != "skipped"} == {
        rows[name]["reason"] for name in BAD
    }
    tried = library.sweep(retry_failed=True)
    assert Counter(outcomes(tried).values()) == {"skipped": len(good), "failed": len(BAD)}
    assert {library.ledger.get(tried[name]["job_id"], "ann").attempt for name in BAD} == {2}


def test_a_sweep_is_one_flow_run_with_a_part_for_each_video_and_a_table(library: Library) -> None:
    for seed in range(4):
        make_clip(library.videos / f"clip-{seed}.mp4", seed)
    library.sweep(parallel=2)
    run = last_sweep()
    assert (run.name, run.state.name) == (str(library.videos), "Completed")
    parts = runs_within(run)
    assert sorted(part.name for part in parts) == [f"clip-{seed} x2 compact" for seed in range(4)]
    assert {part.state.name for part in parts} == {"Completed"}
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id, *(part.id for part in parts)]))

    def names() -> Counter[tuple[UUID, str]]:
        """Of the completed task runs; the server writes them down a moment later."""
        with get_client(sync_client=True) as client:
            tasks = client.read_task_runs(flow_run_filter=of_run, limit=200)
        done = [task for task in tasks if task.state is not None and task.state.is_completed()]
        return Counter((task.flow_run_id, task.name.split(" ")[0].split("-")[0]) for task in done)

    stages = ("plan", "extract", "upscale", "encode", "assemble", "verify", "publish")
    expected = Counter((part.id, stage) for part in parts for stage in stages)
    expected[(run.id, "upscale")] = 4  # What stands for the parts themselves.
    eventually(lambda: names() == expected, 20)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
        assert [artifact.key for artifact in found] == ["library"]
        assert found[0].description == f"{library.videos}: 4 published"
    by_part = {record.flow_run_id: record for record in library.ledger.by_owner("ann", limit=4)}
    assert {str(part.id): Path(part.parameters["source"]).name for part in parts} == {
        run_id: Path(record.source).name for run_id, record in by_part.items()
    }


def test_a_video_that_changed_is_done_again_and_a_result_of_somebody_else_stays(library: Library) -> None:
    make_clip(library.videos / "film.mp4", 1)
    make_clip(library.videos / "other.mp4", 2)
    library.results.mkdir()
    (library.results / "other.mp4").write_text("somebody's")
    rows = library.sweep()
    assert outcomes(rows) == {"film.mp4": "published", "other.mp4": "failed"}
    assert rows["other.mp4"]["kind"] == "destination"
    first = (library.results / "film.mp4").read_bytes()

    make_clip(library.videos / "film.mp4", 3)
    assert outcomes(library.sweep())["film.mp4"] == "published"
    second = (library.results / "film.mp4").read_bytes()
    assert second != first
    assert outcomes(library.sweep())["film.mp4"] == "skipped"
    # With other settings it is another result, and nobody has said that it should replace this one.
    assert library.sweep(upscale=library.options(scale=3))["film.mp4"]["kind"] == "destination"

    (library.results / "film.mp4").write_text("somebody's")
    make_clip(library.videos / "film.mp4", 4)
    assert library.sweep()["film.mp4"]["kind"] == "destination"
    assert (library.results / "film.mp4").read_text() == (library.results / "other.mp4").read_text() == "somebody's"


def test_a_prefix_is_swept_into_a_prefix(library: Library, cloud: Cloud) -> None:
    make_bad_ones(library.folder / "bad")
    clips = [make_clip(library.folder / f"{seed}.mp4", 10 + seed) for seed in range(3)]
    for seed, clip in enumerate(clips):
        cloud.put(f"sweep/a b/{seed}.mp4", clip)
    cloud.put("sweep/noise.mkv", library.folder / "bad" / "noise.mkv")
    cloud.put("sweeping/not-below.mp4", clips[0])
    rows = library.sweep("s3://videos/sweep", "s3://results/swept")
    good = [f"a b/{seed}.mp4" for seed in range(3)]
    assert outcomes(rows) == {**dict.fromkeys(good, "published"), "noise.mkv": "failed"}
    listed = cloud.s3.list_objects_v2(Bucket="results", Prefix="swept/")["Contents"]
    assert [item["Key"] for item in listed] == [f"swept/{name}" for name in good]
    assert library.left_in_scratch() == []
    assert not Path("s3:").exists()

    cloud.put("sweep/a b/0.mp4", make_clip(library.folder / "changed.mp4", 20))
    assert outcomes(library.sweep("s3://videos/sweep/", "s3://results/swept/")) == {
        **dict.fromkeys(good, "skipped"),
        "a b/0.mp4": "published",
        "noise.mkv": "failed earlier",
    }
    assert [len(cloud.versions(f"swept/{name}")) for name in good] == [2, 1, 1]


def test_a_job_that_runs_elsewhere_is_left_alone(library: Library) -> None:
    clip = make_clip(library.videos / "film.mp4", 1)
    request = library.options().request(str(clip), str(library.results / "film.mp4"))
    status = clip.stat()
    version = f"{status.st_size}-{status.st_mtime_ns}"
    job = NewJob("ann", str(clip), version, request.destination, request.settings(), status.st_size)
    record = library.ledger.begin(job, this_holder())
    rows = library.sweep()
    assert outcomes(rows) == {"film.mp4": "running"}
    assert library.ledger.find(rows["film.mp4"]["job_id"]) == record
    assert library.published() == set()
    library.ledger.cancel(record, "not wanted")
    assert outcomes(library.sweep()) == {"film.mp4": "published"}


def test_videos_of_the_same_content_do_not_meet(library: Library) -> None:
    clip = make_clip(library.videos / "a.mp4", 1, frames=30)
    for name in ("b.mp4", "c.mp4", "d.mp4"):
        shutil.copy(clip, library.videos / name)
    assert set(outcomes(library.sweep(parallel=4)).values()) == {"published"}
    assert len({path.read_bytes() for path in library.results.iterdir()}) == 1
    assert library.left_in_scratch() == []


def test_names_that_differ_only_in_their_ending_have_results_of_their_own(library: Library) -> None:
    make_clip(library.videos / "film.mp4", 1)
    make_clip(library.videos / "film.mkv", 2)
    make_clip(library.videos / "film.avi", 3)
    shutil.move(make_clip(library.folder / "film.mp4", 4), library.videos / "film.MP4")
    make_clip(library.videos / "film.avi.mp4", 5)
    assert set(outcomes(library.sweep()).values()) == {"published"}
    assert library.published() == {
        *("film.mp4", "film.mkv.mp4", "film.avi.mp4", "film.MP4.mp4", "film.avi.mp4.mp4"),
    }


def test_sweeps_and_uploads_name_results_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_DESTINATION", "s3://results/")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    handler = _handler(monkeypatch)
    endings = ["", ".", ".txt", ".v2", *(case(ending) for ending in VIDEO_SUFFIXES for case in (str, str.upper))]
    stems = ("film", "a/b.c/film", "two words", ".film", "film.", "f.i.l.m", "Ärger", "film.mp4/x")
    names = [stem + "".join(two) for stem in stems for two in itertools.product(endings, repeat=2)]
    for container in ("mp4", "mov", "mkv"):
        monkeypatch.setenv("SUPERRES_CONTAINER", container)
        settings = handler.Settings.from_environment()
        assert settings.endings == VIDEO_SUFFIXES
        results = {name: result_name(name, container) for name in names}
        assert results == {name: handler.result_key(name, settings) for name in names}
        videos = {name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES}
        assert len({results[name] for name in videos}) == len(videos)


def test_a_library_without_news_costs_no_work(library: Library, cloud: Cloud) -> None:
    assert library.sweep() == {}
    assert last_sweep().state.name == "Completed"
    assert library.sweep("s3://videos/nothing-here", "s3://results/x") == {}
    with pytest.raises(SourceError, match="does not exist"):
        library.sweep(library.folder / "nowhere")
    with pytest.raises(SourceError, match="no-such-bucket"):
        library.sweep("s3://no-such-bucket/in")


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("videos", "videos/results"),
        ("videos", "videos"),
        ("s3://videos/in", "s3://videos/in/up"),
        ("s3://videos", "s3://videos/"),
    ],
)
def test_results_among_the_videos_are_refused(library: Library, source: str, destination: str) -> None:
    places = [place if "://" in place else str(library.folder / place) for place in (source, destination)]
    with pytest.raises(SettingsError, match="would lie among the videos"):
        library.sweep(*places)


def test_a_limit_counts_the_videos_that_need_work(library: Library) -> None:
    for seed in range(5):
        make_clip(library.videos / f"{seed}.mp4", seed)
    assert list(outcomes(library.sweep(limit=2, parallel=3)).items()) == [
        ("0.mp4", "published"),
        ("1.mp4", "published"),
    ]
    assert list(outcomes(library.sweep(limit=2, parallel=3)).values()) == ["skipped"] * 2 + ["published"] * 2
    assert list(outcomes(library.sweep(limit=2, parallel=3)).values()) == ["skipped"] * 4 + ["published"]


def test_a_place_that_cannot_be_written_fails_its_own_videos_only(library: Library) -> None:
    make_clip(library.videos / "a/film.mp4", 1)
    make_clip(library.videos / "b/film.mp4", 2)
    library.results.mkdir()
    (library.results / "a").write_text("a file where a folder should be")
    rows = library.sweep()
    assert outcomes(rows) == {"a/film.mp4": "failed", "b/film.mp4": "published"}
    assert (rows["a/film.mp4"]["kind"], "cannot be made" in rows["a/film.mp4"]["reason"]) == ("destination", True)


def comparable(record: JobRecord) -> dict[str, Any]:
    """A record without what differs between any two runs: ids, times, places, and sums of seconds."""
    left_out = {"job_id", "source", "destination", "source_version", "flow_run_id", "write_id", "holder", "version"}
    facts = {name: value for name, value in record.to_dict().items() if name not in left_out}
    times = ("lease_until", "created_at", "updated_at", "expires_at")
    facts |= {name: facts[name] is not None for name in times}
    facts["history"] = [(step.state, step.attempt, bool(step.node)) for step in record.history]
    for name in ("phase_seconds", "node_seconds"):
        facts[name] = sorted(facts[name])
    facts["metrics"] = {
        name: value for name, value in facts["metrics"].items() if name.split(".")[0] in ("Frames", "Bytes", "Retries")
    } | dict.fromkeys(facts["metrics"])
    output = record.output or {}
    facts["output"] = {name: bool(output[name]) if name in ("uri", "version_id") else output[name] for name in output}
    result = {
        "output",
        "job_id",
        "folder",
        "seconds",
        "flow_started",
        "startup_seconds",
        "fps",
        "node_seconds",
        "engine",
    }
    facts["result"] = {name: value for name, value in record.result.items() if name not in result}
    facts["work_folder"] = Path(record.work_folder).name
    facts["probe"] = {name: value for name, value in record.probe.items() if name != "path"}
    return facts


def test_a_run_by_hand_a_sweep_and_an_upload_leave_the_same_record(
    library: Library, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(library.folder / "film.mkv", 77)
    by_hand = cloud.put("by-hand/film.mkv", clip)
    upscale_video(by_hand, "s3://results/by-hand/film.mkv.mp4", library.options())
    cloud.put("by-sweep/film.mkv", clip)
    library.sweep("s3://videos/by-sweep", "s3://results/by-sweep")
    uploaded = cloud.put("by-event/film.mkv", clip)
    _run_for_upload(library, "by-event/film.mkv", monkeypatch)

    records = {record.source: record for record in library.ledger.by_owner("ann", limit=10)}
    hand, sweep, event = (records[source] for source in (by_hand, "s3://videos/by-sweep/film.mkv", uploaded))
    assert hand.state == JobState.PUBLISHED
    assert hand.destination.replace("by-hand", "") == sweep.destination.replace("by-sweep", "")
    assert hand.destination.replace("by-hand", "") == event.destination.replace("by-event", "")
    assert comparable(hand) == comparable(sweep)
    assert comparable(hand) == comparable(event)
    # By any of the three ways it is found to be done.
    assert outcomes(library.sweep("s3://videos/by-event", "s3://results/by-event")) == {"film.mkv": "skipped"}


def _handler(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("event_handler", HANDLER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "event_handler", module)
    spec.loader.exec_module(module)
    return module


def _run_for_upload(library: Library, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the handler of an upload, and have its run done as a worker would."""
    options = {**library.options().model_dump(), "owner": "nobody"}
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(upscale_video),
            "uploads",
            entrypoint="flows/upscale_video.py:upscale_video",
            path=str(HANDLER.parents[3]),
            parameters={"options": options},
        )
    monkeypatch.setenv("SUPERRES_DEPLOYMENT", "upscale-video/uploads")
    monkeypatch.setenv("SUPERRES_DESTINATION", "s3://results")
    monkeypatch.setenv("SUPERRES_OWNER", "ann")
    head = library.cloud.s3.head_object(Bucket="videos", Key=key)
    item = {"key": key, "size": head["ContentLength"], "etag": head["ETag"].strip('"'), "version-id": head["VersionId"]}
    event = {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": "videos"}, "object": item},
    }
    _handler(monkeypatch).handler(event)
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
        command = [sys.executable, "-m", "prefect.engine", str(run.id)]
        environment = {**os.environ, "PYTHONPATH": str(HANDLER.parents[3])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        run = client.read_flow_run(run.id)
    assert run.state is not None and run.state.is_completed(), done.stderr[-3000:]


def test_ctrl_c_cancels_the_videos_that_are_under_way(place: Place) -> None:
    videos = place.folder / "videos"
    for seed in range(3):
        make_clip(videos / f"{seed}.mp4", seed, frames=400, size=(640, 360))
    run = place.start_command("library", str(videos), str(place.folder / "out"))
    ledger = place.ledger
    run.wait_until(lambda: len(ledger.by_state(JobState.UPSCALING)) == 2, "two videos at work")
    run.interrupt()
    began = time.monotonic()
    finished = run.wait(60)
    assert time.monotonic() - began < 30
    assert finished.code == 130
    assert "Traceback" not in finished.stderr
    run.wait_for_orphans(10)
    records = ledger.by_state(JobState.CANCELLED)
    assert sorted(Path(record.source).name for record in records) == ["0.mp4", "1.mp4"]
    assert list((place.folder / "out").iterdir()) == []


@pytest.mark.chaos
def test_two_hundred_videos_with_five_bad_ones_among_them(library: Library) -> None:
    bad = list(BAD)
    make_bad_ones(library.videos)
    for seed in range(195):
        make_clip(
            library.videos / f"{seed % 7}/clip-{seed:03d}.mp4",
            seed,
            5 + seed % 6,
            (16 + seed % 5 * 8, 16 + seed % 3 * 8),
        )
    for index, name in enumerate(bad):  # Among the others, not before or after them.
        shutil.move(library.videos / name, library.videos / str(index) / name)
    sizes: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1):
            sizes.append(psutil.Process().memory_info().rss)

    library.sweep(limit=1)  # Workers, and threads that stay, are there from now on.
    threads, began = threading.active_count(), time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rows = library.sweep(parallel=4)
    finally:
        stop.set()
        watcher.join()
    print(f"{(time.monotonic() - began) / 200:.2f} s a video")
    failed = {Path(name).name: row for name, row in rows.items() if row["outcome"] == "failed"}
    assert {name: row["kind"] for name, row in failed.items()} == {name: kind for name, (kind, _) in BAD.items()}, [
        row["reason"] for name, row in failed.items() if name not in BAD
    ]
    assert Counter(row["outcome"] for row in rows.values()) == {"published": 194, "skipped": 1, "failed": 5}
    assert len(library.published()) == 195
    records = [library.ledger.get(row["job_id"], "ann") for row in rows.values()]
    assert most_at_once(records) == 4
    assert library.left_in_scratch() == []
    assert threading.active_count() < threads + 10  # A few that are shared may have started meanwhile; not one a video.
    middle = len(sizes) // 4
    print(f"{sizes[middle] / 1e6:.0f} MB after a quarter, {sizes[-1] / 1e6:.0f} MB at the end")
    # Of 150 videos: what Prefect keeps of each task run of a process.
    assert sizes[-1] - sizes[middle] < 60e6
