"""The portal: people who may not see the Prefect UI get leave to upload, the state of their jobs, and their results.

    python -m deployments.portal --uploads s3://videos/uploads --store archive --ledger archive \
        --load-balancer arn:aws:elasticloadbalancing:... --issuer https://cognito-idp.... --client 4f...

It stands behind an Application Load Balancer that lets people sign in with Cognito. The load balancer says who somebody
is in a header that it signs; nothing else is believed. On one's own machine `--owner NAME` takes its place, and then
the portal listens on 127.0.0.1 alone. Links and tickets are made when they are asked for, for the owner of a job or of
an upload folder; every one is logged with who got it, none is kept.
"""

import argparse
import logging
import re
import time
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated, Any, Final

import jwt
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, Field

from blocks.site import load_store, load_tracking
from tasks.errors import AccessError, SettingsError, SuperResolutionError
from tasks.ledger import open_ledger
from tasks.ledger.ledger import Ledger
from tasks.store.address import Address, parse, split
from tasks.store.listing import VIDEO_SUFFIXES
from tasks.store.presign import download_url, upload_ticket
from tasks.store.settings import StoreSettings

logger = logging.getLogger(__name__)

#: Seconds that links and tickets work.
LINK_SECONDS: Final = 300
TICKET_SECONDS: Final = 3600

#: The header in which the load balancer says who somebody is, and where its keys are.
IDENTITY_HEADER: Final = "x-amzn-oidc-data"
KEYS_URL: Final = "https://public-keys.auth.elb.{region}.amazonaws.com/{key}"

#: Names of people as they may stand in a key of S3; Cognito's are UUIDs.
_OWNER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")

#: What an owner is told of a job.
_TOLD: Final = (
    *("job_id", "state", "source", "destination", "settings", "model", "frames_done", "frames_total"),
    *("created_at", "updated_at", "attempt"),
)


class LoadBalancer:
    """Tells who somebody is from what an Application Load Balancer says and signs.

    Args:
        arn: Of the load balancer; another one's word does not count.
        issuer: Of the identities, such as a user pool of Cognito.
        client: Id of the app client in that pool.
        keys_url: Where the load balancer's public keys are, with `{region}` and `{key}`.
    """

    def __init__(self, arn: str, issuer: str, client: str, keys_url: str = KEYS_URL) -> None:
        self._arn = arn
        self._issuer = issuer
        self._client = client
        self._keys_url = keys_url.replace("{region}", arn.split(":")[3] if arn.count(":") >= 5 else "")
        self._key = lru_cache(maxsize=16)(self._fetch_key)

    def __call__(self, request: Request) -> str:
        """The owner that a request comes from.

        Raises:
            HTTPException: Nobody vouches for whoever it is.
        """
        token = request.headers.get(IDENTITY_HEADER, "")
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, self._key(header["kid"]), algorithms=["ES256"])
        except (jwt.PyJWTError, ValueError, KeyError, TypeError, OSError) as error:
            raise _unknown() from error
        # Of another load balancer, pool or client the signature may be just as good.
        if (header.get("signer"), header.get("iss"), header.get("client")) != (self._arn, self._issuer, self._client):
            raise _unknown()
        # It puts into the header what others put into the claims.
        until = header.get("exp")
        if not isinstance(until, int) or until < time.time():
            raise _unknown()
        owner = claims.get("sub")
        if not isinstance(owner, str) or not _OWNER.fullmatch(owner):
            raise _unknown()
        return owner

    def _fetch_key(self, key: str) -> bytes:
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", key):
            raise ValueError("no name of a key")
        with urllib.request.urlopen(self._keys_url.replace("{key}", key), timeout=5) as answer:
            return bytes(answer.read())


def one_person(owner: str) -> Callable[[Request], str]:
    """Tells that every request comes from the same person."""

    def identify(request: Request) -> str:
        return owner

    return identify


def _unknown() -> HTTPException:
    return HTTPException(401, "sign in first")


class TicketRequest(BaseModel):
    """What somebody wants to upload."""

    name: str
    """File name of the video."""
    bytes: int = Field(gt=0)
    """Its size; no more can be uploaded."""


