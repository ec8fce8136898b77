"""Requests that are answered without the model server: its models, its tokenizer, its version. All that is needed was told at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec

from ._errors import UnsupportedEndpointError
from .anthropic import messages
from .openai import models, tokenization
from .openai.endpoint import Asked

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .text import Tokenizer

VERSION_PATH: Final = "/version"
_GET: Final = frozenset((models.PATH, VERSION_PATH))
_POST: Final[Mapping[str, Callable[[bytes, Asked, Tokenizer], bytes]]] = MappingProxyType(
    {
        tokenization.TOKENIZE_PATH: tokenization.encode_tokens,
        tokenization.DETOKENIZE_PATH: tokenization.encode_prompt,
        messages.COUNT_PATH: messages.encode_count,
    }
)
POST_PATHS: Final = tuple(_POST)
"""Those that need a tokenizer."""

PATHS: Final = (models.PATH, VERSION_PATH, *POST_PATHS)
"""All of them but `/v1/models/{id}`."""


def is_local(path: str, *, has_tokenizer: bool) -> bool:
    """Whether a path is one of these."""
    return path in _GET or path.startswith(models.ENTRY_PREFIX) or (has_tokenizer and path in _POST)


def check_method(method: str, path: str) -> None:
    """Raise UnsupportedEndpointError for a method that the path does not take."""
    allow = ("POST",) if path in _POST else ("GET", "HEAD")
    if method not in allow:
        raise UnsupportedEndpointError(f"Method Not Allowed: {path[:200]} takes {allow[0]}", http_status=405, allow=", ".join(allow))


def encode_answer(path: str, body: bytes, asked: Asked, adapter: Adapter, *, created: int, version: str, loras: tuple[str, ...]) -> bytes:
    """The JSON body of the answer. Raises RequestError."""
    if path in _POST:
        assert asked.tokenizer is not None
        return _POST[path](body, asked, asked.tokenizer)
    model = asked.model
    if path == VERSION_PATH:
        return msgspec.json.encode({"version": model.server_version or version})
    owner = adapter.dialect.partition(".")[0]
    entries = models.model_entries(
        model.names, created=created, max_model_len=model.max_model_len, adapters=loras, root=model.model_path, owned_by=owner
    )
    listed = models.encode_models(entries)
    return listed if path == models.PATH else models.encode_model(listed, path.removeprefix(models.ENTRY_PREFIX))
