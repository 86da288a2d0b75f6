"""Scratch: who holds a job's folder, which folders nobody needs any more, and how they are removed.

Scratch has one folder per job, named by its key, and one per staged source, under `sources`. Whoever works on either
holds a lock on the file `lock` in it, so what is locked is never removed. Nothing is removed but what this project
writes: a video that somebody keeps in scratch stays. Links are removed, never followed.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tasks.errors import ScratchError
from tasks.media.chunk_file import remove_leftover

#: Folder in scratch for sources that were downloaded.
SOURCES: Final = "sources"

#: Who is alone in a folder notes its process here and locks the file. It is the last file to go.
_LOCK: Final = "lock"

#: Lists the ids of the jobs that a folder serves or served.
_JOBS: Final = "jobs"

#: Folders of jobs that threads of this process hold.
_own: Final[set[Path]] = set()
_own_changed: Final = threading.Condition()

_FOLDER: Final = re.compile(r"[0-9a-f]{16}")

#: What this project writes into the folder of a job, and into that of a staged source. A file that is being written
#: has `.partial` behind its name, or in place of its ending.
_OF_JOB: Final = re.compile(
    r"((extract|upscale)-\d{7,}-\d{7,}-[0-9a-f]{12}\.yuv|encode-\d{7,}-\d{7,}-[0-9a-f]{12}\.mkv(\.json)?"
    r"|plan-[0-9a-f]{12}(\.json|\.safetensors)?|calibration-\d+(\.json)?|int8-[0-9a-f]+\.safetensors|sample\.yuv"
    r"|evaluate-\d{4}-(given|reference|result-\d{4})\.yuv"
    r"|picture-\d{7,}\.jpg"
    r"|result\.\w+|receipt\.json|upload\.json|publish\.progress|comparison\.jpg|jobs)(\.partial(-\w+)?)?"
)
_OF_SOURCE: Final = re.compile(r"source(\..*)?|staging\.progress|download\.lock|jobs", re.DOTALL)

#: Stands in the lock of a folder that is being removed. Whoever wants the folder waits, and makes it anew.
_REMOVING: Final = "removal"

#: Seconds to wait for a removal: a file system of the network may take that long for a folder of thousands of files.
_REMOVAL_SECONDS: Final = 600.0

#: Seconds in which whoever has just locked a folder says who it is, or only looked whether it is locked.
_MOMENT_SECONDS: Final = 1.0


@contextmanager
def own_job(folder: Path, *, fresh: bool = False) -> Iterator[None]:
    """Create a job's folder and hold it for this process; unfinished files of earlier attempts are removed.

    Args:
        folder: The job's folder.
        fresh: Remove finished chunks too.

    Raises:
        ScratchError: Another process works on the same job, or the folder cannot be made. Another thread is waited for:
            two videos of one library may have the same content.
    """
    with _one_thread_in(folder), hold(folder, fcntl.LOCK_EX) as lock:
        _sign(lock, str(os.getpid()))
        for path in _ours(folder):
            if ".partial" in path.name or (fresh and path.name != _JOBS):
                remove_leftover(path)
        try:
            yield
        finally:
            # Closing is not enough: a process that another thread is just starting has the file open too for a moment.
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def _one_thread_in(folder: Path) -> Iterator[None]:
    with _own_changed:
        _own_changed.wait_for(lambda: folder not in _own)
        _own.add(folder)
    try:
        yield
    finally:
        with _own_changed:
            _own.discard(folder)
            _own_changed.notify_all()


def hold(folder: Path, mode: int) -> IO[str]:
    """Lock a folder, which is made if it is not there.

    Args:
        folder: The folder.
        mode: `fcntl.LOCK_EX` to be alone, `fcntl.LOCK_SH` to share it.

    Returns:
        The open file that holds the lock.

    Raises:
        ScratchError: Another process is alone in it, or it cannot be made.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _open_lock(folder, os.O_CREAT)
        except OSError as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and waited < _MOMENT_SECONDS:
                continue  # Removed since it was made, or found.
            raise ScratchError(
                f"cannot use scratch folder {folder} ({error.strerror})", "Choose another --scratch"
            ) from error
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with lock:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
            if waited < (_REMOVAL_SECONDS if holder == _REMOVING else _MOMENT_SECONDS):
                time.sleep(0.02)
                continue
            raise ScratchError(
                f"the same job is already running (process {holder})", "Wait for it or stop it first"
            ) from error
        except OSError as error:
            lock.close()
            raise ScratchError(
                f"cannot lock {folder} ({error.strerror})", "Mount scratch with locks: Lustre with -o flock"
            ) from error
        if _is_current(lock, folder):
            return lock
        lock.close()  # Whoever removed the folder held the lock; now it can be made anew.


