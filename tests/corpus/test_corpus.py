"""Every file of the corpus comes out right: promises 1 to 4, each judged by ffmpeg and PyAV alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus.judge import complaints
from tests.corpus.samples import SAMPLES, Sample
from tests.corpus.work import upscaled


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files."""
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_comes_out_right(sample: Sample, corpus: Path, tmp_path: Path) -> None:
    source = sample.path(corpus)
    destination = tmp_path / f"result.{sample.ending}"
    plan = upscaled(source, destination, chunk_seconds=0.5, **sample.settings)
    assert len(plan.chunks) > 1
    assert list(complaints(sample, source, plan.result)) == []

    # Made again, and of one chunk: the same bytes.
    whole = upscaled(source, destination, chunk_seconds=1000.0, **sample.settings)
    assert len(whole.chunks) == 1
    assert whole.result.read_bytes() == plan.result.read_bytes()
