"""Clients of AWS services, made in one place so that all of them give up and try again alike.

Workers make their own from `AwsSettings`, which hold no secret: credentials come from the environment, a profile, the
role of the node, or a block of type AWS Credentials that is named here and loaded where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, cast

from tasks.errors import SettingsError

#: Seconds without a connection, or without a single byte, after which a call is made again.
_CONNECT_SECONDS: Final = 5
_READ_SECONDS: Final = 10

#: Times that one call is made: with the growing pauses between them, about a minute of bad answers is outlived.
_ATTEMPTS: Final = 8

#: The same of calls that are rather left undone than waited for.
_HASTY_SECONDS: Final = 3


@dataclass(frozen=True)
class AwsSettings:
    """How to reach AWS.

    Attributes:
        region: Empty for the one that environment, profile or node name.
        endpoint_url: Of a service that speaks like AWS; empty for AWS itself.
        credentials: Name of a block of type AWS Credentials; empty for environment, profile or the node's role.
        hasty: Whether no call may take a minute, as in checks that somebody waits for.
    """

    region: str = ""
    endpoint_url: str = ""
    credentials: str = ""
    hasty: bool = False


@lru_cache(maxsize=32)
def aws_client(service: str, settings: AwsSettings, *, patient: bool = True) -> Any:
    """A client of boto3 for `service`; one per process, safe to use from several threads.

    Args:
        service: Its name, as boto3 knows it.
        settings: How to reach it.
        patient: Whether a call may take a minute; else it is made once and fails within seconds.

    Raises:
        SettingsError: There is no block of that name.
    """
    # Here: boto3 takes a third of a second to load, and many jobs never leave the machine.
    import boto3
    from botocore.config import Config

    patient = patient and not settings.hasty
    session = _session_of_block(settings.credentials) if settings.credentials else boto3.session.Session()
    config = Config(
        connect_timeout=_CONNECT_SECONDS if patient else _HASTY_SECONDS,
        read_timeout=_READ_SECONDS if patient else _HASTY_SECONDS,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS if patient else 1},
        tcp_keepalive=True,
        # Services that speak like S3 rarely have a host name per bucket.
        s3={"addressing_style": "path"} if settings.endpoint_url else {},
    )
    return session.client(
        service,
        region_name=settings.region or session.region_name or "us-east-1",
        endpoint_url=settings.endpoint_url or None,
        config=config,
    )


def _session_of_block(name: str) -> Any:
    from prefect_aws import AwsCredentials

    try:
        block = cast(AwsCredentials, AwsCredentials.load(name))  # Typed as maybe a coroutine; not here.
    except ValueError as error:
        raise SettingsError(
            f"there is no block of type AWS Credentials called {name!r}", "Save one, or leave the name empty"
        ) from error
    return block.get_boto3_session()
