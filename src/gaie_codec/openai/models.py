"""`GET /v1/models`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

PATH: Final = "/v1/models"


def encode_models(names: Sequence[str], *, created: int, max_model_len: int = 0, adapters: Iterable[str] = ()) -> bytes:
    """The body that lists `names`, and LoRA adapters under the first of them.

    `created` is in seconds since the epoch; `max_model_len`, a key of vLLM's, is left out when 0.
    """
    extra = {"max_model_len": max_model_len} if max_model_len else {}
    models = [{"id": name, "object": "model", "created": created, "owned_by": "gaie-codec", **extra} for name in names]
    base = next(iter(names), None)
    models += [{"id": name, "object": "model", "created": created, "owned_by": "gaie-codec", "parent": base} for name in adapters]
    return msgspec.json.encode({"object": "list", "data": models})
