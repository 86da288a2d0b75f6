"""A ledger in a table: what AWS may answer instead, and that calls which AWS's client repeats count once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import pytest
import requests

import tasks.aws
from tasks.aws import AwsSettings, aws_client
from tasks.errors import LedgerError
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.dynamodb import create_table
from tasks.ledger.ledger import DoneBeforeError
from tasks.ledger.record import JobState
from tests.aws import CREDENTIALS
from tests.ledger.jobs import ELSEWHERE, JOB, OUTPUT, begin

#: Gets the call and a function that has AWS answer it; returns status and body, or `None` to break the connection.
Answer = Callable[[str, Callable[[], tuple[int, bytes]]], tuple[int, bytes] | None]


@contextmanager
def _between(aws: AwsSettings, answer: Answer) -> Iterator[AwsSettings]:
    """Something between a client and AWS that answers as it likes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))

            def ask() -> tuple[int, bytes]:
                response = requests.post(aws.endpoint_url, body, headers=dict(self.headers), timeout=10)
                return response.status_code, response.content

            given = answer(self.headers["X-Amz-Target"].rpartition(".")[2], ask)
            if given is None:
                self.close_connection = True
                return
            self.send_response(given[0])
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(given[1])))
            self.end_headers()
            self.wfile.write(given[1])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield AwsSettings(aws.region, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _refusal(code: str, status: int = 400) -> tuple[int, bytes]:
    return status, json.dumps({"__type": f"com.amazonaws.dynamodb#{code}", "message": "Credential=AKIA/x"}).encode()


@pytest.fixture
def table(aws: AwsSettings) -> str:
    name = f"jobs-{uuid4()}"
    create_table(aws, name)
    return name


@pytest.fixture
def few_attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients give up after two attempts."""
    monkeypatch.setattr(tasks.aws, "_ATTEMPTS", 2)
    aws_client.cache_clear()
    yield
    aws_client.cache_clear()


def test_the_table_has_what_records_need(aws: AwsSettings, table: str) -> None:
    create_table(aws, table)
    client = aws_client("dynamodb", aws)
    found = client.describe_table(TableName=table)["Table"]
    assert found["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
    indexes = {index["IndexName"]: index for index in found["GlobalSecondaryIndexes"]}
    keys = {name: [key["AttributeName"] for key in index["KeySchema"]] for name, index in indexes.items()}
    assert keys == {"by-owner": ["owner", "created_at"], "by-state": ["state", "updated_at"]}
    ttl = client.describe_time_to_live(TableName=table)["TimeToLiveDescription"]
    assert (ttl["TimeToLiveStatus"], ttl["AttributeName"]) == ("ENABLED", "expires_at")
    backups = client.describe_continuous_backups(TableName=table)["ContinuousBackupsDescription"]
    assert backups["PointInTimeRecoveryDescription"]["PointInTimeRecoveryStatus"] == "ENABLED"


def test_values_keep_their_types_for_other_tools(aws: AwsSettings, table: str) -> None:
    ledger = open_ledger(LedgerSettings(table=table, aws=aws))
    record = ledger.publish(begin(ledger), OUTPUT, cost=0.1, metrics={"Frames": 2e-7}, slurm_jobs=("1",))
    item = aws_client("dynamodb", aws).get_item(TableName=table, Key={"job_id": {"S": JOB.job_id}})["Item"]
    assert item["expires_at"] == {"N": str(record.expires_at)}
    assert (item["cost"], item["metrics"]) == ({"N": "0.1"}, {"M": {"Frames": {"N": "2e-07"}}})
    assert (item["model"], item["error"]) == ({"S": ""}, {"NULL": True})
    assert (item["slurm_jobs"], item["output"]["M"]["bytes"]) == ({"L": [{"S": "1"}]}, {"N": "40000"})


def test_a_table_that_is_missing_is_named(aws: AwsSettings) -> None:
    with pytest.raises(
        LedgerError, match=r"table missing of DynamoDB, does not exist\. Correct its name and the region"
    ):
        open_ledger(LedgerSettings(table="missing", aws=aws)).find("-")


@pytest.mark.parametrize(
    ("code", "status", "told", "again"),
    [
        ("ThrottlingException", 400, "refused too many calls in a row (ThrottlingException). Try again later.", True),
        ("ProvisionedThroughputExceededException", 400, "refused too many calls in a row (Provisioned", True),
        ("RequestLimitExceeded", 400, "refused too many calls in a row (RequestLimitExceeded)", True),
        ("AccessDeniedException", 400, "refuses access (AccessDeniedException). Check the credentials", False),
        ("ExpiredTokenException", 400, "refuses access (ExpiredTokenException). Check the credentials", False),
        ("InternalServerError", 500, "failed a call of GetItem (InternalServerError). Try again later.", True),
        ("ValidationException", 400, "failed a call of GetItem (ValidationException)", False),
    ],
)
@pytest.mark.usefixtures("few_attempts")
def test_refusals_of_aws_become_errors_of_the_ledger(
    aws: AwsSettings, code: str, status: int, told: str, again: bool
) -> None:
    seen: list[str] = []

    def answer(call: str, _: object) -> tuple[int, bytes]:
        seen.append(call)
        return _refusal(code, status)

    with _between(aws, answer) as settings, pytest.raises(LedgerError) as error:
        open_ledger(LedgerSettings(table="jobs", aws=settings)).find("-")
    assert f"the job ledger, table jobs of DynamoDB, {told}" in str(error.value)
    assert set(seen) == {"GetItem"}
    assert (len(seen) > 1) == again
    for secret in (*list(CREDENTIALS.values())[:2], "Credential", "Signature"):
        assert secret not in str(error.value)


@pytest.mark.usefixtures("few_attempts")
def test_a_service_that_cannot_be_reached_is_said_to_be_so(aws: AwsSettings) -> None:
    with (
        _between(aws, lambda *_: None) as gone,
        pytest.raises(LedgerError, match="ConnectionClosedError"),
    ):
        open_ledger(LedgerSettings(table="jobs", aws=gone)).find("-")
    with pytest.raises(LedgerError, match="cannot be reached"):
        open_ledger(LedgerSettings(table="jobs", aws=gone)).find("-")


def test_missing_credentials_are_said_to_be_so(aws: AwsSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    aws_client.cache_clear()
    try:
        with pytest.raises(LedgerError, match="needs credentials of AWS"):
            open_ledger(LedgerSettings(table="jobs", aws=aws)).find("-")
    finally:
        aws_client.cache_clear()


def test_throttled_calls_are_made_again(aws: AwsSettings, table: str) -> None:
    refused: list[str] = []

    def answer(call: str, ask: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
        if call not in refused:
            refused.append(call)
            return _refusal("ThrottlingException")
        return ask()

    with _between(aws, answer) as settings:
        ledger = open_ledger(LedgerSettings(table=table, aws=settings))
        assert begin(ledger).version == 1
        assert ledger.find(JOB.job_id) is not None
    assert refused == ["PutItem", "GetItem"]


def test_writes_that_the_client_repeats_because_their_answer_was_lost_count_once(aws: AwsSettings, table: str) -> None:
    puts: list[int] = []

    def answer(call: str, ask: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes] | None:
        given = ask()
        if call == "PutItem":
            puts.append(given[0])
            return None if len(puts) % 2 else given  # Each first attempt does its work, and nobody hears of it.
        return given

    with _between(aws, answer) as settings:
        ledger = open_ledger(LedgerSettings(table=table, aws=settings))
        record = ledger.publish(ledger.advance(begin(ledger), JobState.STAGING), OUTPUT)
    assert puts == [200, 400] * 3
    assert (record.version, record.attempt) == (3, 1)
    assert [item.state for item in record.history] == ["created", "staging", "published"]


def test_a_job_is_tracked_and_begun_again_while_nothing_can_be_read(aws: AwsSettings, table: str) -> None:
    calls: list[str] = []

    def answer(call: str, ask: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
        calls.append(call)
        return ask() if call == "PutItem" else _refusal("AccessDeniedException")

    with _between(aws, answer) as settings:
        ledger = open_ledger(LedgerSettings(table=table, aws=settings))
        record = begin(ledger)
        ledger.renew(record, frames_done=1)  # As another thread of the same holder does.
        published = ledger.publish(ledger.advance(record, JobState.STAGING), OUTPUT)
        assert (published.version, published.frames_done) == (4, 1)
        with pytest.raises(DoneBeforeError) as done:
            ledger.begin(JOB, ELSEWHERE, is_done=lambda _: True)
        assert done.value.record == published
        assert begin(ledger).attempt == 2
    assert set(calls) == {"PutItem"}


def test_the_package_loads_no_client_before_it_is_needed() -> None:
    script = "import sys, tasks.ledger.dynamodb; print({'boto3', 'botocore', 'prefect'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "set()\n"
