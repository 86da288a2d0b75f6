"""An upload becomes one run: events of both kinds, twice, damaged, and while the Prefect API is away."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from types import ModuleType
from typing import Any
from urllib.parse import quote_plus
from urllib.request import Request, urlopen
from uuid import uuid4

import boto3
import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ConfigDict

from infra.prefect_server import Api
from tests.aws import running_aws
from tests.infra.aws.handler import load_handler

Runs = Callable[[], list[Any]]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    owner: str = ""
    model: str = "compact"
    pools: str = "local"


@flow(name="upscale-video")
def upscale_video(source: str, destination: str, options: Options = Options()) -> None:  # noqa: B008
    pass


@pytest.fixture
def handler() -> ModuleType:
    return load_handler()


@pytest.fixture
def runs(prefect_api: Api, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A deployment of this test's own; gives its runs, in order of the source."""
    name = f"test-{uuid4().hex}"
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(upscale_video),
            name,
            parameters={"options": {"pools": "fsx"}},
            parameter_openapi_schema=parameter_schema(upscale_video).model_dump_for_openapi(),
            enforce_parameter_schema=True,
        )
    assert prefect_api.url is not None
    monkeypatch.setenv("PREFECT_API_URL", prefect_api.url)
    monkeypatch.setenv("SUPERRES_DEPLOYMENT", f"upscale-video/{name}")
    monkeypatch.setenv("SUPERRES_DESTINATION", "s3://results/upscaled")
    monkeypatch.setenv("SUPERRES_INPUT_PREFIX", "incoming")

    def of_deployment() -> list[Any]:
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
        return sorted(found, key=lambda run: run.parameters["source"])

    return of_deployment


@pytest.fixture
def bucket() -> str:
    """A name of its own: the keys of runs are remembered by flow, not by deployment."""
    return f"uploads-{uuid4().hex}"


def _event(bucket: str, key: str = "incoming/film.mkv", version: str | None = "v1", **item: Any) -> dict[str, Any]:
    """As EventBridge sends it."""
    described = {"key": key, "size": 5, "etag": "e1", "version-id": version, "sequencer": "00A1", **item}
    return {
        "version": "0",
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": bucket}, "object": described, "reason": "PutObject"},
    }


def _notification(bucket: str, key: str = "incoming/film.mkv", version: str | None = "v1") -> dict[str, Any]:
    """As S3 sends it."""
    item = {"key": quote_plus(key, safe="/"), "size": 5, "eTag": "e1", "sequencer": "00A1"}
    if version:
        item["versionId"] = version
    record = {
        "eventSource": "aws:s3",
        "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": bucket}, "object": item},
    }
    return {"Records": [record]}


def _batch(*events: Any) -> dict[str, Any]:
    bodies = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return {
        "Records": [
            {"messageId": f"message-{index}", "eventSource": "aws:sqs", "body": body}
            for index, body in enumerate(bodies)
        ]
    }


def _failed(answer: dict[str, Any]) -> list[str]:
    assert set(answer) == {"batchItemFailures"}
    return [item["itemIdentifier"] for item in answer["batchItemFailures"]]


def test_an_upload_becomes_one_run_with_its_parameters(handler: ModuleType, runs: Runs, bucket: str) -> None:
    assert _failed(handler.handler(_batch(_event(bucket)))) == []
    (run,) = runs()
    assert run.parameters == {
        "source": f"s3://{bucket}/incoming/film.mkv",
        "destination": "s3://results/upscaled/film.mkv.mp4",
        "options": {"owner": "event", "pools": "fsx"},
    }
    assert run.tags == ["event"]
    assert run.state_type == "SCHEDULED"