def note_job(folder: Path, job_id: str) -> None:
    """Note in a folder which job it serves, for `find_leftovers`."""
    with suppress(OSError), (folder / _JOBS).open("a") as file:
        file.write(f"{job_id}\n")


@dataclass(frozen=True)
class Leftover:
    """A folder that nobody works in."""

    folder: Path
    bytes: int
    """That its removal frees."""
    touched: float
    """When anything in it was last written, seconds since the epoch."""
    job_ids: tuple[str, ...]
    """The jobs it served."""


def find_leftovers(scratch: Path) -> Iterator[Leftover]:
    """The folders of jobs and staged sources that nobody works in.

    Raises:
        ScratchError: Scratch cannot be read.
    """
    sources = scratch / SOURCES
    staged = _folders(sources) if sources.is_dir() and not sources.is_symlink() else []
    for folder in [*_folders(scratch), *staged]:
        try:
            leftover = None if _is_held(folder) else _look(folder)
        except OSError:
            continue  # It is no folder of ours, or went away.
        if leftover is not None:
            yield leftover


def remove(leftover: Leftover) -> int | None:
    """Remove what this project wrote into a folder, and the folder if that was all.

    Returns:
        Bytes freed; `None` if somebody works in it again, or did since it was found.
    """
    folder = leftover.folder
    try:
        with _open_lock(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = _look(folder)
            if before.touched > leftover.touched or not _is_current(lock, folder):
                return None
            _clear(folder, lock)
        return before.bytes - (_look(folder).bytes if folder.exists() else 0)
    except FileNotFoundError:
        with suppress(OSError):  # Of somebody who was killed between making it and locking it.
            folder.rmdir()
        return 0
    except OSError:
        return None


def give_up(folder: Path, lock: IO[str] | None = None, *, keep: Collection[str] = ()) -> None:
    """Remove a folder whose job or source is done, unless somebody else works in it. What cannot be removed stays.

    Args:
        folder: The folder.
        lock: What `hold` gave for it, if this process holds it.
        keep: Names of files that stay, and the folder with them.
    """
    try:
        with lock or _open_lock(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(lock, folder):
                _clear(folder, lock, keep)
    except OSError:
        return


def _clear(folder: Path, lock: IO[str], keep: Collection[str] = ()) -> None:
    """Remove our files from a folder that is locked; the lock last, so that nobody begins anew in between."""
    _sign(lock, _REMOVING)
    for path in _ours(folder):
        if path.name not in keep:
            with suppress(OSError):
                remove_leftover(path)
    if any(True for _ in _ours(folder)):
        return
    (folder / _LOCK).unlink()
    with suppress(OSError):  # Somebody else's files are in it.
        folder.rmdir()


def _open_lock(folder: Path, flags: int = 0) -> IO[str]:
    return os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o666), "r+")


def _sign(lock: IO[str], holder: str) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(holder)
    lock.flush()


def _is_current(lock: IO[str], folder: Path) -> bool:
    """Whether a lock is still that of its folder, which may have been removed and made anew."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).lstat())
    except FileNotFoundError:
        return False


def _is_held(folder: Path) -> bool:
    """Whether somebody works in a folder, or it is none of ours."""
    try:
        with _open_lock(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return any(folder.iterdir())


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if _FOLDER.fullmatch(path.name) and not path.is_symlink())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ScratchError(f"cannot read {parent} ({error.strerror})", "Check its permissions") from error


def _ours(folder: Path) -> Iterator[Path]:
    """What this project wrote into a folder, without the lock."""
    kinds = (_OF_JOB, _OF_SOURCE) if folder.parent.name == SOURCES else (_OF_JOB,)
    return (path for path in list(folder.iterdir()) if any(kind.fullmatch(path.name) for kind in kinds))


def _look(folder: Path) -> Leftover:
    paths = [path for path in folder.iterdir() if path.name != _LOCK]
    touched = max((path.lstat().st_mtime for path in paths), default=folder.stat().st_mtime)
    jobs: list[str] = []
    with suppress(OSError):
        jobs = (folder / _JOBS).read_text(errors="replace").split()
    return Leftover(folder, sum(map(_size, _ours(folder))), touched, tuple(dict.fromkeys(jobs)))


def _size(path: Path) -> int:
    """Bytes that the removal of a file or folder frees: not holes, nor what has another name, as a result may have."""
    if path.is_dir() and not path.is_symlink():
        return sum(map(_size, path.iterdir()))
    status = path.lstat()
    return 512 * status.st_blocks if status.st_nlink == 1 else 0
