"""Evaluations: real flows on tiny clips, what they measure, refuse, survive, write down and leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import FlowRunSort
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from blocks.pools import SlurmGpuNodes, SlurmPools
from flows.cli import main
from flows.evaluate import evaluate
from flows.evaluation_files import COLUMNS
from flows.parameters import EvaluateOptions
from tasks.errors import (
    DestinationError,
    EvaluationError,
    ModelError,
    SettingsError,
    SourceError,
    SuperResolutionError,
)
from tasks.media.vmaf import has_vmaf
from tasks.models.cards import BUNDLED_FOLDER
from tests.flows.clouds import Cloud, running_cloud
from tests.flows.jobs import RATE, make_film
from tests.flows.libraries import make_bad_ones, make_clip

KERNELS = ["bicubic", "lanczos"]
RESTORED = ["psnr", "psnr_worst", "ssim", "flicker"]
UNCOMPARED = ["fidelity", "sharpness", "flicker_ratio"]
SPEED = ["frames_per_second", "gpu_seconds_per_minute", "kept", "precision", "device"]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A cloud of its own, with open pools, for the tests of this module."""
    with running_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@dataclass
class Bench:
    """Where evaluations run: a scratch folder and a folder for results."""

    folder: Path

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def options(self, **more: Any) -> EvaluateOptions:
        given = {"folder": str(self.results), "scratch": str(self.scratch), "seconds": 0.3, "store": "cloud"}
        return EvaluateOptions(**{**given, **more})

    def left_in_scratch(self) -> list[Path]:
        """Everything in scratch but the folder of sources."""
        return [path for path in self.scratch.rglob("*") if path != self.scratch / "sources"]


@pytest.fixture
def bench(cloud: Cloud, tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("films") / "film.mp4", 31, "72x64", sound=())


def last_run() -> Any:
    with get_client(sync_client=True) as client:
        return next(run for run in client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=10))


def by_pair(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["clip"], row["model"]): row for row in rows}


def filled(row: dict[str, Any]) -> list[str]:
    """The columns of a row that say something."""
    return [name for name in COLUMNS if row[name] not in (None, "")]


