"""The flight check: what works is said, what is broken is named with its remedy, and nothing stays behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from blocks.pools import SlurmNodes, SlurmPools
from flows.flight_check import FlightCheckOptions, flight_check
from infra.prefect_server import Api
from tasks.errors import FlightCheckError
from tasks.ledger import LedgerSettings, open_ledger
from tests.infra.slurm_cluster import slurm  # noqa: F401
from tests.mounts import small_disk


@pytest.fixture
def scratch(tmp_path: Path, prefect_api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SUPERRES_HOME", str(tmp_path / "home"))
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def refused(**options: Any) -> str:
    with pytest.raises(FlightCheckError) as caught:
        flight_check(FlightCheckOptions(**options))
    return str(caught.value)


def test_an_installation_that_works(scratch: Path) -> None:
    found = flight_check(FlightCheckOptions(scratch=str(scratch)))
    checks = {check["name"]: check["said"] for check in found["checks"]}
    assert list(checks) == ["ffmpeg", "models", "scratch", "pools local", "ledger", "clip"]
    assert "120 frames upscaled and verified" in checks["clip"]
    (record,) = open_ledger(LedgerSettings()).by_owner("flight-check")
    assert record.ended
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["flight-check"])))
    assert "verified" in str(shown[-1].data)


def test_scratch_that_is_read_only(scratch: Path) -> None:
    with small_disk(scratch / "disk", "size=1m,ro") as disk:
        said = refused(scratch=str(disk))
    (scratch / "disk").rmdir()
    assert f"scratch: cannot write into scratch {disk} (Read-only file system)" in said
    assert "--scratch" in said


def test_models_that_cannot_be_reached(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", "http://127.0.0.1:9/models")
    assert "models: the mirror of models http://127.0.0.1:9/models cannot be reached" in refused(scratch=str(scratch))
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", str(scratch / "mirror"))
    assert f"models: the mirror of models {scratch / 'mirror'} cannot be reached" in refused(scratch=str(scratch))
    monkeypatch.delenv("SUPERRES_MODEL_MIRROR")
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(scratch / "weights"))
    assert "models: the folder of models" in refused(scratch=str(scratch))


def test_all_that_is_broken_is_named_at_once(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(scratch / "weights"))
    said = refused(scratch="/proc/scratch", pools="no-such-pools")
    assert [part in said for part in ("models: ", "scratch: ", "pools no-such-pools: ")] == [True] * 3


def test_workers_that_are_not_up_in_time(scratch: Path) -> None:
    said = refused(scratch=str(scratch), minutes=0.01)
    assert "clip: not upscaled after 0.01 minutes; no worker is up in pool" in said
    (record,) = open_ledger(LedgerSettings()).by_owner("flight-check")
    assert record.ended


@pytest.mark.slurm
def test_a_pool_that_cannot_start(scratch: Path, slurm: Any, tmp_path: Path) -> None:  # noqa: F811
    logs = tmp_path / "logs"
    SlurmPools(
        cpu=SlurmNodes(partition="cpu", cores=1, memory="1GB"),
        gpu={"partition": "gpu", "cores": 1, "memory": "1GB", "gres": ""},
        shared_directory=str(tmp_path / "shared"),
        log_directory=str(logs),
        prologue=["exit 1"],
        python=sys.executable,
        death_timeout=10,
    ).save("broken", overwrite=True)
    said = refused(scratch=str(scratch), pools="broken")
    assert "clip: pool: workers of pool 'cpu' failed to start" in said
    assert str(logs) in said
