"""What becomes of every request field at every snapshot: sent as, emulated, done by the gateway, advisory, or refused.

The facts are those by which requests are really treated: the tables of `openai` say what is read at all, `Adapter.sends` and
`Adapter.emulates` what the wire carries, `Passthrough.fields` what a server reads of JSON that is passed through.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from .. import _fit, adapters
from ..adapters.base import Adapter
from ..openai import chat, completions, embeddings
from ..snapshots import SNAPSHOTS, load

Kind = Literal["sent", "emulated", "several calls", "gateway", "advisory", "refused"]

# Rows whose name is not that of the neutral field. A row with a space is a value of the field before it.
_NEUTRAL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "messages": "prompt_token_ids",
        "messages (image_url, video_url, input_audio)": "media",
        "messages (detail of an image)": "media.detail",
        "messages (uuid of an image)": "media.uuid",
        "prompt": "prompt_token_ids",
        "model (of a LoRA adapter)": "lora_name",
        "max_completion_tokens": "max_tokens",
        "top_logprobs": "logprobs",
        "echo": "prompt_logprobs",
        "response_format (json_object)": "constraint.json_object",
        "response_format (json_schema)": "constraint.json_schema",
        "response_format (structural_tag)": "constraint.structural_tag",
        "structured_outputs (regex)": "constraint.regex",
        "structured_outputs (choice)": "constraint.choice",
        "structured_outputs (grammar)": "constraint.grammar",
        "x-data-parallel-rank (header)": "data_parallel_rank",
        "traceparent (header)": "trace_headers",
    }
)
_SPLIT: Final = frozenset(("response_format", "structured_outputs"))
_GATEWAY: Final = frozenset(
    (
        "stream_options documents add_generation_prompt continue_final_message add_special_tokens chat_template_kwargs reasoning_effort"
        " tools tool_choice parallel_tool_calls include_reasoning truncate_prompt_tokens truncation_side"
        " return_prompt_text return_tokens_as_token_ids"
    ).split()
)

FIELDS: Final = tuple(sorted(((chat.READ | completions.READ | chat.REFUSED.keys() | chat.ADVISORY) - _SPLIT) | _NEUTRAL.keys()))
"""Every request field that the library knows, by its OpenAI name, with a row for each value where values are treated differently."""


_EMBEDDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "input": "prompt_token_ids",
        "messages": "prompt_token_ids",
        "request_id": "request_id",
        "model": "model",
        "model (of a LoRA adapter)": "lora_name",
        "cache_salt": "cache_salt",
        "x-data-parallel-rank (header)": "data_parallel_rank",
        "traceparent (header)": "trace_headers",
    }
)
EMBEDDING_FIELDS: Final = tuple(sorted(embeddings.READ | embeddings.REFUSED.keys() | {"user"} | _EMBEDDED.keys()))
"""Likewise of a request for embeddings."""


class Treatment(msgspec.Struct, frozen=True):
    """What becomes of a field, and how: the wire field, or what is done instead."""

    kind: Kind
    how: str = ""


def treatment(adapter: Adapter, field: str, *, passthrough: bool = False) -> Treatment:
    """What becomes of one of `FIELDS` on its way to a server of this dialect and snapshot."""
    name = field.partition(" ")[0]
    if passthrough and adapter.passthrough is not None:
        return _passed(adapter, field, name)
    if field in chat.ADVISORY:
        return Treatment("advisory")
    if field == "chat_template":
        return Treatment("refused", "not trusted, as by vLLM without its option")
    if field in chat.REFUSED:
        return Treatment("refused", "not supported by the gateway yet")
    if field in _GATEWAY:
        return Treatment("gateway")
    neutral = _NEUTRAL.get(field, field)
    if field == "bad_words" and "bad_words_token_ids" in adapter.sends:
        neutral = "bad_words_token_ids"
    if neutral in adapter.sends:
        return Treatment("sent", adapter.sends[neutral])
    if neutral in adapter.emulates:
        return Treatment("emulated", adapter.emulates[neutral])
    if neutral in _fit.ADVISORY:
        return Treatment("advisory", "reported as dropped")
    return Treatment("several calls", "one for each choice") if neutral == "n" else Treatment("refused")


def embedding_treatment(adapter: Adapter, field: str) -> Treatment:
    """What becomes of one of `EMBEDDING_FIELDS` in front of a server that embeds."""
    coder = adapter.embed
    assert coder is not None
    if field in embeddings.ADVISORY:
        return Treatment("advisory")
    if field in embeddings.REFUSED:
        return Treatment("refused", "not supported by the gateway yet")
    neutral = _EMBEDDED.get(field)
    if neutral is None:
        return Treatment("advisory", "reported") if field == "priority" else Treatment("gateway")
    if neutral in coder.sends:
        return Treatment("sent", coder.sends[neutral])
    return Treatment("emulated", coder.emulates[neutral]) if neutral in coder.emulates else Treatment("refused")


def _passed(adapter: Adapter, field: str, name: str) -> Treatment:
    way = adapter.passthrough
    assert way is not None
    if field.endswith("(header)"):
        return Treatment("sent", "trace_headers")
    if field == "model (of a LoRA adapter)":
        return Treatment("refused", "say `MODEL:ADAPTER`")
    if name in way.fields["completions" if name == "prompt" else "chat"]:
        return Treatment("sent", "json_body")
    return Treatment("advisory") if name in chat.ADVISORY else Treatment("refused")


def columns() -> dict[str, tuple[tuple[Adapter, ...], bool]]:
    """The adapters of every dialect, oldest first and without those that are refused; `sglang.runtime` in both of its modes."""
    found: dict[str, tuple[tuple[Adapter, ...], bool]] = {}
    for dialect in adapters.DIALECTS:
        spoken = tuple(adapters.get(snapshot) for name in SNAPSHOTS[dialect] if not (snapshot := load(dialect, name)).refused)
        if spoken[-1].passthrough is not None:
            found[f"{dialect}, passed through"] = (spoken, True)
        found[dialect] = (spoken, False)
    return found
