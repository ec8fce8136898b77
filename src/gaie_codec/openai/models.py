"""`GET /v1/models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

PATH: Final = "/v1/models"


def encode_models(names: Sequence[str], *, created: int, max_model_len: int = 0, adapters: Iterable[str] = ()) -> bytes:
    """The body that lists one model server's models; as for `model_entries`."""
    return encode_model_list(model_entries(names, created=created, max_model_len=max_model_len, adapters=adapters))


def encode_model_list(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """The body that lists these models, each id once: of several model servers the first that has it."""
    by_id: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        by_id.setdefault(entry["id"], entry)
    return msgspec.json.encode({"object": "list", "data": list(by_id.values())})


def model_entries(names: Sequence[str], *, created: int, max_model_len: int = 0, adapters: Iterable[str] = ()) -> list[dict[str, Any]]:
    """An entry for each of `names`, then for each LoRA adapter, under the first of them.

    `created` is in seconds since the epoch; `max_model_len`, a key of vLLM's, is left out when 0.
    """
    extra = {"max_model_len": max_model_len} if max_model_len else {}
    models: list[dict[str, Any]] = [
        {"id": name, "object": "model", "created": created, "owned_by": "gaie-codec", **extra} for name in names
    ]
    base = next(iter(names), None)
    models += [{"id": name, "object": "model", "created": created, "owned_by": "gaie-codec", "parent": base} for name in adapters]
    return models
