"""What a site's blocks say, saved in a real Prefect API."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prefect_aws import AwsClientParameters, AwsCredentials

from blocks.job_ledger import JobLedger
from blocks.media_store import MediaStore
from blocks.site import Tracking, load_store, load_tracking
from infra.prefect_server import Api
from tasks.aws import AwsSettings, aws_client
from tasks.errors import SettingsError
from tasks.ledger import LedgerSettings
from tasks.metrics import MetricsSettings
from tasks.store.settings import StoreSettings

AWS = AwsSettings("eu-central-1", "http://127.0.0.1:9", "archive")


def save_credentials() -> AwsCredentials:
    """Saved credentials called `archive`."""
    AwsCredentials(
        aws_access_key_id="known",
        aws_secret_access_key="a-secret-of-the-site",
        region_name="eu-central-1",
        aws_client_parameters=AwsClientParameters(endpoint_url="http://127.0.0.1:9"),
    ).save("archive", overwrite=True)
    credentials = AwsCredentials.load("archive")
    assert isinstance(credentials, AwsCredentials)
    return credentials


def test_an_empty_name_is_this_machine_and_loads_nothing() -> None:
    assert (load_store(""), load_tracking("")) == (StoreSettings(), Tracking())
    code = (
        "import sys; from blocks.site import *; load_store(''), load_tracking('');"
        "print([name for name in ('prefect', 'prefect_aws', 'boto3') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_store_says_where_its_credentials_are_and_nothing_secret(prefect_api: Api) -> None:
    MediaStore(credentials=save_credentials(), kms_key="alias/media", mounts={"s3://archive": "/fsx/a"}).save(
        "archive", overwrite=True
    )
    settings = load_store("archive")
    assert settings == StoreSettings(AWS, "alias/media", (("s3://archive", "/fsx/a"),))
    assert StoreSettings.from_dict({**vars(settings), "aws": vars(AWS)}) == settings
    assert "a-secret-of-the-site" not in repr(settings)
    client = aws_client("s3", settings.aws)
    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    assert client._request_signer._credentials.secret_key == "a-secret-of-the-site"


def test_a_ledger_says_where_records_and_metrics_go(prefect_api: Api) -> None:
    JobLedger(
        credentials=save_credentials(), table="jobs", namespace="Media", portal="https://media.example.com/"
    ).save("archive", overwrite=True)
    assert load_tracking("archive") == Tracking(
        LedgerSettings(table="jobs", aws=AWS), MetricsSettings("Media", aws=AWS), "https://media.example.com"
    )


def test_what_is_missing_is_named(prefect_api: Api) -> None:
    with pytest.raises(SettingsError, match="no block of type Media store called 'nowhere'"):
        load_store("nowhere")
    with pytest.raises(SettingsError, match="no block of type Job ledger called 'nowhere'"):
        load_tracking("nowhere")
    with pytest.raises(SettingsError, match="AWS Credentials called 'nowhere'"):
        aws_client("s3", AwsSettings(credentials="nowhere"))
    with pytest.raises(SettingsError, match="were not saved"):
        MediaStore(credentials=AwsCredentials(region_name="eu-central-1")).settings()
