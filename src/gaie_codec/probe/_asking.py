"""One question at a time to one server, each within what is left of the deadline, and a record of all of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from .. import Code

if TYPE_CHECKING:
    from ..upstream import Upstream

# Codes that come from the way there, or from nobody at all; every other one is the server's.
_NO_ANSWER: Final = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED)

# What the base classes of grpcio's generated code say of a method that is in the server's schema and has no code. A method that is in
# no schema is "Method not found!".
_IN_SCHEMA: Final = "Method not implemented!"


class Answer(msgspec.Struct, frozen=True):
    """How a call went. `message` is its first message, None where there was none."""

    path: str
    code: Code
    details: str = ""
    message: bytes | None = None

    @property
    def is_answer(self) -> bool:
        """Whether the server answered at all."""
        return self.code not in _NO_ANSWER

    @property
    def is_in_schema(self) -> bool:
        """Whether the server says that it has the method without having code for it."""
        return self.code is Code.UNIMPLEMENTED and self.details == _IN_SCHEMA


class Asker:
    """Calls methods until a point in time, `timeout_s` from now."""

    def __init__(self, upstream: Upstream, timeout_s: float) -> None:
        self._upstream = upstream
        self._give_up = asyncio.get_running_loop().time() + timeout_s
        self.answers: dict[str, Answer] = {}
        """The first answer of every path."""

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never quite none: gRPC takes 0 for no deadline in places."""
        return max(0.01, self._give_up - asyncio.get_running_loop().time())

    async def ask(self, path: str, message: bytes = b"", *, share: float = 0.8) -> Answer:
        """Call a method with one message, for at most that share of what is left. A stream is cancelled after its first message."""
        call = self._upstream.stream(path, message, timeout_s=self.left_s * share)
        try:
            received = await call.read()
            answer = Answer(path, Code.OK, "", received) if received is not None else Answer(path, *await call.status())
        finally:
            call.cancel()
        self.answers.setdefault(path, answer)
        return answer
