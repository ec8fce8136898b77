"""`POST /v1/messages` and `/v1/messages/count_tokens`: the Anthropic Messages API -> InferenceRequest, by way of chat fields.

A message is a chat that is asked for in other words. What those are in a chat is said here, as vLLM 0.33 has it, and all that follows
of a chat (template, tools, sampling, limits) is in `openai.chat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError, UsageError
from ..openai import chat
from ..openai.endpoint import Asked, Decoded
from ..openai.fields import (
    bool_field,
    decode_json_object,
    int_field,
    list_field,
    literal_fault,
    no_model_fault,
    object_field,
    str_field,
    type_error,
    type_errors,
)
from .conversation import decode_conversation
from .errors import PATH

if TYPE_CHECKING:
    from ..text import Tokenizer

COUNT_PATH: Final = f"{PATH}/count_tokens"
ID_PREFIX: Final = "msg_"

READ: Final = frozenset(
    (
        "model messages max_tokens system stop_sequences stream temperature top_p top_k tools tool_choice thinking output_config"
        " cache_salt kv_transfer_params ec_transfer_params chat_template_kwargs vllm_xargs watermarking"
    ).split()
)
ADVISORY: Final = frozenset("metadata service_tier mm_payload return_mm_kwargs".split())

# They have the same name and meaning in a chat, which may refuse them.
_AS_IN_CHAT: Final = (
    "stream temperature top_p top_k cache_salt kv_transfer_params ec_transfer_params chat_template_kwargs vllm_xargs watermarking".split()
)
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
_MIN_BUDGET: Final = 1024


class MessageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like; nothing of it goes to the model server."""

    id: str
    model: str
    stream: bool = False


def decode_request(body: bytes, asked: Asked) -> Decoded:
    """Decode a request for a message. Raises RequestError."""
    fields = decode_json_object(body)
    max_tokens = int_field(fields, "max_tokens")
    if max_tokens is None:
        raise type_error("max_tokens", "missing", "Field required")
    if max_tokens <= 0:
        raise type_error("max_tokens", "value_error", "Value error, max_tokens must be positive")
    if asked.tokenizer is None:
        raise UsageError("a message has to be rendered and tokenized, and there is no tokenizer")
    said, ignored = _decode_chat(fields, asked.tokenizer)
    said |= {name: fields[name] for name in _AS_IN_CHAT if name in fields}
    said["max_completion_tokens"] = max_tokens
    stops = _decode_stops(fields, asked.flavor.max_stop_strings)
    if stops:
        said["stop"] = stops
    budget = _decode_budget(fields, max_tokens)
    if budget is not None and "thinking_token_budget" in asked.carries:
        said["thinking_token_budget"] = budget
    elif budget is not None:  # no client that wants thinking can leave it out
        ignored.add("thinking.budget_tokens")
    said |= _decode_format(fields)
    decoded = chat.decode_fields(said, asked, id_prefix=ID_PREFIX)
    output = decoded.output
    if output is not None and output.id_style == "openai":
        output = msgspec.structs.replace(output, id_style="anthropic")
    ignored |= {name for name in fields if name not in READ and name not in ADVISORY}
    return msgspec.structs.replace(
        decoded,
        options=MessageOptions(id=decoded.options.id, model=decoded.options.model, stream=decoded.options.stream),
        ignored=tuple(sorted(ignored.union(decoded.ignored))),
        output=output,
    )


def encode_count(body: bytes, asked: Asked, tokenizer: Tokenizer) -> bytes:
    """How long the prompt would be. Media count as the placeholders that the template has for them. Raises RequestError."""
    fields = decode_json_object(body)
    said, _ = _decode_chat(fields, tokenizer)
    if "chat_template_kwargs" in fields:
        said["chat_template_kwargs"] = fields["chat_template_kwargs"]
    count = len(chat.decode_fields(said, asked, id_prefix=ID_PREFIX).inference.prompt_token_ids)
    return msgspec.json.encode({"input_tokens": count, "context_management": {"original_input_tokens": count}})


