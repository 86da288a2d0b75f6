"""AWS on this machine: moto over HTTP, for tests of everything that talks to S3, DynamoDB, SQS or CloudWatch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
import requests
from moto.dynamodb.responses import DynamoHandler
from moto.server import ThreadedMotoServer

from tasks.aws import AwsSettings, aws_client

#: What clients find in the environment, in this process and in those it starts.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-show",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def running_aws() -> Iterator[AwsSettings]:
    """Run an empty AWS while the block runs; the environment has its credentials.

    Yields:
        How to reach it.
    """
    # DynamoDB decides about one write to an item after another; moto's threads look and write in two steps.
    answer, one_at_a_time = DynamoHandler.call_action, threading.Lock()

    def answer_alone(handler: DynamoHandler) -> Any:
        with one_at_a_time:
            return answer(handler)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamoHandler, "call_action", answer_alone)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        boto3.DEFAULT_SESSION = None
        aws_client.cache_clear()
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        requests.post(f"{endpoint}/moto-api/reset", timeout=30)  # All servers of a process share what they hold.
        try:
            yield AwsSettings(region="eu-central-1", endpoint_url=endpoint)
        finally:
            server.stop()
            aws_client.cache_clear()
