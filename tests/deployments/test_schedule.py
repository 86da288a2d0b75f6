"""A schedule that fires: its run is started by the worker and succeeds."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.flows.jobs import PATIENCE
from tests.flows.libraries import make_clip
from tests.installation import Installation
from tests.waiting import eventually


def test_a_scheduled_sweep_upscales_what_was_dropped_into_the_folder(installation: Installation) -> None:
    library = installation.home / "library"
    make_clip(library / "videos/dropped.mp4", 5)
    with (
        temporary_settings({PREFECT_API_URL: installation.api, PREFECT_API_AUTH_STRING: None}),
        get_client(sync_client=True) as client,
    ):
        deployment = client.read_deployment_by_name("upscale-library/local")
        (nightly,) = deployment.schedules
        often = DeploymentScheduleCreate(
            schedule=IntervalSchedule(interval=timedelta(seconds=5)),
            parameters=nightly.parameters,
            max_scheduled_runs=1,
            slug="soon",
        )
        client.create_deployment_schedules(deployment.id, [often])
        try:
            eventually((library / "upscaled/dropped.mp4").exists, PATIENCE)
        finally:
            for schedule in client.read_deployment_schedules(deployment.id):
                if schedule.slug == "soon":
                    client.delete_deployment_schedule(deployment.id, schedule.id)

        def completed() -> dict[str, object] | None:
            runs = installation.runs("upscale-library")
            return next((run for run in runs if run["state_name"] == "Completed"), None)

        run = eventually(completed, PATIENCE)
    assert run["auto_scheduled"]
    assert run["parameters"] == nightly.parameters
    assert (library / "upscaled/dropped.mp4").stat().st_size > 0
