"""What a run shows in the Prefect UI, read back from the server that keeps it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import flow_run as this_flow_run

from flows.artifacts.progress import ProgressShown, describe, duration
from flows.artifacts.report import Story, chunk_rows, curve, failure_page
from flows.artifacts.timeline import draw_small_timeline
from flows.chunk_runs import FinishedChunk
from flows.parameters import UpscaleOptions
from flows.upscale_video import upscale_video
from infra.pools import local_pools, open_pools
from infra.prefect_server import Api
from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.compare import draw_comparison
from tasks.encode import encode_upscaled
from tasks.errors import FrameError
from tasks.extract import extract_chunk
from tasks.ledger.record import JobError
from tasks.media.pictures import MOST_BYTES
from tasks.models.cards import find_model
from tasks.models.weights import content_hash
from tasks.place import Place
from tasks.plan import Plan, make_plan
from tasks.progress import Progress
from tasks.request import UpscaleRequest, check_request
from tasks.upscale import upscale_chunk
from tests.corpus.samples import SAMPLES
from tests.flows.jobs import GROUP, PATIENCE, make_film
from tests.waiting import eventually

CHUNKS = 6


@dataclass
class Shown:
    """What one run showed."""

    run: Any
    result: dict[str, Any] | None
    artifacts: dict[str, Any]
    logs: list[str]
    tasks: list[str]


@dataclass
class Studio:
    """A film, and runs on it in this process."""

    folder: Path
    film: Path

    def upscale(self, name: str, error: type[Exception] | None = None, **options: Any) -> Shown:
        """Run the flow; gives what it showed once the server has all of it."""
        options = {"scratch": str(self.folder / "scratch"), "chunk_seconds": 1.0, **options}
        result = None
        source, destination = str(self.film), str(self.folder / name)
        if error is None:
            result = upscale_video(source, destination, UpscaleOptions(**options))
        else:
            with pytest.raises(error):
                upscale_video(source, destination, UpscaleOptions(**options))
        with get_client(sync_client=True) as client:
            run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
            )
            logs = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
            lines = eventually(lambda: _whole_log(client, logs), PATIENCE)
            tasks = [task.name for task in client.read_task_runs(flow_run_filter=_only(run.id))]
            if error is None:  # The server writes down a second late what has ended.
                tasks = eventually(lambda: _complete(client, run.id), PATIENCE)
        newest = sorted(found, key=lambda artifact: artifact.created)
        return Shown(run, result, {artifact.key: artifact for artifact in newest if artifact.key}, lines, tasks)


def _whole_log(client: SyncPrefectClient, logs: LogFilter) -> list[str] | None:
    """The lines of a run itself, once the last one of them is there."""
    lines = [line.message for line in client.read_logs(logs) if line.name == "prefect.flow_runs"]
    return lines if any("Finished" in line for line in lines) else None


def _complete(client: SyncPrefectClient, run: UUID) -> list[str] | None:
    """Names of the task runs of a run, once the last one of them is there."""
    names = [task.name for task in client.read_task_runs(flow_run_filter=_only(run))]
    return names if "publish" in names else None


def _only(run: UUID) -> FlowRunFilter:
    return FlowRunFilter(id=FlowRunFilterId(any_=[run]))


@pytest.fixture(scope="module")
def studio(prefect_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    film = make_film(folder / "a `strange` | name.mp4", CHUNKS * GROUP, "96x64")
    with open_pools(local_pools()):
        yield Studio(folder, film)


@pytest.fixture(scope="module")
def published(studio: Studio) -> Shown:
    return studio.upscale("published.mp4")


def pictures(markdown: str, kind: str) -> list[bytes]:
    """The pictures inside a page."""
    return [base64.b64decode(data) for data in re.findall(rf"!\[[^]]*\]\(data:image/{kind};base64,([^)]+)\)", markdown)]


def cells(markdown: str) -> dict[str, list[str]]:
    """The tables of a page: the cells of each row by its first one."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


