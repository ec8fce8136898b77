"""What has to be asked of the model server for one request: one gRPC call, or several that are joined into one answer.

A server that knows no `n` gets a call for each choice, and every prompt of a list gets calls of its own. They are values: the host makes
them, feeds what comes back to one `Response` under each call's place, and stops those that a `CancelCall` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.message import EncodeError, Message

from ._errors import MalformedRequestError, UnsupportedFieldError, UsageError
from ._events import InferenceRequest
from ._framing import encode_frame
from ._response import Response
from .openai.endpoint import Endpoint, ResponseMeta

if TYPE_CHECKING:
    from ._parts import OutputSettings
    from ._transcoder import Transcoder
    from .adapters.base import Adapter

_HEADERS = (("content-type", "application/grpc"), ("te", "trailers"), ("grpc-accept-encoding", "identity,deflate,gzip"))


class UpstreamCall(msgspec.Struct, frozen=True, kw_only=True):
    """One gRPC call to make. It answers `choices` choices, from `first_index` on, of the prompt with that number."""

    path: str
    message: bytes
    metadata: tuple[tuple[str, str], ...] = ()
    inference: InferenceRequest
    choices: int = 1
    first_index: int = 0
    prompt: int = 0

    @property
    def frame(self) -> bytes:
        """The request body on the wire: `message` with its length prefix."""
        return encode_frame(self.message)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The HTTP/2 request headers for a host without a gRPC library: what gRPC wants, then `metadata`."""
        return (*_HEADERS, *self.metadata)


class Call:
    """All calls of one request, and how to read their answers.

    `inference` is the request as a whole, `prompts` is one request for each prompt. Most requests take one call, whose parts are here
    too: `path`, `message`, `metadata`, `frame`, `headers`; with several they raise UsageError.
    """

    __slots__ = ("_endpoint", "_options", "calls", "dropped", "is_passthrough", "output", "prompts", "transcoder")

    def __init__(
        self,
        transcoder: Transcoder,
        endpoint: Endpoint,
        options: Any,
        prompts: tuple[InferenceRequest, ...],
        calls: tuple[UpstreamCall, ...],
        dropped: tuple[str, ...],
        *,
        is_passthrough: bool = False,
        output: OutputSettings | None = None,
    ) -> None:
        self.transcoder = transcoder
        self._endpoint = endpoint
        self._options = options
        self.prompts = prompts
        self.calls = calls
        self.dropped = dropped
        self.is_passthrough = is_passthrough
        self.output = output

    @property
    def inference(self) -> InferenceRequest:
        """What is asked for; of several prompts the first."""
        return self.prompts[0]

    @property
    def http_path(self) -> str:
        """The path of the HTTP request, by which the form of an error is chosen."""
        return self._endpoint.path

    @property
    def path(self) -> str:
        """The gRPC path of the one call."""
        return self._only.path

    @property
    def message(self) -> bytes:
        """The request message of the one call."""
        return self._only.message

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of the one call."""
        return self._only.metadata

    @property
    def frame(self) -> bytes:
        """The request body of the one call."""
        return self._only.frame

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The HTTP/2 request headers of the one call."""
        return self._only.headers

    @property
    def has_choices(self) -> bool:
        """Whether tokens come, for choices; else vectors, or JSON that is made already."""
        return not (self.is_passthrough or self._endpoint.embeds)

    @property
    def prompts_field(self) -> str:
        """What the request calls its prompts."""
        return self._endpoint.prompts_field

    @property
    def id(self) -> str:
        """The id of the answer when the host gives none."""
        return str(self._options.id)

    @property
    def _only(self) -> UpstreamCall:
        if len(self.calls) > 1:
            raise UsageError(f"this request takes {len(self.calls)} calls; a host that makes only one sets Limits(max_calls=1)")
        return self.calls[0]

    def __repr__(self) -> str:
        return f"<Call {self.id}, {len(self.calls)} to {self.calls[0].path}>"

    def response(self, *, created: int, id: str | None = None) -> Response:
        """The reader of the answer. `created` is in seconds since the epoch; `id` None is the call's own."""
        transcoder = self.transcoder
        meta = ResponseMeta(
            id=id if id is not None else self.id,
            created=created,
            flavor=transcoder.flavor.name,
            eos_token_ids=transcoder.eos_token_ids,
            system_fingerprint=transcoder.system_fingerprint,
            prompt_tokens_details=transcoder.prompt_tokens_details,
            return_tokens_as_token_ids=transcoder.return_tokens_as_token_ids,
        )
        return Response(self, self._endpoint.make_encoder(self._options, meta))


