"""The benchmark of the engine: what it says, and what it refuses. How fast anything is has no place here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.models.bench import as_table, measure
from tasks.models.cards import ModelCard
from tests.models.samples import CPU_BACKENDS

SUPERRES = str(Path(sys.executable).with_name("superres"))


def test_both_take_turns(srvgg_x2: ModelCard) -> None:
    result = measure(srvgg_x2, (48, 32), turns=1, seconds=0.05, reference=True, options={"threads": 1})
    assert (result["model"], result["size"], result["target"]) == (srvgg_x2.name, "48x32", "96x64")
    assert (result["backend"], result["precision"], result["batch"]) == (CPU_BACKENDS[-1], "fp32", 1)
    rate = result["fps"]
    assert result["tflops"] == pytest.approx(rate * srvgg_x2.flop_per_input_pixel * 48 * 32 / 1e12)
    assert result["share_of_peak"] == pytest.approx(result["tflops"] / result["matmul_peak_tflops"])
    assert result["ratio"] == pytest.approx(rate / result["reference_fps"])
    assert min(result["peak_memory_bytes"], result["reference_peak_memory_bytes"]) > 50e6
    assert result["first_frame_seconds"] > 0
    assert f"{rate:.2f}" in as_table([result])


def test_int8_is_measured_too(srvgg_x2: ModelCard) -> None:
    result = measure(srvgg_x2, (48, 32), turns=1, seconds=0.05, options={"threads": 1, "precision": "int8"})
    assert result["precision"] == "int8"
    assert "ratio" not in result


def test_what_the_engine_refuses_is_said_here(srvgg_x2: ModelCard) -> None:
    with pytest.raises(SettingsError, match="backend torch does not compute in int8"):
        measure(srvgg_x2, (48, 32), turns=1, options={"backend": "torch", "precision": "int8"})


def test_the_command() -> None:
    command = [SUPERRES, "bench", "--size", "32x32", "--turns", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads(done.stdout)["results"]
    assert (result["model"], result["size"]) == ("compact-x2", "32x32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "640"), "'640' is not a size"),
        (("--turns", "0"), "0 turns are too few"),
        (("--model", "nothing-like-it"), "No model is called"),
    ],
)
def test_nonsense_is_refused(options: tuple[str, str], message: str) -> None:
    done = subprocess.run([SUPERRES, "bench", *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
