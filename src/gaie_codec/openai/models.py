"""`GET /v1/models` and `/v1/models/{id}`, with the keys that vLLM writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from .._errors import ModelNotFoundError

PATH: Final = "/v1/models"
ENTRY_PREFIX: Final = "/v1/models/"
OWNER: Final = "gaie-codec"


def encode_models(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """The body that lists these models, each id once: of several model servers the first that has it."""
    by_id: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        by_id.setdefault(entry["id"], entry)
    return msgspec.json.encode({"object": "list", "data": list(by_id.values())})


def encode_model(body: bytes, name: str) -> bytes:
    """The body about one model of a list's. Raises ModelNotFoundError."""
    for entry in msgspec.json.decode(body)["data"]:
        if entry["id"] == name:
            return msgspec.json.encode(entry)
    raise ModelNotFoundError(f"The model `{name[:200]}` does not exist.", param="model")


def model_entries(
    names: Sequence[str],
    *,
    created: int,
    max_model_len: int = 0,
    adapters: Iterable[str] = (),
    root: str = "",
    owned_by: str = OWNER,
) -> list[dict[str, Any]]:
    """An entry for each of `names`, then for each LoRA adapter, under the first of them.

    `created` is in seconds since the epoch; `max_model_len`, a key of vLLM's, is null for 0, which is unknown. `root` is where the model
    comes from, its own name where that is not known; of an adapter only the name is known.
    """
    base = next(iter(names), None)
    found: list[tuple[str, str, str | None, int | None]] = [(name, root or name, None, max_model_len or None) for name in names]
    found += [(name, name, base, None) for name in adapters]
    return [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": owned_by,
            "root": origin,
            "parent": parent,
            "max_model_len": length,
            "permission": [_permission(name, created)],
        }
        for name, origin, parent, length in found
    ]


def _permission(name: str, created: int) -> dict[str, Any]:
    """What vLLM says of every model: OpenAI has dropped it, and clients still read it."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
