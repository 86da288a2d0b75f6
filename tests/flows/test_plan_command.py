"""`superres plan`: chunks, seconds and cost before anything runs, from what is known; and that it starts nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.forecast import earlier_jobs, forecast
from flows.pools import Site, pools_of_this_machine, site_of
from tasks.chunks import Capacity, Chunk
from tasks.destinations import Output
from tasks.forecast import Rates, foresee
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.holder import this_holder
from tasks.ledger.record import NewJob
from tasks.models.cards import find_model
from tasks.models.weights import content_hash
from tasks.owner import this_user
from tasks.plan import Plan, make_plan
from tasks.request import UpscaleRequest, check_request
from tests.corpus.samples import SAMPLES
from tests.flows.libraries import make_clip

FRAMES = 130
WORKERS = {"gpu": (4, 1), "cpu": (3, 2)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("plan") / "clip.mp4", seed=5, frames=FRAMES, size=(64, 32))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that a command might leave behind lies here."""
    for name in ("HOME", "SUPERRES_HOME", "SUPERRES_SCRATCH", "PREFECT_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "own" / name.lower()))
    return tmp_path / "own"


def planned(clip: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(clip), *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def job_of(clip: Path, **settings: Any) -> Plan:
    checked = check_request(UpscaleRequest(str(clip), "", **settings), publishes=False)
    return make_plan(checked, content_hash(checked.card))


def test_the_plan_is_the_one_that_the_job_would_have(
    clip: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.time()
    record = planned(clip, capsys, "--chunk-seconds", "2")
    assert set(record) == {
        "source", "frames", "width", "height", "chunks", "chunk_frames", "model", "gpu_seconds", "cpu_seconds",
        "wall_seconds", "finish_at", "cost", "basis", "notes", "not_carried",
    }  # fmt: skip
    assert (record["source"], record["frames"]) == (str(clip), FRAMES)
    assert (record["width"], record["height"], record["model"]) == (128, 64, "compact-x2")
    assert (record["chunks"], record["chunk_frames"]) == (3, 50)
    assert record["cost"] is None
    assert record["wall_seconds"] >= record["gpu_seconds"]
    assert datetime.fromisoformat(record["finish_at"]).timestamp() >= before + record["wall_seconds"] - 2
    assert "estimated from" in record["basis"]
    assert not own_home.exists()  # Nothing was started, and nothing left.


def test_how_the_source_is_treated_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = next(sample for sample in SAMPLES if sample.name == "fields-doubled.mkv")
    clip = sample.path(tmp_path)
    pictures = planned(clip, capsys)["frames"]
    record = planned(clip, capsys, "--deinterlace", "field-rate", "--encoder", "av1", "--crf", "30")
    assert record["frames"] == 2 * pictures


def test_the_estimate_is_the_work_of_the_model_at_the_assumed_speed(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, flops = find_model("compact-x4"), Capacity().flops
    record = planned(clip, capsys, "--scale", "4")
    assert record["model"] == "compact-x4"
    expected = FRAMES * card.flop_per_input_pixel * 64 * 32 / flops
    assert record["gpu_seconds"] == pytest.approx(expected, abs=0.06)


def test_people_read_the_same(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(clip), "--height", "64"]) == 0
    said = capsys.readouterr().out
    assert f"{FRAMES} frames 64x32 -> 128x64" in said
    assert "estimated from" in said and "unknown: the pools have no prices" in said


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("s3://bucket/film.mp4",), 2, "settings"),
        (("OUT/nowhere.mp4",), 3, "source"),
        (("CLIP", "--model", "nonesuch"), 7, "model"),
        (("CLIP", "--scale", "4", "--model", "compact-x2"), 2, "settings"),
        (("CLIP", "--scale", "2", "--height", "64"), 2, "settings"),
        (("CLIP", "--encoder", "theora"), 2, "settings"),
    ],
)
def test_what_no_job_can_be_is_refused(
    clip: Path,
    own_home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    kind: str,
) -> None:
    meant = [text.replace("CLIP", str(clip)).replace("OUT", str(tmp_path)) for text in arguments]
    assert main(["plan", *meant, "--json"]) == code
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["kind"] == kind
    assert said.err.count("\n") == 1
    assert not own_home.exists()


def remember(clip: Path, **changes: Any) -> str:
    """A finished job of this user in the ledger, of a video of 32x16, on a CPU; gives its id."""
    settings = {**UpscaleRequest("", "").settings(), **changes.pop("settings", {})}
    ledger = open_ledger(LedgerSettings())
    job = NewJob(this_user(), "/somewhere/else.mp4", str(changes), f"/out/{len(changes)}.mp4", settings)
    facts: dict[str, Any] = {
        "model": "compact-x2",
        "probe": {"width": 32, "height": 16},
        "phase_seconds": {"extract": 1.0, "upscale": 20.0, "encode": 4.0, "verify": 0.5},
        "result": {
            "frames_out": 100, "width": 64, "height": 32, "kept": 0.0, "chunks_reused": 0, "startup_seconds": 3.0,
            "engine": {"device": "Some CPU", "precision": "fp32", "threads": 2},
        },
    }  # fmt: skip
    facts["result"] |= changes.pop("result", {})
    record = ledger.begin(job, this_holder())
    ledger.publish(record, dataclasses.asdict(Output("/out/x.mp4", "d", 1)), **{**facts, **changes})
    return record.job_id


