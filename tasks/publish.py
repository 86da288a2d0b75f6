"""Publish: let the verified result appear at its destination, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import DestinationError
from tasks.media.encoders import file_digest
from tasks.plan import Plan, load_plan
from tasks.receipt import write_receipt
from tasks.request import check_destination


@task(name="publish", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def publish(plan: str) -> str:
    """Move the result of the plan at path `plan` to its destination."""
    return publish_result(load_plan(Path(plan)))


def publish_result(plan: Plan) -> str:
    """Link or copy the result beside its destination, check the copy, and rename it.

    Returns:
        The path of the published file.

    Raises:
        DestinationError: It appeared meanwhile, or cannot be written.
    """
    destination = plan.request.destination_path
    check_destination(Path(plan.facts.path), destination, plan.request.overwrite)
    digest = file_digest(plan.result)
    partial = destination.with_name(f".{destination.name}.{plan.key}.partial")
    try:
        _place(plan.result, partial)
        if file_digest(partial) != digest:
            raise DestinationError(f"{destination} reads back differently from what was written", "Check the disk")
        write_receipt(plan.folder, destination, digest)
        os.replace(partial, destination)
    except OSError as error:
        raise DestinationError(
            f"cannot write {destination} ({error.strerror})", "Check space and permissions"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return str(destination)


def _place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where they are on different file systems."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
