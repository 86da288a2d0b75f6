"""What a preview refuses before anything is started, and quickly: neither Prefect nor Dask are needed for it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from flows.parameters import PreviewOptions
from tasks.chunks import Capacity
from tasks.errors import DestinationError, SettingsError
from tasks.home import default_home
from tasks.request import CheckedRequest, check_content, check_request
from tasks.store.settings import StoreSettings


def check_models(
    path: str,
    options: PreviewOptions,
    capacity: Capacity | None = None,
    store: StoreSettings = StoreSettings(),  # noqa: B008
    scratch: str = "",
) -> list[CheckedRequest]:
    """Refuse what cannot be previewed, for all models, before anything is started. Reads the source once.

    Args:
        path: Of the video.
        options: Of the preview.
        capacity: Of the pools it will run on.
        store: How to reach S3.
        scratch: Folder for chunk files.

    Raises:
        SuperResolutionError: What is wrong.
    """
    if not options.compared:
        raise SettingsError("no model is named", "Name at least one")
    goes_on = bool(options.approve and options.destination)
    checked: list[CheckedRequest] = []
    for model in options.compared:
        request = replace(options.request(path, model, options.destination), scratch=scratch or None)
        checked.append(check_request(request, capacity, store, publishes=goes_on))
        if any(checked[-1].card == other.card for other in checked[:-1]):
            raise SettingsError(f"model {checked[-1].card.name} is named twice", "Name each model once")
    check_content(checked[0])
    return checked


def pictures_folder(options: PreviewOptions, name: str, run_id: str) -> Path:
    """Where the pictures of a preview are kept."""
    if options.folder:
        return Path(options.folder).expanduser().absolute()
    return default_home() / "previews" / f"{name}-{run_id[:8]}"


def check_folder(folder: Path) -> None:
    """Refuse a folder for pictures that cannot be written; makes nothing.

    Raises:
        DestinationError: Why not.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise DestinationError(f"{folder} is no folder", "Choose another folder for the pictures")
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise DestinationError(
            f"cannot write pictures into {folder} ({error.strerror})", "Choose another folder for them"
        ) from error
