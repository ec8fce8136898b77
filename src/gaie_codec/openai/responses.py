"""`POST /v1/responses`: a JSON body -> InferenceRequest, and what its answer has to look like. Nothing is stored.

A response is a chat by other names: its fields become those of a chat completion, which `chat.decode_fields` decodes, and errors get the
names that the client knows. What the answer repeats of the request is encoded here, once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .._errors import RequestError, UnsupportedEndpointError, UnsupportedFieldError
from .chat import decode_fields
from .endpoint import Asked, Decoded
from .fields import (
    bool_field,
    decode_json_object,
    int_field,
    json_text,
    list_field,
    literal_fault,
    object_field,
    str_field,
    type_error,
    type_errors,
)
from .responses_input import Conversation, decode_input

PATH: Final = "/v1/responses"
ID_PREFIX: Final = "resp_"
LOGPROBS: Final = "message.output_text.logprobs"

# The same in a chat.
SHARED: Final = (
    "model request_id stream temperature top_p top_k frequency_penalty presence_penalty repetition_penalty seed stop ignore_eos"
    " logit_bias skip_special_tokens include_stop_str_in_output parallel_tool_calls include_reasoning priority cache_salt session_id"
    " structured_outputs kv_transfer_params ec_transfer_params vllm_xargs chat_template_kwargs"
).split()

READ: Final = frozenset(SHARED) | frozenset(
    (
        "input instructions max_output_tokens text tools tool_choice reasoning include top_logprobs truncation store"
        " background previous_response_id previous_input_messages previous_response conversation prompt enable_response_messages"
    ).split()
)

# They change nothing in what is generated; the answer repeats those that vLLM's repeats.
ADVISORY: Final = frozenset(
    (
        "metadata user service_tier prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier max_tool_calls"
        " media_io_kwargs mm_processor_kwargs"
    ).split()
)

# Field -> why it cannot be done. Any value asks for it but null and false.
REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "background": "responses are not stored here, so there is no background mode",
        "previous_response_id": "responses are not stored here: send the conversation as `input`",
        "previous_response": "send the conversation as `input`",
        "previous_input_messages": "send the conversation as `input`",
        "conversation": "conversations are not stored here: send the conversation as `input`",
        "prompt": "prompt template is not supported",
        "enable_response_messages": "raw messages are not supported by this gateway",
    }
)

_NO_IDS: Final = ("input_tokens", "compact")  # OpenAI's further endpoints
_ECHOED: Final = (
    "metadata user prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier max_tool_calls reasoning text"
).split()
# What errors of a chat call it -> its name here.
_FROM_CHAT: Final = MappingProxyType(
    {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "reasoning_effort": "reasoning.effort"}
)
_MESSAGE: Final = re.compile(r"(body\.|)messages(?:\.(\d+)(\..*)?)?")


class ResponsesOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like; nothing of it goes to the model server."""

    id: str
    """Of the response, when the host has no other."""
    model: str
    stream: bool = False
    logprobs: bool = False
    shows_empty: bool = True
    """An answer of nothing is an empty message, as with vLLM without parsers; else there is no output."""
    echo: Mapping[str, msgspec.Raw] = {}
    """What the answer repeats of the request, as JSON."""


def check_stored(route: str) -> None:
    """Raise UnsupportedEndpointError for the path of a response that would have to be stored."""
    if route.startswith(f"{PATH}/"):
        wanted = route.removeprefix(f"{PATH}/").partition("/")[0]
        if wanted in _NO_IDS:
            return
        error = UnsupportedEndpointError(f"Response with id {wanted[:100]!r} not found: responses are not stored here.")
        error.param = "response_id"
        raise error


def decode_request(body: bytes, asked: Asked) -> Decoded:
    """Decode a request for a response. The body's own `request_id` is the id as it is, as with vLLM. Raises RequestError."""
    fields = decode_json_object(body)
    for name, why in REFUSED.items():
        if fields.get(name) not in (None, False):
            raise UnsupportedFieldError(why, param=name)
    conversation = decode_input(fields)
    chat = _chat_fields(fields, conversation, asked)
    prefix = "" if asked.fixed_id is None and fields.get("request_id") else ID_PREFIX
    try:
        decoded = decode_fields(chat, asked, id_prefix=prefix)
    except RequestError as error:
        _rename(error, conversation)
        raise
    options = ResponsesOptions(
        id=decoded.options.id,
        model=decoded.options.model,
        stream=decoded.options.stream,
        logprobs=decoded.options.logprobs,
        shows_empty=decoded.options.shows_empty,
        echo=_echo(fields, decoded, bool(chat.get("tools"))),
    )
    output = decoded.output
    if output is not None and output.id_style == "openai":
        output = msgspec.structs.replace(output, id_style="responses")
    ignored = tuple(sorted({*decoded.ignored, *_ignored(fields)}))
    needs_pieces = options.logprobs and output is not None  # of messages alone, and not of what comes before them
    return msgspec.structs.replace(decoded, options=options, ignored=ignored, output=output, needs_pieces=needs_pieces)


