"""Made-up vectors, the same for the same input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

DIMENSIONS: Final = 8


def make_vector(token_ids: Sequence[int], dimensions: int = DIMENSIONS) -> list[float]:
    """One of length 1."""
    values = [math.sin(sum((place + 1) * token_id for place, token_id in enumerate(token_ids)) + axis) for axis in range(dimensions)]
    length = math.hypot(*values) or 1.0
    return [value / length for value in values]
