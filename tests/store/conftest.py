"""A bucket of an AWS on this machine, reached through a proxy that can break calls."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tasks.aws
from tasks.aws import aws_client
from tasks.store import download, parts, upload
from tasks.store.address import Address
from tasks.store.settings import StoreSettings
from tests.aws import running_aws
from tests.fault_proxy import FaultProxy, running_proxy

#: Bytes of a part in these tests.
PART = 1 << 16


@dataclass
class Store:
    """The store as code under test reaches it (`settings`), and as the test does (`client`), past the proxy."""

    settings: StoreSettings
    proxy: FaultProxy
    client: Any
    bucket: str

    def address(self, key: str = "films/film.mp4") -> Address:
        return Address(self.bucket, key)

    def put(self, content: bytes, key: str = "films/film.mp4", **arguments: Any) -> Address:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content, **arguments)
        return self.address(key)

    def get(self, address: Address) -> bytes | None:
        try:
            return bytes(self.client.get_object(Bucket=address.bucket, Key=address.key)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return None

    def versions(self, address: Address) -> int:
        listed = self.client.list_object_versions(Bucket=self.bucket, Prefix=address.key)
        return len(listed.get("Versions", []))

    def unfinished(self) -> int:
        """Multipart uploads that were neither completed nor aborted."""
        return len(self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))

    def keep_versions(self) -> None:
        self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})


@pytest.fixture(scope="package")
def _service() -> Iterator[tuple[StoreSettings, FaultProxy, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        # Both sides as they are, only faster: S3 wants parts of 5 MiB.
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        patch.setattr("botocore.retries.standard.NEW_RETRIES_ENABLED", True)  # Shorter pauses, later to be the default.
        patch.setattr(tasks.aws, "_READ_SECONDS", 1)
        patch.setattr(tasks.aws, "_ATTEMPTS", 3)
        for module in (parts, upload):
            patch.setattr(module, "PAUSES", (0.02, 0.05, 0.1))
        for module in (download, upload):
            patch.setattr(module, "PART_BYTES", PART)
        with running_aws() as aws, running_proxy(aws.endpoint_url) as proxy:
            yield StoreSettings(replace(aws, endpoint_url=proxy.url)), proxy, aws_client("s3", aws)


@pytest.fixture
def store(_service: tuple[StoreSettings, FaultProxy, Any], request: pytest.FixtureRequest) -> Iterator[Store]:
    settings, proxy, client = _service
    proxy.clear()
    bucket = f"bucket-{abs(hash(request.node.nodeid)):x}"
    client.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield Store(settings, proxy, client, bucket)
    proxy.clear()


@pytest.fixture
def content() -> bytes:
    """Four parts and a bit."""
    return random.Random(0).randbytes(4 * PART + 100)


@pytest.fixture
def film(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    return path
