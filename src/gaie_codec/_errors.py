"""What can go wrong: one error tree and one table from gRPC codes to HTTP.

Every error raised on purpose is a `CodecError`; `UsageError` is a bug of the caller and deliberately not one of them. Errors are
mapped by `Code`, never by their text, and no text carries prompts or payload bytes: lengths, offsets, field names and codes only.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Code(enum.IntEnum):
    """gRPC status codes, with the numbers of `grpc-status`."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class HttpError(NamedTuple):
    """How one code looks to an HTTP client. `message` stands in where the server's own words are not the client's business."""

    status: int
    type: str
    message: str


# Types are vLLM's where vLLM has one (400, 404, 500, 503), else the openai SDK's class for that status.
CODE_TABLE: Final[Mapping[Code, HttpError]] = MappingProxyType(
    {
        Code.OK: HttpError(200, "", ""),
        Code.CANCELLED: HttpError(499, "ClientClosedRequestError", "The request was cancelled"),
        Code.UNKNOWN: HttpError(500, "InternalServerError", "Internal server error"),
        Code.INVALID_ARGUMENT: HttpError(400, "BadRequestError", "The model server refused the request as invalid"),
        Code.DEADLINE_EXCEEDED: HttpError(504, "GatewayTimeoutError", "The model server did not answer in time"),
        Code.NOT_FOUND: HttpError(404, "NotFoundError", "Not found"),
        Code.ALREADY_EXISTS: HttpError(409, "ConflictError", "A request with this id is already running"),
        Code.PERMISSION_DENIED: HttpError(403, "PermissionDeniedError", "Permission denied"),
        Code.RESOURCE_EXHAUSTED: HttpError(429, "RateLimitError", "The model server is out of capacity"),
        Code.FAILED_PRECONDITION: HttpError(400, "BadRequestError", "The model server cannot do this in its present state"),
        Code.ABORTED: HttpError(409, "ConflictError", "The model server aborted the request"),
        Code.OUT_OF_RANGE: HttpError(400, "BadRequestError", "A value is out of the range that the model server accepts"),
        Code.UNIMPLEMENTED: HttpError(501, "NotImplementedError", "The model server does not implement this call"),
        Code.INTERNAL: HttpError(500, "InternalServerError", "Internal server error"),
        Code.UNAVAILABLE: HttpError(503, "Service Unavailable", "The model server is unavailable"),
        Code.DATA_LOSS: HttpError(500, "InternalServerError", "Internal server error"),
        Code.UNAUTHENTICATED: HttpError(401, "AuthenticationError", "The model server did not accept the credentials"),
    }
)

# For an answer without grpc-status, from something that does not speak gRPC: the gRPC project's http-grpc-status-mapping.md.
_HTTP_TO_CODE: Final = MappingProxyType(
    {
        400: Code.INTERNAL,
        401: Code.UNAUTHENTICATED,
        403: Code.PERMISSION_DENIED,
        404: Code.UNIMPLEMENTED,
        429: Code.UNAVAILABLE,
        502: Code.UNAVAILABLE,
        503: Code.UNAVAILABLE,
        504: Code.UNAVAILABLE,
    }
)


def code_from_http(status: int) -> Code:
    """The gRPC code that stands for an HTTP status when there is no `grpc-status`."""
    return _HTTP_TO_CODE.get(status, Code.UNKNOWN)


# What a model server says in HTTP terms of its own failure, inside a stream that is well-formed gRPC.
_SERVER_STATUS_TO_CODE: Final = MappingProxyType(
    {
        401: Code.UNAUTHENTICATED,
        403: Code.PERMISSION_DENIED,
        404: Code.NOT_FOUND,
        408: Code.DEADLINE_EXCEEDED,
        409: Code.ABORTED,
        429: Code.RESOURCE_EXHAUSTED,
        499: Code.CANCELLED,
        501: Code.UNIMPLEMENTED,
        503: Code.UNAVAILABLE,
        504: Code.DEADLINE_EXCEEDED,
    }
)


def code_from_server_status(status: int) -> Code:
    """The gRPC code for an HTTP status by which a model server itself reports a failure."""
    return _SERVER_STATUS_TO_CODE.get(status, Code.INVALID_ARGUMENT if 400 <= status < 500 else Code.INTERNAL)


