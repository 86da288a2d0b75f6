"""The portal over HTTP: who gets what, and who does not."""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deployments.portal import LoadBalancer, make_portal, one_person
from tasks.aws import aws_client
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.holder import this_holder
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobError, NewJob
from tasks.store.settings import StoreSettings
from tests.aws import running_aws
from tests.models.servers import Server

ARN = "arn:aws:elasticloadbalancing:eu-central-1:123456789012:loadbalancer/app/portal/50dc6c495c0c9188"
ISSUER = "https://cognito-idp.eu-central-1.amazonaws.com/eu-central-1_pool"
CLIENT = "4fexample"
CONTENT = b"the result" * 1000


class Keys(Server):
    """Where a load balancer shows its public keys."""

    def __init__(self) -> None:
        super().__init__(KeyHandler)
        self.key = generate_private_key(SECP256R1())
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{{key}}"


class KeyHandler(BaseHTTPRequestHandler):
    server: Keys

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.path != "/key-1":
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        public = self.server.key.public_key()
        self.wfile.write(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Portal:
    """A portal that runs, with a job of ann's that is published and one of bob's that failed."""

    url: str
    keys: Keys
    ledger: Ledger
    store: StoreSettings
    published: str
    failed: str

    def token(self, owner: Any, key: EllipticCurvePrivateKey | None = None, **header: Any) -> str:
        """What the load balancer says of somebody."""
        said = {"kid": "key-1", "signer": ARN, "iss": ISSUER, "client": CLIENT}
        said |= {"exp": int(time.time()) + 120, **header}
        return jwt.encode({"sub": owner}, key or self.keys.key, "ES256", said)

    def get(self, path: str, token: str | None) -> requests.Response:
        headers = {} if token is None else {"x-amzn-oidc-data": token}
        return requests.get(self.url + path, headers=headers, allow_redirects=False, timeout=30)


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    """A portal, its load balancer's keys, its ledger and its store."""
    folder = tmp_path_factory.mktemp("portal")
    with running_aws() as aws, Keys().running() as keys:
        s3 = aws_client("s3", aws)
        for bucket in ("videos", "results"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": aws.region})
        s3.put_object(Bucket="results", Key="film.mp4", Body=CONTENT)
        ledger, store = open_ledger(LedgerSettings(file=str(folder / "jobs.sqlite"))), StoreSettings(aws)
        done = ledger.begin(NewJob("ann", "s3://videos/film.mp4", "1", "s3://results/film.mp4"), this_holder())
        output = {"uri": "s3://results/film.mp4", "version_id": "", "etag": "", "digest": "", "bytes": len(CONTENT)}
        ledger.publish(done, output)
        lost = ledger.begin(NewJob("bob", "s3://videos/bad.mp4", "1", "s3://results/bad.mp4"), this_holder())
        ledger.fail(lost, JobError("extract", "frame", "frame 3 cannot be decoded", node="secret-node"))
        identify = LoadBalancer(ARN, ISSUER, CLIENT, keys.url)
        with serving(make_portal(ledger, store, identify, "s3://videos/uploads")) as url:
            yield Portal(url, keys, ledger, store, done.job_id, lost.job_id)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_owners_see_their_own_jobs(portal: Portal) -> None:
    jobs = portal.get("/jobs", portal.token("ann")).json()
    assert [(job["job_id"], job["state"]) for job in jobs] == [(portal.published, "published")]
    job = portal.get(f"/jobs/{portal.failed}", portal.token("bob"))
    assert job.json()["error"] == {"phase": "extract", "kind": "frame", "message": "frame 3 cannot be decoded"}
    assert "secret-node" not in job.text


def test_a_result_is_fetched_by_its_owner_alone(portal: Portal, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = portal.get(f"/jobs/{portal.published}/result", portal.token("ann"))
    assert answer.status_code == 303
    assert (answer.headers["cache-control"], answer.headers["referrer-policy"]) == ("no-store", "no-referrer")
    assert f"ann got a link to the result of job {portal.published}" in caplog.text
    assert "X-Amz" not in caplog.text
    assert requests.get(answer.headers["location"], timeout=30).content == CONTENT

    others = portal.get(f"/jobs/{portal.published}/result", portal.token("bob"))
    nobodys = portal.get(f"/jobs/{'0' * 16}/result", portal.token("bob"))
    assert (others.status_code, nobodys.status_code) == (404, 404)
    assert others.text.replace(portal.published, "0" * 16) == nobodys.text
    assert portal.get(f"/jobs/{portal.failed}/result", portal.token("bob")).status_code == 404


def test_nobody_is_believed_but_the_load_balancer(portal: Portal) -> None:
    forged = generate_private_key(SECP256R1())
    tokens = {
        "no token": None,
        "nonsense": "nonsense",
        "another key": portal.token("ann", forged),
        "unknown key": portal.token("ann", kid="key-2"),
        "a key elsewhere": portal.token("ann", kid="../key-1"),
        "expired": portal.token("ann", exp=int(time.time()) - 1),
        "without an end": portal.token("ann", exp=None),
        "another load balancer": portal.token("ann", signer=ARN + "0"),
        "another pool": portal.token("ann", iss=ISSUER + "0"),
        "another client": portal.token("ann", client="other"),
        "nobody": portal.token(""),
        "a path": portal.token("../ann"),
        "a list": portal.token(["ann"]),
        "changed": ".".join([*portal.token("ann").split(".")[:2], portal.token("bob").split(".")[2]]),
        "unsigned": jwt.encode({"sub": "ann"}, None, "none", {"kid": "key-1", "signer": ARN, "exp": 2**40}),
    }
    for name, token in tokens.items():
        for path in ("/jobs", f"/jobs/{portal.published}", f"/jobs/{portal.published}/result"):
            assert portal.get(path, token).status_code == 401, name
    assert portal.get("/health", None).status_code == 200


def test_a_padded_token_is_understood(portal: Portal) -> None:
    """Load balancers of AWS pad the parts of their tokens, which no other issuer does."""
    header, claims, _ = portal.token("ann").split(".")
    padded = ".".join(part + "=" * (-len(part) % 4) for part in (header, claims))
    r, s = decode_dss_signature(portal.keys.key.sign(padded.encode(), ECDSA(SHA256())))
    signature = base64.urlsafe_b64encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")).decode()
    assert portal.get("/jobs", f"{padded}.{signature}").status_code == 200


def test_keys_are_fetched_once(portal: Portal) -> None:
    portal.get("/jobs", portal.token("ann"))
    before = portal.keys.asked
    for _ in range(3):
        assert portal.get("/jobs", portal.token("ann")).status_code == 200
    assert portal.keys.asked == before


def test_a_ticket_is_for_one_name_in_ones_own_folder(portal: Portal) -> None:
    def ask(owner: str, **wanted: Any) -> requests.Response:
        headers = {"x-amzn-oidc-data": portal.token(owner)}
        return requests.post(f"{portal.url}/tickets", headers=headers, json=wanted, timeout=30)

    answer = ask("ann", name="holiday 1.mp4", bytes=len(CONTENT)).json()
    assert answer["uri"] == "s3://videos/uploads/ann/holiday 1.mp4"
    files = {"file": ("x.mp4", CONTENT)}
    assert requests.post(answer["url"], data=answer["fields"], files=files, timeout=30).ok
    stored = aws_client("s3", portal.store.aws).get_object(Bucket="videos", Key="uploads/ann/holiday 1.mp4")
    assert stored["Body"].read() == CONTENT
    for name in ("../bob/film.mp4", "a/film.mp4", "film.txt", "", ".mp4", "..", "film.mp4/"):
        assert ask("ann", name=name, bytes=1).status_code == 400, name
    for size in (0, -1, "many", 10**13):
        assert ask("ann", name="film.mp4", bytes=size).status_code in (400, 422), size


def test_a_ledger_that_is_away_is_said_so(tmp_path: Path, portal: Portal) -> None:
    ledger = open_ledger(LedgerSettings(file=str(tmp_path / "jobs.sqlite")))
    (tmp_path / "jobs.sqlite").unlink()
    (tmp_path / "jobs.sqlite").mkdir()
    with serving(make_portal(ledger, portal.store, one_person("ann"), "s3://videos/uploads")) as url:
        answer = requests.get(f"{url}/jobs", timeout=30)
    assert (answer.status_code, answer.json()["kind"]) == (503, "ledger")
