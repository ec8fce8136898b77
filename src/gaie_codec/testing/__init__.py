"""Hypothesis strategies for whoever tests against model servers, and a pytest plugin that offers candidate schemas.

    openai_requests()                            bodies of POST /v1/chat/completions that every dialect can be asked
    inference_requests(adapter)                  what one adapter carries, with floats that a 32-bit float holds
    event_streams(request, adapter)              what a server of that dialect may answer to it
    messages(snapshot, "GenerateRequest")        any message of any snapshot, from its descriptors
    partitions(data)                             bytes as networks cut them
    ByteTokenizer()                              a tokenizer that needs no files: one token for each byte of UTF-8

They need the package hypothesis; the plugin does not, and importing this package alone imports neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._events import event_streams, partitions
    from ._messages import messages
    from ._requests import inference_requests, openai_requests
    from ._tokenizer import ByteTokenizer

__all__ = ["ByteTokenizer", "event_streams", "inference_requests", "messages", "openai_requests", "partitions"]

_MODULES = {
    "ByteTokenizer": "_tokenizer",
    "event_streams": "_events",
    "inference_requests": "_requests",
    "messages": "_messages",
    "openai_requests": "_requests",
    "partitions": "_events",
}


def __getattr__(name: str) -> Any:
    # pytest loads the plugin, and with it this module, in every run of every project that has gaie-codec installed.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
