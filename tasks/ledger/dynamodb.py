"""Records in a table of DynamoDB, for runs that start anywhere.

The table is described in `tasks.ledger.table`; its indexes are seconds behind at times. Values keep their types, so the
records can be read with the tools of AWS. DynamoDB removes records that have expired by itself, hours late.

A write that is refused brings the record it met, so a job is tracked without reading anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tasks.aws import AwsSettings, aws_client
from tasks.errors import LedgerError
from tasks.ledger.backend import ConflictError
from tasks.ledger.record import JobRecord, JobState
from tasks.ledger.table import BY_OWNER, BY_STATE, INDEXES, KEY, TIME_TO_LIVE, Index

#: Records asked for at once: some kilobytes each, and DynamoDB sends no more than a megabyte.
_PAGE: Final = 200

_DENIED: Final = (
    "AccessDeniedException",
    "ExpiredTokenException",
    "IncompleteSignatureException",
    "InvalidSignatureException",
    "MissingAuthenticationTokenException",
    "UnrecognizedClientException",
)
_THROTTLED: Final = (
    "LimitExceededException",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ThrottlingException",
)


class DynamoBackend:
    """Records in one table.

    Args:
        settings: How to reach AWS.
        table: Name of the table; made by the installation, or by `create_table`.
    """

    def __init__(self, settings: AwsSettings, table: str) -> None:
        self._settings = settings
        self._table = table

    def set_up(self) -> None:
        """Nothing: the table is the installation's, and its first use tells whether it is there."""

    def read(self, job_id: str) -> JobRecord | None:
        answer = self._call("get_item", Key={KEY: {"S": job_id}}, ConsistentRead=True)
        return _record(answer["Item"]) if "Item" in answer else None

    def create(self, record: JobRecord) -> None:
        self._write("put_item", Item=_item(record), ConditionExpression=f"attribute_not_exists({KEY})")

    def replace(self, record: JobRecord, seen: JobRecord) -> None:
        self._write("put_item", Item=_item(record), **_still(seen))

    def delete(self, seen: JobRecord) -> None:
        self._write("delete_item", Key={KEY: {"S": seen.job_id}}, **_still(seen))

    def by_owner(self, owner: str, since: float | None, limit: int | None) -> list[JobRecord]:
        bound = None if since is None else (f"{BY_OWNER.order} >= :bound", since)
        return self._query(BY_OWNER, owner, bound, limit, newest_first=True)

    def by_state(self, state: JobState, before: float | None, limit: int | None) -> list[JobRecord]:
        bound = None if before is None else (f"{BY_STATE.order} < :bound", before)
        return self._query(BY_STATE, str(state), bound, limit, newest_first=False)

    def _query(
        self,
        index: Index,
        value: str,
        bound: tuple[str, float] | None,
        limit: int | None,
        *,
        newest_first: bool,
    ) -> list[JobRecord]:
        condition, values = "#key = :key", {":key": {"S": value}}
        if bound is not None:
            condition, values = f"{condition} AND {bound[0]}", {**values, ":bound": _typed(bound[1])}
        found: list[JobRecord] = []
        start: dict[str, Any] = {}
        while limit is None or len(found) < limit:
            answer = self._call(
                "query",
                IndexName=index.name,
                KeyConditionExpression=condition,
                ExpressionAttributeNames={"#key": index.partition},  # Words of DynamoDB's language.
                ExpressionAttributeValues=values,
                ScanIndexForward=not newest_first,
                Limit=_PAGE if limit is None else min(_PAGE, limit - len(found)),
                **start,
            )
            found += [_record(item) for item in answer["Items"]]
            if not (last := answer.get("LastEvaluatedKey")):
                break
            start = {"ExclusiveStartKey": last}
        return found

    def _write(self, operation: str, **arguments: Any) -> None:
        self._call(operation, ReturnValuesOnConditionCheckFailure="ALL_OLD", **arguments)

    def _call(self, operation: str, **arguments: Any) -> Any:
        with _own_errors(self._table, self._settings):
            client = aws_client("dynamodb", self._settings)
            return getattr(client, operation)(TableName=self._table, **arguments)


