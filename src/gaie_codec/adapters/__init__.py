"""Model-server dialects: one adapter each, imported only when its dialect is asked for."""

from __future__ import annotations

import importlib
from functools import cache
from types import MappingProxyType
from typing import Final

from .._errors import UsageError
from ..snapshots import Snapshot
from .base import Adapter

_MODULES: Final = MappingProxyType(
    {
        "vllm.engine": ".vllm.engine",
        "vllm.inference": ".vllm.inference",
        "sglang.scheduler": ".sglang.scheduler",
        "sglang.runtime": ".sglang.runtime",
        "sglang.api": ".sglang.api",
    }
)

DIALECTS: Final = tuple(_MODULES)


@cache
def get(snapshot: Snapshot) -> Adapter:
    """The adapter that speaks the snapshot's dialect. Raises UsageError where there is none, or the snapshot is not to be spoken."""
    if snapshot.refused:
        raise UsageError(f"{snapshot} is not spoken: {snapshot.refused}")
    module = _MODULES.get(snapshot.dialect)
    if module is None:
        raise UsageError(f"no adapter for dialect {snapshot.dialect!r}; known: {', '.join(DIALECTS)}")
    adapter: Adapter = importlib.import_module(module, __package__).adapter(snapshot)
    return adapter