def check_calls(adapter: Adapter, prompts: Sequence[InferenceRequest], limit: int) -> None:
    """Raise UnsupportedFieldError where these prompts take more calls than the host makes: before any of them is encoded."""
    n = prompts[0].sampling.n
    by_choice = n > 1 and "n" not in adapter.carries
    needed = len(prompts) * (n if by_choice else 1)
    if needed > limit:
        param = "n" if by_choice else "prompt"
        raise UnsupportedFieldError(
            f"`{param}` takes {needed} calls to this model server ({adapter.dialect}), and this gateway makes at most {limit}", param=param
        )


def plan(adapter: Adapter, prompts: Sequence[InferenceRequest], *, needs_pieces: bool = False) -> tuple[UpstreamCall, ...]:
    """The calls for these prompts, in the order of the choices that they answer. With `needs_pieces` servers are asked for streams.
    Raises MalformedRequestError."""
    calls = []
    for number, prompt in enumerate(prompts):
        n = prompt.sampling.n
        first = number * n
        if n == 1 or "n" in adapter.carries:
            is_streamed = needs_pieces or _must_stream(adapter, prompt)
            asked = prompt if is_streamed == prompt.stream else msgspec.structs.replace(prompt, stream=is_streamed)
            calls.append(_encode(adapter, asked, choices=n, first_index=first, prompt=number))
        else:
            asked = msgspec.structs.replace(prompt, stream=needs_pieces or _must_stream(adapter, prompt))
            calls += [_encode(adapter, _one_of(adapter, asked, place), first_index=first + place, prompt=number) for place in range(n)]
    return tuple(calls)


def plan_embeddings(adapter: Adapter, prompts: Sequence[InferenceRequest]) -> tuple[UpstreamCall, ...]:
    """A call for each prompt, in their order. Raises MalformedRequestError."""
    coder = adapter.embed
    assert coder is not None
    return tuple(
        UpstreamCall(
            path=coder.path,
            message=_serialized(coder.encode_request, prompt),
            metadata=adapter.encode_metadata(prompt),
            inference=prompt,
            first_index=number,
            prompt=number,
        )
        for number, prompt in enumerate(prompts)
    )


def _must_stream(adapter: Adapter, request: InferenceRequest) -> bool:
    """Whether to ask for a stream, be the client's answer one or not: where choices need it, and to end a call at a stop string."""
    ends_here = bool(request.sampling.stop) and not adapter.ends_at_stop_strings
    return request.stream or ends_here or (request.sampling.n > 1 and adapter.streams_several)


def _one_of(adapter: Adapter, request: InferenceRequest, place: int) -> InferenceRequest:
    """One choice by itself: with an id of its own, and a seed of its own, as vLLM gives its choices. The highest seed is followed by the
    lowest."""
    sampling = request.sampling
    seed = sampling.seed
    if seed is not None:
        low, high = adapter.ranges.get("seed", (-(2**63), 2**63 - 1))
        seed = int(low) + (seed - int(low) + place) % (int(high) - int(low) + 1)
    return msgspec.structs.replace(
        request, request_id=f"{request.request_id}-{place}", sampling=msgspec.structs.replace(sampling, n=1, seed=seed)
    )


def _encode(adapter: Adapter, request: InferenceRequest, *, choices: int = 1, first_index: int, prompt: int) -> UpstreamCall:
    return UpstreamCall(
        path=adapter.path_for(request),
        message=_serialized(adapter.encode_request, request),
        metadata=adapter.encode_metadata(request),
        inference=request,
        choices=choices,
        first_index=first_index,
        prompt=prompt,
    )


def _serialized(encode: Callable[[InferenceRequest], Message], request: InferenceRequest) -> bytes:
    try:
        # Maps have an order of their own in every process.
        return encode(request).SerializeToString(deterministic=True)
    except (ValueError, TypeError, EncodeError):
        # The ranges were checked: what protobuf still refuses is text that is not Unicode.
        raise MalformedRequestError("the request holds text that is not valid Unicode") from None
