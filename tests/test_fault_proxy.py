"""The proxy does to calls what it says: tests rely on faults that really happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError, ResponseStreamingError

from tests.aws import running_aws
from tests.fault_proxy import (
    FaultProxy,
    garbled_response,
    refused,
    reset_after,
    reset_before,
    running_proxy,
    serialised,
    shortened_response,
    stalled,
    throttled,
    too_many,
    truncated_request,
    truncated_response,
)


@pytest.fixture(scope="module")
def _proxy() -> Iterator[FaultProxy]:
    with running_aws() as aws, running_proxy(aws.endpoint_url) as proxy:
        _client("s3", proxy).create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
        _client("dynamodb", proxy).create_table(
            TableName="table",
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        yield proxy


@pytest.fixture
def proxy(_proxy: FaultProxy) -> FaultProxy:
    _proxy.clear()
    return _proxy


def _client(service: str, proxy: FaultProxy) -> Any:
    """A client that tries once, does not wait long and believes everything."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=1, response_checksum_validation="when_required")
    return boto3.client(service, endpoint_url=proxy.url, config=config)


def _get(proxy: FaultProxy) -> bytes:
    return bytes(_client("s3", proxy).get_object(Bucket="bucket", Key="key")["Body"].read())


def _put(proxy: FaultProxy, body: bytes) -> None:
    _client("s3", proxy).put_object(Bucket="bucket", Key="key", Body=body)


def test_calls_pass_unchanged_and_are_written_down(proxy: FaultProxy) -> None:
    _put(proxy, b"content")
    assert _get(proxy) == b"content"
    assert [call.operation for call in proxy.calls] == ["PutObject", "GetObject"]
    assert proxy.calls[0].path == "/bucket/key"
    assert proxy.count(lambda call: call.method == "GET") == 1


def test_a_fault_happens_as_often_as_told_and_then_no_more(proxy: FaultProxy) -> None:
    proxy.inject("PutObject", refused(503, "SlowDown"), times=2)
    for _ in range(2):
        with pytest.raises(ClientError, match="SlowDown"):
            _put(proxy, b"content")
    _put(proxy, b"content")
    assert proxy.count("PutObject") == 3


def test_a_reset_happens_before_or_after_the_work(proxy: FaultProxy) -> None:
    _put(proxy, b"old")
    proxy.inject("PutObject", reset_before)
    with pytest.raises(ConnectionClosedError):
        _put(proxy, b"new")
    assert _get(proxy) == b"old"
    proxy.inject("PutObject", reset_after)
    with pytest.raises(ConnectionClosedError):
        _put(proxy, b"new")
    assert _get(proxy) == b"new"


def test_bodies_are_truncated_and_garbled(proxy: FaultProxy) -> None:
    proxy.inject("PutObject", truncated_request)
    # Large enough that the half is not only what encodes the body.
    _client("s3", proxy).put_object(Bucket="bucket", Key="key", Body=b"x" * 10_000, ChecksumSHA256="declared")
    assert _get(proxy) == b"x" * 5_000
    _put(proxy, b"content!")
    proxy.inject("GetObject", shortened_response)
    assert _client("s3", proxy).get_object(Bucket="bucket", Key="key")["Body"].read() == b"cont"
    proxy.inject("GetObject", garbled_response)
    got = _client("s3", proxy).get_object(Bucket="bucket", Key="key")["Body"].read()
    assert (len(got), got[1:]) == (8, b"ontent!")
    proxy.inject("GetObject", truncated_response)
    with pytest.raises(ResponseStreamingError):
        _get(proxy)


def test_a_stall_outlasts_a_client_and_the_call_goes_on(proxy: FaultProxy) -> None:
    _put(proxy, b"old")
    proxy.inject("PutObject", stalled(1.2))
    with pytest.raises(ReadTimeoutError):
        _put(proxy, b"new")
    time.sleep(0.5)
    assert _get(proxy) == b"new"


def test_services_that_speak_json_are_refused_in_json(proxy: FaultProxy) -> None:
    client = _client("dynamodb", proxy)
    item = {"id": {"S": "1"}}
    for fault, code in (
        (throttled, "ThrottlingException"),
        (too_many, "TooManyRequestsException"),
        (refused(400, "ProvisionedThroughputExceededException"), "ProvisionedThroughputExceededException"),
    ):
        proxy.inject("PutItem", fault)
        with pytest.raises(ClientError) as caught:
            client.put_item(TableName="table", Item=item)
        assert caught.value.response["Error"]["Code"] == code
    proxy.inject("PutItem", reset_after)
    with pytest.raises(ConnectionClosedError):
        client.put_item(TableName="table", Item=item)
    assert client.get_item(TableName="table", Key=item)["Item"] == item
    assert proxy.count("PutItem") == 4


def test_serialised_calls_do_not_overlap(proxy: FaultProxy) -> None:
    inside: list[int] = []
    most: list[int] = []

    def watched(exchange: Any) -> None:
        forward = exchange.forward

        def slow(body: bytes | None = None) -> Any:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()
            return forward(body)

        exchange.forward = slow
        fault(exchange)

    fault = serialised()
    proxy.inject("PutObject", watched, times=3)
    threads = [threading.Thread(target=_put, args=(proxy, b"x")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_fault_can_be_written_by_a_test(proxy: FaultProxy) -> None:
    _put(proxy, b"content")
    proxy.inject("GetObject", lambda exchange: exchange.reply(replace(exchange.forward(), body=b"another")))
    assert _client("s3", proxy).get_object(Bucket="bucket", Key="key")["Body"].read() == b"another"
