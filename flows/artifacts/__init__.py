"""What a run shows in the Prefect UI: how far it is, a picture, and at its end a page and a table.

All of it is for people: where the server does not take it, the run goes on without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging import get_run_logger


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show something in the block; if that fails, whatever the reason, it is logged and that is all."""
    try:
        yield
    except Exception as error:
        get_run_logger().debug("%s could not be shown: %r", what, error)