class TestPublishedRun:
    def test_page_has_the_facts_of_source_and_result(self, studio: Studio, published: Shown) -> None:
        page = str(published.artifacts["result"].data)
        table, result = cells(page), published.result
        assert result is not None
        assert table["picture"] == ["96x64", "192x128"]
        assert table["frames"] == [str(CHUNKS * GROUP)] * 2
        assert table["rate"][0] == "23.976 frames/s (24000/1001)"
        assert table["colour"][0] == "bt709, limited range"
        assert table["size"][1] == f"{Path(result['output']).stat().st_size / 1e3:.1f} kB"
        assert table["file"] == [f"`{studio.folder}/a 'strange' \\| name.mp4`", f"`{result['output']}`"]
        assert table["model"] == ["`compact-x2`"]
        assert table["chunks"] == [str(CHUNKS)]
        assert f"{result['fps']:.2f} frames/s" in page
        assert f"after {result['startup_seconds']:.1f} s of start-up" in page

    def test_page_names_the_least_faithful_chunk(self, published: Shown) -> None:
        page, rows = str(published.artifacts["result"].data), json.loads(str(published.artifacts["chunks"].data))
        values = [row["fidelity dB"] for row in rows]
        worst = rows[values.index(min(values))]
        assert 20 < min(values) <= max(values) < 99
        assert f"{median(values):.1f} dB in the median of {CHUNKS} chunks, {min(values):.1f} dB at worst" in page
        assert f"chunk {worst['chunk']} (frames {worst['frames'].replace('-', '–')})" in page
        assert len(re.search("`([▁-█]+)`", page)[1]) == CHUNKS  # type: ignore[index]

    def test_page_shows_who_worked_when(self, published: Shown) -> None:
        (svg,) = pictures(str(published.artifacts["result"].data), r"svg\+xml")
        root = ElementTree.fromstring(svg)
        assert len(root.findall("{http://www.w3.org/2000/svg}path")) >= 3
        assert len(svg) < 20_000

    def test_table_has_a_row_for_each_chunk(self, published: Shown) -> None:
        rows = json.loads(str(published.artifacts["chunks"].data))
        assert [row["chunk"] for row in rows] == list(range(CHUNKS))
        assert [row["frames"] for row in rows] == [f"{GROUP * i}-{GROUP * i + GROUP - 1}" for i in range(CHUNKS)]
        for row in rows:
            assert all(row[f"{stage} s"] > 0 and "process" in row[f"{stage} on"] for stage in ("upscale", "encode"))
            assert row["frames/s"] == pytest.approx(GROUP / row["upscale s"], rel=0.05)
            assert row["retries"] == 0

    def test_progress_ends_in_words(self, published: Shown) -> None:
        progress = published.artifacts["progress"]
        assert float(str(progress.data)) == 100.0
        assert re.fullmatch(r"done · 144 of 144 frames · cpu 1, gpu 1 workers", progress.description)

    def test_picture_is_small_and_shows_the_same_detail_twice(self, published: Shown) -> None:
        (jpeg,) = pictures(str(published.artifacts["comparison"].data), "jpeg")
        assert len(jpeg) <= MOST_BYTES
        picture = Image.open(BytesIO(jpeg))
        assert picture.format == "JPEG"
        assert picture.width > 2 * 192

    def test_log_tells_the_story_once(self, published: Shown) -> None:
        logs = published.logs
        assert len([line for line in logs if re.search(r"144 frames 96x64 at 24000/1001 fps -> 192x128", line)]) == 1
        assert len([line for line in logs if line.startswith("published ")]) == 1
        shares = [int(match[1]) for line in logs if (match := re.match(r"(\d+) %: upscaling", line))]
        assert shares == sorted(shares)
        assert len(logs) < 20
        assert len(set(logs)) == len(logs)

    def test_task_runs_have_names_that_say_what_they_are(self, published: Shown) -> None:
        stages = {f"{stage} {i + 1}/{CHUNKS} frames {GROUP * i}-{GROUP * i + GROUP - 1}" for i in range(CHUNKS)
                  for stage in ("extract", "upscale", "encode")}  # fmt: skip
        others = {name for name in published.tasks if name not in stages}
        assert stages <= set(published.tasks)
        assert {name for name in others if not name.startswith("compare ")} == {"plan", "assemble", "verify", "publish"}


def test_page_says_how_the_source_was_treated(studio: Studio, tmp_path: Path, published: Shown) -> None:
    sample = next(sample for sample in SAMPLES if sample.name == "fields-doubled.mkv")
    shown = replace(studio, film=sample.path(tmp_path)).upscale("fields.mkv", **sample.settings)
    result = shown.result
    assert result is not None
    assert result["frames_out"] == 2 * result["frames_in"]
    page = str(shown.artifacts["result"].data)
    assert result["notes"]
    assert "## How the source was treated\n\n* " in page
    assert "How the source was treated" not in str(published.artifacts["result"].data)


def test_no_picture_where_none_is_wanted(studio: Studio) -> None:
    shown = studio.upscale("private.mp4", pictures=False)
    assert "comparison" not in shown.artifacts
    assert not [name for name in shown.tasks if name.startswith("compare")]
    assert pictures(str(shown.artifacts["result"].data), "jpeg") == []


