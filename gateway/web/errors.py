"""Every error a caller can see: one tree, and from it one table.

Two branches that are never mixed: CallerError is the tenant's doing and tells what to change; ServiceError is ours, tells the
caller a code and a request id, and gives its reason to the operator's log alone. `…` in a text stands for the detail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import msgspec

# A runner's message can be as long as its reply; nobody reads more of an error than this.
MAX_DETAIL_CHARS = 2_000

# Every token failure is the same answer to the byte, so it carries the same id.
NO_REQUEST_ID = "0" * 32


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the documented table."""

    status: int
    code: str
    text: str
    when: str
    retry_after: bool


class ApiError(Exception):
    """The root. `hint`, and `extra` at the envelope's end, are for the caller, `reason` is for the operator; none holds a token."""

    code: ClassVar[str]
    status: ClassVar[int]
    text: ClassVar[str]
    retry_after_seconds: ClassVar[int] = 0

    def __init_subclass__(
        cls, *, code: str = "", status: int = 0, text: str = "", retry_after_seconds: int = 0, **kwargs: object
    ) -> None:
        super().__init_subclass__(**kwargs)
        if code:
            cls.code, cls.status, cls.text, cls.retry_after_seconds = code, status, text, retry_after_seconds

    def __init__(
        self,
        detail: str = "",
        *,
        hint: str | None = None,
        reason: str = "",
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(self.code)
        self.message = self.text.replace("…", detail[:MAX_DETAIL_CHARS])
        self.hint = hint[:MAX_DETAIL_CHARS] if hint else None
        self.reason = reason
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})
        if self.retry_after_seconds:
            self.headers.setdefault("Retry-After", str(self.retry_after_seconds))

    def body(self, request_id: str) -> bytes:
        """The one envelope: error, code, request_id, where it helps hint, and what only some errors have."""
        envelope: dict[str, object] = {"error": self.message, "code": self.code, "request_id": request_id}
        if self.hint is not None:
            envelope["hint"] = self.hint
        return msgspec.json.encode(envelope | self.extra)


class CallerError(ApiError):
    """The request or its SQL is at fault; the same request fails again."""


class ServiceError(ApiError):
    """Something of ours failed; the request may be in order."""


class BadRequestError(CallerError, code="bad_request", status=400, text="bad request"):
    """The bytes are not HTTP, or a header or the request line is too long."""


class InvalidJsonError(CallerError, code="invalid_json", status=400, text="invalid json"):
    """The body is not one JSON object of the documented form; the hint names what is wrong."""


class MissingSqlError(CallerError, code="missing_sql", status=400, text="missing sql"):
    """`sql` is absent, empty or not a string."""


class InvalidArgsError(CallerError, code="invalid_args", status=400, text="invalid args"):
    """A value in `args` has no documented form, or the arguments do not fit the statements."""


class InvalidSqlError(CallerError, code="sql_error", status=400, text="invalid sql: …"):
    """SQLite refused a statement; its own words follow."""


class TooComplexError(CallerError, code="too_complex", status=400, text="invalid sql: statement too complex…"):
    """The SQL, or the program that a statement compiles to, is too long. SQLite's other limits are a `sql_error`."""


class MemoryLimitError(CallerError, code="memory_limit", status=400, text="invalid sql: out of memory"):
    """The statements need more memory than a request has."""


class DatabaseDamagedError(CallerError, code="database_damaged", status=400, text="invalid sql: database disk image is malformed"):
    """The instance's file, or the one that was sent, is not a healthy SQLite database; `report` says what is wrong."""


class ForbiddenSqlError(CallerError, code="forbidden", status=400, text="forbidden sql keyword: …"):
    """SQLite's authorizer refused what a statement means to do, e.g. `ATTACH`."""


class BadParameterError(CallerError, code="bad_parameter", status=400, text="invalid parameter: …"):
    """A parameter of the query or a header's value is unknown, repeated, missing or of no documented form."""


class ImportInvalidError(CallerError, code="import_invalid", status=400, text="invalid import: …"):
    """The data cannot be loaded into that table; `line` counts from 1, or is null. Nothing was changed."""


class FileRefusedError(CallerError, code="file_refused", status=400, text="file refused: …"):
    """The file is a healthy database and beyond a limit, of its pages or its schema."""


class ReadOnlyError(CallerError, code="read_only", status=403, text="read-only session"):
    """The token is a shared one, which can only read."""


class ExtendDisabledError(CallerError, code="extend_disabled", status=403, text="extending is off"):
    """The operator lets no instance live longer than it was given."""


class InstanceNotFoundError(CallerError, code="instance_not_found", status=404, text="instance not found"):
    """The session token is malformed, forged, unknown or expired: always the same answer."""


