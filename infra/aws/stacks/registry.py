"""Images of containers: one repository for each of `infra/images`. A tag, once pushed, stays what it is."""

from __future__ import annotations

from typing import Any, Final

from aws_cdk import Stack
from aws_cdk import aws_ecr as ecr
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.keeping import removal
from infra.aws.stacks.roles import local_key
from infra.aws.stacks.security import SecurityStack

#: Images by what runs in them: Prefect's server, and the project itself (portal, workers, models).
IMAGES: Final = ("server", "worker")

#: Images kept of each: some releases back.
_KEPT: Final = 20


class RegistryStack(Stack):
    """The repositories.

    Attributes:
        repositories: By the name of the image.
    """

    def __init__(self, scope: Construct, name: str, profile: Profile, security: SecurityStack, **options: Any) -> None:
        super().__init__(scope, name, **options)
        key = local_key(self, "RecordsKey", security.records)
        self.repositories = {
            image: ecr.Repository(
                self,
                image.capitalize(),
                repository_name=f"superres-{profile.name}/{image}",
                encryption=ecr.RepositoryEncryption.KMS,
                encryption_key=key,
                image_scan_on_push=True,
                image_tag_mutability=ecr.TagMutability.IMMUTABLE,
                lifecycle_rules=[ecr.LifecycleRule(max_image_count=_KEPT)],
                removal_policy=removal(profile),
            )
            for image in IMAGES
        }