def test_run_that_fails_says_where_and_what_to_do(studio: Studio) -> None:
    """One packet, of a frame in the fourth chunk, is noise."""
    import av

    with av.open(str(studio.film)) as container:
        found = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        lost = next(packet for packet in found[3 * GROUP + 4 :] if bytes(packet)[4] >> 5 & 3 == 0)
        position, size = lost.pos, lost.size
        time = lost.pts * lost.time_base
        times = sorted(packet.pts * packet.time_base for packet in found)
    content = bytearray(studio.film.read_bytes())
    assert position is not None
    content[position : position + size] = b"\xff" * size
    damaged = studio.folder / "damaged.mp4"
    damaged.write_bytes(content)
    shown = replace(studio, film=damaged).upscale("damaged-2x.mp4", FrameError)
    page = str(shown.artifacts["result"].data)
    frame = times.index(time)
    assert "# `damaged.mp4` was not upscaled" in page
    assert f"frame {frame} at" in page
    assert "--salvage" in page
    table = cells(page)
    assert table["phase"] == ["extract"]
    assert table["frames"] == [str(frame)]
    assert table["chunk"] == [f"{frame // GROUP} (of 0 to {CHUNKS - 1})"]
    assert table["kind"] == ["frame"]
    assert "**What is kept:** nothing, for another attempt would fail too." in page
    assert not (studio.folder / "damaged-2x.mp4").exists()


def test_refused_run_says_why(studio: Studio) -> None:
    shown = replace(studio, film=studio.folder / "nowhere.mp4").upscale("nowhere-2x.mp4", Exception)
    page = str(shown.artifacts["result"].data)
    assert "nowhere.mp4 cannot be read" in page.replace("\\", "")
    assert "**What is kept:** nothing, no work had begun." in page
    assert set(shown.artifacts) == {"result"}


# The parts by themselves


@pytest.mark.parametrize(
    ("progress", "workers", "text"),
    [
        (
            Progress(1234, 5000, 3, 9, 12.34, 251.0, "upscaling"),
            {"cpu": 2, "gpu": 1},
            "upscaling · 1 234 of 5 000 frames · 12.3 frames/s · 4 min left · cpu 2, gpu 1 workers",
        ),
        (
            Progress(10, 5000, 0, 9, None, None, "upscaling"),
            {"cpu": 0, "gpu": 0},
            "upscaling · 10 of 5 000 frames · no workers",
        ),
        (
            Progress(0, 0, 0, 0, None, None, "staging", 1_500_000, 90_000_000),
            {"cpu": 1, "gpu": 0},
            "staging · 1.5 of 90.0 MB · cpu 1, gpu 0 workers",
        ),
        (
            Progress(40, 50, 3, 9, 3.0, 3.3, "paused"),
            {"cpu": 0, "gpu": 0},
            "paused · 40 of 50 frames · no workers",
        ),
    ],
)
def test_progress_in_words(progress: Progress, workers: dict[str, int], text: str) -> None:
    assert describe(progress, workers).replace("\N{NO-BREAK SPACE}", " ") == text


def test_the_first_speed_is_shown_at_once(prefect_api: Api) -> None:
    begun = Progress(0, 50, 0, 9, None, None, "upscaling")
    later = [
        replace(begun, frames_done=done, frames_per_second=speed) for done, speed in ((5, None), (9, 4.0), (13, 5.0))
    ]

    @flow
    def shows() -> list[str]:
        with open_pools(local_pools(), warm=False) as cluster, get_client(sync_client=True) as client:
            shown = ProgressShown(lambda: cluster)
            wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[this_flow_run.id]))
            read = []
            for progress in (begun, *later):
                shown.show(progress)
                (artifact,) = client.read_artifacts(artifact_filter=wanted)
                read.append(str(artifact.description))
            return read

    # All in a moment, in which nothing else is news.
    told = "upscaling · 9 of 50 frames · 4.0 frames/s · no workers"
    assert shows() == [*["upscaling · 0 of 50 frames · no workers"] * 2, told, told]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3570, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_curve_shows_high_and_low_and_stays_short() -> None:
    assert curve([30.0, 40.0, 35.0]) == "▁█▅"
    assert curve([40.0, 40.1]) == "██"
    values = [40.0] * 700
    values[333] = 20.0
    drawn = curve(values)
    assert len(drawn) == 100
    assert drawn.index("▁") == 47
    assert set(drawn) == {"▁", "█"}
    assert curve([]) == ""


