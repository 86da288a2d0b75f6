"""Having a source where the workers of a run can read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.stopping import result_of_task
from tasks.stage import Source, held, on_mount, stage
from tasks.store.settings import StoreSettings


@contextmanager
def reachable(
    source: Source,
    scratch: Path,
    store: StoreSettings,
    holder: str,
    wait: Callable[[PrefectFuture[Any]], str] = result_of_task,
) -> Iterator[str]:
    """Have a source where all workers can read it while the block runs: an object is staged, or seen on the mount.

    Args:
        source: The source.
        scratch: Where objects are staged.
        store: How to reach S3.
        holder: Id of the job or run that needs a staged object.
        wait: Gives what the task run that stages it returns.

    Yields:
        Its path.
    """
    if not source.is_stored:
        yield source.uri
    elif (visible := on_mount(source, store)) is not None:
        get_run_logger().info("%s is visible at %s and is not copied", source.uri, visible)
        yield str(visible)
    else:
        with held(source, scratch, holder):
            yield wait(stage.submit(source, str(scratch), store))
