"""OpenAI JSON for a server that takes it as it is: a look at the request, and answers that are checked on their way.

The request is decoded so far as a scheduler and the client's good need it: a field out of range, an unknown model, or a field that the
server would pass over without a word is refused here by name. What is sent are the client's own bytes. Of the answer, chunks go on as
they came; `data: ` and `[DONE]` are ours, and an error that looks like a chunk, or like a success, becomes an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .. import _sse
from .._choices import Delta
from .._errors import (
    CodecError,
    MalformedMessageError,
    OutOfOrderError,
    TruncatedResponseError,
    UnsupportedFieldError,
    UpstreamStatusError,
    UsageError,
    code_from_server_status,
)
from .._events import BodyEvent, InferenceRequest, SamplingParams, Usage
from . import chat, completions, embeddings, sampling
from .endpoint import Asked, Decoded, ResponseMeta
from .errors import encode_error, encode_error_event
from .fields import bool_field, decode_json_object, int_field, object_field, range_error, str_field, type_error
from .flavors import FLAVORS
from .messages import decode_messages
from .request import base_model, decode_model, decode_request_id, decode_stream_options

PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        chat.PATH: "chat",
        completions.PATH: "completions",
        embeddings.PATH: "embeddings",
        "/v1/classify": "classify",
        "/classify": "classify",
        "/v1/score": "score",
        "/score": "score",
        "/v1/rerank": "rerank",
        "/rerank": "rerank",
    }
)
"""The kind of request behind each path."""

_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chat": ("messages",),
        "completions": ("prompt",),
        "embeddings": ("input",),
        "classify": ("input",),
        "score": ("query", "items"),
        "rerank": ("query", "documents"),
    }
)
_GENERATES: Final = ("chat", "completions")
_PREFIXES: Final = MappingProxyType({"chat": chat.ID_PREFIX, "completions": completions.ID_PREFIX})
# What vLLM's endpoints know, and therefore clients may send in good faith.
_VLLM_FIELDS: Final = frozenset().union(
    *(module.READ | module.REFUSED.keys() for module in (chat, completions)), embeddings.READ, embeddings.REFUSED
)
# The values of vLLM's fields that ask for nothing, besides null.
_HARMLESS: Final = MappingProxyType(
    {
        "add_generation_prompt": (None, True),
        "bad_words": (None, []),
        "embed_dtype": (None, "float32"),
        "endianness": (None, "native", "little"),
        "echo": (None, False),
        "include_stop_str_in_output": (None, False),
        "logprob_token_ids": (None, []),
        "request_id": (None, ""),
        "return_prompt_text": (None, False),
        "return_token_ids": (None, False),
        "return_tokens_as_token_ids": (None, False),
        "spaces_between_special_tokens": (None, True),
        "suffix": (None, ""),
        "thinking_token_budget": (None, -1),
        "watermarking": (None, False),
    }
)


class PassthroughOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like."""

    id: str
    kind: str
    stream: bool = False
    n: int = 1


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


