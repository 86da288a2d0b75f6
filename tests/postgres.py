"""A PostgreSQL of its own for a test: that of this machine, or the one that Debian packages bring."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from infra import debian
from tests.ports import free_port
from tests.waiting import eventually

#: PostgreSQL does not run as root.
_USER: Final = "nobody"


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server on a free port of 127.0.0.1 while the block runs; gives the URL of an empty database."""
    installed = _installed()
    tree = None if installed else _unpacked()
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam(_USER)
        as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    port = free_port()
    # Not below the folder of the test, which the other user may not enter.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if as_user:
            os.chown(folder, as_user["user"], as_user["group"])
        programs, environment = installed or Path(), dict(os.environ)
        if tree is not None:
            # The other user may not look into the home of this one.
            shutil.copytree(tree, folder / "programs", symlinks=True, copy_function=_link)
            programs = next(folder.glob("programs/usr/lib/postgresql/*/bin"))
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, debian.libraries(folder / "programs")))
        data = folder / "data"
        made = subprocess.run(
            [programs / "initdb", "--username=prefect", "--auth=trust", "--no-sync", "--locale=C.UTF-8", "-D", data],
            env=environment, cwd="/", capture_output=True, text=True, check=False, **as_user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": name, "fsync": "off"}
        command = [programs / "postgres", "-D", data, *(f"--{option}={value}" for option, value in options.items())]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, **as_user)
        try:
            eventually(lambda: server.poll() is None and _answers(port))
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # Ends sessions instead of waiting for them.
            server.wait(30)


def _installed() -> Path | None:
    """The folder of the programs of this machine."""
    own = [Path(found).parent for found in [shutil.which("initdb")] if found]
    for folder in [*own, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder.resolve()
    return None


def _unpacked() -> Path:
    """Where packages of Debian that bring the programs are unpacked."""
    cache = debian.cache_folder("postgres")
    tree = cache / debian.release()
    try:
        with debian.locked(cache):
            if not tree.is_dir():
                debian.fetch(["postgresql"], tree)
    except (debian.PackagesError, OSError) as error:
        pytest.skip(f"PostgreSQL is not installed, and could not be fetched ({error})")
    return tree


def _link(source: str, target: str) -> None:
    """Hundreds of megabytes need not be copied where a second name does."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
