"""Fixtures of the tests that run whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.jobs import Place


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No records and metrics of tests among those of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERRES_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of its own for one test."""
    place = Place(tmp_path / "place")
    yield place
    place.clear_away()
