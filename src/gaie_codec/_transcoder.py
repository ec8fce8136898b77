"""The one data path: HTTP request -> gRPC call -> HTTP answer, for a dialect and snapshot bound at the start.

    transcoder = Transcoder("vllm.engine", tokenizer=tokenizer)
    call = transcoder.request("POST", "/v1/chat/completions", headers, body, request_id="r1")
    response = call.response(created=1700000000)
    send(response.receive_headers(headers)); send(response.receive_data(chunk)); ...; send(response.receive_trailers(trailers))

No I/O, clocks or randomness: the host brings bytes, ids and times, and copies out `ResponseHead`, `BodyChunk` and `EndOfBody`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from google.protobuf.message import EncodeError

from . import adapters, snapshots
from ._errors import (
    MalformedRequestError,
    RequestTooLargeError,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    UsageError,
)
from ._events import InferenceRequest, ModelInfo, SamplingParams
from ._framing import DEFAULT_MAX_MESSAGE_BYTES, encode_frame
from ._metadata import FORWARDED, Headers, as_mapping, is_metadata_value
from ._response import Response
from .openai import chat, sampling
from .openai.chat_response import ResponseMeta

if TYPE_CHECKING:
    from .text import Tokenizer

_REQUEST_DEFAULTS: Final = InferenceRequest(request_id="")
_SAMPLING_DEFAULTS: Final = SamplingParams()
# OpenAI's and vLLM's, so that a client is not told that they do not exist.
_OTHER_PATHS: Final = frozenset(
    f"/v1/{name}" for name in ("completions", "embeddings", "responses", "messages", "score", "rerank", "audio/transcriptions")
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what is taken in, in bytes."""

    max_request_bytes: int = 64 * 1024 * 1024
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES


class Transcoder:
    """OpenAI HTTP <-> one model-server dialect at one snapshot. Holds no per-request state; share it between threads.

    `snapshot` None is the newest. `tokenizer` may be None only for a dialect that answers in text. `model` is what the server tells of
    itself (`adapter.decode_model_info`); without it nothing is checked against the context length or the served name, and no model
    defaults apply. `unsupported="drop"` sends a request without the fields that the wire cannot carry and reports them in
    `Call.dropped`, instead of refusing it. `stop_holdback="window"` holds back as much text as vLLM's own server while a stop string
    could still come, which reproduces its chunk boundaries; "prefix" holds back only what could still match. Raises UsageError.
    """

    def __init__(
        self,
        dialect: str,
        *,
        snapshot: str | None = None,
        tokenizer: Tokenizer | None = None,
        model: ModelInfo | None = None,
        limits: Limits | None = None,
        unsupported: Literal["reject", "drop"] = "reject",
        stop_holdback: Literal["prefix", "window"] = "prefix",
        prompt_tokens_details: bool = False,
    ) -> None:
        self.adapter = adapters.get(snapshots.load(dialect, snapshot))
        if tokenizer is None:
            raise UsageError(f"{dialect} answers in token ids: a tokenizer is needed")
        if unsupported not in ("reject", "drop"):
            raise UsageError(f"unsupported is {unsupported!r}, not 'reject' or 'drop'")
        if stop_holdback not in ("prefix", "window"):
            raise UsageError(f"stop_holdback is {stop_holdback!r}, not 'prefix' or 'window'")
        self.tokenizer = tokenizer
        self.model = model if model is not None else ModelInfo()
        self.limits = limits if limits is not None else Limits()
        self.unsupported = unsupported
        self.stop_holdback = stop_holdback
        self.prompt_tokens_details = prompt_tokens_details
        self.eos_token_ids = tokenizer.eos_token_ids.union(self.model.eos_token_ids)
        self.system_fingerprint = f"{self.adapter.dialect}-{self.adapter.snapshot.name}"
        try:
            sampling.decode_sampling({}, model=self.model, vocab_size=0, max_tokens=None, logprobs=None)
        except MalformedRequestError as error:
            raise UsageError(f"the model's own default_sampling_params are wrong: {error}") from error

    def request(self, method: str, path: str, headers: Headers | Mapping[str, str], body: bytes, *, request_id: str) -> Call:
        """Decode one HTTP request and encode the call to make of it.

        `request_id` must be unique among the calls in flight; a client's own (X-Request-Id, or `request_id` in the body) wins, as with
        vLLM. Raises RequestError.
        """
        route = path.partition("?")[0]
        if route != chat.PATH:
            known = "is not supported" if route in _OTHER_PATHS else "does not exist"
            raise UnsupportedEndpointError(f"the endpoint {route[:100]!r} {known}; there is {chat.PATH}")
        if method != "POST":
            raise UnsupportedEndpointError(f"{chat.PATH} takes POST", http_status=405, allow="POST")
        if len(body) > self.limits.max_request_bytes:
            raise RequestTooLargeError(f"the body of {len(body)} bytes is over the limit of {self.limits.max_request_bytes}")
        fields = as_mapping(headers)
        content_type = fields.get("content-type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise MalformedRequestError(
                "Unsupported Media Type: Only 'application/json' is allowed; send content-type: application/json", param="content-type"
            )
        if fields.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise MalformedRequestError("a compressed body is not supported; send it without content-encoding", param="content-encoding")
        decoded = chat.decode_request(
            body, request_id=request_id, fixed_id=fields.get("x-request-id"), tokenizer=self.tokenizer, model=self.model
        )
        inference = decoded.inference
        if "x-data-parallel-rank" in fields:
            inference = msgspec.structs.replace(inference, data_parallel_rank=_decode_rank(fields["x-data-parallel-rank"]))
        inference, dropped = self._fit(inference)
        try:
            message = self.adapter.encode_request(inference).SerializeToString()
        except (ValueError, TypeError, EncodeError):
            # The ranges were checked: what protobuf still refuses is text that is not Unicode.
            raise MalformedRequestError("the request holds text that is not valid Unicode") from None
        # A value that gRPC metadata cannot hold would fail the call; trace context is not worth that.
        metadata = tuple((name, fields[name]) for name in FORWARDED if is_metadata_value(fields.get(name, "")))
        return Call(self, inference, decoded.options, message, metadata, dropped + decoded.ignored)

    def _fit(self, request: InferenceRequest) -> tuple[InferenceRequest, tuple[str, ...]]:
        """Hold the request against what the dialect can carry: refuse by name, or drop and report."""
        lost = [name for name in _asked_for(request) if name not in self.adapter.carries]
        if lost:
            if self.unsupported == "reject":
                raise UnsupportedFieldError(
                    f"`{_openai_name(lost[0])}` cannot be sent to this model server ({self.adapter.dialect},"
                    f" snapshot {self.adapter.snapshot.name})",
                    param=_openai_name(lost[0]),
                )
            request = _without(request, lost)
        for name, (low, high) in self.adapter.ranges.items():
            value = getattr(request.sampling, name, None)
            if value is not None and not low <= value <= high:
                raise MalformedRequestError(
                    f"{name} must be between {low} and {high} for this model server, got {value}. (parameter={name}, value={value})",
                    param=name,
                )
        return request, tuple(_openai_name(name) for name in lost)


