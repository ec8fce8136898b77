"""One request for one kind of model server: what to send, and how its answer is to be read. A plan for each way that a request can go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Final
from weakref import WeakKeyDictionary

import msgspec

from .. import (
    Bridge,
    BridgedCall,
    Call,
    CodecError,
    InferenceRequest,
    ObservedCall,
    Observer,
    Transcoder,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    adapters,
    encode_answer_headers,
    snapshots,
)
from .._framing import ENCODINGS
from ..openai import models
from ._answers import Answer, Rewritten, Untouched
from ._headers import MODEL_REWRITE, first_of, to_remove, to_remove_for_grpc
from ._modes import Mode
from ._reading import HttpReading, StatusReading
from .servers import Spoken

# grpc-timeout has room for eight digits.
_MAX_TIMEOUT_MS: Final = 99_999_999
_BRIDGES: Final[WeakKeyDictionary[Transcoder, dict[tuple[str, str], Bridge]]] = WeakKeyDictionary()


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A whole request. `headers` have each name once, with the last value of it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    own_id: str
    is_grpc: bool
    transcodes: bool = True
    declared: str = ""
    """Why it is so, in the words of who declared it."""
    forwarded: frozenset[str] = frozenset()
    timeout_s: float | None = None
    is_chained: bool = False
    """Whether other filters have to see the answer."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`body` None leaves the request's as it is. `set_headers` and `remove` change its headers."""

    mode: Mode
    reason: str
    inference: InferenceRequest
    request_id: str
    dropped: tuple[str, ...] = ()
    set_headers: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()
    body: bytes | None = None
    answer: Callable[[int, bool], Answer]
    """Of the time in seconds since the epoch, and whether Envoy hands over whole bodies."""
    generates: bool = True
    abort: tuple[str, bytes] | None = None
    """Path and message of the call that ends this one at the model server, where there is such."""


def is_native(request: Incoming, server: Spoken) -> bool:
    """Whether a gRPC request is one of the server's own dialect."""
    if server.observer is None:
        return False
    service = request.path[1:].rpartition("/")[0]
    return request.path in server.observer.paths or service in server.observer.adapter.snapshot.services


def make_plan(request: Incoming, server: Spoken) -> Plan:
    """Raises RequestError for what the server cannot be asked."""
    if request.is_grpc:
        if server.observer is None or server.transcoder is None:
            raise UnsupportedEndpointError(f"the model server speaks HTTP, and {request.path[:100]} is gRPC")
        if request.path in server.observer.paths:
            return _observed(request, server.observer)
        if request.path in _dialects():
            return _bridged(request, server.transcoder)
        return _unread(request, "not a call that generates")
    if server.transcoder is not None and request.transcodes:
        return _transcoded(request, server.transcoder)
    return _passed(request, request.declared if server.transcoder is not None else "the model server speaks HTTP")


def _transcoded(request: Incoming, transcoder: Transcoder) -> Plan:
    if request.path == models.PATH or request.path.startswith(models.ENTRY_PREFIX):
        raise UnsupportedEndpointError(f"{models.PATH} is not answered here; the gateway's option --serve-models is for that")
    # Unique, for a model server ends by its id what it is told to end, and clients choose theirs. SGLang takes it as a prefix, too.
    told_id = request.headers.get("x-request-id", "")
    suffix = f"-{request.own_id[:8]}" if told_id else ""
    headers = {name: value for name, value in request.headers.items() if name != "x-request-id"} if told_id else request.headers
    model = first_of(MODEL_REWRITE, request.headers)
    call: Call = transcoder.request(
        request.method, request.path, headers, request.body, request_id=f"{told_id}{suffix}" if told_id else request.own_id, model=model
    )
    if len(call.calls) > 1:
        param = call.prompts_field if len(call.prompts) > 1 else "n"
        raise UnsupportedFieldError(f"`{param}` takes {len(call.calls)} calls to this model server, and Envoy makes one", param=param)
    answer_id = call.id.removesuffix(suffix) if suffix else call.id
    request_id = told_id or answer_id
    head, removed = _grpc_head(request, call.path, call.headers)
    extra = encode_answer_headers(request_id, call.dropped)

    def answer(created: int, whole_bodies: bool) -> Answer:
        return Rewritten(
            call.response(created=created, id=answer_id),
            set_headers=extra,
            whole_bodies=whole_bodies,
            is_chained=request.is_chained,
            http_path=request.path,
        )

    inference = call.inference
    if call.is_passthrough and not (inference.prompt_token_ids or inference.prompt_text):
        inference = msgspec.structs.replace(inference, prompt_text=_read(request.body)[1] or None)
    return Plan(
        mode=Mode.TRANSCODE,
        reason="; ".join(filter(None, (f"OpenAI JSON for {transcoder.adapter.dialect}", request.declared))),
        inference=inference,
        request_id=request_id,
        dropped=call.dropped,
        set_headers=head,
        remove=removed,
        body=call.frame,
        answer=answer,
        abort=_abort(transcoder, inference.request_id) if call.id.endswith(suffix or request.own_id) else None,
    )


