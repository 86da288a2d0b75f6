"""What S3 answers, as typed errors.

Messages name the object and the operation, never headers or URLs, which hold signatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tasks.errors import ScratchError, StoreError, SuperResolutionError

_MISSING: Final = {"NoSuchKey", "NoSuchVersion", "404", "MethodNotAllowed", "405"}
_DENIED: Final = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}
_CHANGED: Final = {"PreconditionFailed", "412", "ConditionalRequestConflict", "InvalidRange", "416"}
_CREDENTIALS: Final = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
}
_ELSEWHERE: Final = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_BUSY: Final = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"}
_BROKEN: Final = {"InternalError", "ServiceUnavailable", "RequestTimeout", "500", "502", "503", "504"}


@contextmanager
def typed_errors(doing: str, uri: object, blame: type[SuperResolutionError]) -> Iterator[None]:
    """Turn errors of botocore raised inside the block into typed ones.

    Args:
        doing: The operation, as it follows "cannot".
        uri: The object or bucket concerned.
        blame: Class of errors that come from what was asked for (missing, denied, changed). Those of the service or of
            the way to it are always `StoreError`.
    """
    # Here: botocore is slow to load, and a command that never leaves the machine does without it.
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _of_answer(error, f"cannot {doing} {uri}", blame) from error
    except BotoCoreError as error:
        raise _of_client(error, f"cannot {doing} {uri}") from error


@contextmanager
def local_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn errors of this machine's files raised inside the block into `ScratchError`."""
    try:
        yield
    except OSError as error:
        raise ScratchError(f"cannot {doing} {path} ({error.strerror})", "Check space and permissions") from error


def code_of(error: Any) -> str:
    """Code of a `ClientError`; its HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _of_answer(error: Any, problem: str, blame: type[SuperResolutionError]) -> SuperResolutionError:
    code = code_of(error)
    message = str(error.response.get("Error", {}).get("Message", ""))
    if code.startswith("KMS.") or (code in _DENIED and "kms:" in message):
        return blame(
            f"{problem}: its encryption key cannot be used ({code})",
            "Enable the KMS key and allow kms:GenerateDataKey and kms:Decrypt",
        )
    if code == "NoSuchBucket":
        return blame(f"{problem}: there is no such bucket", "Check the name, or create it")
    if code in _MISSING:
        return blame(f"{problem}: there is no such object", "Check the address")
    if code in _DENIED:
        return blame(
            f"{problem}: access is denied",
            "Allow s3:GetObject and s3:ListBucket (without the latter a missing object looks denied), for results "
            "s3:PutObject, s3:AbortMultipartUpload and s3:ListMultipartUploadParts too",
        )
    if code in _CHANGED:
        return blame(f"{problem}: it changed meanwhile", "Start again when nobody writes to it")
    if code == "InvalidObjectState":
        return blame(f"{problem}: it is archived", "Restore it first")
    if code in _CREDENTIALS:
        return StoreError(f"{problem}: the credentials are not accepted ({code})", "Renew them, and check the clock")
    if code in _ELSEWHERE:
        return StoreError(f"{problem}: the bucket is in another region ({code})", "Set the region")
    if code in _BUSY:
        return StoreError(f"{problem}: the store was too busy for too long ({code})", "Try again later")
    if code in _BROKEN:
        return StoreError(f"{problem}: the store failed again and again ({code})", "Try again later")
    return StoreError(f"{problem} ({code})", "Check the settings of the store")


def _of_client(error: Any, problem: str) -> SuperResolutionError:
    from botocore import exceptions

    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.ProfileNotFound
        | exceptions.SSOError,
    ):
        return StoreError(f"{problem}: there are no credentials", "Set a profile, a role or a credentials block")
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return StoreError(
            f"{problem}: the store cannot be reached ({type(error).__name__})", "Check network, proxy and endpoint"
        )
    return StoreError(f"{problem} ({type(error).__name__})", "Check the settings of the store")
