"""What `prefect.yaml` and the blocks register, on a real server that asks for a password."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import get_current_settings

from blocks.seeds import KINDS
from deployments.bootstrap import CHECKOUT, DEFAULT_QUEUE, SITES, bootstrap, main
from infra.prefect_server import Api, ensure_api
from tasks.errors import BootstrapError

DEPLOYMENTS: Final[list[dict[str, Any]]] = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]
FLOWS: Final = {"upscale-video", "upscale-library", "preview", "evaluate", "flight-check", "housekeeping"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server of its own, with everything registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("SUPERRES_HOME", str(tmp_path_factory.mktemp("home")))
        with ensure_api(home=tmp_path_factory.mktemp("server")) as api:
            bootstrap(SITES)
            yield api


def everything() -> dict[str, Any]:
    """All that the server knows, but for when it was last told."""
    moments = {"updated": True, "status": True, "schedules": {"__all__": {"updated"}}}
    with get_client(sync_client=True) as client:
        found = {
            "deployments": client.read_deployments(limit=200),
            "work pools": client.read_work_pools(),
            "block types": client.read_block_types(),
            "blocks": client.read_block_documents(),
        }
    return {
        kind: sorted((one.model_dump(mode="json", exclude=moments) for one in these), key=lambda one: str(one["id"]))
        for kind, these in found.items()
    }


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: f"{each['entrypoint']}/{each['name']}")
def test_every_entrypoint_loads(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(str(CHECKOUT / deployment["entrypoint"]), use_placeholder_flow=False)
    assert isinstance(flow, Flow)
    assert flow.name in FLOWS
    assert deployment["description"]
    # What a deployment presets is what its flow takes.
    annotation = flow.fn.__annotations__
    given = deployment.get("parameters", {})
    assert given.keys() <= annotation.keys()
    flow.validate_parameters({**_required(flow), **given})


def _required(flow: Flow[..., Any]) -> dict[str, Any]:
    """Something for each parameter that has no default."""
    values = {"string": "x.mp4", "array": ["x.mp4"]}
    return {name: values[flow.parameters.properties[name]["type"]] for name in flow.parameters.required or []}


def test_a_second_time_changes_nothing_not_even_what_operators_did(server: Api) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("housekeeping/local")
        (schedule,) = deployment.schedules
        assert schedule.active
        client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        client.update_work_pool("local", WorkPoolUpdate(concurrency_limit=2))
    before = everything()
    environment = get_current_settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    command = [sys.executable, "-m", "deployments.bootstrap"]
    done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(said["deployments"].split(", ")) == {f"{flow}/{site}" for flow in FLOWS for site in SITES}
    assert said["work pools"] == ", ".join(SITES)
    assert everything() == before


def test_what_is_registered_can_be_left_alone(
    server: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything()
    monkeypatch.setattr(sys, "argv", ["bootstrap", "--site", "slurm", "--work-queue", "slurm-b", "--if-new"])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("registered already: ") and "upscale-video/slurm" in said and "local" not in said
    assert everything() == before


def test_runs_on_slurm_are_of_the_release_that_registered_them(server: Api) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("upscale-video/slurm")
    assert deployment.work_queue_name == DEFAULT_QUEUE
    assert deployment.job_variables["command"] == f"{CHECKOUT}/.venv/bin/python -m prefect.engine"
    assert deployment.job_variables["env"] == {"PYTHONPATH": str(CHECKOUT)}


def test_the_password_is_asked_for(server: Api, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments.bootstrap"]
    wrong = {
        "PREFECT_API_URL": str(server.url),
        "PREFECT_API_AUTH_STRING": "somebody:else",
        "PREFECT_HOME": str(tmp_path),
    }
    done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **wrong}, capture_output=True, text=True)
    assert done.returncode == BootstrapError.exit_code
    assert done.stderr.strip().splitlines() == [
        f"bootstrap: error: {server.url}/ refuses the credentials. Set PREFECT_API_AUTH_STRING."
    ]


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments.bootstrap"]
    nobody = {
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **nobody}, capture_output=True, text=True)
    assert done.returncode == BootstrapError.exit_code
    assert "http://127.0.0.1:9/api/ does not answer" in done.stderr


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"source": "film.mkv"}, "'destination' is a required property"),
        ({"source": "film.mkv", "destination": "film.avi"}, "does not match"),
        ({"source": "", "destination": "out/"}, "source"),
        ({"source": "a.mp4", "destination": "b.mp4", "options": {"scale": 7}}, "7 is not one of [2, 3, 4]"),
        ({"source": "a.mp4", "destination": "b.mp4", "options": {"model": "no-model"}}, "'no-model' is not one of"),
        ({"source": "a.mp4", "destination": "b.mp4", "options": {"height": 1081}}, "1081 is not a multiple of 2"),
        ({"source": "a.mp4", "destination": "b.mp4", "options": {"sclae": 2}}, "'sclae' was unexpected"),
    ],
)
def test_bad_parameters_are_refused_by_the_server_with_the_reason(
    server: Api, parameters: dict[str, Any], reason: str
) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("upscale-video/local")
        with pytest.raises(PrefectHTTPStatusError) as refusal:
            client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        assert client.read_flow_runs(limit=1) == []
    assert reason in refusal.value.response.json()["detail"]


def test_the_command_line_of_prefect_says_the_reason_too(server: Api) -> None:
    environment = get_current_settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    command = [sys.executable, "-m", "prefect", "deployment", "run", "upscale-video/local", "--param", "source=a.mp4"]
    command += ["--param", "destination=b.avi"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not match" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_blocks_save_and_load_and_show_no_secret(server: Api, kind: type[Any]) -> None:
    secret = "this-is-a-secret"
    credentials = {"aws_access_key_id": "AKIA", "aws_secret_access_key": secret, "region_name": "eu-central-1"}
    given = credentials if "aws_secret_access_key" in kind.model_fields else {}
    block = kind(**given)
    block.save("kept", overwrite=True)
    assert kind.load("kept") == block
    with get_client(sync_client=True) as client:
        (shown,) = [
            each for each in client.read_block_documents(include_secrets=False)
            if each.name == "kept" and each.block_type and each.block_type.slug == kind.get_block_type_slug()
        ]  # fmt: skip
    assert secret not in shown.model_dump_json()