def _bridged(request: Incoming, transcoder: Transcoder) -> Plan:
    call: BridgedCall = _bridge(request.path, transcoder).request(request.path, request.headers, request.body)
    if len(call.calls) > 1:
        raise UnsupportedFieldError(f"`n` takes {len(call.calls)} calls to this model server, and Envoy makes one", param="n")
    (upstream,) = call.calls
    head, removed = _grpc_head(request, upstream.path, upstream.headers)

    def answer(_: int, whole_bodies: bool) -> Answer:
        if whole_bodies:
            raise CodecError("a gRPC answer with trailers of its own needs response_body_mode FULL_DUPLEX_STREAMED")
        return Rewritten(call.response(), is_grpc=True)

    return Plan(
        mode=Mode.BRIDGE,
        reason=f"{_dialects()[request.path][0]} turned into {transcoder.adapter.dialect}",
        inference=call.inference,
        request_id=call.inference.request_id,
        dropped=call.dropped,
        set_headers=head,
        remove=removed,
        body=upstream.frame,
        answer=answer,
        abort=_abort(transcoder, upstream.inference.request_id),
    )


def _observed(request: Incoming, observer: Observer) -> Plan:
    if request.headers.get("grpc-encoding", "identity") not in ENCODINGS:
        return _unread(request, "in an encoding that is not read here", generates=True)
    call: ObservedCall = observer.request(request.path, request.headers, request.body)
    return Plan(
        mode=Mode.OBSERVE,
        reason=f"a call of {observer.adapter.dialect}",
        inference=call.inference,
        request_id=call.inference.request_id,
        remove=tuple(to_remove(request.headers)),
        answer=lambda _, whole_bodies: Untouched(call.response(), is_grpc=True, whole_bodies=whole_bodies),
    )


def _unread(request: Incoming, reason: str, *, generates: bool = False) -> Plan:
    return Plan(
        mode=Mode.OBSERVE,
        reason=reason,
        inference=InferenceRequest(request_id=request.own_id),
        request_id=request.headers.get("x-request-id", request.own_id),
        remove=tuple(to_remove(request.headers)),
        generates=generates,
        answer=lambda _, whole_bodies: Untouched(StatusReading(), is_grpc=True, whole_bodies=whole_bodies),
    )


def _abort(transcoder: Transcoder, request_id: str) -> tuple[str, bytes] | None:
    adapter = transcoder.adapter
    if adapter.abort_path is None or adapter.encode_abort is None:
        return None
    return adapter.abort_path, adapter.encode_abort(request_id).SerializeToString()


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    cache_salt: str | None = None


def _read(data: bytes) -> tuple[_Body, str]:
    """What a picker wants to know of JSON that goes on as it is; the text is the JSON of the prompt, whose beginning says as much."""
    try:
        body = msgspec.json.decode(data, type=_Body)
        return body, bytes(body.messages or body.prompt).decode("utf-8", "replace")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _Body(), ""  # not for us to judge: the model server says what is wrong with it


def _passed(request: Incoming, reason: str) -> Plan:
    body, text = _read(request.body)
    request_id = request.headers.get("x-request-id", request.own_id)
    inference = InferenceRequest(
        request_id=request_id,
        model=body.model or "",
        stream=body.stream or False,
        prompt_text=text or None,
        cache_salt=body.cache_salt or "",
    )
    return Plan(
        mode=Mode.PASS,
        generates=request.method == "POST",
        reason=reason,
        inference=inference,
        request_id=request_id,
        remove=tuple(to_remove(request.headers)),
        answer=lambda _, whole_bodies: Untouched(HttpReading(), is_grpc=False, whole_bodies=whole_bodies, http_path=request.path),
    )


def _grpc_head(request: Incoming, path: str, headers: Sequence[tuple[str, str]]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """What to set and what to remove, where HTTP becomes gRPC or a call that of another service."""
    given = [(":path", path), *headers]
    if request.timeout_s is not None:
        given.append(("grpc-timeout", f"{min(_MAX_TIMEOUT_MS, max(1, round(request.timeout_s * 1000)))}m"))
    removed = to_remove_for_grpc(request.headers, request.forwarded, (name for name, _ in given))
    return tuple(given), tuple(removed)


@cache
def _dialects() -> dict[str, tuple[str, str]]:
    """Dialect and snapshot of every path that generates or embeds: the newest snapshot that has it."""
    found = {}
    for dialect in adapters.DIALECTS:
        for name in snapshots.SNAPSHOTS[dialect]:
            snapshot = snapshots.load(dialect, name)
            if not snapshot.refused:
                adapter = adapters.get(snapshot)
                embeds = (adapter.embed.path,) if adapter.embed is not None else ()
                found.update(dict.fromkeys((*adapter.generate_paths, *embeds), (dialect, name)))
    return found


def generates(path: str) -> bool:
    """Whether it is a gRPC path of a known dialect that generates, embeds, or passes OpenAI JSON on."""
    return path in _dialects() or path in _passthrough_paths()


@cache
def _passthrough_paths() -> frozenset[str]:
    found = (adapters.get(snapshots.load(dialect)) for dialect in adapters.DIALECTS)
    return frozenset(path for one in found if one.passthrough is not None for path in one.passthrough.paths.values())


def _bridge(path: str, transcoder: Transcoder) -> Bridge:
    dialect, snapshot = inbound = _dialects()[path]
    bridges = _BRIDGES.setdefault(transcoder, {})
    if inbound not in bridges:
        bridges[inbound] = Bridge(
            dialect,
            transcoder.adapter,
            inbound_snapshot=snapshot,
            tokenizer=transcoder.tokenizer,
            model=transcoder.model,
            limits=transcoder.limits,
            unsupported=transcoder.unsupported,
        )
    return bridges[inbound]