def test_an_earlier_job_tells_the_speed(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = remember(clip)
    record = planned(clip, capsys)
    # Four times the pixels.
    assert record["gpu_seconds"] == pytest.approx(FRAMES * 20.0 / 100 * 4, abs=0.06)
    assert record["cpu_seconds"] == pytest.approx(FRAMES * 5.0 / 100 * 4, abs=0.06)
    assert record["basis"].startswith("measured on Some CPU (fp32, 2 threads) in job " + job_id)


def test_what_a_job_did_not_have_to_compute_is_not_counted_as_speed(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(clip, result={"kept": 0.75})
    assert planned(clip, capsys)["gpu_seconds"] == pytest.approx(FRAMES * 20.0 / 100 * 4 * 4, abs=0.06)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "compact-x4"},
        {"settings": {"precision": "bf16"}},
        {"settings": {"encoder": "ffv1"}},
        {"result": {"chunks_reused": 2}},
        {"result": {"engine": {"device": "Some GPU", "precision": "fp16", "threads": None}}},
        {"phase_seconds": {}},
        {"probe": {"left_out": "too large"}},
    ],
)
def test_other_jobs_tell_nothing(clip: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    remember(clip, **changes)
    assert planned(clip, capsys)["basis"].startswith("estimated from")


def test_a_ledger_that_cannot_be_read_tells_nothing(
    clip: Path, capsys: pytest.CaptureFixture[str], own_home: Path
) -> None:
    ledger = own_home / "superres_home" / "jobs.sqlite"
    ledger.parent.mkdir(parents=True)
    ledger.write_text("not a database at all, but long enough to look into\n" * 40)
    assert planned(clip, capsys)["basis"].startswith("estimated from")


def test_cost_is_that_of_the_workers_for_as_long_as_they_are_held(clip: Path) -> None:
    local = site_of("local")
    priced = dataclasses.replace(local, hourly_prices={"cpu": 0.5, "gpu": 3.0})
    expected = forecast(job_of(clip), priced, earlier_jobs(""))
    hours = {pool: seconds / 3600 for pool, seconds in expected.node_seconds.items()}
    assert expected.cost == pytest.approx(0.5 * hours["cpu"] + 3.0 * hours["gpu"], abs=1e-4)
    assert forecast(job_of(clip), local, []).cost is None


def test_what_a_preview_has_measured_counts_before_anything_else(clip: Path) -> None:
    remember(clip)
    expected = forecast(job_of(clip), site_of("local"), earlier_jobs(""), (0.25, "Some GPU"))
    assert expected.gpu_seconds == pytest.approx(FRAMES * 0.25)
    assert expected.basis == "measured on Some GPU with excerpts of this video"


def test_the_site_is_this_machine(clip: Path) -> None:
    site = site_of("local")
    assert isinstance(site, Site)
    assert [(pool.name, pool.maximum) for pool in site.pools] == [
        (pool.name, pool.maximum) for pool in pools_of_this_machine()
    ]


def chunks(count: int, frames: int) -> list[Chunk]:
    return [Chunk(index, index * frames, (index + 1) * frames - 1) for index in range(count)]


RATES = Rates(gpu_seconds=1.0, cpu_seconds=0.5, basis="", tail_seconds=0.01, startup_seconds=2.0)


@pytest.mark.parametrize(
    ("gpu_slots", "cpu_slots", "shares", "wall"),
    [
        (1, 2, False, 2 + 400 + 5 + 4),  # The GPU decides; the last chunk is encoded behind it.
        (4, 1, False, 2 + 200 + 5 + 4),  # The CPU pool decides.
        (1, 2, True, 2 + 400 + 100 + 4),  # Both on the same cores.
        (400, 400, False, 2 + 10 + 5 + 4),  # No chunk takes less than its own time.
    ],
)
def test_the_slower_pool_decides(gpu_slots: int, cpu_slots: int, shares: bool, wall: float) -> None:
    capacity = Capacity(gpu_slots, cpu_slots, 1e12)
    found = foresee(chunks(40, 10), RATES, capacity, workers=WORKERS, shares_cores=shares)
    assert (found.frames, found.chunks, found.chunk_frames) == (400, 40, 10)
    assert (found.gpu_seconds, found.cpu_seconds) == (400, 200)
    assert found.wall_seconds == pytest.approx(wall)


def test_as_many_workers_are_held_as_have_enough_to_do() -> None:
    found = foresee(chunks(40, 10), RATES, Capacity(4, 6, 1e12), workers=WORKERS, shares_cores=False)
    assert found.node_seconds["gpu"] == pytest.approx(4 * found.wall_seconds)
    assert found.node_seconds["cpu"] == pytest.approx(found.wall_seconds)  # One of two slots is enough.
