"""Downloads from mirrors of every kind, through proxies, and around mirrors that do not help."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

from tasks.errors import ModelError, SettingsError
from tasks.models import weights
from tasks.models.cards import ModelCard
from tests.models.servers import CONTENT, FileServer, Proxy
from tests.ports import free_port

HALF = len(CONTENT) // 2
OTHER = bytes(len(CONTENT))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment of whoever runs the tests."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SUPERRES_MODEL_MIRROR"):
        for spelled in (name, name.lower()):
            monkeypatch.delenv(spelled, raising=False)


@pytest.fixture
def second_server() -> Iterator[FileServer]:
    with FileServer().running() as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of an S3 with the file in `s3://models/some/weights.pth`, and credentials for it."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "config"))
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        store = boto3.client("s3")
        store.create_bucket(Bucket="models")
        store.put_object(Bucket="models", Key="some/weights.pth", Body=CONTENT)
        yield f"http://{host}:{port}"
    server.stop()


def test_a_folder(
    folder: Path, server: FileServer, remote_card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "weights.pth").write_bytes(CONTENT)
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", f"{mirror}/")
    (folder / "weights.pth.part").write_bytes(CONTENT[:HALF])
    seen: list[int] = []
    assert weights.fetch(remote_card, lambda done, _: seen.append(done)).read_bytes() == CONTENT
    assert min(seen) > HALF
    assert server.requested == []


def test_a_web_server(
    folder: Path,
    server: FileServer,
    second_server: FileServer,
    remote_card: ModelCard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", second_server.url.removesuffix("/weights.pth"))
    second_server.break_off_after = [300_000, 500_000]
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert second_server.requested == [None, "bytes=300000-", "bytes=500000-"]
    assert server.requested == []


def test_s3(s3: str, folder: Path, server: FileServer, remote_card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", "s3://models/some")
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    (folder / "weights.pth").unlink()
    (folder / "weights.pth.part").write_bytes(CONTENT[:HALF])
    seen: list[int] = []
    assert weights.fetch(remote_card, lambda done, _: seen.append(done)).read_bytes() == CONTENT
    assert min(seen) > HALF
    assert server.requested == []


def missing_folder(_: str, __: FileServer) -> str:
    return "/nowhere/models"


def server_without_the_file(_: str, second_server: FileServer) -> str:
    second_server.status = 404
    return second_server.url.removesuffix("/weights.pth")


def failing_server(_: str, second_server: FileServer) -> str:
    second_server.status = 503
    return second_server.url.removesuffix("/weights.pth")


def server_with_another_size(_: str, second_server: FileServer) -> str:
    second_server.content = CONTENT + b"more"
    return second_server.url.removesuffix("/weights.pth")


def server_with_another_file(_: str, second_server: FileServer) -> str:
    second_server.content = OTHER
    return second_server.url.removesuffix("/weights.pth")


def nobody(_: str, __: FileServer) -> str:
    return f"http://127.0.0.1:{free_port()}"


def bucket_without_the_file(_: str, __: FileServer) -> str:
    return "s3://models/elsewhere"


def no_bucket(_: str, __: FileServer) -> str:
    return "s3://nonesuch"


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [
        (missing_folder, "No such file or directory"),
        (server_without_the_file, "404"),
        (failing_server, "503"),
        (server_with_another_size, f"offers {len(CONTENT) + 4} bytes"),
        (server_with_another_file, "sent another file"),
        (nobody, "refused"),
        (bucket_without_the_file, ""),
        (no_bucket, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mirror_that_does_not_help(
    mirror: Callable[[str, FileServer], str],
    reason: str,
    s3: str,
    folder: Path,
    server: FileServer,
    second_server: FileServer,
    remote_card: ModelCard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = mirror(s3, second_server)
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", base)
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert server.requested == [None]
    assert len(second_server.requested) <= 1, "the official source was not kept waiting"
    (folder / "weights.pth").unlink()
    server.status = 404
    with pytest.raises(ModelError) as caught:
        weights.fetch(remote_card)
    message = str(caught.value)
    for said in (f"{base}/weights.pth", reason, server.url, "404", str(folder / "weights.pth")):
        assert said in message
    assert not list(folder.glob("weights.pth*"))


def test_an_s3_that_cannot_be_reached(
    s3: str, folder: Path, server: FileServer, remote_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", "s3://models/some")
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert server.requested == [None]
    (folder / "weights.pth").unlink()
    server.status = 404
    with pytest.raises(ModelError, match="Could not connect to the endpoint URL"):
        weights.fetch(remote_card)


def test_what_an_earlier_download_left_of_another_file_is_replaced(
    folder: Path, server: FileServer, remote_card: ModelCard
) -> None:
    (folder / "weights.pth.part").write_bytes(OTHER[:HALF])
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert server.requested == [f"bytes={HALF}-", None]
    (folder / "weights.pth").unlink()
    (folder / "weights.pth.part").write_bytes(CONTENT + b"more")
    assert weights.fetch(remote_card).read_bytes() == CONTENT


def test_a_mirror_of_no_known_kind(folder: Path, remote_card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", "ftp://models.example")
    with pytest.raises(SettingsError, match=r"SUPERRES_MODEL_MIRROR is ftp://models\.example"):
        weights.fetch(remote_card)


@pytest.fixture
def hidden(remote_card: ModelCard) -> ModelCard:
    """The file at a host that only a proxy knows."""
    return replace(remote_card, url="http://weights.example/weights.pth")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_through_a_proxy(
    variable: str, folder: Path, server: FileServer, hidden: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy("weights.example", server.server_port).running() as proxy:
        monkeypatch.setenv(variable, proxy.address)
        server.break_off_after = [300_000]
        (folder / "weights.pth.part").write_bytes(CONTENT[:1000])
        assert weights.fetch(hidden).read_bytes() == CONTENT
    assert set(proxy.asked) == {"GET http://weights.example/weights.pth"}
    assert server.requested[0] == "bytes=1000-"


def test_a_proxy_is_passed_by_for_hosts_that_need_none(
    folder: Path, server: FileServer, remote_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy("weights.example", server.server_port).running() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        assert weights.fetch(remote_card).read_bytes() == CONTENT
        assert proxy.asked == []


def certificate(host: str, folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, secret


def test_https_through_a_proxy(
    folder: Path, hidden: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, secret = certificate("weights.example", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, secret)
    secure = FileServer()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    card = replace(hidden, url="https://weights.example/weights.pth")
    with secure.running(), Proxy("weights.example", secure.server_port).running() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.address)
        with pytest.raises(ModelError, match="CERTIFICATE_VERIFY_FAILED"):
            weights.fetch(card)
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        assert weights.fetch(card).read_bytes() == CONTENT
    assert set(proxy.asked) == {"CONNECT weights.example:443"}
