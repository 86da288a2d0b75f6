"""Starts a run of `upscale-video` for each video that arrives in a bucket.

An AWS Lambda function that is fed by an SQS queue of S3 events. Nothing but the standard library, and boto3 for the
password where a secret holds it, so this file alone is the whole function. See `README.md` for its settings.

Everything may be done twice: events come more than once and in any order, and a message is handled again when its
answer is lost. A run has a key made of bucket, object and version, and for a key that it knows Prefect answers with the
run it has.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any, Final

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # Lambda shows warnings only, unless told otherwise.

#: Seconds that the API may take for one answer, and pauses before a call is made again. What lasts longer is left to
#: the queue, which gives the message out again later.
_ANSWER_SECONDS: Final = 10
_PAUSES: Final = (0.5, 1.5)

_VIDEOS: Final = ".3gp .avi .dv .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv"


class ApiError(Exception):
    """The Prefect API is away, or did not do what it was asked."""


@dataclass(frozen=True)
class Settings:
    """What the environment says; see `README.md`."""

    api_url: str
    deployment: str
    bucket: str
    """Of the results."""
    folder: str
    """Prefix of the results, ends with `/` unless it is empty."""
    inputs: str
    """Prefix of the sources, ends with `/` unless it is empty."""
    endings: frozenset[str]
    container: str
    owner: str
    owner_part: int
    options: Mapping[str, Any]

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the environment.

        Raises:
            ValueError: A setting is missing or makes no sense.
        """
        scheme, _, place = _setting("SUPERRES_DESTINATION").partition("://")
        bucket, _, folder = place.partition("/")
        if scheme != "s3" or not bucket:
            raise ValueError("SUPERRES_DESTINATION must be s3://bucket/prefix")
        api_url = _setting("PREFECT_API_URL").rstrip("/")
        if not api_url.startswith(("http://", "https://")):
            raise ValueError("PREFECT_API_URL must begin with http:// or https://")
        options = json.loads(_setting("SUPERRES_OPTIONS", "{}"))
        if not isinstance(options, dict):
            raise ValueError("SUPERRES_OPTIONS must be a JSON object")
        return cls(
            api_url,
            deployment=_setting("SUPERRES_DEPLOYMENT", "upscale-video/slurm"),
            bucket=bucket,
            folder=_as_folder(folder),
            inputs=_as_folder(_setting("SUPERRES_INPUT_PREFIX", "/")),
            endings=frozenset(_setting("SUPERRES_ENDINGS", _VIDEOS).lower().split()),
            container=_setting("SUPERRES_CONTAINER", "mp4").removeprefix("."),
            owner=_setting("SUPERRES_OWNER", "event"),
            owner_part=int(_setting("SUPERRES_OWNER_FROM_KEY", "0")),
            options=options,
        )


@dataclass(frozen=True)
class Upload:
    """An object that was created."""

    bucket: str
    key: str
    size: int
    version: str
    """Where the bucket keeps no versions, what tells this upload from one before it under the same name."""

    @classmethod
    def of(cls, bucket: Mapping[str, Any], item: Mapping[str, Any], key: str) -> Upload:
        """From the description of an object in an event; EventBridge and S3 spell some of its fields differently."""
        version = item.get("version-id") or item.get("versionId") or "null"
        if version == "null":
            etag = str(item.get("etag") or item.get("eTag") or "").strip('"')
            version = f"{etag}/{item['size']}/{item.get('sequencer', '')}"
        return cls(bucket["name"], key, int(item["size"]), version)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def run_key(self) -> str:
        """The same for every event of this upload, and for nothing else."""
        return hashlib.sha256(json.dumps([self.bucket, self.key, self.version]).encode()).hexdigest()


def handler(event: dict[str, Any], context: object = None) -> dict[str, Any]:
    """Start a run for each video in a batch of messages, or in one event.

    A message that is not understood fails like one whose run could not be started: after some more attempts the queue
    moves it to its dead-letter queue, where somebody can see it. To drop it would lose a video without a trace.

    Args:
        event: A batch from SQS, an event of EventBridge or a notification of S3.
        context: Of Lambda; not used.

    Returns:
        The messages that failed, as SQS wants to know them: only these come again.

    Raises:
        ValueError: The settings are wrong, or an event given without a queue is not understood.
        ApiError: The run for an event given without a queue was not started.
    """
    settings = Settings.from_environment()
    api = Api(settings.api_url, settings.deployment)
    messages = event.get("Records") or []
    if not messages or messages[0].get("eventSource") != "aws:sqs":
        _start_all(uploads(event), settings, api)
        return {"batchItemFailures": []}
    failed = []
    for message in messages:
        try:
            _start_all(uploads(json.loads(message["body"])), settings, api)
        except Exception as error:  # Whatever it is, the other messages are not to blame.
            logger.error("message %s failed: %s", message["messageId"], error)
            failed.append({"itemIdentifier": message["messageId"]})
    return {"batchItemFailures": failed}


