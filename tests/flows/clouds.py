"""An AWS on this machine with what the flows need of it, for tests of whole jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.retries.standard
import pytest
from distributed import Client
from prefect_aws import AwsClientParameters, AwsCredentials

from blocks.job_ledger import JobLedger
from blocks.media_store import MediaStore
from flows.cli import main
from flows.parameters import UpscaleOptions
from flows.pools import pools_of_this_machine
from flows.upscale_video import upscale_video
from infra.pools import open_pools
from infra.pools.opening import current_cluster
from infra.prefect_server import ensure_api
from tasks import aws as clients
from tasks.aws import AwsSettings, aws_client
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.dynamodb import create_table
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobRecord
from tasks.store import parts, upload
from tests.aws import CREDENTIALS, running_aws
from tests.flows.jobs import GROUP, make_film

TABLE = "superres-jobs"
NAMESPACE = "MediaSuperResolution"


@dataclass
class Cloud:
    """An AWS with buckets, a table and the blocks that name them, and pools that stay open."""

    aws: AwsSettings
    folder: Path
    home: Path
    film: Path

    @property
    def s3(self) -> Any:
        return aws_client("s3", self.aws)

    @property
    def ledger(self) -> Ledger:
        return open_ledger(LedgerSettings(table=TABLE, aws=self.aws))

    def options(self, **more: Any) -> UpscaleOptions:
        given = {"store": "cloud", "ledger": "cloud", "owner": "ann", "scratch": str(self.folder / "scratch")}
        return UpscaleOptions(**{**given, **more})

    def put(self, key: str, path: Path | None = None) -> str:
        """Put a film into the bucket of videos; gives its URI."""
        self.s3.upload_file(str(path or self.film), "videos", key)
        return f"s3://videos/{key}"

    def upscale(self, source: str, name: str, **options: Any) -> dict[str, Any]:
        """Run the flow in this process; the result is called `name`."""
        return upscale_video(source, f"s3://results/{name}", self.options(**options))

    def command(self, owner: str, *arguments: str) -> int:
        """Run a command of `superres` as somebody, in this process; gives its exit code."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SUPERRES_OWNER", owner)
            return main([*arguments, "--store", "cloud", "--ledger", "cloud"])

    def record(self, result: dict[str, Any]) -> JobRecord:
        return self.ledger.get(result["job_id"], "ann")

    def versions(self, key: str) -> list[str]:
        """Versions of a result."""
        listed = self.s3.list_object_versions(Bucket="results", Prefix=key)
        return [version["VersionId"] for version in listed.get("Versions", [])]

    def unfinished_uploads(self) -> list[Any]:
        return [
            upload
            for bucket in ("videos", "results")
            for upload in self.s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        ]


@contextmanager
def running_cloud(folder: Path) -> Iterator[Cloud]:
    """Run an AWS, a Prefect API and the pools of this machine, with blocks called `cloud`, while the block runs."""
    film = make_film(folder / "film.mp4", 2 * GROUP, "96x64", sound=("aac",))
    with pytest.MonkeyPatch.context() as patch, running_aws() as aws:
        patch.delenv("PREFECT_API_URL", raising=False)  # Not the server that other tests share: it has its own blocks.
        with ensure_api(home=folder / "prefect"):
            _furnish(aws)
            with open_pools(pools_of_this_machine()):
                yield Cloud(aws, folder, folder / "prefect", film)


def _furnish(aws: AwsSettings) -> None:
    """Make buckets that keep versions, a table, and the blocks that name them."""
    s3 = aws_client("s3", aws)
    for bucket in ("videos", "results"):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": aws.region})
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    create_table(aws, TABLE)
    save_blocks(aws)


def save_blocks(aws: AwsSettings) -> None:
    """Save the blocks called `cloud`."""
    credentials = AwsCredentials(
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=aws.region,
        aws_client_parameters=AwsClientParameters(endpoint_url=aws.endpoint_url),
    )
    credentials.save("cloud", overwrite=True)
    credentials = AwsCredentials.load("cloud")
    MediaStore(credentials=credentials).save("cloud", overwrite=True)
    JobLedger(credentials=credentials, table=TABLE, namespace=NAMESPACE).save("cloud", overwrite=True)


def hurry(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make this process give up on AWS within seconds, in the same way as it would within minutes."""
    put(botocore.retries.standard, "NEW_RETRIES_ENABLED", True)  # Shorter pauses, later to be the default.
    put(clients, "_READ_SECONDS", 2)
    put(clients, "_ATTEMPTS", 4)
    for module in (parts, upload):
        put(module, "PAUSES", (0.02, 0.05, 0.1))
    aws_client.cache_clear()


def hurry_workers() -> None:
    """The same for the workers of the open pools."""
    cluster = current_cluster()
    assert cluster is not None
    with Client(cluster) as client:
        client.run(hurry)
