"""`GET /v1/models`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

PATH: Final = "/v1/models"


def encode_models(names: Iterable[str], *, created: int, max_model_len: int = 0) -> bytes:
    """The body that lists `names`. `created` is in seconds since the epoch; `max_model_len`, a key of vLLM's, is left out when 0."""
    extra = {"max_model_len": max_model_len} if max_model_len else {}
    models = [{"id": name, "object": "model", "created": created, "owned_by": "gaie-codec", **extra} for name in names]
    return msgspec.json.encode({"object": "list", "data": models})
