"""Weight files: where they are, how they get there, and that they are the right ones.

    path = locate(find_model("realesr-animevideov3"))

A file is looked for in three places, in this order: bundled with this repository, the folder named by the environment
variable `SUPERRES_MODEL_DIR`, and the user's cache. Nothing is downloaded unless `fetch` is called. Whatever the place,
size and SHA-256 must be those of the model card. Nothing here loads torch: `tasks.models.state` reads the weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tasks.errors import ModelError
from tasks.models.cards import BUNDLED_FOLDER, ModelCard

#: Names the folder in which weight files lie, shared by all nodes of a cluster for example.
FOLDER_VARIABLE: Final = "SUPERRES_MODEL_DIR"

#: No network of this family comes near it; what is larger is not a weight file.
_LARGEST_FILE: Final = 2 << 30

_BLOCK: Final = 1 << 18
_TIMEOUT_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3


def cache_folder() -> Path:
    """Where `fetch` puts weights unless `SUPERRES_MODEL_DIR` names a writable folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "media-super-resolution" / "models"


def search_folders() -> list[Path]:
    """Folders a weight file may lie in, in the order they are looked at."""
    named = os.environ.get(FOLDER_VARIABLE)
    return [BUNDLED_FOLDER, *([Path(named)] if named else []), cache_folder()]


def locate(card: ModelCard) -> Path:
    """The weight file of `card`, with size and hash checked.

    Raises:
        ModelError: It is nowhere, or the file found is not the one the card describes.
    """
    return read_checked(card)[0]


def is_present(card: ModelCard) -> bool:
    """Whether a weight file of `card` is on this machine; `locate` says whether it is the right one."""
    return any(path.is_file() for path in _candidates(card))


def content_hash(card: ModelCard) -> str:
    """SHA-256 of the weight file as hex digits: two models are the same if and only if this is. Reads no file."""
    return card.sha256


def read_bytes(path: Path) -> bytes:
    """The whole weight file.

    Raises:
        ModelError: It cannot be read or is too large to be one.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ModelError(f"{path} is larger than {_LARGEST_FILE >> 30} GiB", "Give a weight file")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"The weight file {path} cannot be read: {error.strerror or error}", "Check path and permissions"
        ) from error


def fetch(card: ModelCard, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download the weight file of `card` unless it is here already.

    A download that breaks off is continued where it stopped, in this call and in later ones. The file appears under
    its name only when size and hash are right. Two processes may call this at once.

    Args:
        card: The model.
        progress: Called with bytes done and bytes in all.

    Returns:
        The checked file.

    Raises:
        ModelError: There is nothing to download for this model, the server cannot be reached, or what it sent is not
            the file the card describes.
    """
    if is_present(card):
        return locate(card)
    if card.url is None:
        raise _missing(card)
    folder = _writable_folder()
    target = folder / card.file_name
    part = folder / f"{card.file_name}.part"
    with (folder / f".{card.file_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():  # another process was faster
            return locate(card)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _download(card, part, progress)
                break
            except (OSError, http.client.HTTPException) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or attempt == _ATTEMPTS:
                    raise ModelError(
                        f"{card.url} could not be downloaded: {error}",
                        f"Try again, or put the file by other means here: {target}",
                    ) from error
        try:
            _check(card, part, read_bytes(part))
        except ModelError:
            part.unlink()
            raise
        os.replace(part, target)
    return target


def _download(card: ModelCard, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Append to `part` what it lacks.

    Raises:
        OSError: The connection failed or ended early.
        ModelError: The server's file has another size.
    """
    assert card.url is not None
    done = part.stat().st_size if part.exists() else 0
    if done == card.bytes:
        return
    if done > card.bytes:
        part.unlink()
        done = 0
    request = urllib.request.Request(card.url, headers={"User-Agent": "media-super-resolution"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if done and response.status != 206:  # a server without ranges sends everything again
            done = 0
        offered = _total_size(response, done)
        if offered is not None and offered != card.bytes:
            raise ModelError(f"{card.url} offers {offered} bytes, the model card says {card.bytes}", _NOT_THE_FILE)
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while block := response.read(_BLOCK):
                done += len(block)
                if done > card.bytes:
                    break
                file.write(block)
                if progress is not None:
                    progress(done, card.bytes)
    if done > card.bytes:
        part.unlink()
        raise ModelError(f"{card.url} sent more than the {card.bytes} bytes of the model card", _NOT_THE_FILE)
    if done < card.bytes:
        raise ConnectionError(f"the connection ended after {done} of {card.bytes} bytes")


_NOT_THE_FILE: Final = "It was not kept; get the official file by other means"


def _total_size(response: http.client.HTTPResponse, done: int) -> int | None:
    """Size of the whole file as the server states it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != done:
            raise ConnectionError("the server sent another part of the file than was asked for")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdigit() else None


def _writable_folder() -> Path:
    """The named folder if it can be written, else the cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named and os.access(named, os.W_OK | os.X_OK):
        return Path(named)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be created: {error.strerror}", f"Name a folder in {FOLDER_VARIABLE}"
        ) from error
    return folder


def _candidates(card: ModelCard) -> list[Path]:
    """Where the weight file may be, in the order the places are looked at."""
    return [Path(card.path)] if card.path else [folder / card.file_name for folder in search_folders()]


def read_checked(card: ModelCard) -> tuple[Path, bytes]:
    """The first weight file found, with its content, which is the one the card describes.

    Raises:
        ModelError: There is none, or it is another file.
    """
    for path in _candidates(card):
        if path.is_file():
            data = read_bytes(path)
            _check(card, path, data)
            return path, data
    raise _missing(card)


def _check(card: ModelCard, path: Path, data: bytes) -> None:
    """Size and hash against the card.

    Raises:
        ModelError: They differ.
    """
    if card.bundled:
        remedy = "After changing bundled weights run python -m tasks.models.cards refresh-bundled"
    else:
        remedy = "Delete it and get it again: it is damaged, or is another version"
    if len(data) != card.bytes:
        raise ModelError(f"{path} has {len(data)} bytes, {card.name} needs {card.bytes}", remedy)
    if (found := hashlib.sha256(data).hexdigest()) != card.sha256:
        raise ModelError(f"{path} has SHA-256 {found}, {card.name} needs {card.sha256}", remedy)


def _missing(card: ModelCard) -> ModelError:
    if card.path:
        return ModelError(f"The weight file {card.path} does not exist", "Check the path")
    problem = f"The weights of {card.name} are not on this machine ({card.file_name}, {card.bytes} bytes)"
    if card.url is None:
        return ModelError(problem, f"Put the file into {search_folders()[0]}")
    return ModelError(
        problem,
        f"Run superres models fetch {card.name}, or download {card.url} and put it into {search_folders()[-1]}"
        f" or into a folder named by {FOLDER_VARIABLE}",
    )
