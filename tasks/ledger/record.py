"""What the ledger knows about a job, and the order of its states. Pure data: nothing here reads or writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from numbers import Integral, Rational, Real
from typing import Any, Final

import xxhash

from tasks.errors import LedgerError, SettingsError
from tasks.ledger.holder import Holder


class JobState(StrEnum):
    """Where a job is. Jobs move forward in this order; the last three are ends."""

    CREATED = "created"
    STAGING = "staging"
    EXTRACTING = "extracting"
    UPSCALING = "upscaling"
    ENCODING = "encoding"
    VERIFYING = "verifying"
    PUBLISHED = "published"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Only another attempt leads out of these.
ENDS: Final = frozenset({JobState.PUBLISHED, JobState.FAILED, JobState.CANCELLED})

#: An item of DynamoDB holds 400 kB. These bounds keep a record far below: the latest transitions beside the first one,
#: the latest Slurm jobs, bytes of an error's message.
LATEST_TRANSITIONS: Final = 200
LATEST_SLURM_JOBS: Final = 1000
MESSAGE_BYTES: Final = 4096

#: Bytes of a record as JSON, beyond which its probe is left out. DynamoDB's own count is at most half as much again;
#: every write costs by size.
RECORD_BYTES: Final = 100_000

#: Numbers that DynamoDB holds: this many digits, and sizes from one bound to the other.
_DIGITS: Final = 38
_SMALLEST: Final = 1e-130
_LARGEST: Final = 9.9e125


def may_follow(old: JobState, new: JobState) -> bool:
    """Whether a job may go from one state to another: only forward, over any number of states, never out of an end."""
    order = list(JobState)
    return old not in ENDS and order.index(new) > order.index(old)


def job_id_of(source: str, source_version: str, destination: str, settings: Mapping[str, Any]) -> str:
    """The id of a job: the same request on the same content has the same one.

    Args:
        source: URI.
        source_version: What names the content that the source has now.
        destination: URI.
        settings: All that the result depends on.
    """
    request = json.dumps(plain([source, source_version, destination, settings]), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(request.encode())[:16]


@dataclass(frozen=True)
class NewJob:
    """A job to begin.

    Raises:
        SettingsError: It has no owner.
    """

    owner: str
    source: str
    source_version: str
    destination: str
    settings: dict[str, Any] = field(default_factory=dict)
    source_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.owner:
            raise SettingsError("a job needs an owner", "Name one")

    @property
    def job_id(self) -> str:
        return job_id_of(self.source, self.source_version, self.destination, self.settings)


@dataclass(frozen=True)
class JobError:
    """Why a job failed or was cancelled, and where to look."""

    phase: str
    kind: str
    """As in `SuperResolutionError.kind`."""
    message: str
    first_frame: int | None = None
    last_frame: int | None = None
    node: str = ""
    slurm_job: str = ""
    log: str = ""


@dataclass(frozen=True)
class Transition:
    """A state that a job reached."""

    state: JobState
    at: float
    """Seconds since the epoch."""
    attempt: int
    node: str = ""
    write_id: str = ""
    """The write that brought it."""


@dataclass(frozen=True)
class JobRecord:
    """All that is known about a job. Times are seconds since the epoch."""

    job_id: str
    owner: str
    state: JobState = JobState.CREATED
    source: str = ""
    source_version: str = ""
    source_bytes: int = 0
    destination: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    work_folder: str = ""
    """The job's folder in scratch."""
    output: dict[str, Any] | None = None
    """What was published: `uri`, `version_id`, `etag`, `digest`, `bytes`."""
    frames_total: int = 0
    frames_done: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)
    """By pool."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums of what was measured, as `Name.phase`."""
    result: dict[str, Any] = field(default_factory=dict)
    """What the flow returned."""
    cost: float | None = None
    flow_run_id: str = ""
    slurm_jobs: tuple[str, ...] = ()
    error: JobError | None = None
    attempt: int = 1
    version: int = 1
    """Number of writes."""
    write_id: str = ""
    """Of the last write, random: tells whether a write whose answer was lost is the one that is stored."""
    holder: Holder = field(default_factory=Holder)
    lease_until: float = 0.0
    """Until when the holder counts as alive where nobody can look whether it is."""
    created_at: float = 0.0
    updated_at: float = 0.0
    expires_at: int | None = None
    """When the record may be removed; set once the job has ended."""
    history: tuple[Transition, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and DynamoDB hold them."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JobRecord:
        """The record that `to_dict` was made from; keys that newer code added are ignored, missing ones have defaults.

        Raises:
            LedgerError: It is no record, or in a state that only newer code knows.
        """
        try:
            values = _known(cls, data)
            for name in ("lease_until", "created_at", "updated_at", "cost"):  # DynamoDB makes 2.0 a 2.
                if values.get(name) is not None:
                    values[name] = float(values[name])
            if "state" in values:
                values["state"] = JobState(values["state"])
            if values.get("error") is not None:
                values["error"] = JobError(**_known(JobError, values["error"]))
            if "holder" in values:
                values["holder"] = Holder(**_known(Holder, values["holder"]))
            values["slurm_jobs"] = tuple(values.get("slurm_jobs", ()))
            values["history"] = tuple(
                Transition(**{**_known(Transition, item), "state": JobState(item["state"]), "at": float(item["at"])})
                for item in values.get("history", ())
            )
            return cls(**values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise LedgerError(
                f"the record of job {_name_of(data)} cannot be read ({error!r})",
                "Use the version of this program that wrote it, or a newer one",
            ) from error

    def bounded(self) -> JobRecord:
        """The record without what would make it too large to store; equal to what is read back once it is stored."""
        history, error = self.history, self.error
        if len(history) > 1 + LATEST_TRANSITIONS:
            history = (history[0], *history[-LATEST_TRANSITIONS:])
        if error is not None:
            error = replace(error, message=_cut(error.message))
        short = replace(self, history=history, error=error, slurm_jobs=self.slurm_jobs[-LATEST_SLURM_JOBS:])
        data = short.to_dict()
        if len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()) > RECORD_BYTES:
            data["probe"] = {"left_out": "too large"}
        return self.from_dict(data)


#: What a writer may set; the rest identifies the job or is the ledger's own.
FACTS: Final = frozenset(item.name for item in fields(JobRecord)) - {
    *("job_id", "owner", "source", "source_version", "destination", "settings", "state", "history"),
    *("attempt", "version", "write_id", "holder", "lease_until", "created_at", "updated_at", "expires_at"),
}


def plain(value: Any) -> Any:
    """A value as JSON and DynamoDB both hold it.

    Paths, fractions and the like become text; numbers that are none, or beyond all bounds, `None`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # Names of files need not be Unicode.
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value) if abs(int(value)) < 10**_DIGITS else str(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        number = float(value)
        if abs(number) < _SMALLEST:
            return 0.0
        return number if abs(number) < _LARGEST else None
    return plain(str(value))


def _known(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _name_of(data: Any) -> str:
    return str(data.get("job_id", "?")) if isinstance(data, Mapping) else "?"


def _cut(text: str) -> str:
    return plain(text).encode()[:MESSAGE_BYTES].decode(errors="ignore")