def create_table(settings: AwsSettings, table: str) -> None:
    """Make the table if it is not there, for development and tests; installations have theirs from their own code.

    Raises:
        LedgerError: It cannot be made.
    """
    keys = [(KEY, "S"), *((index.partition, "S") for index in INDEXES), *((index.order, "N") for index in INDEXES)]
    with _own_errors(table, settings):
        client = aws_client("dynamodb", settings)
        try:
            client.create_table(
                TableName=table,
                BillingMode="PAY_PER_REQUEST",
                AttributeDefinitions=[{"AttributeName": name, "AttributeType": kind} for name, kind in keys],
                KeySchema=_key(KEY),
                GlobalSecondaryIndexes=[
                    {
                        "IndexName": index.name,
                        "KeySchema": _key(index.partition, index.order),
                        "Projection": {"ProjectionType": "ALL"},
                    }
                    for index in INDEXES
                ],
            )
        except client.exceptions.ResourceInUseException:
            return
        client.get_waiter("table_exists").wait(TableName=table, WaiterConfig={"Delay": 1, "MaxAttempts": 120})
        client.update_time_to_live(
            TableName=table, TimeToLiveSpecification={"Enabled": True, "AttributeName": TIME_TO_LIVE}
        )
        client.update_continuous_backups(
            TableName=table, PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True}
        )


def _key(partition: str, order: str = "") -> list[dict[str, str]]:
    key = [{"AttributeName": partition, "KeyType": "HASH"}]
    return [*key, {"AttributeName": order, "KeyType": "RANGE"}] if order else key


def _still(seen: JobRecord) -> dict[str, Any]:
    """The condition that a record is the one that was seen."""
    return {
        "ConditionExpression": "write_id = :seen",
        "ExpressionAttributeValues": {":seen": {"S": seen.write_id}},
    }


def _item(record: JobRecord) -> dict[str, Any]:
    return {name: _typed(value) for name, value in record.to_dict().items()}


def _record(item: dict[str, Any]) -> JobRecord:
    return JobRecord.from_dict({name: _untyped(value) for name, value in item.items()})


def _typed(value: Any) -> dict[str, Any]:
    """A plain value as DynamoDB writes it. Not by boto3's own serialiser: it refuses floats."""
    match value:
        case None:
            return {"NULL": True}
        case bool():
            return {"BOOL": value}
        case int() | float():
            return {"N": repr(value)}
        case str():
            return {"S": value}
        case list():
            return {"L": [_typed(item) for item in value]}
        case dict():
            return {"M": {name: _typed(item) for name, item in value.items()}}
    raise TypeError(f"{type(value)} is not plain")


def _untyped(value: dict[str, Any]) -> Any:
    ((kind, content),) = value.items()
    match kind:
        case "NULL":
            return None
        case "N":
            try:
                return int(content)
            except ValueError:
                return float(content)
        case "L":
            return [_untyped(item) for item in content]
        case "M":
            return {name: _untyped(item) for name, item in content.items()}
    return content


@contextmanager
def _own_errors(table: str, settings: AwsSettings) -> Iterator[None]:
    """Turn errors of botocore into `LedgerError` or `ConflictError`; their texts may quote a request."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, NoCredentialsError

    where = f"the job ledger, table {table} of DynamoDB,"
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code == "ConditionalCheckFailedException":
            item = error.response.get("Item")
            raise ConflictError(_record(item) if item else None) from None
        if code == "ResourceNotFoundException":
            raise LedgerError(f"{where} does not exist", "Correct its name and the region, or create it") from None
        if code in _DENIED:
            raise LedgerError(f"{where} refuses access ({code})", "Check the credentials and what they allow") from None
        if code in _THROTTLED:
            raise LedgerError(f"{where} refused too many calls in a row ({code})", "Try again later") from None
        raise LedgerError(f"{where} failed a call of {error.operation_name} ({code})", "Try again later") from None
    except NoCredentialsError:
        raise LedgerError(f"{where} needs credentials of AWS", "Name a block, a profile or a role") from None
    except (HTTPClientError, ConnectionError) as error:
        raise LedgerError(
            f"{where} cannot be reached ({type(error).__name__})", "Check the network and the endpoint"
        ) from None
    except BotoCoreError as error:
        raise LedgerError(f"{where} cannot be used ({type(error).__name__})", "Check the settings of AWS") from None
