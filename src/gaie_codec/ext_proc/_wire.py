"""Envoy's messages <-> plain values: headers in, and the answers that a processor sends.

Everything sent keeps to what all data planes take: an explicit append_action, body pieces below 64 KB, and headers by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, TypeAlias

from .messages import CommonResponse, HeaderMutation, HeaderValueOption, ProcessingMode, ProcessingResponse

Pairs: TypeAlias = list[tuple[str, str]]
Direction: TypeAlias = Literal["request", "response"]

FULL_DUPLEX: Final[int] = ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED: Final[int] = ProcessingMode.BUFFERED
BODY_MODES: Final[Any] = ProcessingMode.BodySendMode

# Some data planes take no more than 64 KB a message; the Go EPPs cut here too.
MAX_BODY_BYTES: Final = 62_000
_OVERWRITE: Final[int] = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def decode_headers(header_map: Any) -> Pairs:
    """Names in lower case with their values: Envoy fills `raw_value`, others `value`."""
    return [(header.key.lower(), header.raw_value.decode("latin-1") or header.value) for header in header_map.headers]


def encode_mutation(set_headers: Iterable[tuple[str, str]] = (), remove: Iterable[str] = ()) -> Any:
    """Headers to set, in the place of any that there are, and names to remove."""
    mutation = HeaderMutation(remove_headers=remove)
    for name, value in set_headers:
        # Anything that a header can hold came in as latin-1, and our own values are ASCII.
        mutation.set_headers.add(header={"key": name, "raw_value": value.encode("latin-1", "replace")}, append_action=_OVERWRITE)
    return mutation


def headers_answer(direction: Direction, mutation: Any = None, *, reroute: bool = False) -> Any:
    """Goes on with the headers. `reroute` lets the route be chosen again, by the new path and headers."""
    common = CommonResponse(header_mutation=mutation, clear_route_cache=reroute)
    return ProcessingResponse(**{f"{direction}_headers": {"response": common}})


def streamed_answer(data: bytes) -> Any:
    """A piece of a response's body, as for `streamed_answers`; twice as fast as with keyword arguments, and once a token."""
    answer = ProcessingResponse()
    answer.response_body.response.body_mutation.streamed_response.body = data
    return answer


def streamed_answers(direction: Direction, data: bytes, *, end: bool) -> Iterator[Any]:
    """Body bytes in pieces. `end` only mirrors what was received; without it no bytes are no message."""
    for start in range(0, len(data) or end, MAX_BODY_BYTES):
        piece = data[start : start + MAX_BODY_BYTES]
        answer = ProcessingResponse()
        body = answer.response_body if direction == "response" else answer.request_body
        streamed = body.response.body_mutation.streamed_response
        streamed.body = piece
        if end and start + MAX_BODY_BYTES >= len(data):
            streamed.end_of_stream = True
        yield answer


def buffered_answer(direction: Direction, body: bytes | None = None, mutation: Any = None, *, reroute: bool = False) -> Any:
    """The answer to a whole body in mode BUFFERED: another in its place, or None for the same. Headers may still change."""
    common = CommonResponse(header_mutation=mutation, clear_route_cache=reroute)
    if body is not None:
        common.body_mutation.body = body
    return ProcessingResponse(**{f"{direction}_body": {"response": common}})


def trailers_answer(direction: Direction, mutation: Any = None) -> Any:
    """Goes on with the trailers."""
    return ProcessingResponse(**{f"{direction}_trailers": {"header_mutation": mutation}})


def replaced_answer(mutation: Any, body: bytes) -> Any:
    """Goes on with other response headers and with this body, where there is none; nothing may follow. Other filters see it."""
    common = CommonResponse(status=CommonResponse.CONTINUE_AND_REPLACE, header_mutation=mutation)
    common.body_mutation.body = body
    return ProcessingResponse(response_headers={"response": common})


def immediate_answer(status: int, body: bytes, headers: Iterable[tuple[str, str]], *, details: str, grpc_status: int | None = None) -> Any:
    """A whole HTTP answer in the place of all else. `grpc_status` is for gRPC clients, to whom the body is the grpc-message."""
    answer = ProcessingResponse()
    answer.immediate_response.status.code = status
    answer.immediate_response.headers.CopyFrom(encode_mutation(headers))
    answer.immediate_response.body = body
    answer.immediate_response.details = details
    if grpc_status is not None:
        answer.immediate_response.grpc_status.status = grpc_status
    return answer
