"""How a site reaches S3: `MediaStore`, a block that operators edit in the Prefect UI.

    MediaStore(credentials=AwsCredentials.load("archive"), kms_key="alias/media").save("archive")

A flow or `superres --store archive` then names it. Without one, S3 is reached with the credentials that environment,
profile or the node's role give.
"""

from __future__ import annotations

from prefect.blocks.core import Block
from prefect_aws import AwsCredentials
from pydantic import Field

from tasks.aws import AwsSettings
from tasks.errors import SettingsError
from tasks.store.settings import StoreSettings


class MediaStore(Block):
    """Where videos come from and go to."""

    _block_type_name = "Media store"
    _block_type_slug = "media-store"
    _description = "How to reach S3: credentials, encryption, and which buckets the nodes see as folders."

    credentials: AwsCredentials | None = Field(
        None,
        title="Credentials",
        description="Saved AWS credentials, with their region and endpoint; none for those of environment or node.",
    )
    kms_key: str = Field(
        "", title="KMS key", description="Id, alias or ARN of the key that encrypts results; empty for the bucket's."
    )
    mounts: dict[str, str] = Field(
        default_factory=dict,
        title="Mounts",
        description="Folders under which a Lustre data repository association shows a prefix, such as"
        ' {"s3://archive/in": "/fsx/in"}. What is visible there is not copied.',
    )

    def settings(self) -> StoreSettings:
        """What workers need to know; holds no secret."""
        return StoreSettings(
            aws=aws_settings(self.credentials), kms_key=self.kms_key, mounts=tuple(sorted(self.mounts.items()))
        )


def aws_settings(credentials: AwsCredentials | None) -> AwsSettings:
    """Where saved credentials are to be found, and what they say about region and endpoint.

    Raises:
        SettingsError: They were not saved, so no worker could find them.
    """
    if credentials is None:
        return AwsSettings()
    name = credentials._block_document_name
    if name is None:
        raise SettingsError("the AWS credentials of a block were not saved", "Save them under a name first")
    return AwsSettings(
        region=credentials.region_name or "",
        endpoint_url=credentials.aws_client_parameters.endpoint_url or "",
        credentials=name,
    )