def make_portal(ledger: Ledger, store: StoreSettings, identify: Callable[[Request], str], uploads: str) -> FastAPI:
    """The portal as an ASGI application.

    Args:
        ledger: Where records of jobs are.
        store: How to reach S3.
        identify: Gives the owner that a request comes from.
        uploads: `s3://bucket/prefix`; everybody uploads into a folder of their own name below it.
    """
    portal = FastAPI(title="Media super resolution", docs_url=None, redoc_url=None, openapi_url=None)
    who = Annotated[str, Depends(identify)]

    @portal.middleware("http")
    async def keep_nothing(request: Request, answer_to: Any) -> Response:
        response: Response = await answer_to(request)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @portal.exception_handler(SuperResolutionError)
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, SuperResolutionError)
        status = 404 if isinstance(error, AccessError) else 400 if isinstance(error, SettingsError) else 503
        return JSONResponse({"kind": error.kind, "error": str(error)}, status)

    @portal.get("/health")
    def health() -> dict[str, str]:
        return {"status": "good"}

    @portal.get("/jobs")
    def jobs(owner: who, limit: int = 50) -> list[dict[str, Any]]:
        return [_brief(record.to_dict()) for record in ledger.by_owner(owner, limit=max(1, min(limit, 500)))]

    @portal.get("/jobs/{job_id}")
    def job(job_id: str, owner: who) -> dict[str, Any]:
        return _brief(ledger.get(job_id, owner).to_dict())

    @portal.get("/jobs/{job_id}/result")
    def result(job_id: str, owner: who) -> RedirectResponse:
        record = ledger.get(job_id, owner)
        address = parse(record.output["uri"]) if record.output else None
        if record.output is None or address is None:
            raise AccessError(f"job {job_id} has no result to fetch, it is {record.state}", "Ask again later")
        link = download_url(store, address, record.output["version_id"], seconds=LINK_SECONDS, file_name=address.name)
        logger.info("%s got a link to the result of job %s", owner, job_id)
        return RedirectResponse(link, 303)

    @portal.post("/tickets")
    def ticket(owner: who, wanted: TicketRequest) -> dict[str, Any]:
        address = _upload_address(uploads, owner, wanted.name)
        made = upload_ticket(
            store, address, largest_bytes=wanted.bytes, content_type=address.content_type, seconds=TICKET_SECONDS
        )
        logger.info("%s got leave to upload %s", owner, address)
        return {"url": made.url, "fields": made.fields, "uri": str(address), "seconds": TICKET_SECONDS}

    return portal


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    """What an owner may know of a job: not where it ran."""
    error = record["error"]
    said = error and {name: error[name] for name in ("phase", "kind", "message")}
    return {name: record[name] for name in _TOLD} | {"error": said}


def _upload_address(uploads: str, owner: str, name: str) -> Address:
    if PurePosixPath(name).name != name or PurePosixPath(name).suffix.lower() not in VIDEO_SUFFIXES:
        raise SettingsError(f"{name!r} is no name of a video", "Give a file name such as film.mp4, without folders")
    bucket, prefix = split(uploads)
    address = parse(f"s3://{bucket}/{'/'.join(filter(None, (prefix.strip('/'), owner, name)))}")
    assert address is not None
    return address


def main() -> None:
    """Serve the portal until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m deployments.portal", description=__doc__)
    parser.add_argument("--uploads", required=True, help="s3://bucket/prefix for uploads")
    parser.add_argument("--store", default="", help="block of the media store")
    parser.add_argument("--ledger", default="", help="block of the job ledger")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--load-balancer", metavar="ARN", help="that signs who somebody is")
    parser.add_argument("--issuer", default="", help="of the identities")
    parser.add_argument("--client", default="", help="id of the app client")
    parser.add_argument("--owner", help="serve this person alone, on one's own machine")
    arguments = parser.parse_args()
    if bool(arguments.owner) == bool(arguments.load_balancer):
        parser.error("either --owner or --load-balancer says who somebody is")
    if arguments.owner and arguments.host != "127.0.0.1":
        parser.error("with --owner nobody signs in: listen on 127.0.0.1")
    if arguments.load_balancer and not (arguments.issuer and arguments.client):
        parser.error("with --load-balancer go --issuer and --client")
    identify: Callable[[Request], str] = one_person(arguments.owner)
    if arguments.load_balancer:
        identify = LoadBalancer(arguments.load_balancer, arguments.issuer, arguments.client)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    portal = make_portal(
        open_ledger(load_tracking(arguments.ledger).ledger), load_store(arguments.store), identify, arguments.uploads
    )
    uvicorn.run(portal, host=arguments.host, port=arguments.port, access_log=False, server_header=False)


if __name__ == "__main__":
    main()
