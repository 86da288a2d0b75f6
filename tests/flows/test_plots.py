"""Plots of evaluations: what is drawn where, for one model as for ten."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from flows.evaluation_files import ALL_CLIPS, COLUMNS, as_markdown, mean_rows
from flows.plots import as_data_uri, gains_over_bicubic, quality_against_speed, svg

GAINS = {"a.mp4": 1.0, "b.mp4": 3.0}


def make_rows(models: int, mode: str = "restore", *, vmaf: bool = True) -> list[dict[str, Any]]:
    """Two clips; each model gains 1 dB (or 10 %) on the first and 3 dB (or 30 %) on the second."""
    rows = []
    for clip, gain in GAINS.items():
        for name in ("bicubic", "lanczos", *(f"model-{number}" for number in range(models))):
            gained = gain if name.startswith("model") else 0.0
            row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "clip": clip, "model": name, "frames": 30, "error": ""}
            if mode == "restore":
                row |= {"psnr": 30 + gained, "vmaf": 70 + gained if vmaf else None}
            else:
                row |= {"sharpness": 1 + gained / 10, "fidelity": 40 - gained}
            if name.startswith("model"):
                row["frames_per_second"] = 30.0 if clip == "a.mp4" else 10.0
            rows.append(row)
    return rows


@pytest.mark.parametrize("models", [1, 3, 10])
def test_models_stand_at_their_mean_quality_and_common_speed(models: int) -> None:
    figure = quality_against_speed(make_rows(models))
    assert [axes.get_ylabel() for axes in figure.axes] == ["PSNR of luma (dB)", "VMAF (0 to 100)"]
    for axes, expected, plain in zip(figure.axes, (32, 72), (30, 70), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines["bicubic"].get_ydata()) == {plain}
        for number in range(models):
            line = lines[f"model-{number}"]
            # 60 frames in 1 + 3 seconds.
            assert (list(line.get_xdata()), list(line.get_ydata())) == ([15.0], [expected])
        assert "frames per second" in axes.get_xlabel() and axes.get_xscale() == "log"
    looks = {
        (to_hex(line.get_color()), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() != "None"
    }
    assert len(looks) == models
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["bicubic", "lanczos", *(f"model-{number}" for number in range(models))]


def test_only_what_was_measured_is_drawn() -> None:
    assert len(quality_against_speed(make_rows(2, vmaf=False)).axes) == 1
    labels = [axes.get_ylabel() for axes in quality_against_speed(make_rows(2, "no-reference")).axes]
    assert labels == ["sharpness (bicubic = 1)", "fidelity to the source (dB)"]
    rows = make_rows(2)
    for row in rows:
        if row["model"] == "model-1" and row["clip"] == "a.mp4":
            row |= {"psnr": None, "vmaf": None, "frames_per_second": None, "error": "lost"}
    lines = {line.get_label(): line for line in quality_against_speed(rows).axes[0].lines}
    assert (list(lines["model-1"].get_xdata()), list(lines["model-1"].get_ydata())) == ([10.0], [33])
    figure = gains_over_bicubic([row for row in rows if row["clip"] == "a.mp4"])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["lanczos", "model-0"]


@pytest.mark.parametrize(
    ("mode", "clips", "mean", "unit"), [("restore", [1, 3], 2, "dB"), ("no-reference", [10, 30], 20, "%")]
)
def test_gains_are_shown_for_each_clip_and_as_a_mean(mode: str, clips: list[float], mean: float, unit: str) -> None:
    axes = gains_over_bicubic(make_rows(10, mode)).axes[0]
    assert axes.get_xlabel().endswith(f"({unit})")
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["lanczos", *(f"model-{number}" for number in range(10))]
    marks = {(line.get_ydata()[0], line.get_marker()): list(line.get_xdata()) for line in axes.lines[1:]}
    assert marks[0, "o"] == [0, 0]
    for height in range(1, 11):
        np.testing.assert_allclose(marks[height, "o"], clips)
        np.testing.assert_allclose(marks[height, "D"], [mean])
    assert f"{mean:+.2f}" in [text.get_text() for text in axes.texts]


def test_models_are_compared_over_the_clips_they_have_in_common() -> None:
    rows = make_rows(2)
    for worst, row in enumerate(rows):
        row |= {"scale": 2, "psnr_worst": 20.0 + worst}
    bicubic, lanczos, one, two = mean_rows(rows)
    assert {row["clip"] for row in (bicubic, lanczos, one, two)} == {ALL_CLIPS}
    assert (bicubic["psnr"], bicubic["psnr_worst"], bicubic["frames_per_second"]) == (30, 20, None)
    assert (two["model"], two["psnr"], two["vmaf"], two["psnr_worst"]) == ("model-1", 32, 72, 23)
    assert (two["frames"], two["frames_per_second"], two["ssim"]) == (60, 15, None)
    table = as_markdown([bicubic, two], ["model", "psnr", "ssim", "frames_per_second"]).splitlines()
    assert table == [
        "| model | psnr | frames per second |",
        "| --- | --- | --- |",
        "| bicubic | 30 |  |",
        "| model-1 | 32 | 15 |",
    ]
    rows[3]["error"] = "lost"  # model-1 on a.mp4
    assert {row["psnr"] for row in mean_rows(rows)} == {30, 33}
    assert {row["frames"] for row in mean_rows(rows)} == {30}
    rows[7]["error"] = "lost"  # and on b.mp4: the others are compared without it
    assert [row["model"] for row in mean_rows(rows)] == ["bicubic", "lanczos", "model-0"]
    rows[0]["error"] = rows[5]["error"] = "lost"
    assert mean_rows(rows) == []
    assert len(quality_against_speed(rows).axes) == 2


def test_pictures_are_files_that_others_read() -> None:
    drawn = [svg(quality_against_speed(make_rows(3))) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert ElementTree.fromstring(drawn[0]).tag.endswith("svg")
    kind, _, content = as_data_uri(gains_over_bicubic(make_rows(3))).partition(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(content).startswith(b"\x89PNG\r\n")
