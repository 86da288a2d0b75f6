"""Weight files: where they are, how they get there, and that they are the right ones.

    path = locate(find_model("realesr-animevideov3"))

A file is looked for in three places, in this order: bundled with this repository, the folder named by the environment
variable `SUPERRES_MODEL_DIR`, and the user's cache. Nothing is downloaded unless `fetch` is called, which asks a mirror
first if there is one (see `tasks.models.sources`). Whatever the place, size and SHA-256 must be those of the model
card. Nothing here loads torch: `tasks.models.state` reads the weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tasks.errors import ModelError
from tasks.models.cards import BUNDLED_FOLDER, ModelCard
from tasks.models.sources import MissingError, Source, mirror, official

#: Names the folder in which weight files lie, shared by all nodes of a cluster for example.
FOLDER_VARIABLE: Final = "SUPERRES_MODEL_DIR"

#: No network of this family comes near it; what is larger is not a weight file.
_LARGEST_FILE: Final = 2 << 30

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
    """The weight file of `card`, with size and hash checked; of a blend its own one, with both checked.

    Raises:
        ModelError: A file is nowhere, or the one found is not the one its card describes.
    """
    paths = [read_checked(part)[0] for part in card.files]
    return paths[0]


def is_present(card: ModelCard) -> bool:
    """Whether the weight files of `card` are on this machine; `locate` says whether they are the right ones."""
    return all(any(path.is_file() for path in _candidates(part)) for part in card.files)


def content_hash(card: ModelCard) -> str:
    """SHA-256 of the weight file as hex digits: two models are the same if and only if this is. Reads no file.

    That of a blend is made of those of both files and of its strength.
    """
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
    """Get the weights of `card` if they are not here: from the mirror, else from where the card says.

    A download that breaks off is continued where it stopped, in this call and in later ones. The file appears under
    its name only when size and hash are right. Two processes may call this at once.

    Args:
        card: The model. Both files of a blend are fetched.
        progress: Called with bytes done and bytes in all, of one file after the other.

    Returns:
        The checked file; of a blend its own one.

    Raises:
        ModelError: There is nothing to download for this model, no source can be reached or has the file, or what they
            have is not the file the card describes.
        SettingsError: `SUPERRES_MODEL_MIRROR` is neither a folder nor a URL of a kind that is known.
    """
    paths = [_fetch_file(part, progress) for part in card.files]
    return paths[0]


def _fetch_file(card: ModelCard, progress: Callable[[int, int], None] | None) -> Path:
    if is_present(card):
        return locate(card)
    if card.url is None:
        raise _missing(card)
    sources = [source for source in (mirror(card.file_name), official(card.url)) if source is not None]
    folder = _writable_folder()
    target = folder / card.file_name
    part = folder / f"{card.file_name}.part"
    with (folder / f".{card.file_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():  # another process was faster
            return locate(card)
        failures = []
        for source in sources:
            try:
                _download(source, card, part, progress)
                os.replace(part, target)
                return target
            except OSError as error:
                failures.append(f"{source} could not be downloaded: {error}")
            except ModelError as error:
                failures.append(error.problem)
    raise ModelError("; ".join(failures), f"Try again, or put the file by other means here: {target}")


def _download(source: Source, card: ModelCard, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Complete `part` and check it.

    Raises:
        OSError: The source cannot be reached or does not have the file.
        ModelError: It sent another file; nothing of that was kept.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        before = _size(part)
        try:
            _append(source, card, part, progress)
            _check(card, part, read_bytes(part))
            return
        except ModelError as error:
            part.unlink()
            if not before or attempt == _ATTEMPTS:
                raise ModelError(f"{source} sent another file: {error.problem}") from error
            # What was there before may not have been of this file: once more from the start.
        except MissingError:
            raise
        except OSError:
            if attempt == _ATTEMPTS or not (source.patient or _size(part) > before):
                raise


def _append(source: Source, card: ModelCard, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Append to `part` what it lacks.

    Raises:
        OSError: The connection failed or ended early; `MissingError` if the source's file has another size.
        ModelError: The source sent more than it should.
    """
    done = _size(part)
    if done == card.bytes:
        return
    with source.open(done if done < card.bytes else 0) as content:
        if content.size not in (None, card.bytes):
            raise MissingError(f"it offers {content.size} bytes, the model card says {card.bytes}")
        done = content.start
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while block := content.read():
                done += len(block)
                if done > card.bytes:
                    raise ModelError(f"it sent more than the {card.bytes} bytes of the model card")
                file.write(block)
                if progress is not None:
                    progress(done, card.bytes)
    if done < card.bytes:
        raise ConnectionError(f"the connection ended after {done} of {card.bytes} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
    """The first weight file found, with its content, which is the one the card describes. Not for blends.

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
