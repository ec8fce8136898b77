"""The one data path: HTTP request -> gRPC call -> HTTP answer, for a dialect and snapshot bound at the start.

    transcoder = Transcoder("vllm.engine", tokenizer=tokenizer)
    call = transcoder.request("POST", "/v1/chat/completions", headers, body, request_id="r1")
    response = call.response(created=1700000000)
    send(response.receive_headers(headers)); send(response.receive_data(chunk)); ...; send(response.receive_trailers(trailers))

No I/O, clocks or randomness: the host brings bytes, ids and times, and copies out `ResponseHead`, `BodyChunk` and `EndOfBody`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from . import _local, adapters, snapshots
from ._calls import Call, UpstreamCall, check_calls, plan, plan_embeddings
from ._errors import MalformedRequestError, RequestTooLargeError, UnsupportedEndpointError, UnsupportedFieldError, UsageError
from ._events import InferenceRequest, ModelInfo
from ._fit import fit, fit_embedding
from ._framing import DEFAULT_MAX_MESSAGE_BYTES
from ._grpc_in import RANK, decode_rank
from ._metadata import FORWARDED, Headers, as_mapping, is_metadata_value
from ._outputs import Output, encode_json_response
from .adapters.base import Adapter
from .anthropic import ENDPOINTS as ANTHROPIC_ENDPOINTS
from .openai import ENDPOINTS as OPENAI_ENDPOINTS
from .openai import chat, passthrough, passthrough_response, responses, sampling
from .openai.endpoint import Asked, Decoded, Endpoint
from .openai.flavors import FLAVORS, FlavorName
from .text import formats

if TYPE_CHECKING:
    from .adapters.base import Passthrough
    from .text import Tokenizer

ENDPOINTS: Final = {**OPENAI_ENDPOINTS, **ANTHROPIC_ENDPOINTS}
# OpenAI's and vLLM's, so that a client is not told that they do not exist.
_OTHER_PATHS: Final = frozenset(("/v1/audio/transcriptions",)) | passthrough.PATHS.keys()
# What a server that takes HTTP headers in the message is told.
_PASSED_HEADERS: Final = (*FORWARDED, RANK, "x-smg-routing-key")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what is taken in, in bytes, and on the calls that one request may take.

    A host that has a single upstream call for each request sets `max_calls` to 1; what needs more is then refused by name. Calls that
    embed are short, and clients send long lists of prompts: they have a bound of their own, which is 1 where `max_calls` is.
    """

    max_request_bytes: int = 64 * 1024 * 1024
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    max_calls: int = 128
    max_embedding_calls: int = 2048  # OpenAI's own limit for a list of inputs

    @property
    def max_embeddings(self) -> int:
        """How many prompts one request may have embedded."""
        return 1 if self.max_calls == 1 else self.max_embedding_calls

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, not at least 1")


