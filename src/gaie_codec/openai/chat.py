"""`POST /v1/chat/completions`: a JSON body -> InferenceRequest, and what its answer has to look like.

Strategy: one table says of every field that vLLM 0.33 knows whether it is read here, advises nobody (accepted), or would change the
output in a way that this codec does not have yet (refused by name). What no table knows is accepted, as vLLM does, and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import MalformedRequestError, ModelNotFoundError, UnsupportedFieldError
from .._events import InferenceRequest, ModelInfo
from . import sampling
from .fields import as_int, bool_field, decode_json_object, int_field, json_text, object_field, range_error, str_field, type_error
from .messages import decode_messages, decode_tools

if TYPE_CHECKING:
    from ..text import Tokenizer

PATH: Final = "/v1/chat/completions"
ID_PREFIX: Final = "chatcmpl-"
MAX_CACHE_SALT: Final = 128
MAX_REQUEST_ID: Final = 1024  # characters; the id is repeated in every chunk

_READ: Final = sampling.FIELDS | frozenset(
    (
        "model messages request_id stream stream_options logprobs top_logprobs max_completion_tokens return_token_ids documents"
        " add_generation_prompt continue_final_message add_special_tokens chat_template_kwargs reasoning_effort tools tool_choice"
        " truncate_prompt_tokens truncation_side priority cache_salt kv_transfer_params"
    ).split()
)

# They change nothing in what this gateway and its model servers generate.
_ADVISORY: Final = frozenset(
    (
        "user metadata store service_tier prediction verbosity prompt_cache_key prompt_cache_retention safety_identifier session_id"
        " include_reasoning mm_payload"
    ).split()
)

# Field -> the values that ask for nothing. Any other value is refused.
_REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "chat_template": (None,),
        "echo": (None, False),
        "ec_transfer_params": (None,),
        "logprob_token_ids": (None,),
        "prompt_logprobs": (None,),
        "repetition_detection": (None,),
        "return_prompt_text": (None, False),
        "return_token_offsets": (None, False),
        "return_tokens_as_token_ids": (None, False),
        "return_weight_versions": (None, False),
        "routed_experts_prompt_start": (None, 0),
        "stream_interval": (None,),
        "thinking_token_budget": (None, -1),
        "use_beam_search": (None, False),
        "vllm_xargs": (None,),
        "watermarking": (None, False),
    }
)

# A template sees these already under a name of its own; a client must not replace them.
_RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like; nothing of it goes to the model server."""

    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    logprobs: bool = False

    @property
    def is_detailed(self) -> bool:
        """Whether a chunk in the middle of the stream says more than its text."""
        return self.continuous_usage or self.return_token_ids or self.logprobs


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded request: what to infer, how to answer, and the fields that were accepted but have no effect."""

    inference: InferenceRequest
    options: ChatOptions
    ignored: tuple[str, ...] = ()


def decode_request(body: bytes, *, request_id: str, tokenizer: Tokenizer, model: ModelInfo, fixed_id: str | None = None) -> ChatRequest:
    """Decode a chat completion request.

    `request_id` is the host's and used when the body has no `request_id` of its own; `fixed_id` (the X-Request-Id header) wins over
    both, as with vLLM. Raises RequestError.
    """
    fields = decode_json_object(body)
    _refuse(fields)
    name = str_field(fields, "model")
    if not model.serves(name):
        raise ModelNotFoundError(f"The model `{name[:200]}` does not exist.", param="model")
    stream = bool_field(fields, "stream")
    logprobs = _decode_logprobs(fields)
    prompt_token_ids = _decode_prompt(fields, tokenizer, model)
    params = sampling.decode_sampling(
        fields,
        model=model,
        vocab_size=model.vocab_size or tokenizer.vocab_size,
        max_tokens=_decode_max_tokens(fields, len(prompt_token_ids), model),
        logprobs=logprobs,
    )
    include_usage, continuous_usage = _decode_stream_options(fields, stream)
    kv_transfer_params = object_field(fields, "kv_transfer_params")
    own_id = fixed_id or str_field(fields, "request_id")
    if len(own_id) > MAX_REQUEST_ID:
        raise range_error("request_id", f"a request id must be at most {MAX_REQUEST_ID} characters, got {len(own_id)}.")
    inference = InferenceRequest(
        request_id=ID_PREFIX + (own_id or request_id),
        model=name or next(iter(model.names), ""),
        prompt_token_ids=prompt_token_ids,
        sampling=params,
        stream=stream,
        priority=int_field(fields, "priority") or 0,
        cache_salt=_decode_cache_salt(fields),
        kv_transfer_params=json_text(kv_transfer_params, "kv_transfer_params") if kv_transfer_params is not None else "",
    )
    options = ChatOptions(
        model=inference.model,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=bool_field(fields, "return_token_ids"),
        logprobs=logprobs is not None,
    )
    ignored = tuple(sorted(field for field in fields if field not in _READ and field not in _REFUSED and field not in _ADVISORY))
    return ChatRequest(inference=inference, options=options, ignored=ignored)


def _refuse(fields: Mapping[str, Any]) -> None:
    for name, harmless in _REFUSED.items():
        if name in fields and fields[name] not in harmless:
            raise UnsupportedFieldError(f"`{name}` is not supported by this gateway (parameter={name})", param=name)
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    if choice is not None and choice != "none":
        if not tools:
            raise range_error("tool_choice", "When using `tool_choice`, `tools` must be set.")
        raise UnsupportedFieldError("tool calls need a tool-call parser, and this gateway has none", param="tool_choice")
    # An absent choice is "auto" when there are tools; null is "none" (observed on vLLM 0.33).
    if tools and "tool_choice" not in fields:
        raise UnsupportedFieldError('"auto" tool choice needs a tool-call parser, and this gateway has none', param="tools")


def _decode_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer, model: ModelInfo) -> list[int]:
    if "messages" not in fields:
        raise type_error("messages", "missing", "Field required")
    messages = decode_messages(fields["messages"], accepts_content_parts=tokenizer.accepts_content_parts)
    kwargs = dict(object_field(fields, "chat_template_kwargs") or {})
    if "chat_template" in kwargs:
        raise UnsupportedFieldError("a chat template in the request is not trusted", param="chat_template_kwargs.chat_template")
    for reserved in _RESERVED_TEMPLATE_KWARGS:
        kwargs.pop(reserved, None)
    effort = fields.get("reasoning_effort")
    if effort is not None:
        kwargs.setdefault("reasoning_effort", effort)
        kwargs.setdefault("enable_thinking", effort != "none")
    documents = fields.get("documents")
    if documents is not None:
        if not isinstance(documents, list):
            raise type_error("documents", "list_type", "Input should be a valid list")
        for place, document in enumerate(documents):
            if not isinstance(document, dict):
                raise type_error(f"documents.{place}", "dict_type", "Input should be a valid dictionary")
    add_generation_prompt = bool_field(fields, "add_generation_prompt", True)
    continue_final_message = bool_field(fields, "continue_final_message")
    if add_generation_prompt and continue_final_message:
        raise MalformedRequestError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    text = tokenizer.render_chat(
        messages,
        tools=decode_tools(fields.get("tools")),
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=kwargs,
    )
    token_ids = tokenizer.encode(text, add_special_tokens=bool_field(fields, "add_special_tokens"))
    return _truncate(fields, token_ids, model.max_model_len)


def _truncate(fields: Mapping[str, Any], token_ids: list[int], max_model_len: int) -> list[int]:
    keep = int_field(fields, "truncate_prompt_tokens")
    side = fields.get("truncation_side")
    if side not in (None, "left", "right"):
        raise type_error("truncation_side", "literal_error", "Input should be left or right")
    if keep is not None:
        if keep < -1:
            raise type_error("truncate_prompt_tokens", "greater_than_equal", "Input should be greater than or equal to -1")
        if max_model_len and keep > max_model_len:
            raise range_error(
                "truncate_prompt_tokens",
                f"truncate_prompt_tokens={keep} cannot be greater than max_model_len = {max_model_len}."
                " Please request a smaller truncation size.",
                keep,
            )
        if keep == -1:
            keep = max_model_len or len(token_ids)
        if len(token_ids) > keep:
            token_ids = token_ids[:keep] if side == "right" else token_ids[len(token_ids) - keep :]
    if not token_ids:
        raise MalformedRequestError("The decoder prompt cannot be empty")
    if max_model_len and len(token_ids) >= max_model_len:
        raise range_error(
            "input_tokens",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {len(token_ids)} input"
            " tokens, which leaves no room for output tokens. Please reduce the length of the input prompt.",
            len(token_ids),
        )
    return token_ids


def _decode_max_tokens(fields: Mapping[str, Any], prompt_tokens: int, model: ModelInfo) -> int | None:
    wanted = int_field(fields, "max_completion_tokens")
    if wanted is None:
        wanted = int_field(fields, "max_tokens")
    max_model_len = model.max_model_len
    default = as_int(model.default_sampling_params.get("max_tokens"), "max_tokens")
    if wanted is None and default is not None:
        return min(default, max_model_len - prompt_tokens) if max_model_len else default
    if not max_model_len:
        return wanted
    if wanted is not None and wanted > max_model_len:
        raise range_error(
            "max_tokens",
            f"max_tokens={wanted} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens.",
            wanted,
        )
    room = max_model_len - prompt_tokens
    return room if wanted is None else min(wanted, room)


def _decode_logprobs(fields: Mapping[str, Any]) -> int | None:
    top = int_field(fields, "top_logprobs")
    wanted = bool_field(fields, "logprobs")
    if top is not None and top < -1:
        raise range_error("top_logprobs", "`top_logprobs` must be a positive value or -1.", top)
    if top and not wanted:
        raise range_error("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.")
    if top is not None and (top == -1 or top > sampling.MAX_LOGPROBS):
        raise range_error(
            "logprobs", f"Requested sample logprobs of {top}, which is greater than max allowed: {sampling.MAX_LOGPROBS}", top
        )
    return (top or 0) if wanted else None


def _decode_stream_options(fields: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    options = object_field(fields, "stream_options")
    if not options:
        return False, False
    if not stream:
        raise range_error("stream_options", "Stream options can only be defined when `stream=True`.")
    include = bool_field(options, "include_usage", loc="stream_options.include_usage")
    return include, include and bool_field(options, "continuous_usage_stats", loc="stream_options.continuous_usage_stats")


def _decode_cache_salt(fields: Mapping[str, Any]) -> str:
    salt = str_field(fields, "cache_salt")
    if fields.get("cache_salt") == "":
        raise range_error("cache_salt", "Parameter 'cache_salt' must be a non-empty string if provided.")
    if len(salt) > MAX_CACHE_SALT or any(character in salt for character in "@/\\\0"):
        raise range_error(
            "cache_salt",
            f"Parameter 'cache_salt' must be at most {MAX_CACHE_SALT} characters and must not contain '@', '/', '\\\\', or NUL.",
        )
    return salt
