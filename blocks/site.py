"""What a site's blocks say, by their names. An empty name stands for this machine, and asks no API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from tasks.errors import SettingsError
from tasks.ledger import LedgerSettings
from tasks.metrics import MetricsSettings
from tasks.store.settings import StoreSettings

if TYPE_CHECKING:
    from prefect.blocks.core import Block

    Kind = TypeVar("Kind", bound=Block)


@dataclass(frozen=True)
class Tracking:
    """Where records and metrics of jobs go, and where their owners get results.

    Attributes:
        ledger: How to open the job ledger.
        metrics: How to open the metrics.
        portal: Address of the portal; empty where there is none.
    """

    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    portal: str = ""


def load_store(name: str) -> StoreSettings:
    """What the media store of this name says; for an empty name, the machine's own credentials.

    Raises:
        SettingsError: There is no such block.
    """
    if not name:
        return StoreSettings()
    # Here, as below: the block loads all of prefect-aws, which takes a second.
    from blocks.media_store import MediaStore

    return _load(MediaStore, name).settings()


def load_tracking(name: str) -> Tracking:
    """What the job ledger of this name says; for an empty name, files on this machine.

    Raises:
        SettingsError: There is no such block.
    """
    if not name:
        return Tracking()
    from blocks.job_ledger import JobLedger

    return _load(JobLedger, name).settings()


def _load(kind: type[Kind], name: str) -> Kind:
    from prefect.exceptions import ObjectNotFound

    try:
        found = kind.load(name)
    except (ValueError, ObjectNotFound) as error:
        called = kind._block_type_name
        raise SettingsError(
            f"there is no block of type {called} called {name!r}", "Save one, or leave it out"
        ) from error
    assert isinstance(found, kind)
    return found
