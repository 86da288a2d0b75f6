"""Where a site keeps the records of its jobs and its metrics: `JobLedger`, a block.

    JobLedger(table="superres-jobs", namespace="MediaSuperResolution").save("production")

A flow or `superres --ledger production` then names it. Without one, both are files on this machine.
"""

from __future__ import annotations

from prefect.blocks.core import Block
from prefect_aws import AwsCredentials
from pydantic import Field

from blocks.media_store import aws_settings
from blocks.site import Tracking
from tasks.ledger import LedgerSettings
from tasks.metrics import MetricsSettings


class JobLedger(Block):
    """Records of jobs, and metrics."""

    _block_type_name = "Job ledger"
    _block_type_slug = "job-ledger"
    _description = "Records of jobs in DynamoDB or a file, metrics in CloudWatch or a file for Prometheus."

    table: str = Field("", title="DynamoDB table", description="Of the records; empty for a file.")
    file: str = Field("", title="File", description="Of the records, SQLite; empty for the usual place.")
    namespace: str = Field("", title="CloudWatch namespace", description="Of the metrics; empty for a file.")
    metrics_file: str = Field(
        "", title="Metrics file", description="In Prometheus' text format; empty for the usual place."
    )
    credentials: AwsCredentials | None = Field(
        None,
        title="Credentials",
        description="Saved AWS credentials, with their region and endpoint; none for those of environment or node.",
    )

    portal: str = Field(
        "",
        title="Portal",
        description="Address at which owners get their results, such as https://media.example.com; see"
        " docs/archive.md. Runs then show a link; it works for the job's owner alone.",
    )

    def settings(self) -> Tracking:
        """How to open both."""
        aws = aws_settings(self.credentials)
        return Tracking(
            LedgerSettings(file=self.file, table=self.table, aws=aws),
            MetricsSettings(namespace=self.namespace, file=self.metrics_file, aws=aws),
            self.portal.rstrip("/"),
        )