def _chat_fields(fields: Mapping[str, Any], conversation: Conversation, asked: Asked) -> dict[str, Any]:
    chat = {name: fields[name] for name in SHARED if name in fields}
    chat["messages"] = conversation.messages
    if conversation.continues:
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    wanted = int_field(fields, "max_output_tokens")
    if wanted is not None:
        chat["max_completion_tokens"] = wanted
    if LOGPROBS in _decode_include(fields):
        chat |= {"logprobs": True, "top_logprobs": int_field(fields, "top_logprobs") or 0}
    effort = (object_field(fields, "reasoning") or {}).get("effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise type_error("reasoning.effort", "string_type", "Input should be a valid string")
        chat["reasoning_effort"] = effort
    response_format = _decode_format(fields)
    if response_format is not None:
        chat["response_format"] = response_format
    if str_field(fields, "truncation", "disabled") not in ("auto", "disabled"):
        raise type_errors(literal_fault("truncation", "auto", "disabled"))
    if fields.get("truncation") == "auto":
        # The beginning of the prompt goes, so that there is room for the answer.
        room = asked.model.max_model_len - max(wanted or 1, 1)
        chat["truncate_prompt_tokens"] = room if room > 0 else -1
    tools = _decode_tools(fields)
    if tools:
        chat["tools"] = tools
    choice = _decode_tool_choice(fields)
    if tools or choice not in ("auto", "none"):
        chat["tool_choice"] = choice
    return chat


def _decode_include(fields: Mapping[str, Any]) -> list[str]:
    included = list_field(fields, "include") or []
    for place, name in enumerate(included):
        if not isinstance(name, str):
            raise type_error(f"include.{place}", "string_type", "Input should be a valid string")
    return included


def _decode_format(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """`text.format`, as a chat has it in `response_format`."""
    text = object_field(fields, "text") or {}
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise type_error("text.format", "dict_type", "Input should be a valid dictionary")
    kind = form.get("type")
    if kind == "json_schema":
        if not isinstance(form.get("name"), str):
            raise type_error("text.format.name", "missing", "Field required")
        if not isinstance(form.get("schema"), dict):
            raise type_error("text.format.schema", "dict_type", "Input should be a valid dictionary")
        return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    if kind in ("text", "json_object"):
        return {"type": kind} if kind == "json_object" else None
    raise type_errors(literal_fault("text.format.type", "text", "json_object", "json_schema"))


def _decode_tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions, whose form is flat here."""
    tools = []
    for place, tool in enumerate(list_field(fields, "tools") or ()):
        loc = f"tools.{place}"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise type_error(f"{loc}.type", "missing", "Field required")
        if kind != "function":
            raise UnsupportedFieldError(f"tools of type {kind[:40]!r} are not supported: only functions are", param=f"{loc}.type")
        if not isinstance(tool.get("name"), str):
            raise type_error(f"{loc}.name", "missing", "Field required")
        if not isinstance(tool.get("parameters"), dict | None):
            raise type_error(f"{loc}.parameters", "dict_type", "Input should be a valid dictionary")
        function = {key: value for key, value in tool.items() if key != "type" and (key != "strict" or value is not None)}
        tools.append({"type": "function", "function": function})
    return tools


def _decode_tool_choice(fields: Mapping[str, Any]) -> Any:
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto"
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind != "function":
        raise UnsupportedFieldError("only functions can be chosen", param="tool_choice.type")
    if not isinstance(choice.get("name"), str):
        raise type_error("tool_choice.name", "missing", "Field required")
    return {"type": "function", "function": {"name": choice["name"]}}


def _echo(fields: Mapping[str, Any], decoded: Decoded, has_tools: bool) -> dict[str, msgspec.Raw]:
    """What vLLM repeats of the request, as it took it. It is made here so that what cannot be JSON is the request's fault."""
    sampling = decoded.inference.sampling
    choice = fields.get("tool_choice")
    object_field(fields, "metadata")
    for name in ("user", "service_tier"):
        str_field(fields, name)
    echoed: dict[str, Any] = {name: fields.get(name) for name in _ECHOED}
    echoed |= {
        "instructions": fields.get("instructions"),
        "parallel_tool_calls": bool_field(fields, "parallel_tool_calls", True),
        "temperature": sampling.temperature,
        "tool_choice": ("auto" if choice is None else choice) if has_tools else "none",
        "tools": fields.get("tools") or [],
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "max_output_tokens": sampling.max_tokens,
        "top_logprobs": sampling.logprobs,
        "service_tier": fields.get("service_tier") or "auto",
        "truncation": fields.get("truncation") or "disabled",
        "background": False,
        "store": False,
        "previous_response_id": None,
        "prompt": None,
    }
    return {name: msgspec.Raw(json_text(value, name).encode()) for name, value in echoed.items()}


def _ignored(fields: Mapping[str, Any]) -> set[str]:
    """What has no effect: unknown fields, and values that ask for something that is not there."""
    ignored = {name for name in fields if name not in READ and name not in ADVISORY}
    included = _decode_include(fields)
    ignored |= {f"include.{name}" for name in included if name != LOGPROBS}
    if fields.get("top_logprobs") and LOGPROBS not in included:
        ignored.add("top_logprobs")
    if bool_field(fields, "store"):
        ignored.add("store")
    ignored |= {f"reasoning.{name}" for name, value in (fields.get("reasoning") or {}).items() if name != "effort" and value is not None}
    ignored |= {f"text.{name}" for name, value in (fields.get("text") or {}).items() if name != "format" and value is not None}
    return ignored


def _rename(error: RequestError, conversation: Conversation) -> None:
    """Name the field as the client knows it: of a message the item that it comes from."""
    param = error.param or ""
    found = _MESSAGE.fullmatch(param)
    if found is not None:
        place = int(found[2]) if found[2] else len(conversation.origins)
        origin = conversation.origins[place] if place < len(conversation.origins) else "input"
        known = f"{found[1]}{origin}{found[3] or ''}"
    else:
        known = _FROM_CHAT.get(param, param)
    if known != param:
        error.param = known
        error.message = re.sub(rf"\b{re.escape(param)}\b", known, error.message)
