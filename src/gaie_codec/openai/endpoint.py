"""What an endpoint is: how its requests are decoded, and what makes its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from .._errors import UsageError
from .._events import BodyEvent, EmbeddingEvent, InferenceRequest, ModelInfo, Usage
from .._parts import OutputSettings
from .flavors import VLLM, Flavor

if TYPE_CHECKING:
    from .._choices import Delta
    from .._errors import CodecError
    from ..text import Tokenizer
    from ..text.formats import ReasoningFormat, ToolFormat


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What decoding needs besides the body. `fixed_id` (the X-Request-Id header) wins over every other id, as with vLLM."""

    request_id: str
    model: ModelInfo
    tokenizer: Tokenizer | None = None
    fixed_id: str | None = None
    max_prompts: int = 1024
    """How many calls the host makes, so that a longer list is refused before it is tokenized."""
    rewritten_model: str = ""
    """What the host takes the request's model for, whatever the body says; "" for what it says."""
    drops: bool = False
    """Whether a field that cannot be done is left out and reported, instead of refused."""
    accepts_media: bool = False
    """Whether images, video and sound can be sent to the model server."""
    carries: frozenset[str] = frozenset()
    """The neutral fields that can be, for who asks for less where it cannot be."""
    flavor: Flavor = VLLM
    fills_max_tokens: bool = True
    """An absent `max_tokens` is sent as what the context has room for; else the model server is left to take it so."""
    tool_format: ToolFormat | None = None
    reasoning_format: ReasoningFormat | None = None
    """How the model writes tool calls and reasoning; None where nothing tells."""


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded request: what to infer for each prompt, how to answer, and the fields that were accepted but have no effect."""

    prompts: tuple[InferenceRequest, ...]
    options: Any
    ignored: tuple[str, ...] = ()
    output: OutputSettings | None = None
    """How choices are parsed; None where all text is content."""
    needs_pieces: bool = False
    """Whether the answer tells which part of it a token belongs to, which of a parsed answer only the pieces of a stream show."""

    @property
    def inference(self) -> InferenceRequest:
        """Of the first prompt, which for a chat is the only one."""
        return self.prompts[0]


class ResponseMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What the host decides about one answer: ids, clocks and labels. `created` is in seconds since the epoch."""

    id: str
    created: int
    flavor: str = "vllm"
    eos_token_ids: frozenset[int] = frozenset()
    system_fingerprint: str | None = None
    prompt_tokens_details: bool = False
    """Show `prompt_tokens_details.cached_tokens` in usage, as vLLM does with --enable-prompt-tokens-details."""
    return_tokens_as_token_ids: bool = False
    """Log probabilities have `token_id:N` for texts unless a request says otherwise, as in vLLM with --return-tokens-as-token-ids."""


class ResponseEncoder(Protocol):
    """What makes an HTTP body: of deltas, or of pieces that are OpenAI JSON already.

    The calls come in this order: `open`, then `text` and `delta`, or `body` alone; then `close` or `error`.
    """

    content_type: str
    streams: bool
    is_detailed: bool
    """Whether a chunk in the middle of the stream says more than its text."""
    wants_usage: bool
    """Whether `delta` needs the usage so far."""
    shows_ids: bool
    """Whether log probabilities have ids for texts."""

    @property
    def reported_usage(self) -> Usage | None:
        """What the server said in JSON of its own; None where deltas are counted."""
        ...

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes: ...
    def text(self, index: int, text: str) -> bytes: ...
    def reasoning(self, index: int, text: str) -> bytes: ...
    def delta(self, delta: Delta, usage: Usage | None) -> bytes: ...
    def body(self, event: BodyEvent) -> bytes: ...
    def check_complete(self) -> None:
        """Raise TruncatedResponseError when the last body has come and a choice has not finished."""
        ...

    def close(self, usage: Usage) -> bytes: ...
    def error(self, error: CodecError) -> bytes: ...


class WithoutDeltas:
    """The half of a ResponseEncoder that is about deltas, for answers in which there are none."""

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        raise UsageError("deltas in an answer without choices of ours")

    def text(self, index: int, text: str) -> bytes:
        raise UsageError("deltas in an answer without choices of ours")

    def reasoning(self, index: int, text: str) -> bytes:
        raise UsageError("deltas in an answer without choices of ours")

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        raise UsageError("deltas in an answer without choices of ours")


class VectorEncoder(ResponseEncoder, Protocol):
    """What makes an HTTP body of vectors: `embedding` for each prompt, in any order, then `close` or `error`."""

    headers: tuple[tuple[str, str], ...]
    """Of the answer, besides those that any has; known after `close`."""

    def embedding(self, place: int, event: EmbeddingEvent) -> None:
        """The vector of the prompt at `place`. Raises CodecError for one that cannot be told."""
        ...


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One path of the API."""

    path: str
    decode_request: Callable[[bytes, Asked], Decoded]
    """Raises RequestError."""
    make_encoder: Callable[[Any, ResponseMeta], ResponseEncoder]
    """Of the request's options."""
    embeds: bool = False
    """Vectors are asked for; `make_encoder` then gives a VectorEncoder."""
    prompts_field: str = "prompt"
    """Where a request has its prompts."""
