"""What the ledger's table looks like in DynamoDB, for the code that uses it and whatever makes it."""

from __future__ import annotations

from typing import Final, NamedTuple


class Index(NamedTuple):
    """A global secondary index; it holds whole records."""

    name: str
    partition: str
    """A string."""
    order: str
    """A number, seconds since the epoch."""


#: Partition key of the table, a string.
KEY: Final = "job_id"

BY_OWNER: Final = Index("by-owner", "owner", "created_at")
BY_STATE: Final = Index("by-state", "state", "updated_at")
INDEXES: Final = (BY_OWNER, BY_STATE)

#: Seconds since the epoch after which DynamoDB removes a record by itself.
TIME_TO_LIVE: Final = "expires_at"
