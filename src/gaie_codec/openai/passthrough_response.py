"""The OpenAI JSON of a server that answers in it: checked on its way, and otherwise as it came.

Chunks go on as they are; `data: ` and `[DONE]` are ours, and an error that looks like a chunk, or like a success, becomes an error.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .. import _sse
from .._errors import (
    CodecError,
    MalformedMessageError,
    OutOfOrderError,
    TruncatedResponseError,
    UpstreamStatusError,
    code_from_server_status,
)
from .._events import BodyEvent, Usage
from .endpoint import ResponseMeta, WithoutDeltas
from .errors import encode_error, encode_error_event
from .passthrough import GENERATES, PassthroughOptions


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    delta: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0
    reasoning_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    reasoning_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    """What of a chunk or a body has to be known."""

    object: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    message: Any = None
    code: Any = None


_decode_body: Final = msgspec.json.Decoder(_Body | list[msgspec.Raw]).decode


class _Passthrough(WithoutDeltas):
    """What both encoders share: to see what a piece says."""

    wants_usage = False
    shows_ids = False
    is_detailed = True

    def __init__(self, options: PassthroughOptions, meta: ResponseMeta) -> None:
        self._flavor = meta.flavor
        self._options = options
        self.finish_reasons: dict[int, str] = {}
        self.reported_usage: Usage | None = None

    def _see(self, event: BodyEvent) -> _Body:
        """Raises UpstreamStatusError for an error of the server, MalformedMessageError for what is no JSON object."""
        try:
            event.data.decode()  # msgspec does not look into what it skips
            body: _Body | list[msgspec.Raw] = _decode_body(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if not 200 <= (event.http_status or 200) < 300:
                raise UpstreamStatusError(code_from_server_status(event.http_status or 500), "") from None
            raise MalformedMessageError(f"a passed-through body of {len(event.data)} bytes is no JSON object") from None
        is_failure = not 200 <= (event.http_status or 200) < 300
        if isinstance(body, list) and not is_failure:
            if self._options.kind != "rerank":
                raise MalformedMessageError(f"a passed-through body of {len(event.data)} bytes is a JSON list")
            return _Body()  # SGLang ranks as a list of scores
        if isinstance(body, list):
            body = _Body()
        error = body.error
        # Before SGLang 0.5.22 there is no status, and an error body looks like a success until it is read.
        if error is not None or body.object == "error" or is_failure:
            inner = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else body.message, "code": body.code}
            status = event.http_status if is_failure else inner.get("code")
            message = inner.get("message")
            raise UpstreamStatusError(
                code_from_server_status(status if isinstance(status, int) else 500), message if isinstance(message, str) else ""
            )
        for choice in body.choices or ():
            if choice.finish_reason in ("abort", "error"):
                raise UpstreamStatusError(
                    code_from_server_status(500), f"choice {choice.index} ended with finish_reason {choice.finish_reason!r}"
                )
            if not 0 <= choice.index < self._options.n:
                raise OutOfOrderError(f"a message for choice {choice.index} of {self._options.n}")
            if self._options.kind == "chat" and (choice.delta if self._options.stream else choice.message) is msgspec.UNSET:
                raise MalformedMessageError(f"choice {choice.index} has no {'delta' if self._options.stream else 'message'}")
            if choice.finish_reason:
                if choice.index in self.finish_reasons:
                    raise OutOfOrderError(f"a second finish for choice {choice.index}")
                self.finish_reasons[choice.index] = choice.finish_reason
        if body.usage is not None:
            self.reported_usage = _decode_usage(body.usage)
        return body

    def check_complete(self) -> None:
        """The end has come: every choice must have finished."""
        missing = self._options.n - len(self.finish_reasons)
        if missing > 0 and self._options.kind in GENERATES:
            raise TruncatedResponseError(f"the response ended before {missing} of {self._options.n} choices had finished")


class PassthroughStream(_Passthrough):
    """Chunks of JSON -> server-sent events."""

    content_type = _sse.CONTENT_TYPE
    streams = True

    def body(self, event: BodyEvent) -> bytes:
        """The chunk as an event; nothing for the empty one that ends the stream."""
        data = event.data
        encoded = b""
        if data:
            self._see(event)
            # An event is one line; JSON has line breaks between its tokens only.
            encoded = _sse.encode_event(msgspec.json.format(data, indent=-1) if b"\n" in data or b"\r" in data else data)
        return encoded

    def close(self, usage: Usage) -> bytes:
        """The end that says that all is well."""
        return _sse.DONE

    def error(self, error: CodecError) -> bytes:
        """An error event. No `[DONE]` follows."""
        return encode_error_event(error, self._flavor)


class PassthroughBody(_Passthrough):
    """One JSON body, as it came."""

    content_type = "application/json"
    streams = False

    def __init__(self, options: PassthroughOptions, meta: ResponseMeta) -> None:
        super().__init__(options, meta)
        self._data = b""

    def body(self, event: BodyEvent) -> bytes:
        """Keep it."""
        if event.data:
            if self._data:
                raise MalformedMessageError("a second body to pass through, where there is one answer")
            self._see(event)
            self._data = event.data
        elif event.is_last and not self._data:
            raise MalformedMessageError("the body that was to be passed through is empty")
        return b""

    def close(self, usage: Usage) -> bytes:
        """The body."""
        return self._data

    def error(self, error: CodecError) -> bytes:
        """The error body alone."""
        return encode_error(error, self._flavor)


def make_encoder(options: PassthroughOptions, meta: ResponseMeta) -> PassthroughStream | PassthroughBody:
    """What the options ask for."""
    return PassthroughStream(options, meta) if options.stream else PassthroughBody(options, meta)


def _decode_usage(usage: _Usage) -> Usage:
    prompt, completion = usage.prompt_tokens_details or _Details(), usage.completion_tokens_details or _Details()
    return Usage(
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=prompt.cached_tokens or 0,
        reasoning_tokens=completion.reasoning_tokens or usage.reasoning_tokens or 0,
    )
