"""Packages are unpacked whatever the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import debian

pytestmark = pytest.mark.infra


def test_what_is_installed_is_unpacked_all_the_same(tmp_path: Path) -> None:
    try:
        debian.fetch(["hostname"], tmp_path / "unpacked")  # Essential: every Debian has it.
    except debian.PackagesError as error:
        pytest.skip(str(error))
    assert (tmp_path / "unpacked/bin/hostname").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["unpacked"]