def witnessed_psnr(path: Path, first: int, count: int, kernel: Image.Resampling) -> list[float]:
    """Shrink and enlarge grey pictures with Pillow alone, twice, and compare their inside."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    found = []
    for frame in frames[first : first + count]:
        luma = Image.fromarray(frame[:64, :72].copy())
        small = luma.resize((36, 32), Image.Resampling.BICUBIC)
        error = (np.asarray(small.resize((72, 64), kernel), float) - np.asarray(luma, float))[2:-2, 2:-2]
        found.append(10 * np.log10(255**2 / np.mean(error**2)))
    return found


def test_clips_and_models_make_a_table_and_plots(bench: Bench, cloud: Cloud, film: Path) -> None:
    stored = cloud.put("evaluate/stored.mp4", make_clip(bench.folder / "stored.mp4", 5, frames=12, size=(48, 32)))
    result = evaluate([str(film), stored], ["compact-x2"], bench.options(crf=0))
    rows = by_pair(result["rows"])
    assert list(rows) == [(clip, model) for clip in ("film.mp4", "stored.mp4") for model in (*KERNELS, "compact-x2")]
    vmaf = ["vmaf"] if has_vmaf() else []
    for (clip, model), row in rows.items():
        assert list(row) == list(COLUMNS)
        measures = [name for name in COLUMNS if name in (*RESTORED, *vmaf)]
        described = ["clip", "model", "scale", "frames", *measures]
        assert filled(row) == (described if model in KERNELS else [*described, *SPEED])
        rate = Fraction(25) if clip == "stored.mp4" else RATE
        assert row["frames"] == round(0.3 * rate)
        assert row["psnr_worst"] <= row["psnr"] and 0 < row["ssim"] < 1 and row["flicker"] > 0
        if model == "compact-x2":
            assert row["gpu_seconds_per_minute"] == pytest.approx(60 * float(rate) / row["frames_per_second"], rel=1e-3)
    for kernel, filtering in zip(KERNELS, (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS), strict=True):
        witnessed = witnessed_psnr(film, 12, 7, filtering)  # The middle 7 of 31.
        row = rows["film.mp4", kernel]
        assert (row["psnr"], row["psnr_worst"]) == (
            pytest.approx(np.mean(witnessed), abs=0.3),
            pytest.approx(min(witnessed), abs=0.3),
        )
    assert rows["film.mp4", "compact-x2"]["psnr"] > rows["film.mp4", "bicubic"]["psnr"] + 0.5
    assert rows["film.mp4", "compact-x2"]["flicker"] < rows["film.mp4", "bicubic"]["flicker"]

    assert sorted(path.name for path in bench.results.iterdir()) == [
        *("evaluation.csv", "evaluation.parquet", "gains.svg", "quality-speed.svg"),
    ]
    assert result["plots"] == [str(bench.results / f"{name}.svg") for name in ("quality-speed", "gains")]
    for table in (pandas.read_csv(result["csv"]), pandas.read_parquet(result["parquet"])):
        assert list(table.columns) == list(COLUMNS)
        assert table["psnr"].tolist() == [row["psnr"] for row in result["rows"]]
        assert table["frames_per_second"].isna().tolist() == [row["model"] in KERNELS for row in result["rows"]]
    assert pandas.read_parquet(result["parquet"])["fidelity"].dtype == "float64"
    assert bench.left_in_scratch() == []

    run = last_run()
    assert (run.name, run.state.name) == ("2 clips x 1 model", "Completed")
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=of_run)}
    assert set(artifacts) == {"evaluation", "evaluation-plots"}
    shown = json.loads(artifacts["evaluation"].data)
    assert [row["model"] for row in shown] == [*KERNELS, "compact-x2"] * 2
    assert "cost_per_minute" not in shown[0] and "fidelity" not in shown[0]
    assert artifacts["evaluation"].description.startswith("6 of 6 pairs of clip and model judged")
    assert artifacts["evaluation-plots"].data.count("](data:image/png;base64,") == 2


def test_without_a_reference_results_are_judged_beside_bicubic_and_cost_what_the_pools_say(
    bench: Bench, film: Path
) -> None:
    SlurmPools(gpu=SlurmGpuNodes(partition="gpu", hourly_price=36.0)).save("priced", overwrite=True)
    result = evaluate([str(film)], ["compact-x4"], bench.options(mode="no-reference", scale=3, pools="priced"))
    bicubic, lanczos, model = result["rows"]
    described = ["clip", "model", "scale", "frames", *UNCOMPARED]
    assert filled(bicubic) == filled(lanczos) == described
    assert filled(model) == [*described, *SPEED[:2], "cost_per_minute", *SPEED[2:]]
    assert (bicubic["sharpness"], bicubic["flicker_ratio"]) == (1, 1)
    assert lanczos["sharpness"] > 1 and model["sharpness"] > 1.05
    assert all(30 < row["fidelity"] <= 60 for row in result["rows"])
    assert model["cost_per_minute"] == pytest.approx(model["gpu_seconds_per_minute"] / 100, abs=1e-5)
    assert bench.left_in_scratch() == []


def test_what_cannot_be_used_is_refused_together_and_leaves_nothing(bench: Bench, cloud: Cloud, film: Path) -> None:
    stored = cloud.put("evaluate/good.mp4", film)
    make_bad_ones(bench.folder / "bad")
    bad = [str(bench.folder / "bad" / name) for name in ("text.mp4", "sound.mp4")]
    clips = [str(film), "s3://videos/nowhere.mp4", *bad]
    with pytest.raises(SettingsError) as caught:
        evaluate(clips, ["compact-x2", "compakt-x2", "compact-x4"], bench.options(scale=4))
    for said in (
        "5 things are wrong",
        *("compact-x2 enlarges 2 times, 4 times was asked for", 'No model is called "compakt-x2"'),
        *("nowhere.mp4", "text.mp4 is a text file", "sound.mp4 holds no video"),
    ):
        assert said in str(caught.value)
    cases: list[tuple[type[SuperResolutionError], str, list[str], list[str], dict[str, Any]]] = [
        (SourceError, "2 things are wrong", bad, ["compact-x2"], {}),
        (ModelError, "No model is called", [str(film), stored], ["compakt-x2"], {}),
        (SettingsError, "no pools called", [str(film)], ["compact-x2"], {"pools": "nowhere"}),
        (DestinationError, "results cannot be written", [str(film)], ["compact-x2"], {"folder": str(film / "here")}),
    ]
    for kind, said, named, models, options in cases:
        with pytest.raises(kind, match=said):
            evaluate(named, models, bench.options(**options))
    assert not bench.scratch.exists() and not bench.results.exists()  # Nothing was downloaded either.
    with get_client(sync_client=True) as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[last_run().id]))
        assert client.read_task_runs(flow_run_filter=of_run) == []
    for wrong in ({"scale": 5}, {"seconds": 0}, {"crf": 52}, {"precision": "int8"}, {"encoder": "h264"}):
        with pytest.raises(ValidationError):
            bench.options(**wrong)


def test_what_fails_later_stops_nothing_else_and_is_named_at_the_end(bench: Bench, film: Path) -> None:
    make_bad_ones(bench.folder / "bad")
    noise = bench.folder / "bad" / "noise.mkv"
    weights = load_file(BUNDLED_FOLDER / "compact-x2.safetensors")
    broken = {name: tensor.clone().fill_(1e30) for name, tensor in weights.items()}
    save_file(broken, bench.folder / "broken.safetensors")
    models = [str(bench.folder / "broken.safetensors"), "compact-x2"]
    with pytest.raises(EvaluationError) as caught:
        evaluate([str(film), str(noise)], models, bench.options())
    rows = by_pair(caught.value.result["rows"])
    assert len(rows) == 8
    failed = {pair for pair, row in rows.items() if row["error"]}
    assert failed == {("film.mp4", "broken"), *((noise.name, name) for name in (*KERNELS, "broken", "compact-x2"))}
    assert "not finite" in rows["film.mp4", "broken"]["error"]
    assert {rows[noise.name, name]["error"] for name in KERNELS} == {
        f"{noise}: frame 3 cannot be decoded. Leave the clip out."
    }
    for pair in failed:
        assert filled(rows[pair]) == ["clip", "model", "scale", "frames", "error"]
        assert f"{pair[1]} on {pair[0]}" in str(caught.value)
    assert rows["film.mp4", "compact-x2"]["psnr"] > rows["film.mp4", "bicubic"]["psnr"]
    table = pandas.read_csv(bench.results / "evaluation.csv", keep_default_na=False)
    assert (table["error"] != "").sum() == 5
    assert (caught.value.kind, last_run().state.name) == ("evaluation", "Failed")
    assert bench.left_in_scratch() == []

    # Where nothing works, there is a table of reasons and nothing to plot.
    with pytest.raises(EvaluationError, match="3 of 3 pairs"):
        evaluate([str(noise)], ["compact-x2"], bench.options(folder=str(bench.folder / "none")))
    assert {path.name for path in (bench.folder / "none").iterdir()} == {"evaluation.csv", "evaluation.parquet"}


def test_the_command_prints_a_table_and_one_json_object(
    bench: Bench, film: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--folder", str(bench.results), "--scratch", str(bench.scratch)]
    assert main(["evaluate", str(film), "--models", "compact-x2", "--seconds", "0.2", *place, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["clip", "model", "PSNR", "dB"]
    said = json.loads(lines[-1])
    assert said["status"] == "evaluated"
    assert [row["model"] for row in said["rows"]] == [*KERNELS, "compact-x2"]
    assert f"{said['rows'][2]['psnr']:.2f}" in lines[3]
    assert lines[4:-1] == [said["csv"], said["parquet"], *said["plots"]]
    assert bench.left_in_scratch() == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["FILM", "--models", "compact-x2", "--scale", "4"], 2, "enlarges 2 times"),
        (["FILM", "--models", "compact-x2", "--scale", "7"], 2, "scale: Input should be 2, 3 or 4"),
        (["FILM", "FILM", "--models", "compact-x2"], 2, "named twice"),
        (["FILM", "--models", ","], 2, "no model is named"),
        (["FILM", "--models", "compact-x2", "--mode", "guess"], 2, "invalid choice: 'guess'"),
        (["nowhere.mp4", "--models", "compact-x2"], 3, "does not exist"),
        (["FILM", "--models", "compakt-x2"], 7, "No model is called"),
        (["ftp://host/film.mp4", "--models", "compact-x2"], 2, "of no known kind"),
    ],
)
def test_the_command_refuses_in_one_line(
    bench: Bench, film: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    named = [str(film) if argument == "FILM" else argument for argument in arguments]
    place = ["--folder", str(bench.results), "--scratch", str(bench.scratch)]
    assert main(["evaluate", *named, *place, "--json"]) == code
    output = capsys.readouterr()
    complaints = [line for line in output.err.splitlines() if line.startswith("superres: error: ")]
    assert len(complaints) == 1 and said in complaints[0]
    assert json.loads(output.out.splitlines()[-1])["status"] == "failed"
    assert not bench.results.exists() and not bench.scratch.exists()