def decode_request(kind: str, body: bytes, asked: Asked, known: frozenset[str] | None, *, drops: bool = False) -> Decoded:
    """Decode a request of one kind, as far as the gateway has to know it; `known` are the fields that the server takes,
    None to refuse none. Those which it passes over are reported, or, where that changes what is asked for and not `drops`, refused.

    Raises RequestError. The prompt stays text or messages: only the server tokenizes it.
    """
    fields = decode_json_object(body)
    for name in _REQUIRED[kind]:
        if fields.get(name) is None:
            raise type_error(name, "missing", "Field required")
    if known is None:
        known = frozenset(fields)
    lost = [
        name
        for name, value in fields.items()
        if name in _VLLM_FIELDS and name not in known and not _asks_nothing(kind, name, value, fields)
    ]
    if lost and not drops:
        raise UnsupportedFieldError(f"`{lost[0]}` is not known to this model server, which would pass over it", param=lost[0])
    if kind == "embeddings" and not drops and fields.get("encoding_format") in ("bytes", "bytes_only"):
        raise UnsupportedFieldError("this model server answers with floats or base64, not with bytes", param="encoding_format")
    model = asked.model
    name, lora_name = _decode_model(fields, asked)
    stream = bool_field(fields, "stream") if kind in _GENERATES else False
    params = SamplingParams()
    if kind in _GENERATES:
        decode_stream_options(fields, stream)
        wanted = int_field(fields, "max_completion_tokens")
        params = sampling.decode_sampling(
            {field: value for field, value in fields.items() if field in known},
            model=model,
            vocab_size=model.vocab_size,
            max_tokens=int_field(fields, "max_tokens") if wanted is None else wanted,
            logprobs=_decode_logprobs(kind, fields),
            max_stop_strings=FLAVORS["sglang"].max_stop_strings,  # whose servers these are
        )
    if kind == "chat":
        decode_messages(fields["messages"], accepts_content_parts=True, accepts_media=True)
        object_field(fields, "chat_template_kwargs")
    if kind == "rerank" and not isinstance(fields["documents"], list):
        raise type_error("documents", "list_type", "Input should be a valid list")
    prompt = fields.get("prompt")
    inference = InferenceRequest(
        request_id=_PREFIXES.get(kind, "") + decode_request_id(fields, asked),
        model=base_model(name, model),
        prompt_text=prompt if isinstance(prompt, str) else None,
        sampling=params,
        stream=stream,
        lora_name=lora_name,
    )
    unknown = {field for field in fields if field not in known and field not in chat.ADVISORY and field not in _VLLM_FIELDS}
    options = PassthroughOptions(id=inference.request_id, kind=kind, stream=stream, n=params.n * _prompts(prompt))
    return Decoded(prompts=(inference,), options=options, ignored=tuple(sorted(unknown.union(lost))))


def _decode_model(fields: Mapping[str, Any], asked: Asked) -> tuple[str, str]:
    """The model and the LoRA adapter that SGLang understands: it takes `MODEL:ADAPTER`, and any other name for the model's own."""
    model = asked.model
    if asked.rewritten_model not in ("", str_field(fields, "model")):
        raise UnsupportedFieldError("this model server gets the body as it is: its model cannot be rewritten", param="model")
    name, _, adapter = str_field(fields, "model").partition(":")
    if adapter in model.lora_adapters and (not name or name in model.names):
        return name, model.lora_adapters[adapter]
    name, _ = decode_model(fields, asked)
    if name in model.lora_adapters:
        base = next(iter(model.names), "MODEL")
        raise UnsupportedFieldError(f"this model server knows the adapter `{name}` as `{base}:{name}`", param="model")
    return name, ""


def _decode_logprobs(kind: str, fields: Mapping[str, Any]) -> int | None:
    if kind == "completions":
        return int_field(fields, "logprobs")
    top = int_field(fields, "top_logprobs") or 0
    if not 0 <= top <= sampling.MAX_LOGPROBS:
        raise range_error("top_logprobs", f"top_logprobs must be between 0 and {sampling.MAX_LOGPROBS}, got {top}.", top)
    return top if bool_field(fields, "logprobs") else None


def _asks_nothing(kind: str, name: str, value: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a field that the server does not know has the value which it would have anyway."""
    if name == "add_special_tokens":
        return value in (None, kind in ("completions", "embeddings"))
    if name == "add_generation_prompt" and fields.get("continue_final_message") is True:
        return True  # who continues a message gets no generation prompt
    refused = {"completions": completions.REFUSED, "embeddings": embeddings.REFUSED}.get(kind, chat.REFUSED)
    return value in refused.get(name, _HARMLESS.get(name, (None,)))


def _prompts(prompt: Any) -> int:
    """How many prompts a completion request has: a list of texts, or of lists of ids, is several."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


class _Passthrough:
    """What both encoders share: to see what a piece says, and that no deltas come."""

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
        if missing > 0 and self._options.kind in _GENERATES:
            raise TruncatedResponseError(f"the response ended before {missing} of {self._options.n} choices had finished")

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        raise UsageError("deltas in an answer that is passed through")

    def text(self, index: int, text: str) -> bytes:
        raise UsageError("deltas in an answer that is passed through")

    def reasoning(self, index: int, text: str) -> bytes:
        raise UsageError("deltas in an answer that is passed through")

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        raise UsageError("deltas in an answer that is passed through")


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
