"""`POST /v1/chat/completions`: a JSON body -> InferenceRequest, and what its answer has to look like.

Strategy: one table says of every field that vLLM 0.33 knows whether it is read here, advises nobody (accepted), or would change the
output in a way that this codec does not have yet (refused by name). What no table knows is accepted, as vLLM does, and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import MalformedRequestError, UsageError
from .._events import InferenceRequest, Media, ModelInfo
from . import policy, sampling
from .endpoint import Asked, Decoded
from .fields import bool_field, decode_json_object, int_field, literal_fault, object_field, type_error, type_errors
from .flavors import renamed
from .logprobs import decode_chat_logprobs, decode_logprob_token_ids, decode_prompt_logprobs, decode_shows_ids
from .messages import decode_messages
from .request import (
    base_model,
    check_chars,
    decode_max_tokens,
    decode_model,
    decode_request_id,
    decode_routing,
    decode_stream_options,
    encode_text,
    truncate,
)
from .tools import decode_reading, decode_tool_choice, decode_tools, sample_for, template_tools

if TYPE_CHECKING:
    from ..text import Tokenizer

PATH: Final = "/v1/chat/completions"
ID_PREFIX: Final = "chatcmpl-"

READ: Final = sampling.FIELDS | frozenset(
    (
        "model messages request_id stream stream_options logprobs top_logprobs max_completion_tokens return_token_ids documents"
        " add_generation_prompt continue_final_message add_special_tokens chat_template_kwargs reasoning_effort tools tool_choice"
        " truncate_prompt_tokens truncation_side priority cache_salt kv_transfer_params ec_transfer_params watermarking session_id"
        " parallel_tool_calls include_reasoning chat_template echo prompt_logprobs return_prompt_text return_tokens_as_token_ids"
        " logprob_token_ids"
    ).split()
)

ADVISORY: Final = policy.ADVISORY
REFUSED: Final = policy.REFUSED
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# A template sees these already under a name of its own; a client must not replace them.
_RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like; nothing of it goes to the model server."""

    id: str
    """Of the completion, when the host has no other."""
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    return_tokens_as_token_ids: bool | None = None
    """None for what the server was told."""
    role: str = "assistant"
    echo: str = ""
    """What the content begins with."""
    prompt_text: str | None = None
    """What the template made of the messages, where the client wants to see it."""
    parses: bool = False
    """Reasoning or tool calls are told apart from content."""
    counts_reasoning: bool = False
    """Reasoning tokens are shown also where there are none."""
    shows_empty: bool = True
    """A chunk that says nothing has empty content, as with vLLM without parsers."""
    forces_call: bool = False
    """The client demanded a tool call."""

    @property
    def is_detailed(self) -> bool:
        """Whether a chunk in the middle of the stream says more than its text."""
        return self.continuous_usage or self.return_token_ids or self.logprobs


def decode_request(body: bytes, asked: Asked) -> Decoded:
    """Decode a chat completion request. The body's own `request_id` wins over the host's. Raises RequestError."""
    return decode_fields(renamed(decode_json_object(body), asked.flavor), asked, id_prefix=ID_PREFIX if asked.flavor.prefixes_ids else "")


