"""The Anthropic Messages API: requests and answers <-> the same vocabulary as chats, over the same events."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..openai.endpoint import Endpoint
from . import errors, messages, messages_response

ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {errors.PATH: Endpoint(path=errors.PATH, decode_request=messages.decode_request, make_encoder=messages_response.make_encoder)}
)
"""What generates, by path."""
