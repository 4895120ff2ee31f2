"""Requests to storage: which failures are tried again, and what is said of the others."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from diffprune.errors import DiffpruneError, RemoteError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Retries:
    """How often a request is tried, and the seconds before the second try; they double up to ``most``."""

    attempts: int = 8
    first: float = 0.25
    most: float = 15.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the ``attempt``-th try; partly random, so that many clients do not return at once."""
        return min(self.most, self.first * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


RETRIES = Retries()


class Truncated(Exception):
    """A body of another length than was asked for."""


def retrying(where: str, request: Callable[[], Result]) -> Result:
    """The result of ``request``, which is tried again while it fails in a way that may pass.

    That is: a status of 500 or above, 408 or 429, "slow down", a timeout, a broken connection, a body that is too short
    or fails its checksum. Raises FileNotFoundError for what is not there, and for the rest RemoteError, which says
    ``where`` (URL and range) and after how many tries.
    """
    for attempt in range(1, RETRIES.attempts + 1):
        try:
            return request()
        except DiffpruneError:
            raise
        except Exception as error:
            kind, told = judge(error)
            if kind == "missing":
                raise FileNotFoundError(errno.ENOENT, "no such object", where) from error
            if kind != "passing" or attempt == RETRIES.attempts:
                raise RemoteError(
                    _message(where, kind, told, attempt), "failed" if kind == "passing" else kind
                ) from error
        time.sleep(RETRIES.pause(attempt))
    raise AssertionError("unreachable")


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_MISSING = {"NoSuchKey", "NoSuchBucket", "NotFound"}
_CHANGED = {"PreconditionFailed", "InvalidRange"}
_PASSING = {
    "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError",
    "ServiceUnavailable", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
}  # fmt: skip
# Of botocore, aiohttp and fsspec, by name: those packages are not there for everyone.
_PASSING_CLASSES = {
    "HTTPClientError", "ResponseParserError", "ResponseStreamingError", "IncompleteReadError", "FlexibleChecksumError",
    "IncompleteRead", "ClientPayloadError", "ClientConnectionError", "FSTimeoutError", "TimeoutError",
    "ConnectionError", "Truncated",
}  # fmt: skip
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_EXPIRED_CLASSES = {"TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}


_SIGNATURE = re.compile(r"(?<=[^\s'\"?])\?[^\s'\"]+")  # what follows the ? of a URL


def judge(error: BaseException) -> tuple[str, str]:
    """(what kind of failure: missing, passing, expired, denied, changed or refused; what was told about it)."""
    status, code = answer(error)
    classes = {base.__name__ for one in _causes(error) for base in type(one).__mro__}
    said = _SIGNATURE.sub("", str(error) if status else repr(error))
    told = f"{status} {code}: {said}" if status and code else f"{status}: {said}" if status else said
    if code in _EXPIRED or classes & _EXPIRED_CLASSES:
        return "expired", told
    if code in _PASSING or (status is not None and (status >= 500 or status in (408, 429))):
        return "passing", told
    if code in _MISSING or status == 404:
        return "missing", told
    if code in _CHANGED or status in (412, 416):
        return "changed", told
    if status in (401, 403) or classes & _NO_CREDENTIALS:
        return "denied", told
    if status is None and classes & _PASSING_CLASSES:
        return "passing", told
    if isinstance(error, FileNotFoundError):
        return "missing", told
    return "denied" if isinstance(error, PermissionError) else "refused", told


def answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the error code that a server gave, from the exception of a package behind this one."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        status = getattr(one, "code" if type(one).__name__ == "HttpError" else "status", None)  # gcsfs's, or aiohttp's
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, "" if code == str(status) else code
        if isinstance(status, int):
            return status, ""
    return None, ""


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _message(where: str, kind: str, told: str, attempt: int) -> str:
    again = "run the same command again; what is finished is kept"
    if kind == "expired":
        return f"{where}: the credentials have expired ({told}): get new ones and {again}"
    if kind == "denied":
        return f"{where}: access denied ({told}); check the credentials and what they may do"
    if kind == "changed":
        return f"{where}: it was changed or replaced while it was read ({told}); {again}"
    if kind == "passing":
        return f"{where}: tried {attempt} times, the last time: {told}; when storage answers again, {again}"
    return f"{where}: refused ({told})"
