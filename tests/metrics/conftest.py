from __future__ import annotations

from collections.abc import Iterator

import pytest

from tasks.aws import AwsSettings, aws_client
from tests.aws import CREDENTIALS, running_aws


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsSettings]:
    with running_aws() as settings:
        yield settings


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client of services other than `aws` needs in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    aws_client.cache_clear()
