"""Whether everything that a job needs is there: the checks that runs make at their start, all at once, in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from blocks.pools import load_pools
from blocks.site import load_store, load_tracking
from tasks.aws import aws_client
from tasks.errors import LedgerError, ModelError, ScratchError, SettingsError, StoreError, SuperResolutionError
from tasks.ledger import open_ledger
from tasks.media import ffmpeg
from tasks.models.cards import all_cards
from tasks.models.sources import check_mirror
from tasks.models.weights import FOLDER_VARIABLE, is_present, locate
from tasks.request import check_scratch, scratch_folder
from tasks.stage import look_at
from tasks.store.address import Address, split
from tasks.store.errors import code_of, typed_errors
from tasks.store.settings import StoreSettings
from tasks.store.upload import check_destination

#: Seconds for all checks together; what has not answered by then does not answer.
_SECONDS: Final = 20.0

#: Bytes of scratch below which little can be done.
_SCRATCH_BYTES: Final = 10 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    good: bool
    said: str
    """What was found, or what is wrong."""
    remedy: str
    """How to mend it; empty where nothing is wrong."""
    seconds: float


def examine(
    readable: Sequence[str], writable: Sequence[str], pools: str, scratch: str, store: str, ledger: str
) -> list[Check]:
    """Look at everything side by side.

    Args:
        readable: `s3://` URIs of videos that must be readable.
        writable: `s3://` URIs of prefixes into which results must be writable, KMS key included.
        pools: Name of the pools.
        scratch: Folder for chunk files; empty for the pools' own.
        store: Name of the media store's block.
        ledger: Name of the job ledger's block.
    """
    looks: list[tuple[str, Callable[[], str]]] = [
        ("ffmpeg", _ffmpeg),
        ("models", _models),
        ("scratch", lambda: _scratch(scratch, pools)),
        (f"pools {pools}", lambda: _pools(pools)),
        (f"ledger {ledger}".rstrip(), lambda: _ledger(ledger)),
    ]
    if store or readable or writable:
        looks.append((f"store {store}".rstrip(), lambda: _credentials(_hasty(store))))
    looks += [(where, partial(_readable, where, store)) for where in readable]
    looks += [(where, partial(_writable, where, store)) for where in writable]
    deadline = time.monotonic() + _SECONDS
    found: dict[int, Check] = {}

    def look_at_one(number: int) -> None:
        found[number] = _look(*looks[number])

    # Daemons: what never answers must not keep the program from its end.
    # In our context: it says which Prefect API is asked.
    threads = [
        threading.Thread(target=copy_context().run, args=[look_at_one, number], daemon=True)
        for number in range(len(looks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silence = ("does not answer", "Look at its network and its service", _SECONDS)
    return [found.get(number) or Check(name, False, *silence) for number, (name, _) in enumerate(looks)]


def _look(name: str, look: Callable[[], str]) -> Check:
    began = time.monotonic()

    def check(good: bool, said: str, remedy: str = "") -> Check:
        return Check(name, good, said, remedy, round(time.monotonic() - began, 2))

    for attempt in (1, 2, 3):
        try:
            return check(True, look())
        except SuperResolutionError as error:
            # Calls are made once here, and any service refuses one now and then.
            if attempt == 3 or not isinstance(error, StoreError | LedgerError):
                return check(False, error.problem, error.remedy or "")
        except Exception as error:
            return check(False, f"{type(error).__name__}: {error}", "Report this as a fault of this program")
    raise AssertionError


def _hasty(store: str) -> StoreSettings:
    settings = load_store(store)
    return replace(settings, aws=replace(settings.aws, hasty=True))


def _ffmpeg() -> str:
    try:
        return " ".join(ffmpeg.version().split()[1:3])
    except (OSError, RuntimeError, subprocess.CalledProcessError, IndexError) as error:
        raise SettingsError(
            f"ffmpeg does not run ({error})", "Install imageio-ffmpeg anew, or name another one in SUPERRES_FFMPEG"
        ) from error


def _models() -> str:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and not Path(folder).is_dir():
        raise ModelError(f"the folder of models {folder} is not there", f"Mount it, or correct {FOLDER_VARIABLE}")
    elsewhere = next(card for card in all_cards().values() if not card.bundled)
    reached = check_mirror(elsewhere.file_name)
    present = [card.name for card in all_cards().values() if is_present(card)]
    for name in present:
        locate(all_cards()[name])
    said = f"{', '.join(present)} are here and undamaged"
    return f"{said}; the mirror {reached} answers" if reached else said


def _scratch(named: str, pools: str) -> str:
    folder = scratch_folder(named or load_pools(pools).scratch_directory or None)
    free = shutil.disk_usage(check_scratch(folder)).free
    if free < _SCRATCH_BYTES:
        raise ScratchError(
            f"{folder} has only {free / 1e9:.1f} GB free", "See superres housekeeping, or choose another --scratch"
        )
    return f"{folder} has {free / 1e9:.0f} GB free"


def _pools(name: str) -> str:
    block = load_pools(name)
    block.check()
    return block.describe()


def _ledger(name: str) -> str:
    settings = load_tracking(name).ledger
    ledger = open_ledger(replace(settings, aws=replace(settings.aws, hasty=True)))
    ledger.check()
    return f"table {settings.table} can be written" if settings.table else "a file on this machine, can be written"


def _credentials(store: StoreSettings) -> str:
    """Whose credentials they are, if the store accepts them; what they allow is another question."""
    from botocore.exceptions import ClientError

    client = aws_client("s3", store.aws)
    with typed_errors("ask", store.aws.endpoint_url or "S3", StoreError):
        try:
            client.list_buckets()
        except ClientError as error:
            if code_of(error) not in ("AccessDenied", "403"):  # So they are known.
                raise
    return f"accepts the credentials of {f'block {store.aws.credentials}' if store.aws.credentials else 'this machine'}"


def _readable(where: str, store: str) -> str:
    return f"can be read, {look_at(where, _hasty(store)).bytes} bytes"


def _writable(where: str, store: str) -> str:
    (bucket, prefix), settings = split(where), _hasty(store)
    check_destination(settings, Address(bucket, f"{prefix.rstrip('/')}/superres-doctor".lstrip("/")), overwrite=True)
    return "can be written" + (f", encrypted with {settings.kms_key}" if settings.kms_key else "")
