"""What answers of embeddings and of scores have in common: the vectors, and how their usage is told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from .._errors import MalformedMessageError, UsageError
from .endpoint import WithoutDeltas
from .errors import encode_error

if TYPE_CHECKING:
    from .._errors import CodecError
    from .._events import BodyEvent, EmbeddingEvent, Usage

_LARGEST_FLOAT32: Final = (2 - 2**-23) * 2.0**127


class Vectors(WithoutDeltas):
    """The vectors of an answer as they come, each checked: one that JSON could not say, or that is not of one length with the others, is
    the model server's fault."""

    content_type = "application/json"
    streams = False
    is_detailed = True
    wants_usage = False
    shows_ids = False
    reported_usage: Usage | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self) -> None:
        self._by_place: dict[int, list[float]] = {}

    @property
    def vectors(self) -> list[list[float]]:
        """In the order of the prompts."""
        return [self._by_place[place] for place in sorted(self._by_place)]

    def embedding(self, place: int, event: EmbeddingEvent) -> None:
        """The vector of the prompt at `place`. Raises MalformedMessageError."""
        values = event.values
        if not values:
            raise MalformedMessageError("an embedding without values")
        if event.dimensions not in (0, len(values)):
            raise MalformedMessageError(f"an embedding of {len(values)} values, where {event.dimensions} are announced")
        # The sum of float32 is finite where they are, and costs a tenth of a look at each.
        if not (math.isfinite(sum(values)) and min(values) >= -_LARGEST_FLOAT32 and max(values) <= _LARGEST_FLOAT32):
            raise MalformedMessageError("an embedding with values that are no finite numbers")
        other = next(iter(self._by_place.values()), values)
        if len(other) != len(values):
            raise MalformedMessageError(f"embeddings of {len(other)} and of {len(values)} values in one answer")
        self._by_place[place] = values

    def check_complete(self) -> None:
        """Nothing is told in bodies."""

    def body(self, event: BodyEvent) -> bytes:
        raise UsageError("bodies in an answer of vectors")

    def error(self, error: CodecError) -> bytes:
        """The error body alone."""
        return encode_error(error)


def encode_usage(usage: Usage) -> dict[str, Any]:
    """With vLLM's keys, all of them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