class Transcoder:
    """OpenAI HTTP <-> one model-server dialect at one snapshot. Holds no per-request state; share it between threads.

    `dialect` is the name of one of ours, or an adapter of your own (docs/adding-a-server.md), which has its snapshot already.
    `snapshot` None is the newest. `tokenizer` may be None only where OpenAI JSON is passed through: `passthrough` False does without that
    on a server that offers it (`sglang.runtime`), and sends token ids instead. `model` is what the server tells of
    itself (`adapter.decode_model_info`); without it nothing is checked against the context length or the served name, and no model
    defaults apply. `unsupported="drop"` sends a request without the fields that the wire cannot carry and reports them in
    `Call.dropped`, instead of refusing it. `stop_holdback="window"` holds back as much text as vLLM's own server while a stop string
    could still come, which reproduces its chunk boundaries; "prefix" holds back only what could still match.
    With `return_tokens_as_token_ids` log probabilities name tokens as `token_id:N`, unless a request says otherwise.

    `tool_call_parser` and `reasoning_parser` name how the model writes tool calls and reasoning (docs/parsers.md): "auto" is what the
    server tells, else what the chat template shows; "none" leaves all output as content. `flavor` "sglang" makes answers and errors as
    SGLang's own OpenAI server does. Raises UsageError.
    """

    def __init__(
        self,
        dialect: str | Adapter,
        *,
        snapshot: str | None = None,
        tokenizer: Tokenizer | None = None,
        model: ModelInfo | None = None,
        limits: Limits | None = None,
        unsupported: Literal["reject", "drop"] = "reject",
        stop_holdback: Literal["prefix", "window"] = "prefix",
        prompt_tokens_details: bool = False,
        return_tokens_as_token_ids: bool = False,
        flavor: FlavorName = "vllm",
        passthrough: bool = True,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self.adapter = dialect if isinstance(dialect, Adapter) else adapters.get(snapshots.load(dialect, snapshot))
        self.passthrough: Passthrough | None = self.adapter.passthrough if passthrough else None
        if tokenizer is None and self.passthrough is None:
            raise UsageError(f"{self.adapter.dialect} takes token ids: a tokenizer is needed")
        if isinstance(tokenizer, str):
            raise UsageError(f"tokenizer is {tokenizer!r}: load it with gaie_codec.tokenizer_sources.load_tokenizer")
        if unsupported not in ("reject", "drop"):
            raise UsageError(f"unsupported is {unsupported!r}, not 'reject' or 'drop'")
        if stop_holdback not in ("prefix", "window"):
            raise UsageError(f"stop_holdback is {stop_holdback!r}, not 'prefix' or 'window'")
        self._endpoints = {
            path: endpoint
            for path, endpoint in ENDPOINTS.items()
            if not endpoint.embeds or (self.adapter.embed is not None and self.passthrough is None)
        }
        self.tokenizer = tokenizer
        self.model = model if model is not None else ModelInfo()
        self.limits = limits if limits is not None else Limits()
        self.unsupported = unsupported
        self.stop_holdback = stop_holdback
        self.prompt_tokens_details = prompt_tokens_details
        self.return_tokens_as_token_ids = return_tokens_as_token_ids
        if flavor not in FLAVORS:
            raise UsageError(f"flavor is {flavor!r}, not one of {', '.join(FLAVORS)}")
        self.flavor = FLAVORS[flavor]
        template = getattr(tokenizer, "chat_template", "")
        is_skipped = partial(_is_skipped, tokenizer)
        self.tool_format = formats.choose_tool_format(tool_call_parser, self.model.tool_call_parser, template, is_skipped)
        self.reasoning_format = formats.choose_reasoning_format(reasoning_parser, self.model.reasoning_parser, template, is_skipped)
        self.eos_token_ids = (tokenizer.eos_token_ids if tokenizer is not None else frozenset()).union(self.model.eos_token_ids)
        self._asked = Asked(
            request_id="",
            tokenizer=tokenizer,
            model=self.model,
            flavor=self.flavor,
            fills_max_tokens=self.flavor.fills_max_tokens or self.adapter.default_max_tokens is not None,
            tool_format=self.tool_format,
            reasoning_format=self.reasoning_format,
            drops=unsupported == "drop",
            accepts_media="media" in self.adapter.carries and self.model.is_multimodal is not False,
            carries=self.adapter.carries,
        )
        self.system_fingerprint = f"{self.adapter.dialect}-{self.adapter.snapshot.name}" if flavor == "vllm" else None
        try:
            sampling.decode_sampling({}, model=self.model, vocab_size=0, max_tokens=None, logprobs=None, max_stop_strings=0)
        except MalformedRequestError as error:
            raise UsageError(f"the model's own default_sampling_params are wrong: {error}") from error

    def request(
        self, method: str, path: str, headers: Headers | Mapping[str, str], body: bytes, *, request_id: str, model: str = ""
    ) -> Call:
        """Decode one HTTP request and encode the call to make of it.

        `request_id` must be unique among the calls in flight; a client's own (X-Request-Id, or `request_id` in the body) wins, as with
        vLLM. `model` is what the host takes the request's model for, whatever the body says; the answer still has the client's name for
        it. Raises RequestError.
        """
        route = path.partition("?")[0]
        kind = passthrough.PATHS.get(route)
        body_path = self.passthrough.paths.get(kind or "") if self.passthrough is not None else None
        endpoint = self._endpoints.get(route)
        if body_path is None and (endpoint is None or self.tokenizer is None):
            responses.check_stored(route)
            known = "is not supported" if route in _OTHER_PATHS or route in ENDPOINTS else "does not exist"
            if self.tokenizer is None and (endpoint is not None or route in _local.POST_PATHS):
                known = "needs a tokenizer here (--tokenizer)"
            elif _local.is_local(route, has_tokenizer=True):
                known = "is answered without a model server (Transcoder.answer)"
            there = (*self.paths, *(_local.POST_PATHS if self.tokenizer is not None else ()))
            raise UnsupportedEndpointError(f"Not Found: the endpoint {route[:100]!r} {known}; there is {', '.join(there)}")
        if method != "POST":
            raise UnsupportedEndpointError(f"Method Not Allowed: {route} takes POST", http_status=405, allow="POST")
        self._check_size(body)
        fields = as_mapping(headers)
        _check_content(fields)
        asked = msgspec.structs.replace(
            self._asked,
            request_id=request_id,
            fixed_id=fields.get("x-request-id"),
            max_prompts=self.limits.max_embeddings if endpoint is not None and endpoint.embeds else self.limits.max_calls,
            rewritten_model=model,
        )
        if body_path is not None and kind is not None:
            return self._pass_through(route, kind, body_path, fields, body, asked)
        assert endpoint is not None
        return self._transcode(endpoint, fields, endpoint.decode_request(body, asked))

    def answer(
        self, method: str, path: str, headers: Headers | Mapping[str, str], body: bytes, *, created: int, version: str = ""
    ) -> tuple[Output, ...] | None:
        """The whole answer to a request that needs no model server, None for any other: `/v1/models`, `/v1/models/{id}`, `/version`,
        `/tokenize`, `/detokenize` and `/v1/messages/count_tokens`.

        `path` has no escapes of URLs. `created` is in seconds since the epoch; `version` stands in where the server told none. Raises
        RequestError.
        """
        route = path.partition("?")[0]
        if not _local.is_local(route, has_tokenizer=self.tokenizer is not None):
            return None
        _local.check_method(method, route)
        self._check_size(body)
        if method == "POST":
            _check_content(as_mapping(headers))
        told = _local.encode_answer(route, body, self._asked, self.adapter, created=created, version=version, loras=self.lora_models)
        return encode_json_response(told)

    def _check_size(self, body: bytes) -> None:
        if len(body) > self.limits.max_request_bytes:
            raise RequestTooLargeError(f"the body of {len(body)} bytes is over the limit of {self.limits.max_request_bytes}")

    @property
    def paths(self) -> tuple[str, ...]:
        """The endpoints that there are, all by POST."""
        if self.passthrough is not None:
            passed = tuple(path for path, kind in passthrough.PATHS.items() if kind in self.passthrough.paths)
            own = () if self.tokenizer is None else tuple(path for path in self._endpoints if path not in passthrough.PATHS)
            return passed + own
        return tuple(self._endpoints)

    @property
    def lora_models(self) -> tuple[str, ...]:
        """By which names clients ask for the LoRA adapters: where JSON is passed through, as the server wants it."""
        base = next(iter(self.model.names), "") if self.passthrough is not None else ""
        return tuple(f"{base}:{name}" if base else name for name in self.model.lora_adapters)

    def _transcode(self, endpoint: Endpoint, headers: Mapping[str, str], decoded: Decoded) -> Call:
        rank = decode_rank(headers[RANK]) if RANK in headers else None
        trace = {name: headers[name] for name in FORWARDED if is_metadata_value(headers.get(name, ""))}
        prompts = []
        dropped: tuple[str, ...] = ()
        for prompt in decoded.prompts:
            whole = msgspec.structs.replace(prompt, data_parallel_rank=rank, trace_headers=trace)
            if whole.sampling.bad_words and self.tokenizer is not None and "bad_words_token_ids" in self.adapter.carries:
                whole = msgspec.structs.replace(whole, sampling=sampling.tokenize_bad_words(whole.sampling, self.tokenizer))
            fitted, dropped = (fit_embedding if endpoint.embeds else fit)(self.adapter, whole, drops=self.unsupported == "drop")
            prompts.append(fitted)
        if endpoint.embeds:
            calls = plan_embeddings(self.adapter, prompts)
            return Call(self, endpoint, decoded.options, tuple(prompts), calls, dropped + decoded.ignored)
        prompts, too_many = self._within_calls(prompts)
        calls = plan(self.adapter, prompts, needs_pieces=decoded.needs_pieces)
        lost = dropped + too_many + decoded.ignored
        return Call(self, endpoint, decoded.options, tuple(prompts), calls, lost, output=decoded.output)

    def _within_calls(self, prompts: list[InferenceRequest]) -> tuple[list[InferenceRequest], tuple[str, ...]]:
        """The prompts, if the host may make the calls that they take; with one choice each where the others are dropped."""
        dropped: tuple[str, ...] = ()
        try:
            check_calls(self.adapter, prompts, self.limits.max_calls)
        except UnsupportedFieldError:
            if self.unsupported != "drop":
                raise
            prompts = [msgspec.structs.replace(one, sampling=msgspec.structs.replace(one.sampling, n=1)) for one in prompts]
            check_calls(self.adapter, prompts, self.limits.max_calls)
            dropped = ("n",)
        return prompts, dropped

    def _pass_through(self, route: str, kind: str, path: str, headers: Mapping[str, str], body: bytes, asked: Asked) -> Call:
        way = self.passthrough
        assert way is not None
        known = way.fields[kind]
        decoded = passthrough.decode_request(kind, body, asked, known, drops=self.unsupported == "drop")
        told = {name: headers[name] for name in _PASSED_HEADERS if is_metadata_value(headers.get(name, ""))}
        if RANK in headers:
            told[RANK] = str(decode_rank(headers[RANK]))
        inference = msgspec.structs.replace(decoded.prompts[0], trace_headers=told)
        message = way.encode_request(body, told).SerializeToString(deterministic=True)
        call = UpstreamCall(path=path, message=message, inference=inference, choices=1)
        endpoint = Endpoint(path=route, decode_request=chat.decode_request, make_encoder=passthrough_response.make_encoder)
        return Call(self, endpoint, decoded.options, (inference,), (call,), decoded.ignored, is_passthrough=True)


def _is_skipped(tokenizer: Tokenizer | None, text: str) -> bool:
    """Whether a text is lost where special tokens are skipped."""
    if tokenizer is None:
        return False
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return text not in tokenizer.detokenizer((), skip_special_tokens=True).decode(token_ids)


def _check_content(headers: Mapping[str, str]) -> None:
    content_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        error = MalformedRequestError("1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed")
        error.error_type = "Bad Request"
        raise error
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        error = MalformedRequestError(
            "There was an error parsing the body: it is compressed; send it without content-encoding", param="content-encoding"
        )
        error.error_type = "Bad Request"
        raise error