def _decode_chat(fields: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[dict[str, Any], set[str]]:
    """What makes the prompt, as fields of a chat, and what of it has no effect."""
    model = str_field(fields, "model")
    if not model:
        missing = ("missing", "Field required") if "model" not in fields else ("value_error", "Value error, Model is required")
        raise type_error("model", *missing)
    messages, ignored = decode_conversation(fields, tokenizer)
    said: dict[str, Any] = {"model": model, "messages": messages}
    tools = _decode_tools(fields)
    if tools:
        said["tools"] = tools
    said |= _decode_tool_choice(fields, has_tools=bool(tools))
    effort = _decode_effort(fields, tokenizer)
    if effort is not None:
        said["reasoning_effort"] = effort
    return said, ignored


def _decode_tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = []
    for place, tool in enumerate(list_field(fields, "tools") or ()):
        loc = f"tools.{place}"
        if not isinstance(tool, dict):
            raise type_errors(no_model_fault(loc))
        name, schema, description = tool.get("name"), tool.get("input_schema"), tool.get("description")
        if schema is None and tool.get("type") not in (None, "custom"):
            raise UnsupportedFieldError("tools without an input_schema are Anthropic's own, and are not there", param=f"{loc}.type")
        if not isinstance(name, str):
            raise type_error(f"{loc}.name", "missing", "Field required")
        if not isinstance(schema, dict):
            fault = ("missing", "Field required") if schema is None else ("dict_type", "Input should be a valid dictionary")
            raise type_error(f"{loc}.input_schema", *fault)
        if not isinstance(description, str | None):
            raise type_error(f"{loc}.description", "string_type", "Input should be a valid string")
        function: dict[str, Any] = {"name": name, "parameters": schema if "type" in schema else {**schema, "type": "object"}}
        if description is not None:
            function["description"] = description
        if isinstance(tool.get("strict"), bool):
            function["strict"] = tool["strict"]
        tools.append({"type": "function", "function": function})
    return tools


def _decode_tool_choice(fields: Mapping[str, Any], *, has_tools: bool) -> dict[str, Any]:
    choice = object_field(fields, "tool_choice")
    if choice is None:
        return {}
    kind, name = choice.get("type"), choice.get("name")
    parallel = not bool_field(choice, "disable_parallel_tool_use", loc="tool_choice.disable_parallel_tool_use")
    if kind == "tool":
        if not isinstance(name, str) or not name:
            raise type_error("tool_choice", "value_error", "Value error, tool_choice.name is required when type is \\'tool\\'")
        return {"tool_choice": {"type": "function", "function": {"name": name}}, "parallel_tool_calls": parallel}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise type_errors(literal_fault("tool_choice.type", "auto", "any", "tool", "none"))
    if not has_tools and kind != "any":
        return {}  # nothing to choose from, and nothing demanded
    return {"tool_choice": _CHOICES[kind], "parallel_tool_calls": parallel}


def _decode_stops(fields: Mapping[str, Any], most: int) -> list[str]:
    stops = list_field(fields, "stop_sequences") or []
    for place, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise type_error(f"stop_sequences.{place}", "string_type", "Input should be a valid string")
    if len(stops) > most:
        raise type_error("stop_sequences", "too_long", f"List should have at most {most} items after validation, not {len(stops)}")
    if "" in stops:
        raise MalformedRequestError("stop_sequences cannot contain an empty string.", param="stop_sequences")
    return stops


def _thinking(fields: Mapping[str, Any]) -> dict[str, Any]:
    thinking = object_field(fields, "thinking") or {"type": "adaptive"}
    if thinking.get("type") not in ("enabled", "disabled", "adaptive"):
        raise type_errors(literal_fault("thinking.type", "enabled", "disabled", "adaptive"))
    return thinking


def _decode_budget(fields: Mapping[str, Any], max_tokens: int) -> int | None:
    thinking = _thinking(fields)
    if thinking["type"] != "enabled":
        return None
    budget = int_field(thinking, "budget_tokens", loc="thinking.budget_tokens")
    if budget is None:
        raise type_error("thinking.budget_tokens", "missing", "Field required")
    if budget < _MIN_BUDGET:
        raise type_error("thinking.budget_tokens", "greater_than_equal", f"Input should be greater than or equal to {_MIN_BUDGET}")
    transfer = object_field(fields, "kv_transfer_params") or {}
    if budget >= max_tokens and not transfer.get("do_remote_decode"):  # a prefill's max_tokens is 1
        raise type_error("", "value_error", "Value error, thinking.budget_tokens must be less than max_tokens")
    return budget


def _decode_effort(fields: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """How much to think; none at all goes before that, as far as the model knows such a thing."""
    effort = (object_field(fields, "output_config") or {}).get("effort")
    if effort is not None and effort not in _EFFORTS:
        raise type_errors(literal_fault("output_config.effort", *_EFFORTS))
    if _thinking(fields)["type"] != "disabled":
        return effort
    return "none" if _knows_no_effort(tokenizer) else "low"


def _knows_no_effort(tokenizer: Tokenizer) -> bool:
    """Whether the chat template takes "none", and does not do the same for it as for some effort, as vLLM finds out."""
    content = [{"type": "text", "text": "Hi"}] if tokenizer.accepts_content_parts else "Hi"

    def prompt(effort: str) -> str:
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none"}  # as those of a chat
        return tokenizer.render_chat([{"role": "user", "content": content}], template_kwargs=kwargs)

    try:
        none = prompt("none")
    except MalformedRequestError:
        return False
    return all(prompt(effort) != none for effort in _EFFORTS)


def _decode_format(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat's response_format."""
    wanted = object_field(object_field(fields, "output_config") or {}, "format")
    if wanted is None:
        return {}
    if wanted.get("type", "json_schema") != "json_schema":
        raise type_errors(literal_fault("output_config.format.type", "json_schema"))
    schema = wanted.get("schema")
    if not isinstance(schema, dict):
        raise type_error("output_config.format.schema", "dict_type", "Input should be a valid dictionary")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "json_schema", "schema": schema}}}
