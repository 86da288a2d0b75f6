"""Credentials of a cluster as files: who can read them, when they are gone, and that they open the right door."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from distributed.comm import connect, listen
from distributed.security import Security

from infra.pools import Pool, SlurmWorker, open_pools
from infra.pools.credentials import credential_files, temporary_security
from tasks.errors import PoolError

ROOT: Final = Path(__file__).parents[2]

#: An address of another machine (RFC 5737): no scheduler of this one can listen on it.
ELSEWHERE: Final = "203.0.113.1"

#: A process that holds credentials until its input ends.
HOLD: Final = """
import pathlib, sys
from infra.pools.credentials import credential_files, temporary_security
with credential_files(temporary_security(), pathlib.Path(sys.argv[1])) as files:
    print(files.tls_ca_file, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


class TestFiles:
    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
    def test_only_their_owner_can_read_them(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            with credential_files(temporary_security(), tmp_path) as files:
                folder = Path(files.tls_ca_file).parent
                assert folder.parent == tmp_path
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
                assert modes == {"ca_file.pem": 0o600, "cert.pem": 0o600, "key.pem": 0o600}
        finally:
            os.umask(before)

    def test_hold_what_was_in_other_files(self, tmp_path: Path) -> None:
        memory = temporary_security()
        with credential_files(memory, tmp_path) as own, credential_files(own, tmp_path / "copies") as copies:
            assert Path(copies.tls_worker_key).read_text() == memory.tls_worker_key
            assert Path(copies.tls_ca_file).read_text() == memory.tls_ca_file

    def test_hold_what_was_in_memory(self, tmp_path: Path) -> None:
        memory = temporary_security()
        with credential_files(memory, tmp_path) as files:
            assert files.require_encryption
            assert Path(files.tls_ca_file).read_text() == memory.tls_ca_file
            assert Path(files.tls_worker_cert).read_text() == memory.tls_worker_cert
            assert Path(files.tls_worker_key).read_text() == memory.tls_worker_key

    def test_worker_is_told_where_they_are(self, tmp_path: Path) -> None:
        with credential_files(temporary_security(), tmp_path) as files:
            paths = files.get_tls_config_for_role("worker")
            assert all(Path(paths[part]).is_absolute() for part in ("ca_file", "cert", "key"))

    def test_are_gone_at_the_end(self, tmp_path: Path) -> None:
        folder = tmp_path / "made" / "for" / "this"
        with credential_files(temporary_security(), folder):
            assert len(names(folder)) == 1
        assert names(folder) == set()

    def test_are_gone_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), credential_files(temporary_security(), tmp_path):
            raise KeyboardInterrupt
        assert names(tmp_path) == set()

    def test_may_be_gone_before_the_end(self, tmp_path: Path) -> None:
        with credential_files(temporary_security(), tmp_path) as files:
            for path in Path(files.tls_ca_file).parent.iterdir():
                path.unlink()
            Path(files.tls_ca_file).parent.rmdir()
        assert names(tmp_path) == set()

    def test_of_two_clusters_lie_side_by_side(self, tmp_path: Path) -> None:
        with credential_files(temporary_security(), tmp_path) as first:
            with credential_files(temporary_security(), tmp_path) as second:
                assert first.tls_worker_key != second.tls_worker_key
                assert Path(first.tls_worker_key).read_text() != Path(second.tls_worker_key).read_text()
            assert Path(first.tls_worker_key).exists()
            assert not Path(second.tls_worker_key).exists()


@pytest.fixture
def holder() -> Iterator[Callable[[Path], tuple[subprocess.Popen[str], Path]]]:
    """Starts processes that hold credentials; ends them."""
    started: list[subprocess.Popen[str]] = []

    def start(directory: Path) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(directory)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip()).parent

    yield start
    for process in started:
        process.kill()
        process.communicate()


class TestLeftovers:
    def test_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(
        self, tmp_path: Path, holder: Callable[[Path], tuple[subprocess.Popen[str], Path]]
    ) -> None:
        killed, left = holder(tmp_path)
        living, kept = holder(tmp_path)
        killed.kill()
        killed.wait()
        assert names(tmp_path) == {left.name, kept.name}
        with credential_files(temporary_security(), tmp_path):
            assert not left.exists()
            assert names(kept) == {"ca_file.pem", "cert.pem", "key.pem"}
        assert names(tmp_path) == {kept.name}
        living.communicate()
        assert living.returncode == 0
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("other", ["another-node", f"{socket.gethostname()}-2", f"{socket.gethostname()}2"])
    def test_of_other_machines_are_left_alone(
        self, tmp_path: Path, holder: Callable[[Path], tuple[subprocess.Popen[str], Path]], other: str
    ) -> None:
        """Whether a process of another machine lives cannot be seen here; its name may begin like this one's."""
        process, folder = holder(tmp_path)
        process.kill()
        process.wait()
        theirs = folder.rename(tmp_path / folder.name.replace(f"-{socket.gethostname()}-", f"-{other}-"))
        assert theirs != folder
        with credential_files(temporary_security(), tmp_path):
            assert names(theirs) == {"ca_file.pem", "cert.pem", "key.pem"}

    def test_everything_else_in_the_folder_is_left_alone(self, tmp_path: Path) -> None:
        ours = {"notes.txt", ".superres-tls-", f".superres-tls-{socket.gethostname()}-notes", ".superres"}
        for name in ours:
            (tmp_path / name).mkdir()
        with credential_files(temporary_security(), tmp_path):
            assert names(tmp_path) > ours
        assert names(tmp_path) == ours