def long_run(chunks: int, workers: int) -> list[FinishedChunk]:
    """A run of many chunks, one after the other on each worker."""
    done = []
    for index in range(chunks):
        at = 1.7e9 + 45.0 * (index // workers)
        places = [Place(f"node-{kind}-{index % workers}", "", "", 1) for kind in ("cpu", "gpu", "cpu")]
        stages = zip(("extract", "upscale", "encode"), (3.0, 44.0, 5.0), places, strict=True)
        reports = tuple(StageReport(stage, index, at, seconds, where=place) for stage, seconds, place in stages)
        done.append(FinishedChunk(Chunk(index, 1000 * index, 1000 * index + 999), reports, ("encode",) * (index % 3)))
    return done


@pytest.mark.parametrize(("chunks", "workers"), [(5, 1), (700, 4), (5000, 64), (3000, 1000)])
def test_small_timeline_is_small_whatever_the_run(chunks: int, workers: int) -> None:
    reports = [report for done in long_run(chunks, workers) for report in done.reports]
    svg = draw_small_timeline(reports, 220_000)
    if workers == 1000:
        assert svg is None
        return
    assert svg is not None and len(svg) <= 220_000
    root = ElementTree.fromstring(svg)
    drawn = sum(path.attrib["d"].count("M") for path in root.iter("{http://www.w3.org/2000/svg}path"))
    assert drawn == 3 * chunks if chunks < 1000 else drawn >= 3 * workers


def test_rows_name_the_stages_that_were_repeated() -> None:
    rows = chunk_rows(long_run(6, 2)[::-1])
    assert [row["chunk"] for row in rows] == list(range(6))
    assert [row["retries"] for row in rows] == [0, "encode", "encode, encode"] * 2
    assert rows[0]["frames/s"] == 22.73
    reused = replace(
        long_run(1, 1)[0],
        reports=tuple(StageReport.reused(stage, 0) for stage in ("extract", "upscale", "encode")),
    )
    (row,) = chunk_rows([reused])
    assert row["frames/s"] is None
    assert row["encode on"] == "done before"


def test_failure_that_nobody_foresaw() -> None:
    error = JobError("upscale", "internal", "<b>boom</b> [x](y)", 48, 71, "gpu-3", "77", "/logs/77.out")
    page = failure_page(Story("/films/film.mp4"), error, "")
    assert "<b>" not in page and "[x]" not in page.replace("\\[x\\]", "")
    table = cells(page)
    assert table["frames"] == ["48–71"]
    assert (table["node"], table["Slurm job"], table["log"]) == (["`gpu-3`"], ["`77`"], ["`/logs/77.out`"])
    assert "Retry, or run the same command again." in page


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A job of two chunks, both encoded: the first one is grey, the second one shows something."""
    from tests.media.clips import run_ffmpeg

    folder = tmp_path_factory.mktemp("encoded")
    film = folder / "film.mp4"
    # A second of grey, then the pattern; in a height that no whole factor gives.
    source = "color=gray:s=120x90:r=24:d=1,format=yuv420p[a];testsrc2=s=120x90:r=24:d=1,format=yuv420p[b];[a][b]concat"
    run_ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-qp", "1", "-pix_fmt", "yuv420p", film)
    request = UpscaleRequest(
        str(film), str(folder / "out.mp4"), height=144, chunk_seconds=1.0, scratch=str(folder), encoder="ffv1"
    )
    request = replace(request, destination=str(folder / "out.mkv"))
    checked = check_request(request)
    plan = make_plan(checked, content_hash(find_model(checked.card.name)))
    plan.folder.mkdir(parents=True)
    for chunk in plan.chunks:
        extract_chunk(plan, chunk)
        upscale_chunk(plan, chunk)
        encode_upscaled(plan, chunk)
    return plan


def test_picture_is_taken_where_there_is_something_to_see(encoded: Plan) -> None:
    assert len(encoded.chunks) == 2
    picture = np.asarray(Image.open(draw_comparison(encoded, encoded.chunks)).convert("RGB")).astype(float)
    height, width = encoded.target.height, encoded.target.width
    assert Fraction(height, encoded.facts.height).denominator > 1
    left = picture[-height:, :width]
    right = picture[-height:, -width:]
    assert left.std() > 40
    # The same place in both, to the pixel: any shift is worse.
    difference = np.abs(left - right).mean()
    assert difference < 16
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        assert np.abs(np.roll(left, shift, (0, 1)) - right).mean() > difference
