"""Fixtures of the tests that run whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.jobs import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of its own for one test."""
    place = Place(tmp_path / "place")
    yield place
    place.clear_away()
