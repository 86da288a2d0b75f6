"""How the media store is reached, and how what is written there is encrypted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.aws import AwsSettings
from tasks.store.address import Address, split


@dataclass(frozen=True)
class StoreSettings:
    """Settings of the media store; they hold no secret.

    Attributes:
        aws: How to reach it.
        kms_key: Key ID, ARN or alias of the KMS key for what is written; empty for what the bucket does by itself.
        mounts: Pairs of `s3://bucket/prefix` and the folder in which a Lustre file system shows what lies below it.

    Raises:
        SettingsError: A prefix of `mounts` is no address.
    """

    aws: AwsSettings = field(default_factory=AwsSettings)
    kms_key: str = ""
    mounts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for prefix, _ in self.mounts:
            split(prefix)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoreSettings:
        """The settings that `dataclasses.asdict` made `data` from, also after a journey as JSON."""
        mounts = tuple((prefix, folder) for prefix, folder in data["mounts"])
        return cls(AwsSettings(**data["aws"]), data["kms_key"], mounts)

    @property
    def encryption(self) -> dict[str, str]:
        """Arguments of calls that make an object."""
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key} if self.kms_key else {}

    def mount_of(self, address: Address) -> Path | None:
        """Where the object appears as a file, `None` if it does not; nothing says that the file is there already."""
        if "" in address.key.split("/"):  # Two slashes in a row are one in a path: that would be another object.
            return None
        for prefix, folder in sorted(self.mounts, key=lambda mount: -len(mount[0])):
            bucket, below = split(prefix)
            below = below.rstrip("/") + "/" if below.rstrip("/") else ""
            if bucket == address.bucket and address.key.startswith(below):
                return Path(folder) / address.key[len(below) :]
        return None