class NotFoundError(CallerError, code="not_found", status=404, text="not found"):
    """There is no such path."""


class MethodNotAllowedError(CallerError, code="method_not_allowed", status=405, text="method not allowed"):
    """The path exists, the method does not; `Allow` lists those that do."""


class QueryTimeoutError(CallerError, code="query_timeout", status=408, text="query timeout"):
    """The statements ran longer than the deadline; what was not committed is undone."""


class RequestTimeoutError(CallerError, code="request_timeout", status=408, text="request timeout"):
    """The header or the body did not arrive in time."""


class DatabaseSalvagedError(CallerError, code="database_salvaged", status=409, text="database salvaged"):
    """The instance's file was damaged, and what could be read of it is in its place; the request was not done, send it again."""


class AlreadyDoneError(CallerError, code="already_done", status=409, text="request was done already"):
    """A request with this `Idempotency-Key` was begun before, and its answer is not held."""


class BodyTooLargeError(CallerError, code="body_too_large", status=413, text="request body too large"):
    """The body, or what its numbers grow to, is above the limit."""


class UnsupportedMediaTypeError(CallerError, code="unsupported_media_type", status=415, text="unsupported media type"):
    """The body is compressed, or is declared as something that the route does not take."""


class RangeNotSatisfiableError(CallerError, code="range_not_satisfiable", status=416, text="range not satisfiable"):
    """The range begins behind the end of the file; `Content-Range` has its size."""


class IdempotencyMismatchError(CallerError, code="idempotency_mismatch", status=422, text="idempotency key reused"):
    """The instance had this `Idempotency-Key` with another request."""


class RateLimitedError(CallerError, code="rate_limited", status=429, text="rate limit exceeded"):
    """Too many requests, or too many new instances, from one address; `Retry-After` says when."""

    def __init__(self, *, retry_after_seconds: int, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "Retry-After": str(retry_after_seconds)})


class TooManyInstancesError(
    CallerError, code="too_many_instances", status=429, text="too many live instances", retry_after_seconds=60
):
    """This address has as many live instances as one may have; `Retry-After` says when the oldest of them ends."""


class QueryQuotaError(CallerError, code="query_quota", status=429, text="instance query limit exceeded"):
    """The instance has answered as many requests as one may; start a new instance."""


class StorageLimitError(CallerError, code="storage_limit", status=507, text="instance storage limit exceeded"):
    """The instance's database is full; delete rows or start a new instance."""


class InternalError(ServiceError, code="internal_error", status=500, text="internal error"):
    """A defect of ours."""


class RunnerFailedError(ServiceError, code="runner_failed", status=500, text="runner failed"):
    """The request's container ended without an answer."""


class ReplyInvalidError(ServiceError, code="reply_invalid", status=500, text="runner reply invalid"):
    """The request's container answered something that is not of the documented form."""


class OverloadedError(ServiceError, code="overloaded", status=503, text="overloaded", retry_after_seconds=1):
    """Too many requests wait already, or this one waited too long."""


class ShuttingDownError(ServiceError, code="shutting_down", status=503, text="shutting down", retry_after_seconds=5):
    """The service is being stopped; what ran before is finished first."""


class LauncherUnavailableError(
    ServiceError, code="launcher_unavailable", status=503, text="launcher unavailable", retry_after_seconds=5
):
    """The process that starts containers does not answer."""


class EngineUnavailableError(ServiceError, code="engine_unavailable", status=503, text="engine unavailable", retry_after_seconds=5):
    """The container engine does not answer or lost the container."""


class ImageMissingError(ServiceError, code="image_missing", status=503, text="runner image missing", retry_after_seconds=60):
    """The runner image is not on this host."""


class HostStorageLowError(ServiceError, code="host_storage_low", status=503, text="host storage low", retry_after_seconds=60):
    """The host has no room for more data."""


class HostFullError(ServiceError, code="host_full", status=503, text="too many instances", retry_after_seconds=30):
    """The host has as many live instances as it may; those that live go on."""


class CircuitOpenError(ServiceError, code="circuit_open", status=503, text="circuit breaker open", retry_after_seconds=5):
    """The service is refusing work until it is well again: too much waits, or memory, disk, engine or runs are in trouble."""


def leaves(branch: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    """Every class that a caller can see, in the order of this file."""
    for cls in branch.__subclasses__():
        if "code" in vars(cls):
            yield cls
        yield from leaves(cls)


def table() -> tuple[Row, ...]:
    """What docs/api.md and openapi.json are kept equal to."""
    return tuple(
        Row(cls.status, cls.code, cls.text, (cls.__doc__ or "").strip(), bool(cls.retry_after_seconds) or cls is RateLimitedError)
        for cls in leaves()
    )