def _decode_rank(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:10]) < 2**31 and len(text) <= 10):
        raise MalformedRequestError("x-data-parallel-rank is no rank", param="x-data-parallel-rank")
    return int(text)


def _asked_for(request: InferenceRequest) -> list[str]:
    """The neutral fields that ask for something: those which differ from their defaults."""
    names = [name for name in request.__struct_fields__ if getattr(request, name) != getattr(_REQUEST_DEFAULTS, name)]
    if "sampling" in names:
        names.remove("sampling")
    for name in SamplingParams.__struct_fields__:
        value = getattr(request.sampling, name)
        if value != getattr(_SAMPLING_DEFAULTS, name):
            names.append(f"constraint.{value.kind}" if name == "constraint" else name)
    return names


def _without(request: InferenceRequest, names: Sequence[str]) -> InferenceRequest:
    plain = ["constraint" if name.startswith("constraint.") else name for name in names]
    sampling = {name: getattr(_SAMPLING_DEFAULTS, name) for name in plain if name in SamplingParams.__struct_fields__}
    outer = {name: getattr(_REQUEST_DEFAULTS, name) for name in plain if name in InferenceRequest.__struct_fields__}
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **sampling), **outer)


def _openai_name(name: str) -> str:
    """The request field behind a neutral name, where they differ."""
    return "response_format" if name.startswith("constraint.") else name


class Call:
    """One gRPC call to make: where it goes, what it says, and how to read the answer."""

    __slots__ = ("_options", "_transcoder", "dropped", "inference", "message", "metadata", "path")

    def __init__(
        self,
        transcoder: Transcoder,
        inference: InferenceRequest,
        options: chat.ChatOptions,
        message: bytes,
        metadata: tuple[tuple[str, str], ...],
        dropped: tuple[str, ...],
    ) -> None:
        self._transcoder = transcoder
        self._options = options
        self.path = transcoder.adapter.generate_path
        self.metadata = metadata
        self.message = message
        self.inference = inference
        self.dropped = dropped

    @property
    def frame(self) -> bytes:
        """The request body on the wire: `message` with its length prefix."""
        return encode_frame(self.message)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The HTTP/2 request headers for a host without a gRPC library: what gRPC wants, then `metadata`."""
        return (
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("grpc-accept-encoding", "identity,deflate,gzip"),
            *self.metadata,
        )

    def __repr__(self) -> str:
        return f"<Call {self.inference.request_id} to {self.path}>"

    def response(self, *, created: int, id: str | None = None) -> Response:
        """The reader of the answer. `created` is in seconds since the epoch; `id` None is the call's request id."""
        transcoder = self._transcoder
        meta = ResponseMeta(
            id=id if id is not None else self.inference.request_id,
            created=created,
            system_fingerprint=transcoder.system_fingerprint,
            prompt_tokens_details=transcoder.prompt_tokens_details,
        )
        return Response(transcoder, self.inference, self._options, meta)
