"""Publish: let the verified result appear at its destination, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.destinations import Output
from tasks.failures import at
from tasks.media.encoders import file_digest
from tasks.plan import Plan, load_plan
from tasks.progress import TransferNote
from tasks.receipt import published, write_receipt


@task(name="publish", task_run_name="publish", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def publish(plan: str, notes: dict[str, str]) -> Output:
    """Bring the result of the plan at path `plan` to its destination; `notes` are kept beside an object."""
    with at("publish"):
        return publish_result(load_plan(Path(plan)), notes)


def publish_result(plan: Plan, notes: dict[str, str]) -> Output:
    """Check the destination once more, leave a receipt, and put the result there.

    Raises:
        DestinationError: Something appeared there meanwhile, or it cannot be written.
        StoreError: The store failed for too long, or gives something else back.
    """
    destination = plan.destination
    if (output := published(plan.folder, destination)) is not None:  # By a worker that was lost right after it.
        return output
    destination.check(Path(plan.facts.path), overwrite=plan.request.overwrite)
    digest = file_digest(plan.result)
    write_receipt(plan.folder, destination, digest)
    return destination.put(
        plan.result,
        digest,
        overwrite=plan.request.overwrite,
        notes=notes,
        progress=TransferNote(plan.publishing).write,
    )