def decode_fields(fields: Mapping[str, Any], asked: Asked, *, id_prefix: str = ID_PREFIX) -> Decoded:
    """Likewise of the fields of one: other endpoints that are chats say what they want in these. Raises RequestError."""
    tokenizer, model = asked.tokenizer, asked.model
    if tokenizer is None:
        raise UsageError("a chat has to be rendered and tokenized, and there is no tokenizer")
    policy.check_types(fields, policy.CHAT_TYPES)
    lost = policy.refuse(fields, REFUSED, drops=asked.drops)
    given, name = decode_model(fields, asked)
    stream = bool_field(fields, "stream")
    vocab_size = model.vocab_size or tokenizer.vocab_size
    logprobs = decode_chat_logprobs(fields, vocab_size)
    prompt_logprobs = decode_prompt_logprobs(fields, vocab_size, stream=stream)
    if prompt_logprobs is None and bool_field(fields, "echo"):
        prompt_logprobs = int_field(fields, "top_logprobs") or 0  # as vLLM, whose answer shows them
    selected = decode_logprob_token_ids(fields, vocab_size, logprobs)
    tools = decode_tools(fields.get("tools"))
    choice = decode_tool_choice(fields, tools)
    kwargs = _decode_template_kwargs(fields)
    shown = template_tools(tools if choice.kind != "none" or asked.flavor.shows_uncallable_tools else None, asked.flavor.name)
    prompt, media = _decode_prompt(fields, tokenizer, model, shown, kwargs, accepts_media=asked.accepts_media)
    text = prompt if isinstance(prompt, str) else ""
    reading = decode_reading(fields, asked, tools=tools, choice=choice, prompt_text=text, template_kwargs=kwargs)
    if isinstance(prompt, str):
        special = bool_field(fields, "add_special_tokens")
        prompt = encode_text(fields, prompt, tokenizer, model.max_model_len, add_special_tokens=special)
    prompt_token_ids = truncate(fields, prompt, model.max_model_len)
    params = sampling.decode_sampling(
        fields,
        model=model,
        vocab_size=vocab_size,
        max_tokens=decode_max_tokens(_wanted_tokens(fields), len(prompt_token_ids), model, fills=asked.fills_max_tokens),
        logprobs=0 if selected else logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=selected,
        max_stop_strings=asked.flavor.max_stop_strings,
    )
    params = sample_for(reading, params, asked)
    include_usage, continuous_usage = decode_stream_options(fields, stream)
    role, echo = _decode_echo(fields)
    inference = InferenceRequest(
        request_id=id_prefix + decode_request_id(fields, asked),
        model=base_model(name, model),
        prompt_token_ids=prompt_token_ids,
        sampling=params,
        stream=stream,
        lora_name=model.lora_adapters.get(name, ""),
        media=media,
        return_token_ids=bool_field(fields, "return_token_ids"),
        thinks=reading.thinks and not params.grammar_from_first_token,
        **decode_routing(fields),
    )
    options = ChatOptions(
        id=inference.request_id,
        model=given or inference.model,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=inference.return_token_ids,
        logprobs=logprobs is not None,
        top_logprobs=len(selected) + 1 if selected else logprobs or 0,
        prompt_logprobs=prompt_logprobs is not None,
        return_tokens_as_token_ids=decode_shows_ids(fields),
        role=role,
        echo=echo,
        prompt_text=text if bool_field(fields, "return_prompt_text") else None,
        parses=reading.output is not None,
        counts_reasoning=asked.reasoning_format is not None and not asked.reasoning_format.is_guess,
        shows_empty=not reading.is_told,
        forces_call=choice.forces_call,
    )
    ignored = set(lost) | {field for field in fields if field not in READ and field not in REFUSED and field not in ADVISORY}
    reserved = _RESERVED_TEMPLATE_KWARGS.intersection(object_field(fields, "chat_template_kwargs") or ())
    ignored |= {f"chat_template_kwargs.{name}" for name in reserved}
    return Decoded(prompts=(inference,), options=options, ignored=tuple(sorted(ignored)), output=reading.output)


def _decode_template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = dict(object_field(fields, "chat_template_kwargs") or {})
    if fields.get("chat_template") is not None or kwargs.get("chat_template") is not None:
        raise MalformedRequestError(
            "Chat template is passed with request, but --trust-request-chat-template is not set."
            " Refused request with untrusted chat template."
        )
    for reserved in _RESERVED_TEMPLATE_KWARGS:
        kwargs.pop(reserved, None)
    effort = fields.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise type_errors(literal_fault("reasoning_effort", *EFFORTS))
    if effort is not None:
        kwargs.setdefault("reasoning_effort", effort)
        kwargs.setdefault("enable_thinking", effort != "none")
    return kwargs


def _decode_prompt(
    fields: Mapping[str, Any],
    tokenizer: Tokenizer,
    model: ModelInfo,
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
    *,
    accepts_media: bool,
) -> tuple[str | list[int], tuple[Media, ...]]:
    """The prompt's text, or its tokens where the tokenizer makes these itself, and the media that it has places for."""
    if "messages" not in fields:
        raise type_error("messages", "missing", "Field required")
    encode_chat: Callable[..., list[int]] | None = getattr(tokenizer, "encode_chat", None)
    messages, media = decode_messages(
        fields["messages"],
        accepts_content_parts=tokenizer.accepts_content_parts,
        accepts_media=accepts_media,
        text_model=next(iter(model.names), "the model") if model.is_multimodal is False else "",
        keeps_arguments=encode_chat is not None,
    )
    if encode_chat is not None:
        chars = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        check_chars(fields, chars, tokenizer, model.max_model_len)
    documents = fields.get("documents")
    if documents is not None:
        if not isinstance(documents, list):
            raise type_error("documents", "list_type", "Input should be a valid list")
        for place, document in enumerate(documents):
            if not isinstance(document, dict):
                raise type_error(f"documents.{place}", "dict_type", "Input should be a valid dictionary")
            if not all(isinstance(text, str) for text in document.values()):
                raise type_error(f"documents.{place}", "string_type", "Input should be a valid string")
    add_generation_prompt = bool_field(fields, "add_generation_prompt", True)
    continue_final_message = bool_field(fields, "continue_final_message")
    if add_generation_prompt and continue_final_message:
        raise MalformedRequestError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    render: Callable[..., str | list[int]] = encode_chat or tokenizer.render_chat
    prompt = render(
        messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=kwargs,
    )
    return prompt, tuple(media)


def _wanted_tokens(fields: Mapping[str, Any]) -> int | None:
    wanted = int_field(fields, "max_completion_tokens")
    return int_field(fields, "max_tokens") if wanted is None else wanted


def _decode_echo(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The role that answers, and what of the last message its answer begins with. Without a generation prompt the last message goes on."""
    last = fields["messages"][-1]
    role = "assistant" if bool_field(fields, "add_generation_prompt", True) else last["role"]
    content = last.get("content")
    if not bool_field(fields, "echo") or last["role"] != role or not content:
        return role, ""
    return role, content if isinstance(content, str) else "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