def uploads(event: Any) -> list[Upload]:
    """The objects that an event says were created; none where it is about something else.

    Raises:
        ValueError: It is no event of EventBridge and no notification of S3.
    """
    try:
        if "detail-type" in event:
            if (event["source"], event["detail-type"]) != ("aws.s3", "Object Created"):
                return []
            item = event["detail"]["object"]
            return [Upload.of(event["detail"]["bucket"], item, item["key"])]
        if event.get("Event") == "s3:TestEvent":  # Sent once, when notifications are switched on.
            return []
        return [
            Upload.of(s3["bucket"], s3["object"], urllib.parse.unquote_plus(s3["object"]["key"]))  # Encoded only here.
            for s3 in (
                record["s3"]
                for record in event["Records"]
                if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:")
            )
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"neither an event of EventBridge nor a notification of S3 ({error!r})") from error


def reason_to_ignore(upload: Upload, settings: Settings) -> str:
    """Why no run is started for an object; empty if one is."""
    if not upload.key.startswith(settings.inputs):
        return f"not in {settings.inputs}"
    if upload.bucket == settings.bucket and upload.key.startswith(settings.folder):
        return "where results go"
    if upload.key.endswith("/") or not upload.size:
        return "empty or a folder"
    if PurePosixPath(upload.key).suffix.lower() not in settings.endings:
        return "not a video by its name"
    return ""


def result_key(relative: str, settings: Settings) -> str:
    """Where the result of a source goes, in the folder of the results.

    `film.avi` becomes `film.avi.mp4`, so that it does not meet the result of `film.mkv`; `film.mp4` stays as it is,
    unless it would then meet the result of some `film`.

    Args:
        relative: Key of the source in the folder of the sources.
        settings: Say which container, and which endings are those of sources.
    """
    path = PurePosixPath(relative)
    if path.suffix == f".{settings.container}" and PurePosixPath(path.stem).suffix.lower() not in settings.endings:
        return relative
    return f"{relative}.{settings.container}"


class Api:
    """The Prefect API during one call of the function.

    Args:
        url: Ends with `/api`.
        deployment: `flow/deployment`.
    """

    def __init__(self, url: str, deployment: str) -> None:
        self._url = url
        self._name = deployment
        self._is_away = False

    def start(self, upload: Upload, destination: str, owner: str, options: Mapping[str, Any]) -> None:
        """Have an upload upscaled, unless it was asked for before.

        Options come from the deployment, where the event and the function's settings say nothing else: Prefect itself
        would replace those of the deployment altogether.

        Raises:
            ApiError: The run was not created.
        """
        defaults = (self._deployment.get("parameters") or {}).get("options") or {}
        run = self._call(
            "POST",
            f"/deployments/{self._deployment['id']}/create_flow_run",
            {
                "parameters": {
                    "source": upload.url,
                    "destination": destination,
                    "options": {**defaults, "owner": owner, **options},
                },
                "idempotency_key": upload.run_key,
                "tags": ["event"],
            },
        )
        logger.info("%s is upscaled to %s by run %s", upload.url, destination, run["id"])

    @cached_property
    def _deployment(self) -> dict[str, Any]:
        return self._call("GET", f"/deployments/name/{urllib.parse.quote(self._name)}")

    def _authorization(self) -> dict[str, str]:
        password = os.environ.get("PREFECT_API_AUTH_STRING", "")
        if name := os.environ.get("SUPERRES_API_SECRET"):
            try:
                password = _secret(name)
            except Exception as error:
                self._is_away = True
                raise ApiError(f"the secret {name} cannot be read ({type(error).__name__})") from None
        return {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"} if password else {}

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Make a call, again where that may help.

        Raises:
            ApiError: It failed. Where nobody answers, each call after it fails at once: a whole batch that waits for
                its time to run out would outlast the function.
        """
        if self._is_away:
            raise ApiError("the Prefect API is away, or its password")
        headers = {"Content-Type": "application/json", **self._authorization()}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        for pause in (*_PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    _secret.cache_clear()  # It may have been changed since.
                if pause is None or error.code < 500:
                    # The answer says which parameter is wrong; the request, which holds the password, says nothing.
                    said = error.read(300).decode(errors="replace")
                    raise ApiError(f"{method} {path} was answered with {error.code}: {said}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if pause is None:
                    self._is_away = True
                    raise ApiError(f"the Prefect API does not answer ({error})") from None
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _start_all(found: Iterable[Upload], settings: Settings, api: Api) -> None:
    for upload in found:
        if reason := reason_to_ignore(upload, settings):
            logger.info("%s is left alone: %s", upload.url, reason)
            continue
        relative = upload.key.removeprefix(settings.inputs)
        folders = relative.split("/")[:-1]
        has_owner = 0 < settings.owner_part <= len(folders)
        owner = folders[settings.owner_part - 1] if has_owner else settings.owner
        destination = f"s3://{settings.bucket}/{settings.folder}{result_key(relative, settings)}"
        api.start(upload, destination, owner, settings.options)


def _setting(name: str, default: str = "") -> str:
    value = os.environ.get(name) or default
    if not value:
        raise ValueError(f"{name} is not set")
    return value


def _as_folder(prefix: str) -> str:
    """A prefix that ends at the name of a folder: `incoming` is not to mean `incoming-old/` too."""
    return f"{prefix.strip('/')}/".removeprefix("/")


@lru_cache(maxsize=1)
def _secret(name: str) -> str:
    """The password in Secrets Manager; kept for as long as Lambda keeps this process."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=_ANSWER_SECONDS, read_timeout=_ANSWER_SECONDS, retries={"total_max_attempts": 2})
    client = boto3.client("secretsmanager", config=config)
    return str(client.get_secret_value(SecretId=name)["SecretString"]).strip()
