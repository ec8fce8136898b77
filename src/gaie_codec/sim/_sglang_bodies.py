"""JSON bodies of SGLang's OpenAI endpoints -> what to generate, and the parts of answers that take some making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import CodecError, InferenceRequest, MalformedRequestError, SamplingParams, TokensEvent
from .._errors import CODE_TABLE, server_status_from_code

if TYPE_CHECKING:
    from ..text import Tokenizer

GENERATIONS: Final = ("chat", "completions")
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chat": ("messages",),
        "completions": ("prompt",),
        "embeddings": ("input",),
        "classify": ("input",),
        "score": (),
        "rerank": ("query", "documents"),
    }
)
_CLASSES: Final = MappingProxyType(
    {
        "chat": "ChatCompletionRequest",
        "completions": "CompletionRequest",
        "embeddings": "EmbeddingRequest",
        "classify": "ClassifyRequest",
        "rerank": "V1RerankReqInput",
    }
)
_RANK: Final = "x-data-parallel-rank"
_DEFAULT_COMPLETION_TOKENS: Final = 16


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that change something here; the request models pass over what they do not know."""

    model: str = "default"
    messages: list[dict[str, Any]] = []
    prompt: Any = None
    rid: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    seed: int | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    priority: int | None = None
    lora_path: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False

    def request(self, request_id: str, headers: Mapping[str, str], *, is_chat: bool) -> InferenceRequest:
        """The request without its prompt; `request_id` is for a body that has none."""
        rank = headers.get(_RANK, "")
        return InferenceRequest(
            request_id=self.rid or request_id,
            model=self.model,
            sampling=self._sampling(is_chat=is_chat),
            stream=self.stream,
            priority=self.priority or 0,
            lora_name=self.lora_path or "",
            data_parallel_rank=int(rank) if rank.isdecimal() else None,
            trace_headers=dict(headers),
        )

    def _sampling(self, *, is_chat: bool) -> SamplingParams:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if is_chat:
            logprobs = (self.top_logprobs or 0) if self.logprobs else None
        else:
            logprobs = int(self.logprobs) if self.logprobs is not None else None
            limit = _DEFAULT_COMPLETION_TOKENS if limit is None else limit
        return SamplingParams(
            **given,
            max_tokens=limit,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=bool(self.no_stop_trim),
            logprobs=logprobs,
        )

    def prompts(self, tokenizer: Tokenizer, *, is_chat: bool) -> list[list[int]]:
        """The prompts as token ids. Raises CodecError."""
        if not is_chat:
            return encode_inputs(self.prompt, tokenizer)
        text = tokenizer.render_chat(
            self.messages,
            tools=self.tools,
            add_generation_prompt=not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs or {},
        )
        return [tokenizer.encode(text, add_special_tokens=False)]


_SAMPLING: Final = tuple(
    (
        "temperature top_p min_p frequency_penalty presence_penalty repetition_penalty min_tokens n ignore_eos skip_special_tokens seed"
    ).split()
)


def decode_object(body: bytes, kind: str) -> dict[str, Any]:
    """A body that has what its kind must have. Raises ValueError with Python's or pydantic's words."""
    try:
        value = json.loads(body)
    except RecursionError:
        raise ValueError("maximum recursion depth exceeded") from None
    if not isinstance(value, dict):
        raise ValueError(f"Request body must be a JSON object, got {type(value).__name__}")
    missing = [name for name in _REQUIRED[kind] if value.get(name) is None]
    if missing:
        raise _refusal(kind, [(name, "Field required", "missing") for name in missing])
    return value


def decode_generation(body: bytes, kind: str) -> Generation:
    """What to generate. Raises ValueError likewise."""
    fields = decode_object(body, kind)
    try:
        # Null stands for the default, as in most of SGLang's fields.
        asked = msgspec.convert({name: value for name, value in fields.items() if value is not None}, Generation)
    except msgspec.ValidationError as error:
        words, _, path = str(error).partition(" - at `$.")
        raise _refusal(kind, [(path.rstrip("`"), words, "type")]) from None
    if kind == "completions" and asked.max_tokens is not None and asked.max_tokens < 0:
        raise _refusal(kind, [("max_tokens", "Input should be greater than or equal to 0", "greater_than_equal")])
    return asked


def encode_inputs(value: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """A text, token ids, or a list of either, as lists of token ids. Raises MalformedRequestError."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise MalformedRequestError("Prompt cannot be empty")
    found = []
    for one in value:
        if isinstance(one, str):
            found.append(tokenizer.encode(one, add_special_tokens=True))
        elif isinstance(one, list) and all(type(token_id) is int for token_id in one):
            found.append(one)
        else:
            raise MalformedRequestError("a prompt is neither text nor token ids")
    return found


def encode_error(error: CodecError) -> dict[str, Any]:
    """The body by which SGLang's serving layer refuses."""
    status = server_status_from_code(error.code)
    return {"object": "error", "message": error.message, "type": CODE_TABLE[error.code].type, "param": None, "code": status}


def describe_logprobs(gained: TokensEvent, tokenizer: Tokenizer, *, is_chat: bool) -> dict[str, Any]:
    """Log probabilities in the form of either endpoint."""
    pieces = tokenizer.detokenizer((), skip_special_tokens=False)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = pieces.peek(token_id)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    if is_chat:
        rows = [
            {**entry(one.token_id, one.logprob), "top_logprobs": [entry(other, value) for other, value in one.top]}
            for one in gained.logprobs
        ]
        return {"content": rows}
    return {
        "text_offset": [],
        "token_logprobs": [one.logprob for one in gained.logprobs],
        "tokens": [pieces.peek(one.token_id) for one in gained.logprobs],
        "top_logprobs": [{pieces.peek(other): value for other, value in one.top} for one in gained.logprobs],
    }


def _refusal(kind: str, faults: list[tuple[str, str, str]]) -> ValueError:
    count = f"{len(faults)} validation error{'s' if len(faults) > 1 else ''} for {_CLASSES[kind]}"
    lines = [f"{name}\n  {words} [type={fault}]" for name, words, fault in faults]
    return ValueError("\n".join([count, *lines]))
