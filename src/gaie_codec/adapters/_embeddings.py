"""Embed of the servers that have it: one prompt's token ids -> its vector, and back.

The smg servicers have a message of their own for it, which was changed twice: SGLang's answer was an envelope with a result or an error,
and has other field numbers since. SGLang's native server answers with a vector and `meta_info`, whose values are JSON texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import Code
from .._events import EmbeddingEvent, ErrorEvent, InferenceRequest
from .base import EmbedCoder, existing

if TYPE_CHECKING:
    from ..snapshots import Snapshot

_SERVICER_FIELDS: Final = {
    "request_id": "request_id",
    "prompt_token_ids": "tokenized.input_ids",
    "data_parallel_rank": "data_parallel_rank",
}
_NATIVE_FIELDS: Final = {"request_id": "rid", "prompt_token_ids": "input_ids", "trace_headers": "trace_headers"}
_ONE_MODEL: Final = {"model": "a server has one model; the name is checked by the gateway"}


def servicer_embeddings(snapshot: Snapshot, service: str) -> EmbedCoder | None:
    """Embed of the smg servicers, for vLLM and SGLang, and of their predecessors in the engines' own trees."""
    if not snapshot.has_method(service, "Embed"):
        return None
    method = snapshot.method(service, "Embed")
    request_type: Any = method.request
    response_type: Any = method.response
    sends = existing(request_type, _SERVICER_FIELDS)
    has_rank = "data_parallel_rank" in sends
    has_envelope = "complete" in response_type.DESCRIPTOR.fields_by_name

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        message.request_id = request.request_id
        message.tokenized.input_ids.extend(request.prompt_token_ids)
        if has_rank and request.data_parallel_rank is not None:
            message.data_parallel_rank = request.data_parallel_rank
        return message

    def decode_request(message: Any) -> InferenceRequest:
        return InferenceRequest(
            request_id=message.request_id,
            prompt_token_ids=list(message.tokenized.input_ids),
            # Without presence 0 is what any rank may do.
            data_parallel_rank=(message.data_parallel_rank or None) if has_rank else None,
        )

    def decode_response(message: Any) -> tuple[EmbeddingEvent | ErrorEvent, ...]:
        if has_envelope:
            which = message.WhichOneof("response")
            if which == "error":
                # Its code is a name of the servicer's own and says no more than that it failed.
                return (ErrorEvent(code=Code.INTERNAL, message=message.error.message),)
            if which is None:
                return ()
            message = message.complete
        return (
            EmbeddingEvent(
                values=message.embedding[:],
                dimensions=max(message.embedding_dim, 0),
                prompt_tokens=max(message.prompt_tokens, 0),
                cached_tokens=max(message.cached_tokens, 0) if has_envelope else 0,
            ),
        )

    def encode_response(event: EmbeddingEvent) -> Any:
        message = response_type()
        part = message.complete if has_envelope else message
        if has_envelope:
            part.cached_tokens = event.cached_tokens
        part.embedding.extend(event.values)
        part.prompt_tokens = event.prompt_tokens
        part.embedding_dim = event.dimensions
        return message

    return EmbedCoder(
        path=method.path,
        sends=sends,
        emulates=_ONE_MODEL | {"trace_headers": "metadata"},
        also_reads=frozenset(("tokenized.original_text", "sampling_params", "log_metrics")),
        ranges={"data_parallel_rank": (1, 2**31 - 1)},  # 0 is what is not said
        encode_request=encode_request,
        decode_request=decode_request,
        decode_response=decode_response,
        encode_response=encode_response,
    )


def sglang_runtime_embeddings(snapshot: Snapshot, service: str) -> EmbedCoder:
    """Embed of SGLang's native server."""
    method = snapshot.method(service, "Embed")
    request_type: Any = method.request
    response_type: Any = method.response

    def encode_request(request: InferenceRequest) -> Any:
        message = request_type()
        message.input_ids.extend(request.prompt_token_ids)
        message.rid = request.request_id
        message.trace_headers.update(request.trace_headers)
        return message

    def decode_request(message: Any) -> InferenceRequest:
        return InferenceRequest(request_id=message.rid, prompt_token_ids=list(message.input_ids), trace_headers=dict(message.trace_headers))

    def decode_response(message: Any) -> tuple[EmbeddingEvent]:
        meta = message.meta_info
        return (
            EmbeddingEvent(
                values=message.embedding[:], prompt_tokens=_count(meta, "prompt_tokens"), cached_tokens=_count(meta, "cached_tokens")
            ),
        )

    def encode_response(event: EmbeddingEvent) -> Any:
        message = response_type()
        message.embedding.extend(event.values)
        for key in ("prompt_tokens", "cached_tokens"):
            message.meta_info[key] = msgspec.json.encode(getattr(event, key)).decode()
        return message

    return EmbedCoder(
        path=method.path,
        sends=existing(request_type, _NATIVE_FIELDS),
        emulates=_ONE_MODEL,
        also_reads=frozenset(("routing_key",)),
        encode_request=encode_request,
        decode_request=decode_request,
        decode_response=decode_response,
        encode_response=encode_response,
    )


def _count(meta: Mapping[str, str], key: str) -> int:
    text = meta.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
