"""The OpenAI HTTP API: one module an endpoint, bodies <-> the neutral vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from . import chat, chat_response, completions, completions_response
from .endpoint import Endpoint

ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {
        endpoint.path: endpoint
        for endpoint in (
            Endpoint(path=chat.PATH, decode_request=chat.decode_request, make_encoder=chat_response.make_encoder),
            Endpoint(path=completions.PATH, decode_request=completions.decode_request, make_encoder=completions_response.make_encoder),
        )
    }
)
"""What generates, for servers that take token ids, by path."""
