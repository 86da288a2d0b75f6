"""A schedule that fires: its run is started by the worker and succeeds."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.flows.jobs import PATIENCE
from tests.flows.libraries import make_clip
from tests.installation import Installation
from tests.waiting import eventually


def test_a_scheduled_sweep_upscales_what_was_dropped_into_the_folder(installation: Installation) -> None:
    library = installation.home / "library"
    make_clip(library / "videos/dropped.mp4", 5)
    deployment = f"{installation.api}/deployments/{installation.deployment('upscale-library')}"
    (nightly,) = httpx.get(deployment, timeout=30).json()["schedules"]
    often = {"schedule": {"interval": 5.0}, "active": True, "parameters": nightly["parameters"], "slug": "soon"}
    # Not a hundred ahead, as schedules usually have.
    often["max_scheduled_runs"] = 1
    httpx.post(f"{deployment}/schedules", json=[often], timeout=30).raise_for_status()
    (soon,) = [each for each in httpx.get(deployment, timeout=30).json()["schedules"] if each["slug"] == "soon"]
    try:
        eventually((result := library / "upscaled/dropped.mp4").exists, PATIENCE)
    finally:
        httpx.delete(f"{deployment}/schedules/{soon['id']}", timeout=30).raise_for_status()
    ended = eventually(lambda: _completed(installation), PATIENCE)
    assert ended["auto_scheduled"]
    assert ended["parameters"] == nightly["parameters"]
    assert Path(result).stat().st_size > 0


def _completed(installation: Installation) -> dict[str, object] | None:
    return next((run for run in installation.runs("upscale-library") if run["state_name"] == "Completed"), None)