def server_status_from_code(code: Code) -> int:
    """The inverse, for who speaks like such a server."""
    return next((status for status, known in _SERVER_STATUS_TO_CODE.items() if known is code), CODE_TABLE[code].status)


def code_from_text(text: str) -> Code:
    """The code in a `grpc-status` value. What is no code at all is UNKNOWN, as the gRPC specification has it."""
    try:
        return Code(int(text)) if text.isascii() and text.isdigit() else Code.UNKNOWN
    except ValueError:
        return Code.UNKNOWN


def as_code(number: int) -> Code:
    """The code of a number, which some gRPC libraries give bare; UNKNOWN for one without a name. Raises UsageError for anything else."""
    if not isinstance(number, int):
        raise UsageError(f"{number!r} is no status code; gaie_codec.Code has them by number")
    return Code(number) if 0 <= number < len(Code) else Code.UNKNOWN


class CodecError(Exception):
    """Base of everything raised on purpose.

    `message` is safe to show to an HTTP client, `detail` is for the operator's log only, `param` names the request field at fault.
    """

    code: Code = Code.INTERNAL
    http_status: int = 500
    error_type: str = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.message} ({self.detail})" if self.detail else self.message


class RequestError(CodecError):
    """The client is at fault: 4xx."""

    code = Code.INVALID_ARGUMENT
    http_status = 400
    error_type = "BadRequestError"


class MalformedRequestError(RequestError):
    """The body is not what its endpoint takes: not JSON, a wrong type, a value out of range."""


class UnsupportedFieldError(RequestError):
    """A known field which this model server or snapshot cannot be told, and which would change the output."""


class UnsupportedEndpointError(RequestError):
    """No such path (404), or not with this method (405); `allow` lists the methods that there are."""

    code = Code.UNIMPLEMENTED

    def __init__(self, message: str, *, http_status: int = 404, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow
        self.http_status = http_status
        self.error_type = "NotFoundError" if http_status == 404 else "MethodNotAllowedError"


class ModelNotFoundError(RequestError):
    """The request names a model that the server does not serve: 404."""

    code = Code.NOT_FOUND
    http_status = 404
    error_type = "NotFoundError"


class RequestTooLargeError(RequestError):
    """The body is longer than `Limits.max_request_bytes`: 413."""

    code = Code.RESOURCE_EXHAUSTED
    http_status = 413
    error_type = "RequestTooLargeError"


class UpstreamError(CodecError):
    """The model server, or something between, broke the protocol: 502."""

    http_status = 502
    error_type = "BadGatewayError"


class FramingError(UpstreamError):
    """Bytes that are no gRPC length-prefixed message."""


class MalformedMessageError(UpstreamError):
    """A frame whose payload is not the protobuf message, or not the compression, that it should be."""


class OutOfOrderError(UpstreamError):
    """A well-formed message at a moment when the protocol has no place for it."""


class TruncatedResponseError(UpstreamError):
    """The response ended before every choice had finished."""


class UpstreamStatusError(CodecError):
    """The model server ended the call with a status other than OK; `code` decides what the client sees.

    A 4xx shows the server's own words, because they tell the client what to change. From 500 on they tell of the inside of the
    cluster, so the client gets the table's sentence, and `detail` keeps the words for the log.
    """

    def __init__(self, code: Code, detail: str = "") -> None:
        if code is Code.OK:
            raise UsageError("OK is not an error")
        entry = CODE_TABLE[code]
        # CANCELLED is a gRPC library's or a proxy's, never the server's word about the request.
        is_internal = entry.status >= 500 or code is Code.CANCELLED
        super().__init__(entry.message if is_internal or not detail else detail, detail=f"{code.name}: {detail}")
        self.code = code
        self.words = detail
        """The server's own, as they came."""
        self.http_status = entry.status
        self.error_type = entry.type

    def __str__(self) -> str:
        return self.detail


class UsageError(RuntimeError):
    """The caller misused an object or asked for something that does not exist. A bug to fix, hence no `CodecError`."""