@pytest.fixture(params=["below-a-file", "proc"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that nobody can make, root neither."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "shared" if request.param == "below-a-file" else Path("/proc/nowhere/shared")


def slurm_pool(shared: Path, **options: Any) -> Pool:
    """A pool of jobs, of which none will be started."""
    start = SlurmWorker(shared_directory=shared, log_directory=shared, partition="gpu", **options)
    return Pool("gpu", start=start)


class TestRefusals:
    def test_folder_that_cannot_be_made_is_named(self, unwritable: Path) -> None:
        with pytest.raises(PoolError) as refusal, credential_files(temporary_security(), unwritable):
            pytest.fail("there is no such folder")
        assert f"cannot write credentials into {unwritable} (" in str(refusal.value)

    def test_pools_that_need_it_do_not_open(self, unwritable: Path) -> None:
        with (
            pytest.raises(PoolError, match="cannot write credentials"),
            open_pools([slurm_pool(unwritable, host="127.0.0.1")], warm=False),
        ):
            pytest.fail("opened without credentials")

    def test_nothing_is_left_of_pools_that_do_not_open(self, tmp_path: Path) -> None:
        with (
            pytest.raises((PoolError, RuntimeError), match="start"),
            open_pools([slurm_pool(tmp_path, host=ELSEWHERE)], warm=False),
        ):
            pytest.fail("opened on somebody else's address")
        assert names(tmp_path) == set()

    def test_scheduler_that_cannot_start_is_reported_in_the_projects_words(self, tmp_path: Path) -> None:
        with (
            pytest.raises(PoolError, match=re.escape(ELSEWHERE)),
            open_pools([slurm_pool(tmp_path, host=ELSEWHERE)], warm=False),
        ):
            pytest.fail("opened on somebody else's address")

    def test_pools_hold_them_while_they_are_open(self, tmp_path: Path) -> None:
        with open_pools([slurm_pool(tmp_path, host="127.0.0.1")], warm=False):
            (folder,) = tmp_path.iterdir()
            assert names(folder) == {"ca_file.pem", "cert.pem", "key.pem"}
        assert names(tmp_path) == set()


class TestConnections:
    """A server with the credentials in memory, as the scheduler has them."""

    async def ask(self, server: Security, ask: Callable[[str], Any]) -> tuple[Any, list[Any]]:
        """What `ask` returns or raises for the address of a server, and what this server was told."""
        told: list[Any] = []

        async def answer(comm: Any) -> None:
            told.append(await comm.read())
            await comm.write("welcome")

        listener = await listen("tls://127.0.0.1:0", answer, **server.get_listen_args("scheduler"))
        try:
            return await ask(listener.contact_address), told
        finally:
            listener.stop()

    async def greet(self, address: str, **options: Any) -> Any:
        """Say hello and wait for the answer."""
        comm = await connect(address, timeout=3, **options)
        try:
            await comm.write("hello")
            return await asyncio.wait_for(comm.read(), 5)
        finally:
            comm.abort()

    def test_files_open_the_door(self, tmp_path: Path) -> None:
        memory = temporary_security()
        with credential_files(memory, tmp_path) as files:
            arguments = files.get_connection_args("worker")
            answer, told = asyncio.run(self.ask(memory, lambda address: self.greet(address, **arguments)))
        assert (answer, told) == ("welcome", ["hello"])

    @pytest.mark.parametrize("stranger", ["plain", "other-credentials", "no-certificate"])
    def test_strangers_stay_outside(self, stranger: str) -> None:
        memory = temporary_security()
        anybody = ssl.create_default_context()
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        options = {
            "plain": {},
            "other-credentials": temporary_security().get_connection_args("worker"),
            "no-certificate": {"ssl_context": anybody, "require_encryption": True},
        }[stranger]

        async def knock(address: str) -> Exception | None:
            target = address.replace("tls://", "tcp://") if stranger == "plain" else address
            try:
                await self.greet(target, **options)
            except Exception as error:
                return error
            return None

        error, told = asyncio.run(self.ask(memory, knock))
        assert isinstance(error, OSError), error
        assert told == []