def test_the_functions_own_options_come_first(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_OPTIONS", '{"model": "swin"}')
    monkeypatch.setenv("SUPERRES_OWNER", "archive")
    handler.handler(_event(bucket))
    assert [run.parameters["options"] for run in runs()] == [{"owner": "archive", "pools": "fsx", "model": "swin"}]


def test_the_owner_is_a_part_of_the_key_where_there_is_one(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_OWNER_FROM_KEY", "1")
    handler.handler(_batch(_event(bucket, "incoming/alice/film.mkv"), _event(bucket, "incoming/film.mkv")))
    assert [run.parameters["options"]["owner"] for run in runs()] == ["alice", "event"]
    assert runs()[0].parameters["destination"] == "s3://results/upscaled/alice/film.mkv.mp4"


@pytest.mark.parametrize("version", ["v1", None])
def test_one_upload_is_one_run_however_often_and_in_whatever_form_it_is_told(
    handler: ModuleType, runs: Runs, bucket: str, version: str | None
) -> None:
    event = _event(bucket, version=version)
    other_spelling = _event(bucket, version=version)
    other_spelling["detail"]["object"]["eTag"] = f'"{other_spelling["detail"]["object"].pop("etag")}"'
    for _ in range(3):
        assert _failed(handler.handler(_batch(event))) == []
    assert _failed(handler.handler(_batch(event, event, _notification(bucket, version=version), other_spelling))) == []
    handler.handler(event)
    handler.handler(_notification(bucket, version=version))
    assert len(runs()) == 1


def test_another_upload_under_the_same_name_is_another_run(handler: ModuleType, runs: Runs, bucket: str) -> None:
    handler.handler(_batch(_event(bucket), _event(bucket, version="v2")))
    assert len(runs()) == 2
    unversioned = {"version": None}
    handler.handler(
        _batch(
            _event(bucket, **unversioned),
            _event(bucket, **unversioned, etag="e2"),
            _event(bucket, version="null", sequencer="00A2"),  # The same bytes once more.
        )
    )
    assert len(runs()) == 5


def test_keys_are_taken_as_they_are_meant(handler: ModuleType, runs: Runs, bucket: str) -> None:
    key = "incoming/50% off + más/a=b?c#d.mkv"
    handler.handler(_batch(_event(bucket, key), _notification(bucket, key)))
    assert [run.parameters["source"] for run in runs()] == [f"s3://{bucket}/{key}"]


def _documented(bucket: str, key: str, version: str, sequencer: str) -> dict[str, Any]:
    """An event of EventBridge with all its fields, as the documentation of S3 shows it."""
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "account": "111122223333",
        "time": "2026-11-12T00:00:00Z",
        "region": "us-east-1",
        "resources": [f"arn:aws:s3:::{bucket}"],
        "detail": {
            "version": "0",
            "bucket": {"name": bucket},
            "object": {
                "key": key,
                "size": 5_368_709_120,
                "etag": "b1946ac92492d2347c6235b4d2611184-640",
                "version-id": version,
                "sequencer": sequencer,
            },
            "request-id": "N4N7GDK58NMKJ12R",
            "requester": "123456789012",
            "source-ip-address": "10.20.3.4",
            "reason": "CompleteMultipartUpload",
        },
    }


def _with_attributes(event: dict[str, Any], received: int) -> dict[str, Any]:
    """A batch of one message with all that Lambda says of it."""
    message = {
        "messageId": f"{uuid4()}",
        "receiptHandle": "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a",
        "body": json.dumps(event),
        "attributes": {
            "ApproximateReceiveCount": str(received),
            "SentTimestamp": "1794441600000",
            "SenderId": "AIDAIENQZJOLO23YVJ4VO",
            "ApproximateFirstReceiveTimestamp": "1794441600001",
        },
        "messageAttributes": {},
        "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:111122223333:uploads",
        "awsRegion": "us-east-1",
    }
    return {"Records": [message]}


def test_uploads_that_arrive_in_any_order_and_again_are_each_one_run(
    handler: ModuleType, runs: Runs, bucket: str, chance: Random
) -> None:
    uploads = [(f"incoming/{name}.mkv", version) for name in "abc" for version in ("v1", "v2")]
    events = [_documented(bucket, key, version, f"00{version}") for key, version in uploads] * 3
    chance.shuffle(events)
    for event in events:
        assert _failed(handler.handler(_with_attributes(event, received=chance.randint(1, 5)))) == []
    # Of two versions of a name both are asked for, whichever was heard of first.
    assert [run.parameters["source"] for run in runs()] == sorted(f"s3://{bucket}/{key}" for key, _ in uploads)


def test_only_messages_that_failed_come_again(handler: ModuleType, runs: Runs, bucket: str) -> None:
    batch = _batch(
        _event(bucket, "incoming/a.mkv"),
        "no JSON",
        {"some": "thing"},
        "[]",
        {"detail-type": "Object Created", "source": "aws.s3", "detail": {"object": {}}},
        {"Records": [{"eventName": "ObjectCreated:Put"}]},
        _event(bucket, "incoming/b.mkv", size="large"),
        _notification(bucket, "incoming/c.mkv"),
    )
    assert _failed(handler.handler(batch)) == [f"message-{index}" for index in range(1, 7)]
    assert [run.parameters["source"][-5:] for run in runs()] == ["a.mkv", "c.mkv"]


def test_what_is_no_upload_of_a_video_is_left_alone(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_DESTINATION", f"s3://{bucket}/incoming/done")
    deleted = _event(bucket) | {"detail-type": "Object Deleted"}
    removed = _notification(bucket)
    removed["Records"][0]["eventName"] = "ObjectRemoved:Delete"
    ignored = [
        _event(bucket, "incoming/done/film.mkv.mp4"),
        _event(bucket, "incoming-old/film.mkv"),
        _event(bucket, "film.mkv"),
        _event(bucket, "incoming/folder.mkv/"),
        _event(bucket, "incoming/empty.mkv", size=0),
        _event(bucket, "incoming/notes.txt"),
        _event(bucket, "incoming/.mkv"),
        deleted,
        removed,
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": bucket},
        {"source": "aws.ec2", "detail-type": "Object Created", "detail": {}},
    ]
    assert _failed(handler.handler(_batch(*ignored))) == []
    assert runs() == []
    handler.handler(_batch(_event(bucket, "incoming/done-not/Film.MKV"), *ignored))
    assert len(runs()) == 1


def test_a_destination_without_prefix_is_the_whole_bucket(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_DESTINATION", f"s3://{bucket}")
    handler.handler(_batch(_event(bucket), _event(f"{bucket}-2")))
    assert [run.parameters["destination"] for run in runs()] == [f"s3://{bucket}/film.mkv.mp4"]


def test_no_two_sources_have_the_same_result(handler: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://localhost/api")
    monkeypatch.setenv("SUPERRES_DESTINATION", "s3://results/upscaled")
    settings = handler.Settings.from_environment()
    names = [
        "film" + first + second
        for first in ("", ".mp4", ".MP4", ".avi", ".1080p")
        for second in (".mp4", ".avi", ".MP4")
    ]
    results = [handler.result_key(name, settings) for name in names]
    assert len(set(results)) == len(names)
    assert all(result.endswith(".mp4") for result in results)
    assert handler.result_key("a/film.mp4", settings) == "a/film.mp4"
    assert handler.result_key("a/film.1080p.mp4", settings) == "a/film.1080p.mp4"
    assert handler.result_key("a/film.avi", settings) == "a/film.avi.mp4"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_URL", ""),
        ("PREFECT_API_URL", "file:///etc"),
        ("SUPERRES_DESTINATION", ""),
        ("SUPERRES_DESTINATION", "/results"),
        ("SUPERRES_OPTIONS", "[]"),
        ("SUPERRES_OWNER_FROM_KEY", "first"),
    ],
)
def test_wrong_settings_fail_the_whole_batch(
    handler: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://localhost/api")
    monkeypatch.setenv("SUPERRES_DESTINATION", "s3://results/upscaled")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError):
        handler.handler(_batch())


def test_an_api_that_is_away_fails_every_message_and_soon(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = os.environ["PREFECT_API_URL"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    batch = _batch(*(_event(bucket, f"incoming/{index}.mkv") for index in range(10)))
    begun = time.monotonic()
    assert _failed(handler.handler(batch)) == [f"message-{index}" for index in range(10)]
    assert time.monotonic() - begun < 5, "the others do not wait for what the first waited for"
    monkeypatch.setenv("PREFECT_API_URL", url)
    assert _failed(handler.handler(batch)) == []
    assert len(runs()) == 10


@contextmanager
def _troubled(api_url: str, troubles: list[str]) -> Iterator[str]:
    """An API behind something that has a trouble with each of the first calls that create runs; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._forward()

        def do_POST(self) -> None:
            trouble = troubles.pop(0) if troubles else ""
            if trouble == "busy":
                self.send_error(503)
            else:
                self._forward(is_lost=trouble == "lost answer")

        def _forward(self, is_lost: bool = False) -> None:
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            request = Request(api_url.removesuffix("/api") + self.path, body, headers, method=self.command)
            with urlopen(request, timeout=10) as response:
                answer = response.read()
            if not is_lost:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("troubles", "failed"),
    [
        (["busy", "busy"], []),
        (["lost answer"], []),
        (["busy"] * 3, ["message-0"]),
        (["lost answer"] * 3, ["message-0"]),
    ],
)
def test_a_call_that_failed_is_made_again_and_leaves_one_run(
    handler: ModuleType,
    runs: Runs,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    troubles: list[str],
    failed: list[str],
) -> None:
    batch = _batch(_event(bucket))
    with _troubled(os.environ["PREFECT_API_URL"], list(troubles)) as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        assert _failed(handler.handler(batch)) == failed
        assert _failed(handler.handler(batch)) == []
    assert len(runs()) == 1


def test_a_wrong_password_fails_every_message_and_is_not_shown(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "superres:not-the-password")
    assert _failed(handler.handler(_batch(_event(bucket), _event(bucket, "incoming/b.mkv")))) == [
        "message-0",
        "message-1",
    ]
    assert runs() == []
    assert "401" in caplog.text
    assert "not-the-password" not in caplog.text
    with pytest.raises(handler.ApiError, match="401"):
        handler.handler(_event(bucket))


def test_what_the_flow_does_not_take_fails_and_says_why(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SUPERRES_OPTIONS", '{"colour": "red"}')
    assert _failed(handler.handler(_batch(_event(bucket)))) == ["message-0"]
    assert runs() == []
    assert "colour" in caplog.text


def test_a_deployment_that_is_not_there_fails(
    handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SUPERRES_DEPLOYMENT", "upscale-video/nowhere")
    assert _failed(handler.handler(_batch(_event(bucket)))) == ["message-0"]
    assert "404" in caplog.text


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with running_aws() as settings:
        monkeypatch.setenv("AWS_ENDPOINT_URL", settings.endpoint_url)
        yield


def test_the_password_is_read_from_a_secret_and_again_when_it_has_changed(
    aws: None, handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = os.environ["PREFECT_API_AUTH_STRING"]
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    secrets = boto3.client("secretsmanager")
    arn = secrets.create_secret(Name="prefect", SecretString="superres:old")["ARN"]
    monkeypatch.setenv("SUPERRES_API_SECRET", arn)
    assert _failed(handler.handler(_batch(_event(bucket)))) == ["message-0"]
    secrets.put_secret_value(SecretId=arn, SecretString=password)
    assert _failed(handler.handler(_batch(_event(bucket)))) == []
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", password)
    assert len(runs()) == 1


def test_a_secret_that_is_not_there_fails_every_message(
    aws: None, handler: ModuleType, runs: Runs, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_API_SECRET", "arn:aws:secretsmanager:eu-central-1:123456789012:secret:nothing-AbCdEf")
    assert len(_failed(handler.handler(_batch(_event(bucket), _event(bucket, "incoming/b.mkv"))))) == 2
    assert runs() == []


def _received(queue: str) -> dict[str, Any]:
    """What Lambda makes of the messages of a queue."""
    answer = boto3.client("sqs").receive_message(QueueUrl=queue, MaxNumberOfMessages=10)
    return {
        "Records": [
            {"messageId": message["MessageId"], "eventSource": "aws:sqs", "body": message["Body"]}
            for message in answer.get("Messages", [])
        ]
    }


def test_uploads_reach_the_handler_through_eventbridge_and_queue(
    aws: None, handler: ModuleType, runs: Runs, bucket: str
) -> None:
    s3, sqs, events = (boto3.client(service) for service in ("s3", "sqs", "events"))
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration={"EventBridgeConfiguration": {}})
    queue = sqs.create_queue(QueueName=bucket)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    pattern = {"source": ["aws.s3"], "detail-type": ["Object Created"], "detail": {"bucket": {"name": [bucket]}}}
    events.put_rule(Name="uploads", EventPattern=json.dumps(pattern))
    events.put_targets(Rule="uploads", Targets=[{"Id": "queue", "Arn": arn}])

    for key in ("incoming/mein Film.mkv", "incoming/mein Film.mkv", "incoming/notes.txt", "elsewhere/film.mkv"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"video")
    batch = _received(queue)
    assert len(batch["Records"]) == 4
    assert _failed(handler.handler(batch)) == []
    assert _failed(handler.handler(batch)) == []
    assert [run.parameters["source"] for run in runs()] == [f"s3://{bucket}/incoming/mein Film.mkv"] * 2, "two versions"


def test_uploads_reach_the_handler_from_s3_through_a_queue_alone(
    aws: None, handler: ModuleType, runs: Runs, bucket: str
) -> None:
    s3, sqs = boto3.client("s3"), boto3.client("sqs")
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    queue = sqs.create_queue(QueueName=bucket)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    s3.put_bucket_notification_configuration(
        Bucket=bucket,
        NotificationConfiguration={"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]},
    )
    s3.put_object(Bucket=bucket, Key="incoming/mein Film + mehr.mkv", Body=b"video")
    batch = _received(queue)
    assert len(batch["Records"]) == 2, "the first says that notifications were switched on"
    assert _failed(handler.handler(batch)) == []
    assert [run.parameters["source"] for run in runs()] == [f"s3://{bucket}/incoming/mein Film + mehr.mkv"]
