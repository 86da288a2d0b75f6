"""Credentials of one cluster: every connection between client, scheduler and workers is encrypted and authenticated."""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from distributed.security import Security

from tasks.errors import PoolError

_PREFIX: Final = ".superres-tls-"


def temporary_security() -> Security:
    """Credentials for one cluster, in memory only.

    The same as Dask's `Security.temporary()` but with an elliptic curve key, which takes no measurable time to make.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dask-internal")])
    now = datetime.datetime.now(tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("dask-internal")]), critical=False)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # Clocks of other nodes may be behind.
        .not_valid_after(now + datetime.timedelta(days=365))
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    certificate_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    roles = {
        f"tls_{role}_{part}": pem
        for role in ("client", "scheduler", "worker")
        for part, pem in (("key", key_pem), ("cert", certificate_pem))
    }
    return Security(require_encryption=True, tls_ca_file=certificate_pem, **roles)


@contextmanager
def credential_files(security: Security, directory: Path) -> Iterator[Security]:
    """The credentials as files on a file system that all nodes share, for the time of the `with` block.

    Each file can be read by its owner only. They are of no use without the scheduler that made them; what a killed
    process of this machine left behind is removed by the next one.

    Args:
        security: Credentials in memory or as paths.
        directory: Where to make a folder for the files.

    Raises:
        PoolError: The folder cannot be made.
    """
    _remove_leftovers(directory)
    folder = directory / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise PoolError(
            f"cannot write credentials into {directory} ({error.strerror})", "Name a folder that all nodes share"
        ) from error
    try:
        worker = security.get_tls_config_for_role("worker")
        paths = {}
        for part in ("ca_file", "cert", "key"):
            paths[part] = folder / f"{part}.pem"
            descriptor = os.open(paths[part], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as file:  # noqa: PTH123 - opened by descriptor, for its mode
                # Dask's rule for what is a path.
                file.write(worker[part] if "\n" in worker[part] else Path(worker[part]).read_text())
        yield Security(
            require_encryption=True,
            tls_ca_file=str(paths["ca_file"]),
            tls_worker_cert=str(paths["cert"]),
            tls_worker_key=str(paths["key"]),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(directory: Path) -> None:
    for folder in directory.glob(f"{_PREFIX}{socket.gethostname()}-*"):
        owner, process, _ = folder.name.rsplit("-", 2)
        if owner != f"{_PREFIX}{socket.gethostname()}":
            continue  # Of a machine whose name begins like this one's.
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)
